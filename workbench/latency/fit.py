"""Fitting the costs of a step to measured ones, and the error of a fit on steps that it has not seen.

Costs are found by non-negative least squares on *relative* errors, so that a 10 ms decode step matters as much as a 300 ms training
step, with Huber's weights (Huber 1964, Robust estimation of a location parameter): the few steps that the host delayed count as if they
were a little late, and no more. So a prediction is what such a step usually lasts; what delays it now and then is in the residuals.

Where an executor pads, a bucket's cost is a smooth curve through all buckets (a constant and hinges, as without padding, at the bucket's
size) plus a deviation of its own, drawn towards 0 by a ridge: three steps are enough to say where a bucket stands off the curve, one that
was delayed is not believed, and a bucket without steps lies between its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.core import BUCKETS, ExecutorInfo
from workbench.features import NAMES
from workbench.latency.costs import CostModel
from workbench.latency.terms import (
    BACKWARD,
    BACKWARD_HINGE,
    BACKWARD_KNEES,
    CLASSES,
    DECODING,
    FORWARD,
    FORWARD_HINGE,
    FORWARD_KNEES,
    IN_TABLE,
    SERVING,
    TABLES,
    TRAINING,
    UNPADDED,
    Padding,
    Places,
    classes_of,
    smooth_design,
    smooth_terms,
    table_design,
    table_terms,
)

HELD_OUT_BLOCK, HELD_OUT_EVERY = 10, 5  # one block of 10 consecutive steps in 5 is held out: neighbours are correlated
REWEIGHTINGS = 8
HUBER = 1.345  # in standard deviations of a class's errors: 95 % as efficient as least squares where errors are normal
LEAST_SPREAD = 1e-3  # relative; of a class whose errors are all but 0
SPREAD = 0.02  # of a usual step around its prediction, relative: what the ridges are weighed against
CONSTANT = 1.0  # as DEVIATION, of constants that would otherwise be anywhere
DEVIATION = {SERVING: 0.1, TRAINING: 0.05, DECODING: 0.1, BACKWARD: 0.1}  # of a bucket from the curve, relative to its steps' durations


@dataclass(frozen=True, kw_only=True)
class ErrorReport:
    """A model's error on steps that it was not fitted to.

    `bias` = (sum predicted - sum measured) / sum measured: above 0 when it predicts too long; near capacity a bias of 3 % moves
    p99 latency several-fold. `mape` = mean |predicted - measured| / measured. `outside_share`: steps with a feature beyond what
    the fit saw. `by_class`: class of step -> (steps, bias, mape).
    """

    steps: int
    bias: float
    mape: float
    p95_error: float
    outside_share: float
    by_class: dict[str, tuple[int, float, float]]
    held_out: bool = True

    def table(self) -> pd.DataFrame:
        """Steps, bias and mean error as shares, one row per class of step and one for all."""
        rows = {**self.by_class, "all": (self.steps, self.bias, self.mape)}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["steps", "bias", "mape"]).rename_axis("step holds")

    def __str__(self) -> str:
        where = f"{self.steps} {'held-out' if self.held_out else 'fitted (too few to hold any out)'} steps"
        error = f"bias {self.bias:+.1%}, mean error {self.mape:.1%} (95 % of steps within {self.p95_error:.1%})"
        lines = [f"{where}: {error}, {self.outside_share:.1%} outside the fitted range"]
        lines += [f"  {name}: {n} steps, bias {bias:+.1%}, mean error {mape:.1%}" for name, (n, bias, mape) in self.by_class.items()]
        return "\n".join(lines)


def step_arrays(steps: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, len(NAMES)] and durations [n] of a steps frame, a replay, or several of either.

    Steps that stopped early are left out: their features say what was planned, their duration what was done.
    Raises ValueError for a frame without the feature columns, without steps, and for durations that are not above 0.
    """
    frames = [getattr(s, "steps", s) for s in (steps if isinstance(steps, Sequence) else [steps])]
    for frame in frames:
        missing = [name for name in (*NAMES, "duration_s") if name not in frame.columns]
        if missing:
            raise ValueError(f"steps must have the columns of features.NAMES and duration_s, got a frame without {missing[0]!r}")
    frames = [f[~f["stopped_early"].astype(bool)] if "stopped_early" in f.columns else f for f in frames]
    values = np.concatenate([f[list(NAMES)].to_numpy(float) for f in frames]) if frames else np.zeros((0, len(NAMES)))
    duration = np.concatenate([f["duration_s"].to_numpy(float) for f in frames]) if frames else np.zeros(0)
    if not np.all(duration > 0) or not np.all(np.isfinite(values)):
        raise ValueError(f"duration_s must be above 0 and every feature finite, got {duration.min() if len(duration) else duration}")
    return values, duration


def spread_out(steps: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` of a replay's steps that did not stop early, in even distances."""
    whole = steps[~steps["stopped_early"].astype(bool)]
    return whole.iloc[np.unique(np.linspace(0, len(whole) - 1, min(most, len(whole))).round().astype(int))]


def check_executor(own: ExecutorInfo, other: ExecutorInfo) -> None:
    """Raise ValueError unless a latency model is of the device, of the depth and of the padding of what an executor runs."""
    require(not other.simulated, "steps must be measured by an engine, not simulated", other.name)
    require(own.device == other.device, f"the profile must be of the device of the replays, {other.device}", own.device)
    require(own.num_layers == other.num_layers, f"the profile must be of a model of {other.num_layers} layers", own.num_layers)
    for name in BUCKETS:
        require(getattr(own, name) == getattr(other, name), f"the profile's {name} must be {getattr(other, name)}", getattr(own, name))


def fit_costs(values: np.ndarray, duration_s: np.ndarray, padding: Padding = UNPADDED) -> CostModel:
    """Non-negative costs that minimise the relative error, robustly. Raises ValueError for fewer than two steps.

    Weights are 1 / predicted, refined a few times: weights of 1 / measured would pull the fit below the mean of noisy steps.
    """
    if len(duration_s) < 2:
        raise ValueError(f"a fit needs at least 2 steps, got {len(duration_s)}. Record a replay on an engine and pass it.")
    places = Places.of(values, padding, rounded=True)
    smooth, tables = smooth_design(values, places), _deviations(values, places, padding)
    terms, kinds = np.hstack([smooth, tables]), classes_of(values)
    shares = np.concatenate([_ridges(padding)] + [np.full(len(padding.buckets(table)), DEVIATION[table]) for table in TABLES])
    expected, weights, costs = duration_s, np.ones(len(duration_s)), np.zeros(terms.shape[1])
    for _ in range(REWEIGHTINGS):
        costs = _solve(terms, duration_s, expected, np.sqrt(weights), smooth.shape[1], shares)
        expected = np.maximum(terms @ costs, 0.05 * duration_s)
        error = (duration_s - expected) / expected
        weights = np.minimum(1.0, HUBER * _spread(error, kinds) / np.maximum(np.abs(error), 1e-12))
    return _with_tables(costs, np.abs(tables).sum(axis=0) > 0, padding)


def _deviations(values: np.ndarray, places: Places, padding: Padding) -> np.ndarray:
    """Columns [n, buckets] of the buckets' deviations: a serving forward's is shared by training ones, which have one on top."""
    columns = table_design(values, places, padding)
    num = len(padding.forward)
    columns[:, :num] += columns[:, num : 2 * num]
    return columns


def _spread(error: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Each step's robust standard deviation [n]: 1.4826 times the median absolute error of its class."""
    out = np.empty(len(error))
    for kind in np.unique(kinds):
        out[kinds == kind] = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(error[kinds == kind]))))
    return out


def _ridges(padding: Padding) -> np.ndarray:
    """How far each smooth term is drawn towards 0 [smooth terms]: infinitely little, but for the constants of a model with tables.

    Steps without a forward are few or none: what all steps cost is then the forwards', which may cost less than the curve says.
    """
    is_constant = [name == "step" or (name.startswith("has ") and name != FORWARD) for name in smooth_terms()]
    return np.where(np.asarray(is_constant) & (padding != UNPADDED), CONSTANT, np.inf)


def _solve(
    terms: np.ndarray, duration_s: np.ndarray, expected: np.ndarray, weights: np.ndarray, num_smooth: int, shares: np.ndarray
) -> np.ndarray:
    """One weighted least squares: terms from `num_smooth` on may be negative, and each pays for its size by its share of `expected`."""
    from scipy.optimize import nnls

    there = np.abs(terms).max(axis=0) > 0
    per_step = np.where(terms > 0, expected[:, None] / np.where(terms > 0, terms, 1.0), np.nan)
    sizes = np.array([np.nanmedian(column) if seen else 1.0 for column, seen in zip(per_step.T, there, strict=True)])
    ridge = np.diag(1.0 / (shares * sizes))[np.isfinite(shares)]
    rows = np.vstack([terms * (weights / (SPREAD * expected))[:, None], ridge])
    right = np.concatenate([weights * duration_s / (SPREAD * expected), np.zeros(len(ridge))])
    kept, signed = np.flatnonzero(there), np.flatnonzero(there[num_smooth:]) + num_smooth
    both = np.hstack([rows[:, kept], -rows[:, signed]])
    scale = np.abs(both).max(axis=0)
    q, r = np.linalg.qr(both / scale) if len(both) > both.shape[1] else (np.eye(len(both)), both / scale)
    found = nnls(r, q.T @ right, maxiter=50 * both.shape[1])[0] / scale
    costs = np.zeros(terms.shape[1])
    costs[kept] = found[: len(kept)]
    costs[signed] -= found[len(kept) :]
    return costs


def _with_tables(costs: np.ndarray, seen: np.ndarray, padding: Padding) -> CostModel:
    """The curve and the deviations as whole costs by bucket; where no step was seen, the deviation lies between its neighbours'."""
    names = smooth_terms()
    by_term, deviations = dict(zip(names, costs[: len(names)], strict=True)), costs[len(names) :]
    first, shared = 0, np.zeros(len(padding.forward))
    for table in TABLES:
        buckets = np.asarray(padding.buckets(table), float)
        here = slice(first, first + len(buckets))
        first = here.stop
        found = np.interp(buckets, buckets[seen[here]], deviations[here][seen[here]]) if seen[here].any() else np.zeros(len(buckets))
        if table == TRAINING:
            found = found + shared
        elif table == SERVING:
            shared = found
        curve = _curve(by_term, buckets, table)
        by_term |= dict(zip(table_terms(table, padding), np.maximum(0.0, curve + found).tolist(), strict=True))
    return CostModel.of_terms(by_term, padding)


def _curve(by_term: dict[str, float], buckets: np.ndarray, table: str) -> np.ndarray:
    """What the smooth terms cost at the buckets' sizes [buckets]."""
    held = [by_term[name] for name in IN_TABLE[table]]
    if table == BACKWARD:
        line, hinge, knees = held[0] + held[1] * buckets, BACKWARD_HINGE, BACKWARD_KNEES
    else:
        line, hinge, knees = np.full(len(buckets), by_term[FORWARD] + held[0]), FORWARD_HINGE, FORWARD_KNEES
    return line + sum(by_term[hinge.format(knee)] * np.maximum(0.0, buckets - knee) for knee in knees)


def held_out_mask(num_steps: int) -> np.ndarray:
    """Which steps a fit is judged on [n]; none when there are too few to hold any out."""
    if num_steps < 2 * HELD_OUT_BLOCK * HELD_OUT_EVERY:
        return np.arange(num_steps) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 if num_steps >= 4 * HELD_OUT_EVERY else np.zeros(num_steps, bool)
    return np.arange(num_steps) // HELD_OUT_BLOCK % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def error_report(
    model: CostModel, values: np.ndarray, duration_s: np.ndarray, largest: np.ndarray, *, held_out: bool = True
) -> ErrorReport:
    """The error of `model` on measured steps; `largest` [len(NAMES)] is the largest of each feature that its fit saw."""
    predicted = model.predict_all(values)
    error = np.abs(predicted - duration_s) / duration_s
    kinds = classes_of(values)
    by_class = {}
    for index, name in enumerate(CLASSES):
        chosen = kinds == index
        if chosen.any():
            total = duration_s[chosen].sum()
            by_class[name] = (int(chosen.sum()), float(predicted[chosen].sum() / total - 1), float(error[chosen].mean()))
    return ErrorReport(
        steps=len(duration_s),
        bias=float(predicted.sum() / duration_s.sum() - 1),
        mape=float(error.mean()),
        p95_error=float(np.quantile(error, 0.95)),
        outside_share=float(is_outside(values, largest).mean()),
        by_class=by_class,
        held_out=held_out,
    )


def is_outside(values: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Which steps [n] have a feature above the largest that the fit saw: there the model extrapolates."""
    return np.any(values > largest * (1 + 1e-9), axis=1)
