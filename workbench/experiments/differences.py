"""From the replays of a comparison to `Difference`s: over seeds, or over blocks of time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from workbench.config import did_you_mean, require
from workbench.experiments.statistics import (
    BINS,
    MIN_BLOCKS,
    RESAMPLES,
    Difference,
    expanded_percentile,
    holm_frame,
    interval_block_length,
    seed_difference,
    stationary_blocks,
)
from workbench.experiments.time_blocks import binned
from workbench.model_error import with_error
from workbench.policy import policy_label
from workbench.results import metrics

if TYPE_CHECKING:
    from workbench.experiments.comparison import Comparison

FEW_BLOCKS = 20


def label_of(policy: Any, labels: Sequence[str]) -> str:
    """The label of a policy, or the label itself. Raises ValueError for one that was not run."""
    label = policy if isinstance(policy, str) else policy_label(policy)
    if label not in labels:
        raise ValueError(f"a difference is between two policies that were run, got {label!r}. {did_you_mean(label, labels)}")
    return label


def over_seeds(frame: pd.DataFrame, a: str, b: str, metric: str, redrawn: Sequence[str], confidence: float, resamples: int) -> Difference:
    """From rows with `policy`, `seed` and the metric; of simulated ones the note says the model's error."""
    numbers = [c for c in frame.columns if c not in ("policy", "seed")]
    if metric not in numbers:
        raise ValueError(f"metric must be a number of the summary, got {metric!r}. {did_you_mean(metric, numbers)}")
    values = [dict(zip(rows["seed"], rows[metric].astype(float), strict=True)) for rows in (frame[frame["policy"] == p] for p in (a, b))]
    found, n, note = seed_difference(values[0], values[1], confidence=confidence, resamples=resamples)
    require(
        bool(redrawn) or n < 2,
        "seeds must redraw something, or their number says nothing about chance; here they redraw",
        "nothing",
        'Pass trace= as a function seed -> Trace, or compare blocks of time, over="blocks".',
    )
    common = {
        "a": a,
        "b": b,
        "metric": metric,
        "n": n,
        "confidence": confidence,
        "resamples": resamples,
        "redrawn": tuple(redrawn),
        "note": with_error(note, frame, metric),
    }
    return Difference(
        over="seeds", estimate=found.estimate, low=found.low, high=found.high, p_value=found.p_value, method=found.method, **common
    )


def over_blocks(
    first: Sequence[Any], second: Sequence[Any], a: str, b: str, metric: str, block_s: float | None, confidence: float, resamples: int
) -> Difference:
    """From the replays of two policies, seed by seed in the same order, on equal windows."""
    require(all(not r.interrupted for r in (*first, *second)), "blocks of time need whole replays, got an interrupted one", metric)
    one, other = binned(first, metric, BINS), binned(second, metric, BINS)
    num = BINS * len(first)
    windows = [[metrics.window(r.measure, r.events, r.steps) for r in replays] for replays in (first, second)]
    require(windows[0] == windows[1], "both policies must be measured on the same windows", windows, "Pass measure= to compare.")
    width = float(np.mean([end - start for start, end in windows[0]])) / BINS
    length = interval_block_length(one.pull - other.pull) if block_s is None else block_s / width
    require(
        1 <= length <= num / MIN_BLOCKS,
        f"block_s must lie between {width:.3g} s and {num * width / MIN_BLOCKS:.3g} s ({MIN_BLOCKS} blocks in the window)",
        length * width,
    )
    rng = np.random.default_rng(0)
    drawn = stationary_blocks(num, length, resamples, rng)
    counts = np.bincount((drawn + num * np.arange(resamples)[:, None]).ravel(), minlength=num * resamples).reshape(resamples, num)
    whole = np.ones((1, num))
    estimate = float(one.evaluate(whole)[0] - other.evaluate(whole)[0])
    distribution = one.evaluate(counts.astype(float)) - other.evaluate(counts.astype(float))
    require(
        bool(np.isfinite(distribution).all()), "the metric must be defined in every resample; blocks without requests leave it", "undefined"
    )
    blocks = max(2, round(num / length))
    found = expanded_percentile(estimate, distribution, blocks, confidence, f"stationary block bootstrap, {resamples} resamples")
    note = ""
    if blocks < FEW_BLOCKS:
        note = f"The differences hang together over {length * width:.3g} s, which leaves {blocks} blocks: the interval may be too short"
    if np.ptp(distribution) == 0:
        note = "Every resample gave exactly this difference, so the interval has no width"
    return Difference(
        a=a,
        b=b,
        metric=metric,
        estimate=estimate,
        low=found.low,
        high=found.high,
        p_value=found.p_value if np.ptp(distribution) else float(estimate == 0),
        n=blocks,
        over="blocks",
        block_s=length * width,
        method=found.method,
        confidence=confidence,
        resamples=resamples,
        note=note,
    )


def difference(
    comparison: "Comparison",
    a: Any,
    b: Any,
    metric: str,
    over: Literal["seeds", "blocks"],
    block_s: float | None,
    confidence: float,
    resamples: int,
) -> Difference:
    """See `Comparison.difference`."""
    require(over in ("seeds", "blocks"), "over must be 'seeds' or 'blocks'", over)
    require(over == "blocks" or block_s is None, "block_s needs over='blocks'", block_s)
    a, b = (label_of(p, comparison.labels) for p in (a, b))
    require(a != b, "a difference is between two policies, both are", a)
    if over == "seeds":
        return over_seeds(comparison.runs, a, b, metric, comparison.redrawn, confidence, resamples)
    common = [s for s in comparison.seeds if (a, s) in comparison.replays and (b, s) in comparison.replays]
    require(len(common) > 0, "both policies must have run on a common seed", common)
    note = ""
    if not comparison.redrawn and len(common) > 1:
        # equal runs counted several times would narrow the interval
        note, common = f"The {len(common)} seeds redraw nothing, so one of them counts", common[:1]
    first, second = ([comparison.replays[p, s] for s in common] for p in (a, b))
    found = over_blocks(first, second, a, b, metric, block_s, confidence, resamples)
    note = "; ".join(n for n in (found.note, note) if n)
    return replace(found, note=with_error(note, comparison.runs, metric))


def differences(
    comparison: "Comparison",
    primary: tuple[Any, Any],
    metric: str,
    rest: Sequence[tuple[Any, ...]] | None,
    over: Literal["seeds", "blocks"],
    confidence: float,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """See `Comparison.differences`."""
    a, b = (label_of(p, comparison.labels) for p in primary)
    if rest is None:
        rest = [(other, b) for other in comparison.labels if other not in (a, b)]
    pairs = [(a, b, metric), *[(x, y, z[0] if z else metric) for x, y, *z in rest]]
    found = [difference(comparison, x, y, name, over, None, confidence, resamples) for x, y, name in pairs]
    return holm_frame(found[0], found[1:])
