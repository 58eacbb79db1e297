"""How long a step takes, as a small model that can be read: a non-negative sum of what the step did.

    duration = sum over terms of cost * term(work),  cost >= 0

The terms (`term_names`) are: one per step; the sixteen sums of `features.NAMES`; a constant for each kind of work that is present (its
kernel launches) and one for a forward of whatever kind (the weights are read once); and hinges max(0, tokens - knee) on the packed
tokens of the forward and on the tokens of each backward layer, so that the cost of a token may rise once a matrix product leaves the
memory-bound regime. Costs are seconds per unit, found by non-negative least squares on *relative* errors, so that a 10 ms decode step
matters as much as a 300 ms training step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter, mul
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import did_you_mean, require
from workbench.features import INDEX, NAMES, Work

FORWARD_KNEES = (32, 64, 128, 256, 512, 1024)
BACKWARD_KNEES = (128, 256, 512, 1024)
PRESENT = ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens", "backward_layers")
TOKENS = ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens")
FORWARD = "has a forward"
CLASSES = ("train", "prefill", "decode")  # a step's class is the first of these kinds of work that it holds
HELD_OUT_BLOCK, HELD_OUT_EVERY = 10, 5  # one block of 10 consecutive steps in 5 is held out: neighbours are correlated
REWEIGHTINGS = 4
_CONTEXT = INDEX["decode_context"]


def term_names() -> tuple[str, ...]:
    """The model's terms, in the order of its costs."""
    hinges = [f"tokens above {knee}" for knee in FORWARD_KNEES] + [f"backward token-layers above {knee} tokens" for knee in BACKWARD_KNEES]
    return ("step", *NAMES, *(f"has {name}" for name in PRESENT), FORWARD, *hinges)


def design(values: np.ndarray) -> np.ndarray:
    """Terms [n, terms] of steps given as features [n, len(NAMES)]."""
    tokens = values[:, [INDEX[name] for name in TOKENS]].sum(axis=1)
    layers, token_layers = values[:, INDEX["backward_layers"]], values[:, INDEX["backward_token_layers"]]
    columns = [np.ones(len(values)), *values.T]
    columns += [(values[:, INDEX[name]] > 0).astype(float) for name in PRESENT]
    columns += [(tokens > 0).astype(float)]
    columns += [np.maximum(0.0, tokens - knee) for knee in FORWARD_KNEES]
    columns += [np.maximum(0.0, token_layers - knee * layers) for knee in BACKWARD_KNEES]
    return np.column_stack(columns)


def classes_of(values: np.ndarray) -> np.ndarray:
    """Each step's class as an index into `CLASSES` [n]: train beats prefill beats decode."""
    train = values[:, [INDEX[n] for n in ("finetune_tokens", "evaluate_tokens", "backward_layers")]].any(axis=1)
    return np.select([train, values[:, INDEX["prefill_tokens"]] > 0], [0, 1], 2)


@dataclass(frozen=True)
class CostModel:
    """Fitted costs in seconds per unit of each term. `predict` is plain Python floats, a few microseconds a call."""

    costs: tuple[float, ...]
    _linear: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _values: Callable[[Sequence[float]], tuple[float, ...]] = field(init=False, repr=False, compare=False)
    _context: float = field(init=False, repr=False, compare=False)
    _any_forward: float = field(init=False, repr=False, compare=False)
    _present: tuple[tuple[int, float], ...] = field(init=False, repr=False, compare=False)
    _forward: tuple[tuple[int, float], ...] = field(init=False, repr=False, compare=False)
    _backward: tuple[tuple[int, float], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.costs) != len(term_names()):
            raise ValueError(f"costs must hold {len(term_names())} terms, got {len(self.costs)}. Fit the model again with this version.")
        costs = [float(c) for c in self.costs]
        first = 1 + len(NAMES)
        present = costs[first : first + len(PRESENT)]
        hinges = costs[first + len(PRESENT) + 1 :]
        forward, backward = hinges[: len(FORWARD_KNEES)], hinges[len(FORWARD_KNEES) :]
        object.__setattr__(self, "costs", tuple(costs))
        # those that cost nothing are left out; two at least, or the getter would give a single value
        linear = {k: c for k, c in enumerate(costs[1:first]) if (c or k < 2) and k != _CONTEXT}
        object.__setattr__(self, "_linear", tuple(linear.values()))
        object.__setattr__(self, "_values", itemgetter(*linear))
        object.__setattr__(self, "_context", costs[1 + _CONTEXT])
        object.__setattr__(self, "_any_forward", costs[first + len(PRESENT)])
        object.__setattr__(self, "_present", tuple((INDEX[n], c) for n, c in zip(PRESENT, present, strict=True) if c))
        object.__setattr__(self, "_forward", tuple((k, c) for k, c in zip(FORWARD_KNEES, forward, strict=True) if c))
        object.__setattr__(self, "_backward", tuple((k, c) for k, c in zip(BACKWARD_KNEES, backward, strict=True) if c))

    def predict(self, work: Work) -> float:
        """Mean duration in seconds of a step that does `work`."""
        return self._without_context(work) + self._context * work.values[_CONTEXT]

    def predict_decodes(self, work: Work, num_steps: int) -> list[float]:
        """`predict`, bit for bit, of the next steps that decode the same rows: each reads one token more a row."""
        fixed, cost = self._without_context(work), self._context
        context, rows = work.values[_CONTEXT], work.values[INDEX["decode_tokens"]]
        return [fixed + cost * (context + k * rows) for k in range(num_steps)]

    def _without_context(self, work: Work) -> float:
        v = work.values
        total = self.costs[0] + sum(map(mul, self._linear, self._values(v)))
        for index, cost in self._present:
            if v[index]:
                total += cost
        tokens = v[0] + v[1] + v[2] + v[3]
        if tokens:
            total += self._any_forward
            for knee, cost in self._forward:
                if tokens > knee:
                    total += cost * (tokens - knee)
        if v[12]:
            for knee, cost in self._backward:
                if v[10] > knee * v[12]:
                    total += cost * (v[10] - knee * v[12])
        return total

    def predict_all(self, values: np.ndarray) -> np.ndarray:
        """Mean durations [n] of steps given as features [n, len(NAMES)]."""
        return design(values) @ np.asarray(self.costs)

    def parts(self, values: np.ndarray) -> pd.DataFrame:
        """Seconds [n, terms] that each term with a cost adds to steps given as features [n, len(NAMES)]; a row sums to its prediction."""
        seconds = pd.DataFrame(design(values) * np.asarray(self.costs), columns=list(term_names()))
        return seconds.loc[:, np.asarray(self.costs) > 0]

    def table(self) -> pd.Series:
        """The costs that are not zero, in microseconds per unit of their term."""
        costs = pd.Series(self.costs, index=list(term_names()), name="cost_us") * 1e6
        return costs[costs > 0]

    def shares(self, steps: pd.DataFrame) -> pd.DataFrame:
        """How much of the predicted time each term makes: terms whose cost is not zero x classes of step, columns summing to 1.

        `steps`: rows with the columns of `features.NAMES`.
        """
        values = steps[list(NAMES)].to_numpy(float)
        seconds = pd.DataFrame(design(values) * np.asarray(self.costs), columns=list(term_names()))[self.table().index]
        sums = seconds.groupby(np.asarray(CLASSES, object)[classes_of(values)], sort=False).sum().T
        return sums[[name for name in CLASSES if name in sums]] / sums.sum()


def perturbed(costs: Mapping[str, float], bias: float, scale: Mapping[str, float], shift_s: Mapping[str, float]) -> dict[str, float]:
    """The costs with single terms times `scale`, seconds added to every step with a kind of work, and all of it times 1 + `bias`.

    Raises ValueError for a term or kind that is not there, and where a cost would be negative.
    """
    kinds = {"step": "step"} | {name.split("_")[0]: f"has {name}" for name in PRESENT}
    out = dict(costs)
    for name, factor in scale.items():
        if name not in out:
            raise ValueError(f"scale must name terms of the model, got {name!r}. {did_you_mean(name, list(out))}")
        require(factor >= 0, f"the factor on {name!r} must be at least 0", factor)
        out[name] *= factor
    for kind, seconds in shift_s.items():
        if kind not in kinds:
            raise ValueError(f"shift_s must name kinds of work, got {kind!r}. {did_you_mean(kind, list(kinds))}")
        out[kinds[kind]] += seconds
        require(out[kinds[kind]] >= 0, f"{kinds[kind]!r} must cost at least 0 seconds after the shift", out[kinds[kind]])
    return {name: (1.0 + bias) * cost for name, cost in out.items()}


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


def fit_costs(values: np.ndarray, duration_s: np.ndarray) -> CostModel:
    """Non-negative costs that minimise the squared *relative* error. Raises ValueError for fewer than two steps.

    Weights are 1 / predicted, refined a few times: weights of 1 / measured would pull the fit below the mean of noisy steps.
    """
    from scipy.optimize import nnls

    if len(duration_s) < 2:
        raise ValueError(f"a fit needs at least 2 steps, got {len(duration_s)}. Record a replay on an engine and pass it.")
    terms = design(values)
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-30)
    expected = duration_s
    costs = np.zeros(terms.shape[1])
    for _ in range(REWEIGHTINGS):
        weighted = terms / scale / expected[:, None]
        q, r = np.linalg.qr(weighted) if len(weighted) > weighted.shape[1] else (np.eye(len(weighted)), weighted)
        solution, _ = nnls(r, q.T @ (duration_s / expected), maxiter=50 * terms.shape[1])
        costs = solution / scale
        expected = np.maximum(terms @ costs, 0.05 * duration_s)
    return CostModel(tuple(costs))


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
