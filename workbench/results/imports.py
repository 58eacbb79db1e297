"""`import_replay`: result files of other systems' load generators, as replays that the metrics work on.

| format | file | source of the format |
| --- | --- | --- |
| vllm | JSON of `vllm bench serve --save-result --save-detailed` | vllm-project/vllm, vllm/benchmarks/serve.py |
| sglang | JSONL of `sglang.bench_serving --output-details`, a line per run | sgl-project/sglang, python/sglang/benchmark/serving.py |
| loquetier | `NAME_I.txt`, and `NAME_F.txt` if it lies beside it | NJUDeepEngine/Loquetier, tests/test_scalable_loquetier.py |

Only what a file says is taken over: anything else is nan, with a note. Durations there are a client's, in seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.config import SLO, did_you_mean, require
from workbench.results import metrics
from workbench.results.frames import EVENT_COLUMNS, STEP_COLUMNS, WORK_COLUMNS, rows_to_frame

FORMATS = ("vllm", "sglang", "loquetier")
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
# What a client cannot see of a server.
_UNSEEN = (
    *("steps", "busy_share", "planning_share", "kv_occupancy_mean", "kv_occupancy_max", "attainment_admission_wait", "queue_mean_s"),
    *("preemptions", "adapter_loads", "optimizer_steps", "finetune_tokens_per_s", "prefill_tokens_per_s"),
)
_PER_TOKEN = (
    "decode_tokens_per_s",
    "jain_throughput",
    "jain_slowdown",
    "attainment",
    "attainment_tpot",
    "attainment_pace",
    "goodput_per_s",
)
_WAITS = ("requests", "measure_start_s", "measure_end_s", "rejected", "attainment_admission_wait", "queue_mean_s", "interrupted")
_LOQUETIER_KINDS = {"0": "train forward", "1": "evaluate forward", "2": "backward"}
Events = list[tuple[Any, ...]]


@dataclass(frozen=True)
class MeasuredElsewhere:
    """What stands where a replay names its executor: a system that this project did not run."""

    name: str
    device: str = "unknown device, measured elsewhere"
    simulated: bool = False
    num_blocks: int | None = None


@dataclass(kw_only=True)
class ImportedReplay:
    """A run of another system: what `metrics` and `Comparison` read of a Replay. `events`, `steps`, `work` as there, the last two empty.

    `known` holds per-request columns that the file states itself and that take the place of those counted from events; `unknown` names
    columns of `requests` and entries of `summary()` that it does not support (nan). `record` is the file's own aggregates, `calls`
    its log of model calls (Loquetier), `notes` what was understood and what is missing.
    """

    policy: str
    executor: MeasuredElsewhere
    events: pd.DataFrame
    known: pd.DataFrame
    unknown: frozenset[str]
    notes: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False)
    calls: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    slo: SLO | Mapping[str, SLO] | None = None
    measure: tuple[float, float] | None = None
    seed: int | None = None
    interrupted: bool = False
    error: str | None = None

    @property
    def steps(self) -> pd.DataFrame:
        return rows_to_frame([], STEP_COLUMNS)

    @property
    def work(self) -> pd.DataFrame:
        return rows_to_frame([], WORK_COLUMNS)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request, by `metrics.request_frame`, with the file's own values and nan for what it does not say."""
        frame = metrics.request_frame(self.known, self.events, self.slo)
        for name in self.known.columns:
            frame[name] = self.known[name].reindex(frame.index)
        for name in self.unknown & set(frame.columns):
            frame[name] = np.nan
        return frame

    @property
    def jobs(self) -> pd.DataFrame:
        return metrics.job_frame((), self.events)

    def summary(self) -> dict[str, Any]:
        """The headline numbers, by `metrics.summary`; nan for those that the file does not support."""
        return {name: np.nan if name in self.unknown else value for name, value in metrics.summary(self).items()}

    def __repr__(self) -> str:
        return f"ImportedReplay({self.policy}, measured elsewhere, {len(self.known)} requests; {'; '.join(self.notes)})"


def import_replay(
    path: str | Path,
    format: Literal["vllm", "sglang", "loquetier"],
    *,
    run: int | None = None,
    timestamps: str | Path | Sequence[float] | None = None,
    slo: SLO | Mapping[str, SLO] | None = None,
) -> ImportedReplay:
    """A result file of another system as a replay "measured elsewhere".

    `run` chooses a line of a file that holds several runs (from 0; needed then). `timestamps`, for files that do not say when requests
    arrived: the harness's own list of seconds (a file with one a line, or a sequence), in order. Without it, arrival times are nan and
    each request is on a clock of its own. Raises FileNotFoundError, and ValueError for an unknown format, a file without details,
    lists of unequal length, and values that are no times.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}. {did_you_mean(str(format), FORMATS)}")
    if not path.is_file():
        raise FileNotFoundError(f"a result file must exist, got {str(path)!r}. Pass the file that the load generator wrote.")
    arrivals = _arrivals(timestamps)
    if format == "loquetier":
        require(run is None, "run is for files that hold several runs; Loquetier's hold one", run, "Leave it out.")
        return _loquetier(path, arrivals, slo)
    return _client(_one_run(path, run), path, format, arrivals, slo)


def _arrivals(timestamps: str | Path | Sequence[float] | None) -> np.ndarray | None:
    if timestamps is None:
        return None
    if isinstance(timestamps, (str, Path)):
        timestamps = [float(line) for line in Path(timestamps).read_text(encoding="utf-8").split()]
    return np.sort(np.asarray(timestamps, float), kind="stable")


def _one_run(path: Path, run: int | None) -> dict[str, Any]:
    """The run's JSON object: the file is one, or holds one a line."""
    text = path.read_text(encoding="utf-8")
    try:
        runs = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        try:
            runs = [json.loads(text)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: must be a JSON object, or one a line, got text that does not parse ({error}).") from error
    require(len(runs) > 0, f"{path.name} must hold at least one run", len(runs))
    require(run is not None or len(runs) == 1, f"{path.name} holds {len(runs)} runs: run must say which", run, "Pass run=0 for the first.")
    require(run is None or 0 <= run < len(runs), f"run must lie in 0..{len(runs) - 1}", run)
    chosen = runs[run or 0]
    require(isinstance(chosen, dict), f"{path.name}: a run must be a JSON object", type(chosen).__name__)
    return chosen


def _client(
    record: dict[str, Any], path: Path, format: str, arrivals: np.ndarray | None, slo: SLO | Mapping[str, SLO] | None
) -> ImportedReplay:
    """vLLM's and SGLang's files: the same per-request lists, vLLM's newer ones with start and queue times."""
    flag = "--save-detailed" if format == "vllm" else "--output-details"
    missing = [name for name in DETAILS if name not in record]
    require(not missing, f"{path.name} must hold {', '.join(DETAILS)}", f"a run without {missing}", f"Run the benchmark with {flag}.")
    sizes = {name: len(record[name]) for name in (*DETAILS, "start_times", "queue_times") if name in record}
    require(len(set(sizes.values())) == 1, f"{path.name}: lists must be of one length", sizes)
    num, notes = sizes["ttfts"], [f"from {path.name}, measured elsewhere by {format}'s client"]
    unknown = {*_UNSEEN, "queue_s"}
    ttft, held = _seconds(record, "ttfts", path), np.zeros(num)
    if "start_times" in record and arrivals is None:
        held = _seconds(record, "queue_times", path) if "queue_times" in record else held
        sent = _seconds(record, "start_times", path)
        arrivals = sent - held
        arrivals = arrivals - (arrivals.min() if num else 0.0)
        if np.any(held > 1e-3):
            notes.append(
                f"{int((held > 1e-3).sum())} requests were held back by the client for up to {held.max():.3g} s: counted as latency"
            )
    if arrivals is None:
        notes.append("arrival times are not in the file: each request is on a clock of its own")
        unknown |= {"arrival_s", "saturated"}
        arrivals = np.zeros(num)
    require(len(arrivals) == num, f"timestamps must hold one time for each of the {num} requests", len(arrivals))
    lengths = np.asarray(record["output_lens"], float)
    failed = np.array([bool(text) for text in record["errors"]]) | (lengths == 0)
    unstreamed = ~failed & (ttft <= 0)
    events, chunked = _client_events(record, arrivals, ttft + held, failed, unstreamed)
    if failed.any():
        notes.append(f"{int(failed.sum())} requests failed (aborted); when is not in the file")
    known = pd.DataFrame({"prompt_tokens": np.asarray(record["input_lens"], float), "output_tokens": lengths}, index=_names(num))
    if unstreamed.any():
        notes.append(
            f"{int(unstreamed.sum())} requests without a first-token time (not streamed): their times are nan, and so is attainment"
        )
        unknown |= {*_PER_TOKEN, *(f"attainment_{name}" for name in metrics.TARGETS)}
    if chunked.any():
        notes.append(f"{int(chunked.sum())} requests got several tokens at once: gaps are between arrivals of text")
        unknown |= {*_PER_TOKEN, *(name for name in _tpot_names())}
        spans = np.array([float(np.sum(gaps)) for gaps in record["itls"]])
        with np.errstate(invalid="ignore", divide="ignore"):
            known["tpot_s"] = np.where(~failed & ~unstreamed & (lengths > 1), spans / (lengths - 1), np.nan)
    notes.append("not in the file: queueing, preemptions, steps, adapters of requests")
    duration = record.get("duration")
    return ImportedReplay(
        policy=f"{record.get('backend', format)} ({path.stem})",
        executor=MeasuredElsewhere(str(record.get("model_id", format))),
        events=rows_to_frame(events, EVENT_COLUMNS),
        known=known,
        unknown=frozenset(unknown | {"preemptions"}),
        notes=tuple(notes),
        record={name: value for name, value in record.items() if not isinstance(value, list)},
        slo=slo,
        measure=(0.0, float(duration)) if duration else None,
    )


def _client_events(
    record: dict[str, Any], arrivals: np.ndarray, ttft: np.ndarray, failed: np.ndarray, unstreamed: np.ndarray
) -> tuple[Events, np.ndarray]:
    """Event rows in order of time, and which requests [n] got several tokens in one piece."""
    events: Events = []
    chunked = np.zeros(len(arrivals), bool)
    for i, name in enumerate(_names(len(arrivals))):
        at = float(arrivals[i])
        events.append((at, 0, "arrived", name, None, None, ""))
        if failed[i]:
            events.append((at, 0, "aborted", name, None, None, str(record["errors"][i])[:200]))
            continue
        times = at + ttft[i] + np.concatenate([[0.0], np.cumsum(np.asarray(record["itls"][i], float))])
        require(bool(np.all(np.diff(times) >= 0)), f"request {i}: itls must be at least 0 seconds", list(record["itls"][i])[:5])
        if not unstreamed[i]:
            events += [(float(t), 0, "token", name, None, float(k), "") for k, t in enumerate(times, start=1)]
            chunked[i] = len(times) != record["output_lens"][i]
        events.append((float(times[-1]), 0, "finished", name, None, None, ""))
    return sorted(events, key=lambda row: row[0]), chunked


def _seconds(record: dict[str, Any], name: str, path: Path) -> np.ndarray:
    values = np.asarray(record[name], float)
    require(bool(np.all(np.isfinite(values) & (values >= 0))), f"{path.name}: {name} must be seconds of at least 0", record[name][:5])
    return values


def _names(num: int) -> list[str]:
    return [str(i) for i in range(num)]


def _tpot_names() -> list[str]:
    return ["tpot_n", *(f"tpot_p{p}{end}_s" for p in metrics.PERCENTILES for end in ("", "_low", "_high"))]


def _loquetier(path: Path, arrivals: np.ndarray | None, slo: SLO | Mapping[str, SLO] | None) -> ImportedReplay:
    """Waits for admission of each request in order of arrival (-1: dropped), then a line per model call."""
    require(path.stem.endswith("_I"), "a Loquetier result must be its file NAME_I.txt", path.name, "NAME_F.txt is read beside it.")
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    try:
        waits = np.array([float(word) for word in first.split()])
        calls = [("inference", *(float(word) for word in line.split())) for line in rest.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path.name}: must hold a line of waits, then lines of four numbers ({error}).") from error
    require(
        all(len(row) == 5 for row in calls), f"{path.name}: a line must be prefill tokens, decode tokens, seconds, idle seconds", calls[:2]
    )
    notes = [
        f"from {path.name}, measured elsewhere by the released Loquetier",
        "known per request: its wait for admission, or that it was dropped",
    ]
    rows = [(kind, prefill, decode, np.nan, seconds, idle) for kind, prefill, decode, seconds, idle in calls]
    other = path.with_name(path.name.replace("_I.", "_F."))
    if other.is_file():
        for line in filter(None, map(str.strip, other.read_text(encoding="utf-8").splitlines())):
            kind, tokens, seconds, idle = line.split()
            require(kind in _LOQUETIER_KINDS, f"{other.name}: a line must begin with 0, 1 or 2", kind)
            rows.append((_LOQUETIER_KINDS[kind], np.nan, np.nan, float(tokens), float(seconds), float(idle)))
    log = pd.DataFrame(rows, columns=["kind", "prefill_tokens", "decode_tokens", "finetune_tokens", "duration_s", "idle_s"])
    negative = int(((log["duration_s"] < 0) | (log["idle_s"] < 0)).sum())
    if negative:
        notes.append(f"{negative} lines of its log hold negative durations (kept as they are)")
    unknown = {"arrival_s"} if arrivals is None else set()
    arrivals = np.zeros(len(waits)) if arrivals is None else arrivals
    require(len(arrivals) == len(waits), f"timestamps must hold one time for each of the {len(waits)} requests", len(arrivals))
    events: Events = []
    for name, at, wait in zip(_names(len(waits)), arrivals.tolist(), waits.tolist(), strict=True):
        events.append((at, 0, "arrived", name, None, None, ""))
        dropped = wait < 0
        events.append(
            (
                at if dropped else at + wait,
                0,
                "rejected" if dropped else "scheduled",
                name,
                None,
                None,
                "waited too long" if dropped else "",
            )
        )
    imported = ImportedReplay(
        policy=f"released Loquetier ({path.stem.removesuffix('_I')})",
        executor=MeasuredElsewhere("released Loquetier"),
        events=rows_to_frame(sorted(events, key=lambda row: row[0]), EVENT_COLUMNS),
        known=pd.DataFrame({"prompt_tokens": np.nan, "outcome": np.where(waits < 0, "rejected", "unknown")}, index=_names(len(waits))),
        unknown=frozenset(),
        notes=tuple(notes),
        record=_model_time_rates(log),
        calls=log,
        slo=slo,
    )
    met = {"output_tokens", "preemptions", "met", "met_pace", *(f"met_{name}" for name in metrics.TARGETS)}
    return replace(imported, unknown=frozenset(unknown | met | (set(metrics.summary(imported)) - set(_WAITS))))


def _model_time_rates(log: pd.DataFrame) -> dict[str, float]:
    """Loquetier's own rates: padded tokens over the time inside model calls, not over the run's (which is not in the file)."""
    inference, trained = log[log["kind"] == "inference"], log[log["kind"].isin(("train forward", "backward"))]
    model_s, tuning_s = float(inference["duration_s"].sum()), float(trained["duration_s"].sum())
    row = {"inference_model_s": model_s, "finetune_model_s": tuning_s}
    for name, seconds in (("prefill", model_s), ("decode", model_s), ("finetune", tuning_s)):
        tokens = float((trained if name == "finetune" else inference)[f"{name}_tokens"].sum())
        row |= {f"{name}_tokens": tokens, f"{name}_tokens_per_model_s": tokens / seconds if seconds > 0 else np.nan}
    return row
