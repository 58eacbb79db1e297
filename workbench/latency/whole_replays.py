"""Whole replays of an engine beside those of its latency model: as a file that a profile ships, and policy by policy as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from math import inf, isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from workbench.config import require
from workbench.model_error import METRICS, MetricError, ModelError

REPLAYS_FILE = "replays.csv"


def error(metric: str, measured: float, simulated: float) -> float:
    """Simulated less measured: points of attainment, per cent of what was measured of all else (nan where that is nothing)."""
    if METRICS[metric] == "points":
        return 100 * (simulated - measured)
    return 100 * (simulated / measured - 1) if measured else nan


@dataclass(frozen=True)
class Prediction:
    """One metric of one replay, as `Replay.summary()` has it, measured on `device` and simulated.

    `load` in requests/s (inf: all arrive at once). `commit` and `date` are those of the measurement.
    """

    trace: str
    load: float
    policy: str
    metric: str
    measured: float
    simulated: float
    commit: str
    date: str
    device: str

    @property
    def error(self) -> float:
        """As `error`."""
        return error(self.metric, self.measured, self.simulated)


COLUMNS = tuple(f.name for f in fields(Prediction))
NUMBERS = ("load", "measured", "simulated")


@dataclass(frozen=True)
class ReplayErrors:
    """How well a latency model predicted whole replays that its fit had not seen: a row for each replay and metric of `METRICS`."""

    predictions: tuple[Prediction, ...]

    def __post_init__(self) -> None:
        unknown = sorted({p.metric for p in self.predictions} - METRICS.keys())
        require(not unknown, f"metrics must be among {', '.join(METRICS)}", unknown)

    @classmethod
    def of(cls, measured: Any, simulated: Any, *, date: str | None = None) -> "ReplayErrors":
        """From replays of an engine and of a model: two Replays, two Comparisons, or two lists of Replays in the same order.

        `date`: when they were measured (ISO 8601); now unless given. Raises ValueError where the two are not replays of the same requests,
        policies, seeds, jobs, targets and windows on the same device, or where `measured` was simulated.
        """
        pairs = list(zip(_replays(measured), _replays(simulated), strict=True))
        require(len(pairs) > 0, "errors need at least one pair of replays", len(pairs))
        date = date or datetime.now(UTC).isoformat(timespec="seconds")
        return cls(tuple(p for one, other in pairs for p in _predictions(one, other, date)))

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each replay and metric: the columns of `Prediction`, `error` and its `unit`."""
        frame = pd.DataFrame([[getattr(p, name) for name in COLUMNS] for p in self.predictions], columns=list(COLUMNS))
        return frame.assign(error=[p.error for p in self.predictions], unit=[METRICS[p.metric] for p in self.predictions])

    def table(self) -> pd.DataFrame:
        """A row for each metric: over how many replays, the largest absolute error, the mean error (signed), and their unit."""
        brief = self.brief()
        found = [brief.on(metric) for metric in METRICS]
        rows = {e.metric: [e.replays, e.worst, e.mean, e.unit] for e in found}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["replays", "worst", "mean", "unit"]).rename_axis("metric")

    def on(self, metric: str) -> MetricError:
        """The error on one metric; printed, a sentence."""
        return self.brief().on(metric)

    def brief(self, step_error: float | None = None, changed: Sequence[str] = ()) -> ModelError:
        """What travels with a simulated result. `step_error`: the mean error of single steps; `changed`: what was changed since."""
        errors = []
        for metric in METRICS:
            found = [p.error for p in self.predictions if p.metric == metric and isfinite(p.error)]
            if found:
                errors.append((metric, len(found), max(map(abs, found)), sum(found) / len(found)))
        return ModelError(
            errors=tuple(errors),
            tried=max((sum(p.metric == metric for p in self.predictions) for metric in METRICS), default=0),
            where=", ".join([*dict.fromkeys(p.device for p in self.predictions), _days(self.predictions)]) if self.predictions else "",
            step_error=step_error,
            changed=tuple(changed),
        )

    def __str__(self) -> str:
        brief = self.brief()
        lines = [f"{brief.tried} whole replays on {brief.where}"]
        return "\n".join([*lines, *(f"  {metric}: {brief.on(metric).amount}" for metric in METRICS)])

    def save(self, file: str | Path) -> Path:
        """Write the predictions as CSV."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.frame[list(COLUMNS)].to_csv(file, index=False)
        return file

    @classmethod
    def read(cls, file: str | Path) -> "ReplayErrors":
        """What `save` wrote. Raises ValueError for a file with other columns."""
        words: Any = {name: str for name in COLUMNS if name not in NUMBERS}
        frame = pd.read_csv(
            file, dtype=words | dict.fromkeys(NUMBERS, float), keep_default_na=False, na_values={name: [""] for name in NUMBERS}
        )
        require(tuple(frame.columns) == COLUMNS, f"{file} must have the columns {', '.join(COLUMNS)}", tuple(frame.columns))
        return cls(tuple(Prediction(**{str(k): v for k, v in row.items()}) for row in frame.to_dict("records")))


def mean_of(runs: Sequence[Sequence[Prediction]]) -> tuple[Prediction, ...]:
    """The predictions of several runs of one replay as those of one: the means of what was measured and of what was simulated.

    Raises ValueError where they are not of the same trace, load, policy, device and metrics.
    """
    what = [[(p.trace, p.load, p.policy, p.device, p.metric) for p in run] for run in runs]
    differing = sorted({str(pair) for one in what for pair in set(one) ^ set(what[0])})
    require(not differing, "runs of one replay must be of the same trace, load, policy, device and metrics", differing[:2])
    return tuple(
        replace(
            of[-1],
            measured=fmean(p.measured for p in of),
            simulated=fmean(p.simulated for p in of),
            commit=", ".join(dict.fromkeys(p.commit for p in of)),
        )
        for of in zip(*runs, strict=True)
    )


def replay_errors(measured: Any, simulated: Any) -> pd.DataFrame:
    """Rows (policy, metric): `measured`, `simulated` (means over seeds), and `error` as text with its unit, above 0 if predicted too high.

    Both are Comparisons of the same policies on the same traces, seeds and windows, `measured` on an engine and `simulated` on a model.
    Attainment errs in points, times and rates in per cent. Raises ValueError where the two differ in policies, seeds or windows, or where
    `measured` was simulated.
    """
    _check_executors(measured.executor, simulated.executor)
    same = ["policy", "seed", "requests", "measure_start_s", "measure_end_s"]
    first, second = (one.runs[same].reset_index(drop=True) for one in (measured, simulated))
    require(
        first.equals(second), "both must be of the same policies, seeds, requests and windows", (len(first), len(second)), "Pass measure=."
    )
    means = [one.runs.groupby("policy", sort=False)[list(METRICS)].mean().stack() for one in (measured, simulated)]
    frame = pd.DataFrame({"measured": means[0], "simulated": means[1]}).rename_axis(["policy", "metric"])
    errors = [(metric, error(metric, *row)) for (_, metric), row in zip(frame.index, frame.to_numpy(float), strict=True)]
    return frame.assign(error=[_text(METRICS[metric], found) for metric, found in errors])


def _text(unit: str, found: float) -> str:
    return "undefined" if not isfinite(found) else f"{found:+.1f} points" if unit == "points" else f"{found:+.0f} %"


def _check_executors(measured: Any, simulated: Any) -> None:
    require(not measured.simulated, "measured must come from an engine", measured.name)
    require(simulated.simulated, "simulated must come from a latency model", simulated.name)


def _replays(given: Any) -> list[Any]:
    if hasattr(given, "labels"):
        return [given.replays[label, seed] for label in given.labels for seed in given.seeds]
    return list(given) if isinstance(given, Iterable) else [given]


def _predictions(measured: Any, simulated: Any, date: str) -> list[Prediction]:
    _check_executors(measured.executor, simulated.executor)
    same = [_what(one) for one in (measured, simulated)]
    differ = [name if name == "requests" else f"{name}: {a!r}, {same[1][name]!r}" for name, a in same[0].items() if a != same[1][name]]
    require(not differ, "both must be replays of the same requests, policy, seed, jobs, targets and window on one device", differ)
    arrivals = [r.arrival_s for r in measured.trace_requests]
    last = max(arrivals, default=0.0)
    rows = measured.summary(), simulated.summary()
    return [
        Prediction(
            trace=measured.settings["trace"],
            load=round(len(arrivals) / last, 3) if last else inf,
            policy=measured.policy,
            metric=metric,
            measured=float(rows[0][metric]),
            simulated=float(rows[1][metric]),
            commit=measured.provenance.commit,
            date=date,
            device=measured.executor.device,
        )
        for metric in METRICS
    ]


def _what(replay: Any) -> dict[str, Any]:
    """What two replays must have in common."""
    requests = [(r.request_id, r.arrival_s, r.prompt_tokens, r.output_tokens, r.adapter) for r in replay.trace_requests]
    return {
        "requests": requests,
        "policy": replay.policy,
        "seed": replay.seed,
        "jobs": [(job.id, job.adapter) for job in replay.finetune_jobs],
        "slo": replay.slo,
        "measure": None if replay.measure is None else tuple(replay.measure),
        "device": replay.executor.device,
    }


def _days(predictions: Sequence[Prediction]) -> str:
    days = sorted({p.date[:10] for p in predictions})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
