"""The shipped traces, lengths and jobs by name; files in the formats that others publish."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from workbench.config import did_you_mean, require
from workbench.traces import io as trace_io
from workbench.traces.popularity import per_phase
from workbench.traces.synthesis import E6_PHASES, piecewise
from workbench.traces.trace import Trace

Kind = Literal["requests", "lengths", "jobs"]


@dataclass(frozen=True)
class _Shipped:
    """One name: what it is, and how to make it."""

    about: str
    make: Callable[[], Trace]
    has_lengths: bool = True


def _file(name: str, file: str, *notes: str) -> Callable[[], Trace]:
    def make() -> Trace:
        trace = trace_io.read(trace_io.shipped(file), format="workbench", name=name)
        return trace.derived(trace._frame, None, *notes)

    return make


def _burstgpt(name: str, start_s: float, end_s: float) -> Callable[[], Trace]:
    """The paper's E7, or one of its days: 20-minute windows end to end, so that the span is a multiple of 1,200 s."""

    def make() -> Trace:
        frame = pd.read_parquet(trace_io.shipped("burstgpt_loquetier_day29_33_arrivals.parquet"))
        times = frame["arrival_s"].astype("float64")
        times = times[(times >= start_s) & (times < end_s)].reset_index(drop=True) - start_s
        rows = pd.DataFrame({"request_id": [str(i) for i in range(len(times))], "arrival_s": times})
        trace = Trace.from_frame(rows, name=name, duration_s=end_s - start_s)
        return trace.derived(trace._frame, None, "arrivals recorded in whole seconds")

    return make


def _paper_e6() -> Trace:
    trace = piecewise(E6_PHASES, arrivals="constant")
    named = Trace.from_frame(trace.frame, name="paper-e6", duration_s=trace.duration_s)
    named = named.derived(named._frame, None, *trace.notes)
    return named.assign_adapters(len(E6_PHASES), popularity=per_phase(*(end for end, _ in E6_PHASES)))


def _w(name: str, file: str, duration_s: float | None) -> Callable[[], Trace]:
    """The project's own fixed workloads; their adapters 0..3 are named adapter-0 .. adapter-3, as everywhere else."""

    def make() -> Trace:
        frame = trace_io.read(trace_io.shipped(file), format="workbench").frame
        return Trace.from_frame(frame.assign(adapter="adapter-" + frame["adapter"]), name=name, duration_s=duration_s)

    return make


_TRACES = {
    "azure-conv": _Shipped(
        "Azure LLM inference 2023, conversation: 19,366 requests in 58 min", _file("azure-conv", "azure_llm_2023_conv.parquet")
    ),
    "azure-code": _Shipped("Azure LLM inference 2023, code: 8,819 in 57 min, bursty", _file("azure-code", "azure_llm_2023_code.parquet")),
    "mooncake-conversation": _Shipped(
        "Mooncake (FAST'25) conversation: 12,031 in 59 min, long prompts with shared prefixes",
        _file("mooncake-conversation", "mooncake_fast25_conversation.parquet", "the recording's clock ticks every 3 s"),
    ),
    "burstgpt-day29": _Shipped("BurstGPT day 29 as in the paper's E7: 4,286 arrivals in 1 h", _burstgpt("burstgpt-day29", 0, 3600), False),
    "burstgpt-day33": _Shipped(
        "BurstGPT day 33 as in the paper's E7: 7,039 arrivals in 1 h", _burstgpt("burstgpt-day33", 3600, 7200), False
    ),
    "burstgpt-e7": _Shipped("the paper's E7, days 29 and 33 end to end: 11,325 arrivals in 2 h", _burstgpt("burstgpt-e7", 0, 7200), False),
    "paper-e6": _Shipped("the paper's E6: 630 evenly spaced arrivals, four phases, one adapter each", _paper_e6, False),
    "w2-offline": _Shipped("256 requests at t = 0, four adapters", _w("w2-offline", "w2_requests.csv", None)),
    "w3-5rps": _Shipped("Poisson 5/s for 30 s, four adapters", _w("w3-5rps", "w3_requests_5rps.csv", 30.0)),
    "w3-10rps": _Shipped("Poisson 10/s for 30 s, four adapters", _w("w3-10rps", "w3_requests_10rps.csv", 30.0)),
    "w3-20rps": _Shipped("Poisson 20/s for 30 s, four adapters", _w("w3-20rps", "w3_requests_20rps.csv", 30.0)),
}
_LENGTHS = {"arxiv-lengths": ("arXiv summarization: 28,257 (prompt, output) pairs, long prompts", "arxiv_summarization_lengths.parquet")}
_JOBS = {
    "philly-jobs": ("Microsoft Philly: 15,264 training-job arrivals in 125 days", "philly_job_arrivals_by_vc.parquet"),
    "philly-runtimes": ("Alibaba GPU cluster 2020: 83,154 training-job runtimes", "philly_runtime_s.parquet"),
}


def names(kind: Kind = "requests") -> tuple[str, ...]:
    """Shipped names: "requests" for `load`, "lengths" for `with_lengths`, "jobs" for `job_arrivals` and `job_runtimes`."""
    require(kind in ("requests", "lengths", "jobs"), 'kind must be "requests", "lengths" or "jobs"', kind)
    if kind == "requests":
        return tuple(_TRACES)
    return (*(n for n, s in _TRACES.items() if s.has_lengths), *_LENGTHS) if kind == "lengths" else tuple(_JOBS)


def describe() -> pd.DataFrame:
    """Every shipped name with what it is."""
    rows = [(n, "requests", s.has_lengths, s.about) for n, s in _TRACES.items()]
    rows += [(n, "lengths", True, about) for n, (about, _) in _LENGTHS.items()] + [
        (n, "jobs", False, about) for n, (about, _) in _JOBS.items()
    ]
    return pd.DataFrame(rows, columns=["name", "kind", "has_lengths", "about"]).set_index("name")


def load(name_or_path: str | Path, *, format: str | None = None, drop_empty: bool = False) -> Trace:
    """A shipped trace by name, or a file in one of `traces.io.FORMATS` (told from its columns if `format` is None).

    `drop_empty=True` leaves out requests logged with 0 tokens and notes how many. Raises ValueError for an unknown name (with a
    did-you-mean) and for values that break a trace's rules, FileNotFoundError for a path that is not there.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in _TRACES:
        require(format is None and not drop_empty, "format and drop_empty are for files", name, "Leave them out for a shipped name.")
        return _TRACES[name].make()
    if name in _LENGTHS:
        raise ValueError(f"a trace must have arrivals, got {name!r}, which holds lengths only. Use .with_lengths({name!r}, seed=).")
    if name in _JOBS:
        raise ValueError(f"a trace must hold requests, got {name!r}, which holds training jobs. Use job_arrivals() or job_runtimes().")
    path = Path(name_or_path)
    if not path.exists() and not path.suffix and path.parent == Path():
        raise ValueError(f"a trace must be a shipped name or an existing file, got {name!r}. {did_you_mean(name, tuple(_TRACES))}")
    return trace_io.read(path, format=format, drop_empty=drop_empty)


def lengths(source: str | Path | Trace | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """(pairs of `prompt_tokens` and `output_tokens`, the source's name), for `Trace.with_lengths`. Raises ValueError if it has none."""
    if isinstance(source, pd.DataFrame):
        missing = [c for c in ("prompt_tokens", "output_tokens") if c not in source]
        require(not missing, "a source of lengths must have prompt_tokens and output_tokens", list(source.columns))
        rows = pd.DataFrame({"request_id": range(len(source)), "arrival_s": 0.0}).assign(
            prompt_tokens=source["prompt_tokens"].to_numpy(), output_tokens=source["output_tokens"].to_numpy()
        )
        return _pairs(Trace.from_frame(rows, name="a frame"), "a frame")
    if isinstance(source, Trace):
        return _pairs(source, source.name)
    name = str(source)
    if name in _LENGTHS:
        return pd.read_parquet(trace_io.shipped(_LENGTHS[name][1])).astype("int64"), name
    if name in _TRACES and not _TRACES[name].has_lengths:
        raise ValueError(f"a source of lengths must have token counts, got {name!r}, which has none. Known: {', '.join(names('lengths'))}.")
    if name not in _TRACES and not Path(name).exists():
        raise ValueError(f"a source of lengths must be a shipped name or a file, got {name!r}. {did_you_mean(name, names('lengths'))}")
    trace = load(source)
    return _pairs(trace, trace.name)


def _pairs(trace: Trace, label: str) -> tuple[pd.DataFrame, str]:
    frame: Any = trace.frame
    has_both = {"prompt_tokens", "output_tokens"} <= set(frame.columns)
    complete = has_both and not frame[["prompt_tokens", "output_tokens"]].isna().any().any()
    require(complete and len(frame) > 0, "a source of lengths must have both token counts in every row", label)
    return frame[["prompt_tokens", "output_tokens"]].astype("int64"), label


def job_arrivals() -> pd.DataFrame:
    """Microsoft Philly's training jobs: `vc` (virtual cluster), `arrival_s`, `gpus`. Five clusters are cut at 2,000 jobs."""
    return pd.read_parquet(trace_io.shipped(_JOBS["philly-jobs"][1]))


def job_runtimes() -> Any:
    """A Series: runtimes of training jobs in seconds (Alibaba's GPU cluster, 2020), sorted."""
    return pd.read_parquet(trace_io.shipped(_JOBS["philly-runtimes"][1]))["runtime_s"]
