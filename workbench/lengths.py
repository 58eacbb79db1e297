"""Output-length predictors: what `RequestView.expected_output` says, and what it is worth to know it.

A predictor is anything that can be called with an arriving request and gives its expected output tokens. The request's `output_tokens`
is None unless the predictor declares `needs = frozenset({"oracle"})`. Two methods are optional: `begin(seed)` before a replay, and
`learn(request, output_tokens)` for every request that has finished, at the moment when it has. A replay works on a copy.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import Any, Literal, Protocol

import pandas as pd

from workbench.config import require
from workbench.core import Request

__all__ = ["History", "LengthPredictor", "Max", "Noisy", "Oracle", "ladder", "predictions", "worth"]


class LengthPredictor(Protocol):
    """Expected output tokens of a request when it arrives; what is beyond 1 .. request.max_tokens is moved to that range."""

    def __call__(self, request: Request, /) -> float: ...


@dataclass(frozen=True)
class Max:
    """`max_tokens`: what a server knows without predicting anything."""

    def __call__(self, request: Request) -> float:
        assert request.max_tokens is not None
        return float(request.max_tokens)


@dataclass(frozen=True)
class Oracle:
    """The length that the trace gives; `max_tokens` where the text decides."""

    needs = frozenset({"oracle"})

    def __call__(self, request: Request) -> float:
        assert request.max_tokens is not None
        return float(request.max_tokens if request.output_tokens is None else min(request.output_tokens, request.max_tokens))


@dataclass
class Noisy:
    """The oracle times exp(`sigma` z), z standard normal: sigma 0.5 is off by a factor of 1.65 or more for a third of the requests.

    The noise follows from (seed of the replay, `seed`, request id), so that no policy and no schedule changes it. With `sigma=0` it is the
    oracle. For the question how good a predictor has to be; real errors are neither log-normal nor independent.
    """

    sigma: float
    seed: int = 0
    needs = frozenset({"oracle"})
    _replay_seed: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.sigma >= 0, "sigma must be at least 0", self.sigma)

    def begin(self, seed: int) -> None:
        self._replay_seed = seed

    def __call__(self, request: Request) -> float:
        z = Random(f"lengths:{self._replay_seed}:{self.seed}:{request.request_id}").gauss(0.0, 1.0)
        return Oracle()(request) * 2.718281828459045 ** (self.sigma * z)


@dataclass
class History:
    """From the last `window` finished requests of the same adapter, tenant or SLO class: their mean, a quantile, or one drawn at random.

    `quantile=0.9` gives the smallest length that nine in ten did not exceed. `draw=True` draws one of them, by the replay's seed and the
    request's id (as a sampled length distribution is used in admission control). A group without history takes that of all requests,
    and before any has finished the prediction is `prior`, or max_tokens.
    """

    by: Literal["adapter", "tenant", "slo_class"] = "adapter"
    quantile: float | None = None
    draw: bool = False
    prior: float | None = None
    window: int = 1000
    _groups: dict[Any, "_Recent"] = field(default_factory=dict, init=False, repr=False)
    _seed: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        known = ("adapter", "tenant", "slo_class")
        require(self.by in known, f"by must be one of {known}", self.by)
        require(self.quantile is None or 0 < self.quantile <= 1, "quantile must lie in (0, 1], or be None for the mean", self.quantile)
        require(not (self.draw and self.quantile is not None), "a prediction is drawn or a quantile, not both", (self.draw, self.quantile))
        require(self.prior is None or self.prior >= 1, "prior must be at least 1 token, or None for max_tokens", self.prior)
        require(self.window >= 1, "window must be at least 1 request", self.window)

    def begin(self, seed: int) -> None:
        self._groups.clear()
        self._seed = seed

    def learn(self, request: Request, output_tokens: int) -> None:
        for group in ("", (getattr(request, self.by),)):
            self._groups.setdefault(group, _Recent(self.window)).add(output_tokens)

    def __call__(self, request: Request) -> float:
        recent = self._groups.get((getattr(request, self.by),)) or self._groups.get("")
        if recent is None:
            assert request.max_tokens is not None
            return float(request.max_tokens) if self.prior is None else self.prior
        ordered = recent.ordered
        if self.draw:
            return float(Random(f"lengths:{self._seed}:{request.request_id}").choice(ordered))
        if self.quantile is not None:
            return float(ordered[ceil(self.quantile * len(ordered) - 1e-9) - 1])
        return recent.total / len(ordered)


class _Recent:
    """The last few numbers, in order of size too."""

    __slots__ = ("latest", "ordered", "total")

    def __init__(self, window: int) -> None:
        self.latest: deque[int] = deque(maxlen=window)
        self.ordered: list[int] = []
        self.total = 0

    def add(self, number: int) -> None:
        if len(self.latest) == self.latest.maxlen:
            gone = self.latest[0]
            del self.ordered[bisect_left(self.ordered, gone)]
            self.total -= gone
        self.latest.append(number)
        insort(self.ordered, number)
        self.total += number


def ladder(sigmas: Sequence[float] = (0.25, 0.5, 1.0, 2.0), **others: Any) -> dict[str, Any]:
    """Predictors from knowing everything to knowing nothing, as an axis: `sweep(..., axes={"lengths": lengths.ladder()})`.

    "oracle", "sigma s" for each of `sigmas`, `others` by name (`history=History()`), and "max".
    """
    return {"oracle": Oracle(), **{f"sigma {s:g}": Noisy(s) for s in sigmas}, **others, "max": Max()}


def worth(found: Any, metric: str = "attainment", *, axis: str = "lengths", **where: Any) -> pd.DataFrame:
    """What each prediction of a sweep over `ladder()` is worth: a row per policy and prediction.

    `mean` of `metric` over seeds, `gain` over "max" (mean of the differences of equal seeds, `low` and `high` their range), and `share` of
    the oracle's gain that is kept (nan where the oracle gains nothing). `where` fixes other axes.
    Raises ValueError where an axis is left open, or the sweep lacks "max" or "oracle".
    """
    rows = found.where(**where)
    others = [name for name in found.axes if name not in (axis, *where, *found_parameters(found)) and rows[name].nunique(dropna=False) > 1]
    require(not others, "worth is at one cell; these axes have several values", others, "Name a value for each.")
    for name in ("max", "oracle"):
        require(name in set(rows[axis]), f"the axis {axis!r} must hold 'max' and 'oracle'", list(rows[axis].unique()), "Use ladder().")
    table = rows.pivot_table(index=["policy", "seed"], columns=axis, values=metric, sort=False)
    gains = table.sub(table["max"], axis=0)
    out = []
    for policy, of_policy in gains.groupby(level="policy", sort=False):
        most = of_policy["oracle"].mean()
        for name in table.columns:
            gain = of_policy[name]
            share = gain.mean() / most if most else float("nan")
            mean = table.loc[policy, name].mean()
            out.append((policy, name, mean, gain.mean(), gain.min(), gain.max(), share))
    columns = ["policy", axis, "mean", "gain", "low", "high", "share"]
    return pd.DataFrame(out, columns=columns).set_index(["policy", axis])


def found_parameters(found: Any) -> tuple[str, ...]:
    """The axes of a sweep that are parameters of its policies: part of their labels."""
    return tuple(name for name in found.axes if found.frame.groupby("policy")[name].nunique(dropna=False).le(1).all())


def predictions(replay: Any, predictor: Any) -> pd.DataFrame:
    """What `predictor` would have said in a replay, and what came: `predicted` and `output_tokens` of each finished request, by id.

    It sees what it would have seen: requests as they arrive, lengths as they finish.
    """
    from workbench.loop.expected import length_predictor

    expected = length_predictor(predictor, replay.seed)
    requests = {r.request_id: r for r in replay.trace_requests}
    events = replay.events[replay.events["kind"].isin(["arrived", "token", "finished"])]
    said: dict[str, float] = {}
    tokens: dict[str, int] = {}
    rows = []
    for kind, owner in zip(events["kind"], events["owner"], strict=True):
        request = requests[owner]
        if kind == "arrived":
            most = request.max_tokens or replay.executor.max_model_len - request.prompt_tokens
            said[owner] = expected.predict(request, most)
        elif kind == "token":
            tokens[owner] = tokens.get(owner, 0) + 1
        else:
            expected.learn(request, tokens[owner])
            rows.append((owner, said[owner], tokens[owner]))
    return pd.DataFrame(rows, columns=["request_id", "predicted", "output_tokens"]).set_index("request_id")


NAMED: Mapping[str, type[Oracle] | type[Max] | type[History]] = {"oracle": Oracle, "max": Max, "history": History}
