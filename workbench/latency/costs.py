"""Fitted costs of a step, and what they say of it: plain floats, a microsecond or two a prediction."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench.config import did_you_mean, require
from workbench.features import INDEX, NAMES, Work
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
    PRESENT,
    PROMPTS,
    SEQUENCES,
    SERVING,
    TRAINING,
    UNPADDED,
    Padding,
    classes_of,
    design,
    group_of,
    table_terms,
    term_names,
)

MANY = 48  # from so many steps on arrays are faster than lists
_CONTEXT, _ROWS, _ADAPTERS = (INDEX[name] for name in ("decode_context", "decode_tokens", "adapters"))


class _Fast(NamedTuple):
    """The costs as `predict` reads them: of the features but the context and the layers, of each kind of work that is present, of the rest.

    A table ends with the largest size that it holds; 0 where there is none. Hinges that cost nothing are left out.
    """

    linear: tuple[float, ...]
    present: tuple[float, ...]
    context: float
    prompts: float
    sequences: float
    sequence_tokens: float
    any_forward: float
    forward: tuple[tuple[int, float], ...]
    layer: float
    layer_token: float
    backward: tuple[tuple[int, float], ...]
    serving: tuple[float, ...]
    training: tuple[float, ...]
    decoding: tuple[float, ...]
    layers: tuple[float, ...]
    most_forward: int
    most_decode: int
    most_backward: int

    @classmethod
    def of(cls, costs: Mapping[str, float], padding: Padding) -> "_Fast":
        tables = [tuple(costs[name] for name in table_terms(table, padding)) for table in (SERVING, TRAINING, DECODING, BACKWARD)]
        hinges = ((FORWARD_HINGE, FORWARD_KNEES), (BACKWARD_HINGE, BACKWARD_KNEES))
        forward, backward = (tuple((k, costs[name.format(k)]) for k in knees if costs[name.format(k)]) for name, knees in hinges)
        return cls(
            tuple(costs[name] for k, name in enumerate(NAMES) if k != _CONTEXT and name not in IN_TABLE[BACKWARD]),
            tuple(costs[f"has {name}"] for name in PRESENT),
            costs["decode_context"],
            costs[PROMPTS],
            *(costs[name] for name in SEQUENCES),
            costs[FORWARD],
            forward,
            *(costs[name] for name in IN_TABLE[BACKWARD]),
            backward,
            *tables,
            *(max(buckets, default=0) for buckets in (padding.forward, padding.decode, padding.backward)),
        )


@dataclass(frozen=True)
class CostModel:
    """Fitted costs in seconds per unit of each term of `term_names(padding)`."""

    costs: tuple[float, ...]
    padding: Padding = UNPADDED
    _fast: _Fast = field(init=False, repr=False, compare=False)
    _decodes: dict[tuple[float, float], float] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Of steps that only decode, without their context, by rows and adapters."""

    def __post_init__(self) -> None:
        names = term_names(self.padding)
        if len(self.costs) != len(names):
            raise ValueError(f"costs must hold {len(names)} terms, got {len(self.costs)}. Fit the model again with this version.")
        object.__setattr__(self, "costs", tuple(float(c) for c in self.costs))
        object.__setattr__(self, "_fast", _Fast.of(self.by_term(), self.padding))

    @classmethod
    def of_terms(cls, costs: Mapping[str, float], padding: Padding) -> "CostModel":
        """From costs by term. Raises ValueError where a term lacks, or is not one of this padding."""
        names = term_names(padding)
        if set(costs) != set(names):
            other = sorted(set(costs) ^ set(names))[0]
            raise ValueError(f"costs must hold exactly the terms of this version, got {other!r} on one side only. Fit the model again.")
        return cls(tuple(costs[name] for name in names), padding)

    def by_term(self) -> dict[str, float]:
        """The costs by term."""
        return dict(zip(term_names(self.padding), self.costs, strict=True))

    def predict(self, work: Work) -> float:
        """Usual duration in seconds of a step that does `work`."""
        fast = self._fast
        tuned, evaluated, prefilled, decoded, pairs, prefill_pairs, context, requests, samples, adapters = work.values[:10]
        layer_tokens, pair_layers, layers, updates, loads, load_bytes, starts = work.values[10:]
        per = fast.linear
        total = self.costs[0] + per[0] * tuned + per[1] * evaluated + per[2] * prefilled + per[3] * decoded
        total = total + per[4] * pairs + per[5] * prefill_pairs + per[6] * requests + per[7] * samples + per[8] * adapters
        total = total + per[9] * pair_layers + per[10] * updates + per[11] * loads + per[12] * load_bytes + per[13] * starts
        has_tuned, has_evaluated, has_prefilled, has_decoded, has_layers, has_adapters = fast.present
        trained = tuned + evaluated
        others = trained + prefilled
        tokens = others + decoded
        if not tokens:
            pass
        elif not others and tokens <= fast.most_decode:
            total += fast.decoding[bisect_left(self.padding.decode, tokens)]
            has_decoded = 0.0  # held by the table
        elif tokens <= fast.most_forward:
            place = bisect_left(self.padding.forward, tokens)
            if trained:
                total += fast.training[place]
                has_tuned = 0.0
            else:
                total += fast.serving[place]
                has_prefilled = 0.0
            sequences = self.padding.sequences
            if requests and sequences and requests <= sequences[-1]:
                many = sequences[bisect_left(sequences, requests)]
                total += fast.sequences * many
                if prefilled:
                    total += fast.sequence_tokens * (many * self.padding.forward[place])
        else:
            total += fast.any_forward
            for knee, cost in fast.forward:
                if tokens > knee:
                    total += cost * (tokens - knee)
        if requests > decoded:
            total += fast.prompts * (requests - decoded)
        if tuned:
            total += has_tuned
        if evaluated:
            total += has_evaluated
        if prefilled:
            total += has_prefilled
        if decoded:
            total += has_decoded
        if layers:
            total += has_layers
        if adapters:
            total += has_adapters
        if layers:
            each = layer_tokens / layers
            if fast.layers and each <= fast.most_backward:
                total += fast.layers[bisect_left(self.padding.backward, each)] * layers
            else:
                total += (fast.layer + fast.layer_token * each) * layers
                for knee, cost in fast.backward:
                    if each > knee:
                        total += cost * ((each - knee) * layers)
        return total + fast.context * context

    def predict_decodes(self, work: Work, num_steps: int, first: int = 0) -> Any:
        """`predict`, bit for bit, of the next steps but the `first` ones that decode the same rows: each reads one token more a row.

        A list where there are fewer than `MANY`, else an array.
        """
        cost, values = self._fast.context, work.values
        context, rows = values[_CONTEXT], values[_ROWS]
        key = (rows, values[_ADAPTERS])
        fixed = self._decodes.get(key)
        if fixed is None:
            bare = Work(values)
            bare.values[_CONTEXT] = 0.0
            fixed = self._decodes[key] = self.predict(bare)
        if num_steps < MANY:
            return [fixed + cost * (context + k * rows) for k in range(first, first + num_steps)]
        return fixed + cost * (context + np.arange(first, first + num_steps) * rows)

    def predict_all(self, values: np.ndarray) -> np.ndarray:
        """`predict`, bit for bit, [n] of steps given as features [n, len(NAMES)]."""
        return np.array([self.predict(Work(row)) for row in np.asarray(values, float).tolist()], float)

    def parts(self, values: np.ndarray) -> pd.DataFrame:
        """Seconds [n, terms] that each term with a cost adds to steps given as features [n, len(NAMES)]; a row sums to its prediction."""
        costs = np.asarray(self.costs)
        seconds = pd.DataFrame(design(values, self.padding) * costs, columns=list(term_names(self.padding)))
        return seconds.loc[:, costs > 0]

    def table(self) -> pd.Series:
        """The costs that are not zero, in microseconds per unit of their term."""
        costs = pd.Series(self.costs, index=list(term_names(self.padding)), name="cost_us") * 1e6
        return costs[costs > 0]

    def shares(self, steps: pd.DataFrame) -> pd.DataFrame:
        """How much of the predicted time each term makes: terms whose cost is not zero x classes of step, columns summing to 1.

        `steps`: rows with the columns of `features.NAMES`. The buckets of a table (`latency.terms.TABLES`) are one row together.
        """
        values = steps[list(NAMES)].to_numpy(float)
        seconds = self.parts(values).T.groupby(group_of, sort=False).sum().T
        sums = seconds.groupby(np.asarray(CLASSES, object)[classes_of(values)], sort=False).sum().T
        sums = sums[[name for name in CLASSES if name in sums]]
        return sums / sums.sum()


def perturbed(costs: Mapping[str, float], bias: float, scale: Mapping[str, float], shift_s: Mapping[str, float]) -> dict[str, float]:
    """The costs with single terms (or whole tables) times `scale`, seconds added to every step with a kind of work, and all of it times
    1 + `bias`.

    Raises ValueError for a term or kind that is not there, and where a cost would be negative.
    """
    kinds = {"step": "step"} | {name.split("_")[0]: f"has {name}" for name in PRESENT}
    out = dict(costs)
    known = [*out, *dict.fromkeys(group_of(name) for name in out if group_of(name) != name)]
    for name, factor in scale.items():
        if name not in known:
            raise ValueError(f"scale must name terms of the model, got {name!r}. {did_you_mean(name, known)}")
        require(factor >= 0, f"the factor on {name!r} must be at least 0", factor)
        for term in out:
            if name in (term, group_of(term)):
                out[term] *= factor
    for kind, seconds in shift_s.items():
        if kind not in kinds:
            raise ValueError(f"shift_s must name kinds of work, got {kind!r}. {did_you_mean(kind, list(kinds))}")
        tables = [table for table, held in IN_TABLE.items() if kinds[kind] in held]
        for term in [kinds[kind], *(term for term in out if group_of(term) in tables)]:
            out[term] += seconds
            require(out[term] >= 0, f"{term!r} must cost at least 0 seconds after the shift", out[term])
    return {name: (1.0 + bias) * cost for name, cost in out.items()}
