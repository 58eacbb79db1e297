"""A replay's metrics as functions of which stretches of its window count, for the bootstrap over time blocks.

The window is cut into equal bins; requests belong to the bin of their arrival, tokens to that of their time. A metric is then
evaluated on drawn bins, with their multiplicities, exactly as `metrics.summary` would on the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.config import did_you_mean
from workbench.results import metrics

FLAGS = {f"attainment{suffix}": f"met{suffix}" for suffix in ("", "_ttft", "_tpot", "_itl", "_e2e", "_pace")}
TOKENS = {"decode_tokens_per_s": "token", "prefill_tokens_per_s": "prefill", "finetune_tokens_per_s": "committed"}
QUANTILES = {f"{name}_p{p}_s": (f"{name}_s", p / 100) for name in ("ttft", "tpot", "e2e") for p in metrics.PERCENTILES}
METRICS = (*FLAGS, "attainment_admission_wait", "goodput_per_s", "queue_mean_s", *TOKENS, *QUANTILES)
CHUNK = 64  # resamples at a time, so that weights of a day's requests stay small

Evaluate = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Binned:
    """A metric on bins: `evaluate(counts [R, bins]) -> [R]`, and each bin's pull on it [bins], for its correlation in time."""

    evaluate: Evaluate
    pull: np.ndarray


def binned(replays: Sequence[Any], metric: str, bins: int) -> Binned:
    """The metric of one policy's replays (one per seed), each window cut into `bins`, seed after seed.

    Raises ValueError for a metric that time blocks do not give: gaps between tokens, fairness, counts of the machine.
    """
    if metric not in METRICS:
        raise ValueError(f"a metric over time blocks must be one that time adds up to, got {metric!r}. {did_you_mean(metric, METRICS)}")
    parts = [_rows(replay, metric, bins) for replay in replays]
    value, weight, where = (np.concatenate([part[i] for part in parts]) for i in range(3))
    where = where + np.concatenate([np.full(len(part[2]), k * bins) for k, part in enumerate(parts)]).astype(int)
    num = bins * len(parts)
    if metric in QUANTILES:
        return _quantile(value, where, num, QUANTILES[metric][1])
    span = np.concatenate([np.full(bins, part[3]) for part in parts])
    top = np.bincount(where, value, num)
    bottom = span if metric.endswith("_per_s") else np.bincount(where, weight, num)
    return _ratio(top, bottom)


def _rows(replay: Any, metric: str, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Values, weights and bins of the rows that a metric is made of, and the seconds of a bin."""
    start, end = metrics.window(replay.measure, replay.events, replay.steps)
    width = (end - start) / bins

    def places(times: np.ndarray) -> np.ndarray:
        return np.clip(((times - start) / width).astype(int), 0, bins - 1)

    if metric in TOKENS:
        kind, time = replay.events["kind"].to_numpy(), replay.events["time_s"].to_numpy(float)
        is_decode = metric == "decode_tokens_per_s"
        mask = ((kind == TOKENS[metric]) | (is_decode & (kind == "merged"))) & (time >= start) & (time <= end)
        value = replay.events["value"].to_numpy(float)[mask]
        if is_decode:
            value = np.where(kind[mask] == "token", 1.0, value)
        return value, np.ones(len(value)), places(time[mask]), width
    requests = replay.requests[replay.requests["arrival_s"].between(start, end)]
    if metric == "attainment_admission_wait":
        value = ((requests["queue_s"] <= metrics.ADMISSION_WAIT_S) & (requests["outcome"] != "rejected")).to_numpy(float)
    else:
        column = "met" if metric == "goodput_per_s" else FLAGS.get(metric) or QUANTILES.get(metric, ("queue_s",))[0]
        value = requests[column].to_numpy(float)
    known = np.isfinite(value)
    return value[known], np.ones(int(known.sum())), places(requests["arrival_s"].to_numpy(float)[known]), width


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Binned:
    whole = top.sum() / bottom.sum() if bottom.sum() > 0 else np.nan

    def evaluate(counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts @ top) / (counts @ bottom)

    return Binned(evaluate, (top - whole * bottom) / max(bottom.mean(), 1e-300))


def _quantile(value: np.ndarray, where: np.ndarray, num: int, quantile: float) -> Binned:
    """The smallest value that at least that share of the drawn rows does not exceed, as `metrics.quantile_interval` has it."""
    order = np.argsort(value, kind="stable")
    value, where = value[order], where[order]

    def evaluate(counts: np.ndarray) -> np.ndarray:
        out = np.full(len(counts), np.nan)
        for first in range(0, len(counts) if len(value) else 0, CHUNK):
            weight = np.cumsum(counts[first : first + CHUNK][:, where], axis=1)
            reached = weight >= np.maximum(quantile * weight[:, -1:] - 1e-9, 1e-9)
            out[first : first + CHUNK] = np.where(weight[:, -1] > 0, value[reached.argmax(axis=1)], np.nan)
        return out

    whole = evaluate(np.ones((1, num)))[0]
    return Binned(evaluate, np.bincount(where, (value <= whole) - quantile, num))
