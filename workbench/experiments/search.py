"""`search`: the largest load at which a policy still meets its targets, by bisection over runs with several seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.config import SLO, FinetuneJob, require
from workbench.experiments.statistics import mean_interval
from workbench.experiments.sweep import sweep
from workbench.model_error import with_error
from workbench.policy import policy_label

Status = Literal["found", "below low", "above high"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The capacity of one policy, for one or several targets of one metric.

    `table`, by target: `capacity`, the largest evaluated load below which every evaluated load met the target in the mean over seeds;
    `low` and `high`, the evaluated loads between which it lies with 95 % confidence: up to `low` the metric's interval over seeds stays
    at or above the target, from `high` on it stays below (0 and inf where no evaluated load says so; nan with one seed, which has no
    interval); `status`; and `monotone`, whether no load met the target above one that missed it. `points` holds every load that was
    evaluated, with its mean and interval; `rises` marks those where the metric is higher than at some smaller load.
    """

    policy: str
    metric: str
    table: pd.DataFrame
    points: pd.DataFrame
    seeds: tuple[int, ...]
    redrawn: tuple[str, ...]
    runs: pd.DataFrame = field(repr=False)

    def __str__(self) -> str:
        parts = []
        for target, row in self.table.iterrows():
            if row["status"] == "found":
                text = f"{row['capacity']:.4g} at {self.metric} >= {target:g} (95 % interval {row['low']:.4g} to {row['high']:.4g})"
            else:
                side = "the smallest load tried misses" if row["status"] == "below low" else "the largest load tried meets"
                text = f"none found for {self.metric} >= {target:g}: {side} it"
            parts.append(text + ("" if row["monotone"] else "; NOT MONOTONE: a larger load met the target again"))
        drawn = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}, redrawn: {', '.join(self.redrawn) or 'nothing'}"
        evaluated = with_error(f"{len(self.points)} loads evaluated, {drawn}", self.runs, self.metric)
        return f"Largest load of {self.policy}: {'; '.join(parts)}; {evaluated}."


def search(
    policy: Any,
    *,
    trace: Callable[..., Any],
    low: float,
    high: float,
    executor: Any,
    planning: str | float,
    slo: SLO | Mapping[str, SLO] | None = None,
    metric: str = "attainment",
    targets: Sequence[float] = (0.90, 0.95, 0.99),
    seeds: Iterable[int] = range(5),
    grid: int = 4,
    tolerance: float = 0.02,
    jobs: Sequence[FinetuneJob] = (),
    measure: tuple[float, float] | None = None,
    lengths: Any = "max",
    cache: str | Path | None = None,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Capacity:
    """The largest load between `low` and `high` at which `metric` keeps each of `targets`, to within `tolerance` of the load.

    `trace` is a function of `seed` and `load`. First `grid` loads, evenly spaced in ratio from `low` to `high`, are run, since more load
    need not mean less attainment; then the interval above the last load before the first miss is bisected. Every load is run with every
    seed, and the seeds' arrivals are the same ones at every load only if `trace` makes them so. Runs are kept in `cache` as by `sweep`.
    Raises ValueError if `trace` takes no load, or where the metric is undefined; KeyboardInterrupt on Ctrl-C (`cache` keeps the runs).
    """
    seeds, targets = tuple(seeds), tuple(sorted(targets))
    require(0 < low < high < inf, "a search needs 0 < low < high", (low, high))
    require(grid >= 2, "grid must be at least 2: low and high", grid)
    require(tolerance > 0, "tolerance must be above 0", tolerance)
    require(len(targets) > 0 and all(isfinite(t) for t in targets), "targets must be numbers", targets)
    frames: dict[float, pd.DataFrame] = {}
    redrawn: list[str] = []

    def run(loads: Sequence[float]) -> None:
        new = [load for load in loads if load not in frames]
        if not new:
            return
        made = sweep(
            [policy],
            trace=trace,
            executor=executor,
            planning=planning,
            jobs=jobs,
            slo=slo,
            seeds=seeds,
            axes={"load": new},
            measure=measure,
            lengths=lengths,
            cache=cache,
            n_jobs=n_jobs,
            progress=progress,
        )
        if made.interrupted:
            raise KeyboardInterrupt
        redrawn[:] = made.redrawn
        require(metric in made.frame, "metric must be a number of the summary", metric)
        frames.update({load: made.frame[made.frame["load"] == load] for load in new})
        values = made.frame[metric].astype(float)
        require(
            bool(np.isfinite(values).all()), f"{metric} must be defined in every run; pass slo= and check the column error", values.tolist()
        )

    def means() -> dict[float, float]:
        return {load: float(frames[load][metric].mean()) for load in sorted(frames)}

    run([float(x) for x in np.geomspace(low, high, grid)])
    for target in targets:
        while (bracket := _bracket(means(), target)) is not None and bracket[1] / bracket[0] > 1 + tolerance:
            run([sqrt(bracket[0] * bracket[1])])
    points = _points(frames, metric)
    table = pd.DataFrame([_row(points, target) for target in targets]).set_index("target")
    runs = pd.concat([frames[load] for load in sorted(frames)], ignore_index=True)
    runs.attrs = next(iter(frames.values())).attrs
    return Capacity(policy=policy_label(policy), metric=metric, table=table, points=points, seeds=seeds, redrawn=tuple(redrawn), runs=runs)


def _bracket(means: Mapping[float, float], target: float) -> tuple[float, float] | None:
    """The load that misses first, and the one before it; None where none misses, or the smallest does."""
    loads = list(means)
    first = next((i for i, load in enumerate(loads) if means[load] < target), None)
    return None if first in (None, 0) else (loads[first - 1], loads[first])


def _points(frames: Mapping[float, pd.DataFrame], metric: str) -> pd.DataFrame:
    rows, least = [], inf
    for load in sorted(frames):
        values = frames[load][metric].to_numpy(float)
        mean = float(values.mean())
        found = mean_interval(values) if len(values) > 1 else None
        bounds = {"low": found.low if found else np.nan, "high": found.high if found else np.nan}
        saturated = float(frames[load]["saturated"].astype(float).mean())
        rows.append({"load": load, metric: mean, **bounds, "seeds": len(values), "saturated": saturated, "rises": mean > least})
        least = min(least, mean)
    return pd.DataFrame(rows)


def _row(points: pd.DataFrame, target: float) -> dict[str, Any]:
    metric = points.columns[1]
    loads, means = points["load"].to_numpy(), points[metric].to_numpy()
    meets = means >= target
    first = int(np.argmin(meets)) if not meets.all() else len(meets)
    status: Status = "below low" if first == 0 else "above high" if first == len(meets) else "found"
    sure, missed = (points["low"] >= target).to_numpy(), (points["high"] < target).to_numpy()
    last_sure = int(np.argmin(sure)) if not sure.all() else len(sure)
    first_missed = len(missed) - (int(np.argmin(missed[::-1])) if not missed.all() else len(missed))
    has_interval = bool(points["low"].notna().all())
    return {
        "target": target,
        "capacity": loads[first - 1] if status == "found" else np.nan,
        "low": np.nan if not has_interval else loads[last_sure - 1] if last_sure else 0.0,
        "high": np.nan if not has_interval else loads[first_missed] if first_missed < len(loads) else inf,
        "status": status,
        "monotone": not bool(meets[first:].any()),
    }
