"""How well whole replays were predicted: the same traces and policies on an engine and on its latency model."""

from typing import Any

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.model_error import METRICS

POINTS = tuple(metric for metric, unit in METRICS.items() if unit == "points")


def replay_errors(measured: Any, simulated: Any) -> pd.DataFrame:
    """Rows (policy, metric): `measured`, `simulated` (means over seeds), and `error` as text with its unit, above 0 if predicted too high.

    Both are Comparisons of the same policies on the same traces, seeds and windows, `measured` on an engine and `simulated` on a model.
    Attainment errs in points, times and rates in per cent. Raises ValueError where the two differ in policies, seeds or windows, or where
    `measured` was simulated.
    """
    require(not measured.executor.simulated, "measured must come from an engine", measured.executor.name)
    require(simulated.executor.simulated, "simulated must come from a latency model", simulated.executor.name)
    same = ["policy", "seed", "requests", "measure_start_s", "measure_end_s"]
    first, second = (one.runs[same].reset_index(drop=True) for one in (measured, simulated))
    require(
        first.equals(second), "both must be of the same policies, seeds, requests and windows", (len(first), len(second)), "Pass measure=."
    )
    metrics = list(METRICS)
    means = [one.runs.groupby("policy", sort=False)[metrics].mean().stack() for one in (measured, simulated)]
    frame = pd.DataFrame({"measured": means[0], "simulated": means[1]}).rename_axis(["policy", "metric"])
    frame["error"] = [_error(metric, *row) for (_, metric), row in zip(frame.index, frame.to_numpy(float), strict=True)]
    return frame


def _error(metric: str, measured: float, simulated: float) -> str:
    if metric in POINTS:
        return f"{(simulated - measured) * 100:+.1f} points"
    if not np.isfinite(simulated / measured if measured else np.nan):
        return "undefined"
    return f"{(simulated / measured - 1) * 100:+.0f} %"
