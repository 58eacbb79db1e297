"""What a replay leaves: rows of events, steps and work as frames, outputs, and where it all came from. Saved as parquet + JSON."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from workbench.config import SLO, FinetuneJob, Provenance
from workbench.core import ExecutorInfo, Predictor, Request, Sampling, StepResult
from workbench.loop.history import History
from workbench.loop.tape import Tape
from workbench.model_error import METRICS, MetricError, ModelError, error_of, how
from workbench.results.frames import text_as_objects
from workbench.results.stream import Stream

RECORD_FILE = "replay.json"


class Replay:
    """One policy on one trace and one executor.

    `events`, `steps` and `work` are frames of what happened; `requests` and `jobs` are derived from them by `metrics`. Times in seconds
    on the replay clock. `results` keeps every StepResult, so that `Recorded(replay)` can play it again. An `interrupted` replay, or one
    with an `error`, holds everything up to its last complete step. `digests` holds each step's `Batch.digest()`.

    All five are made from `history` when they are first asked for. A replay read from a folder has them already (`history` maps their names
    to them); one whose rows were written as it ran reads the frames from there as a whole, and has neither results nor digests.
    """

    def __init__(
        self,
        *,
        history: History | Stream | Mapping[str, Any],
        outputs: Mapping[str, tuple[int, ...]],
        trace_requests: Sequence[Request],
        finetune_jobs: Sequence[FinetuneJob],
        executor: ExecutorInfo,
        provenance: Provenance,
        settings: Mapping[str, Any],
        tape: Tape,
        slo: SLO | Mapping[str, SLO] | None,
        measure: tuple[float, float] | None,
        interrupted: bool = False,
        error: str | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        self.history = history
        self.outputs = dict(outputs)
        self.trace_requests = tuple(trace_requests)
        self.finetune_jobs = tuple(finetune_jobs)
        self.executor = executor
        self.provenance = provenance
        self.settings = dict(settings)
        self.tape = tape
        self.predictor = predictor
        self.slo = slo
        self.measure = measure
        self.interrupted = interrupted
        self.error = error

    def _made(self, name: str, make: Callable[[History], Any]) -> Any:
        return make(self.history) if isinstance(self.history, History) else self.history[name]

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row for each event, in the order of time."""
        return self._made("events", History.events_frame)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row for each step."""
        return self._made("steps", lambda history: history.steps_frame(self.predictor, self.executor.num_layers))

    @cached_property
    def work(self) -> pd.DataFrame:
        """One row for each segment and backward slice of each step."""
        return self._made("work", History.work_frame)

    @cached_property
    def results(self) -> tuple[StepResult, ...]:
        return tuple(self._made("results", History.all_results))

    @cached_property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._made("digests", History.all_digests))

    @property
    def num_steps(self) -> int:
        return self.history.num_steps if isinstance(self.history, (History, Stream)) else len(self.steps)

    @property
    def policy(self) -> str:
        """The policy's label."""
        return self.provenance.policy

    @property
    def seed(self) -> int:
        return self.provenance.seed

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per arrived request, by `metrics.request_frame`."""
        from workbench.results.metrics import request_frame

        return request_frame(self.trace_requests, self.events, self.slo)

    @cached_property
    def jobs(self) -> pd.DataFrame:
        """One row per fine-tune job, by `metrics.job_frame`."""
        from workbench.results.metrics import job_frame

        return job_frame(self.finetune_jobs, self.events)

    def summary(self) -> Any:
        """The headline numbers, by `metrics.summary`."""
        from workbench.results.metrics import summary

        return summary(self)

    def model_error(self, metric: str = "attainment") -> MetricError | None:
        """How far the latency model was from measured replays in a metric; printed, a sentence. None where this was measured."""
        return error_of(self.executor, metric)

    def headline(self) -> pd.DataFrame:
        """The metrics that models are judged by, as numbers of the summary, and beside each the model's error (or "measured")."""
        summary = self.summary()
        errors = [self.model_error(metric) for metric in METRICS]
        said = ["measured" if error is None else error.amount for error in errors]
        return pd.DataFrame({"value": [summary[m] for m in METRICS], "model error": said}, index=pd.Index(METRICS, name="metric"))

    def by_class(self, **options: Any) -> pd.DataFrame:
        """One row per SLO class: outcomes, attainment, latencies, deadlines, slowdown. By `tables.requests_by`, whose options it takes."""
        from workbench.results.tables import requests_by

        return requests_by(self, "slo_class", **options)

    def by_tenant(self, **options: Any) -> pd.DataFrame:
        """One row per tenant, as `by_class`."""
        from workbench.results.tables import requests_by

        return requests_by(self, "tenant", **options)

    def by_priority(self, **options: Any) -> pd.DataFrame:
        """One row per priority, as `by_class`."""
        from workbench.results.tables import requests_by

        return requests_by(self, "priority", **options)

    def by_adapter(self, **options: Any) -> pd.DataFrame:
        """One row per adapter, as `by_class`."""
        from workbench.results.tables import requests_by

        return requests_by(self, "adapter", **options)

    def fairness(self, by: Literal["slo_class", "tenant", "priority", "adapter"] = "tenant", **options: Any) -> pd.Series:
        """Jain's index over groups of requests, by slowdown and by throughput, by `tables.fairness`."""
        from workbench.results.tables import fairness

        return fairness(self, by, **options)

    def job_table(self, *, predictor: Predictor | None = None) -> pd.DataFrame:
        """One row per fine-tune job: completion time, tardiness, throughput, slowdown. By `tables.job_table`."""
        from workbench.results.tables import job_table

        return job_table(self, predictor=predictor)

    def attribution(self, of: Literal["ttft", "e2e"] = "ttft") -> pd.DataFrame:
        """Why each request took as long as it did: seconds by cause, by `attribution.attribution`."""
        from workbench.results.attribution import attribution

        return attribution(self, of)

    def save_trace(self, path: str | Path, predicted: Any = None) -> Path:
        """Write the replay in the Chrome trace format, by `perfetto.save_trace`: open the file in ui.perfetto.dev.

        With `predicted`, a LatencyModel, its prediction of every step by cost terms stands beside the measured duration.
        """
        from workbench.results.perfetto import save_trace

        return save_trace(self, path, predicted)

    def __repr__(self) -> str:
        return f"{self._brief()}\n{how(self.executor, 'attainment')}" if self.executor.simulated else self._brief()

    def _brief(self) -> str:
        end = f", interrupted={self.interrupted}, error={self.error!r}" if self.interrupted or self.error else ""
        loop, num = self.settings.get("loop", "open"), len(self.trace_requests)
        return f"Replay({self.policy} on {self.executor.name}, {num} requests ({loop} loop), {self.num_steps} steps{end})"

    def save(self, folder: str | Path) -> Path:
        """Write the replay as parquet and JSON files into `folder`, which is made; `load_replay` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("events", "work"):
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        self.steps.assign(digest=pd.Series(self.digests, dtype=object)).to_parquet(folder / "steps.parquet", index=False)
        pd.DataFrame([_result_row(r) for r in self.results], columns=_RESULT_COLUMNS).to_parquet(folder / "results.parquet", index=False)
        write_requests(folder, self.trace_requests)
        record = {
            "format": 1,
            "outputs": {name: list(ids) for name, ids in self.outputs.items()},
            "jobs": [job_record(job) for job in self.finetune_jobs],
            "executor": {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(self.executor).items()},
            "provenance": asdict(self.provenance) | {"versions": dict(self.provenance.versions)},
            "settings": self.settings,
            "tape": self.tape.to_record(),
            "slo": _slo_record(self.slo),
            "measure": self.measure,
            "interrupted": self.interrupted,
            "error": self.error,
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return folder


def load_replay(folder: str | Path) -> Replay:
    """The replay that `Replay.save(folder)` wrote, without its jobs' data. Raises FileNotFoundError without one there."""
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise FileNotFoundError(f"a replay folder must hold {RECORD_FILE}, got {str(folder)!r}. Pass the folder given to save().")
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if "replicas" in record:
        from workbench.fleet.replay import FleetReplay

        return FleetReplay.load(folder, record)
    frames = {name: text_as_objects(pd.read_parquet(folder / f"{name}.parquet")) for name in ("events", "steps", "work")}
    results = [_result_of(row) for row in pd.read_parquet(folder / "results.parquet").itertuples(index=False)]
    values: dict[str, Any] = dict(
        history=frames | {"results": results, "digests": frames["steps"].pop("digest")},
        outputs={name: tuple(ids) for name, ids in record["outputs"].items()},
        trace_requests=read_requests(folder),
        finetune_jobs=[job_of(job) for job in record["jobs"]],
        provenance=Provenance(**record["provenance"]),
        settings=record["settings"],
        tape=Tape.from_record(record["tape"]),
        slo=_slo_of(record["slo"]),
        measure=None if record["measure"] is None else tuple(record["measure"]),
        interrupted=record["interrupted"],
        error=record["error"],
    )
    executor = record["executor"]
    if "url" in executor:
        from workbench.server.result import ServerReplay

        return ServerReplay.loaded(folder, executor=executor, **values)
    executor |= {name: frozenset(executor[name]) for name in ("can", "eos_token_ids")}
    if executor.get("model_error") is not None:
        executor["model_error"] = ModelError.of_record(executor["model_error"])
    return Replay(executor=ExecutorInfo(**executor), **values)


_RESULT_COLUMNS = [f.name for f in fields(StepResult)]
_MAPPINGS = ("tokens", "layers_done", "losses", "eval_losses", "published")


def _result_row(result: StepResult) -> list[Any]:
    values = [getattr(result, name) for name in _RESULT_COLUMNS]
    return [json.dumps(dict(v)) if n in _MAPPINGS else v for n, v in zip(_RESULT_COLUMNS, values, strict=True)]


def _result_of(row: Any) -> StepResult:
    values = {name: json.loads(getattr(row, name)) if name in _MAPPINGS else getattr(row, name) for name in _RESULT_COLUMNS}
    for name in ("losses", "eval_losses"):
        values[name] = {owner: (pair[0], pair[1]) for owner, pair in values[name].items()}
    return StepResult(**values)


def write_requests(folder: Path, requests: Sequence[Request]) -> None:
    """`requests.parquet` in a replay's folder."""
    rows = [{f.name: getattr(r, f.name) for f in fields(Request)} for r in requests]
    for row in rows:
        for name in ("prompt_token_ids", "prefix_ids"):
            row[name] = json.dumps(row[name])
        row["sampling"] = json.dumps(asdict(row["sampling"]))
    frame = pd.DataFrame(rows, columns=[f.name for f in fields(Request)])
    for name in ("output_tokens", "max_tokens"):
        frame[name] = frame[name].astype("Int64")
    frame.to_parquet(folder / "requests.parquet", index=False)


def read_requests(folder: Path) -> list[Request]:
    """What `write_requests` wrote."""
    return [_request_of(row) for row in text_as_objects(pd.read_parquet(folder / "requests.parquet")).to_dict("records")]


def _request_of(row: dict[Any, Any]) -> Request:
    ids = json.loads(row["prompt_token_ids"])
    values = row | {
        "prompt_token_ids": None if ids is None else tuple(ids),
        "prefix_ids": tuple(json.loads(row["prefix_ids"])),
        "sampling": Sampling(**json.loads(row["sampling"])),
    }
    deadline = values["deadline_s"]
    values["deadline_s"] = None if deadline is None or deadline != deadline else deadline
    return Request(**values)


def job_record(job: FinetuneJob) -> dict[str, Any]:
    values = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in ("data", "evaluation", "checkpoint")}
    return values | {"data": type(job.data).__name__, "evaluation": None if job.evaluation is None else type(job.evaluation).__name__}


def job_of(record: dict[str, Any]) -> FinetuneJob:
    values: dict[str, Any] = record | {"targets": tuple(record["targets"]), "betas": tuple(record["betas"])}
    return FinetuneJob(**values)


def _slo_record(slo: SLO | Mapping[str, SLO] | None) -> dict[str, Any] | None:
    if slo is None:
        return None
    return {"one": asdict(slo)} if isinstance(slo, SLO) else {"classes": {name: asdict(one) for name, one in slo.items()}}


def _slo_of(record: dict[str, Any] | None) -> SLO | Mapping[str, SLO] | None:
    if record is None:
        return None
    return SLO(**record["one"]) if "one" in record else {name: SLO(**one) for name, one in record["classes"].items()}


@cache
def commit_of_code() -> str:
    """The commit of the code that runs, with "+changes" if files differ from it; "unknown" outside a checkout.

    The environment variable LOQUETIER_COMMIT says it where the sources were copied without their history.
    """
    if given := os.environ.get("LOQUETIER_COMMIT"):
        return given
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def versions_of_code() -> Mapping[str, str]:
    """Versions of what a result depends on."""
    import platform

    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "numpy", "pandas", "simpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
