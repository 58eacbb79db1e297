"""Whether a queue grows: the flag beside every summary of a replay that was cut somewhere."""

from math import sqrt
from typing import Any

import numpy as np
import pandas as pd

from workbench.core import ENDS

TREND_BLOCKS = 20


def saturation(events: pd.DataFrame, start: float, end: float) -> dict[str, Any]:
    """Whether the queue grows through the window: latencies of a `saturated` run depend on where it was cut.

    All must hold. (1) An upward trend of the number in the system, p < 0.01: a stable system has none in the long run, the number of an
    unstable one grows linearly (checking stability from arrivals and departures alone: Wieland, Pasupathy & Schmeiser, Winter Simulation
    Conference 2003). `queue_growth_p` is Mann-Kendall's test (Mann, Econometrica 13, 1945) on the number's means over `TREND_BLOCKS`
    equal stretches, which are far less correlated than the number itself; `queue_growth_per_s` their Theil-Sen slope. (2) Its second
    half has such a trend, too (p < 0.05): a queue that fills to its level at the start of a window has not. (3) The window adds to the
    system more than twice the Poisson noise of its arrivals: a stable queue that wanders is not called saturated.
    `unfinished_at_end_share`: arrivals of the window still there at its end. Numbers are nan where nothing arrived.
    """
    from scipy import stats

    kind, time, owner = events["kind"].to_numpy(), events["time_s"].to_numpy(float), events["owner"].to_numpy()
    is_arrival, is_end = kind == "arrived", np.isin(kind, ENDS)
    inside = (time >= start) & (time <= end)
    num = int((is_arrival & inside).sum())
    if num == 0 or end <= start:
        return {"saturated": False, "queue_growth_per_s": np.nan, "queue_growth_p": np.nan, "unfinished_at_end_share": np.nan}
    is_change = is_arrival | is_end
    centres, means = _mean_number(time[is_change], np.where(is_arrival, 1, -1)[is_change], start, end)
    p, p_late = (_trend_p(centres[first:], means[first:]) for first in (0, TREND_BLOCKS // 2))
    gained = num - int((is_end & inside).sum())
    still_there = ~pd.Index(owner[is_arrival & inside]).isin(owner[is_end & (time <= end)])
    return {
        "saturated": bool(p < 0.01 and p_late < 0.05 and gained > 2 * sqrt(num)),
        "queue_growth_per_s": float(np.asarray(stats.theilslopes(means, centres))[0]),
        "queue_growth_p": p,
        "unfinished_at_end_share": float(still_there.mean()),
    }


def _trend_p(centres: np.ndarray, means: np.ndarray) -> float:
    """How likely so clear an upward trend is without any, by Mann-Kendall's test."""
    from scipy import stats

    return float(np.asarray(stats.kendalltau(centres, means, alternative="greater"))[1]) if np.ptp(means) > 1e-9 else 1.0


def _mean_number(times: np.ndarray, change: np.ndarray, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of `TREND_BLOCKS` equal stretches of [start, end], and the mean over each of the number that `change` moves at `times`."""
    order = np.argsort(times, kind="stable")
    times, change = times[order], change[order]
    edges = np.linspace(start, end, TREND_BLOCKS + 1)
    # the integral of the number up to t: each change counts for the time since it
    level, moment = np.cumsum(change), np.cumsum(change * times)
    at = np.searchsorted(times, edges, side="right") - 1
    integral = np.where(at >= 0, level[at] * edges - moment[at], 0.0)
    return (edges[1:] + edges[:-1]) / 2, np.diff(integral) / np.diff(edges)
