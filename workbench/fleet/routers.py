"""Routers: which replica of a fleet a request goes to when it arrives, and a job when it starts.

A router is anything with `route(request, fleet) -> int`, a position in `fleet`, a sequence of `ReplicaView`; or that function alone. It
may also have `place(job, fleet) -> int`, else a job goes where fewest are, and `moves(fleet)`, asked after every arrival, which gives
("adapter", name, to): copies of adapters to replicas that lack them. It is copied for each replay.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil, inf
from typing import Any, Literal

from workbench.config import require
from workbench.fleet.view import ReplicaView
from workbench.policies import FCFS, ServeFirst
from workbench.policy import JobView, Plan, Policy, RequestView, View

__all__ = ["ROUTERS", "AdapterAffinity", "LeastLoaded", "PowerOfTwo", "RankAware", "RoundRobin", "Split", "StaticSplit"]

Move = tuple[Literal["adapter"], str, int]
"""What, its name, and the replica that gets it."""


@dataclass(frozen=True)
class RoundRobin:
    """One replica after another, whatever they do.

    Source: folklore; the baseline of every load balancer.
    """

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        return sum(view.num_routed for view in fleet) % len(fleet)


@dataclass(frozen=True)
class LeastLoaded:
    """The replica with the fewest outstanding tokens (prompt and expected output of what has not ended); the first of equals.

    A router sees requests end, not how far they are.
    Source: join the shortest queue (Winston, Journal of Applied Probability 1977), by tokens instead of requests.
    """

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        return least_loaded(fleet)


@dataclass(frozen=True)
class PowerOfTwo:
    """Two replicas drawn at random (by the replay's seed), and of these the one with fewer outstanding tokens.

    Source: Mitzenmacher, The power of two choices in randomized load balancing (IEEE TPDS 2001).
    """

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        first, second = fleet[0].rng.sample(range(len(fleet)), 2) if len(fleet) > 1 else (0, 0)
        return min(first, second, key=lambda k: (fleet[k].outstanding_tokens, k != first))


@dataclass(frozen=True)
class AdapterAffinity:
    """An adapter's requests go to one replica, so that it stays on that device, unless that has more than its share of them all.

    Each adapter ranks the replicas by a hash of both; the first one with fewer outstanding requests than `bound` times the mean
    (rounded up, the new request counted) is taken. A replica more or less moves only the adapters that it gains or loses. Requests
    for the base go where the load is least. Source: rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 1998) with the bound of
    consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018); 1.25 is a usual choice.
    """

    bound: float = 1.25

    def __post_init__(self) -> None:
        require(self.bound >= 1, "bound must be at least 1, or no replica may have room", self.bound)

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        if request.adapter is None:
            return least_loaded(fleet)
        most = inf if self.bound == inf else ceil(self.bound * (sum(view.outstanding for view in fleet) + 1) / len(fleet))
        adapter = request.adapter
        order = sorted(range(len(fleet)), key=lambda k: _weight(adapter, fleet[k].replica), reverse=True)
        return next(k for k in order if fleet[k].outstanding < most)


@dataclass(frozen=True)
class RankAware:
    """The replica that the request's rank costs least: what its coming adds to the time of everybody there.

    The cost is (added prefill time / its expected output + added time of a decode step) * requests there with it, plus `penalty_s` for
    each of them where a decode step would then exceed the token target (`itl_s`, else `tpot_s`, else `token_s`). Times are the
    executor's predictions, plus `rank_s` seconds times requests * largest rank with padded kernels, or times the sum of the ranks with
    unpadded ones. Needs an executor with a predictor. Source: CaraServe (arXiv 2401.11240), its rank-aware scheduling (*recalled*);
    `rank_s` is fitted per device there, 1e-6 s is a placeholder of ours.
    """

    kernel: Literal["padded", "unpadded"] = "unpadded"
    rank_s: float = 1e-6
    token_s: float = 0.05
    penalty_s: float = 1.0

    def __post_init__(self) -> None:
        require(self.kernel in ("padded", "unpadded"), "kernel must be 'padded' or 'unpadded'", self.kernel)

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        return min(range(len(fleet)), key=lambda k: (self.cost_s(request, fleet[k]), fleet[k].outstanding_tokens))

    def cost_s(self, request: RequestView, view: ReplicaView) -> float:
        ranks = [view.rank(name) for name, num in view.outstanding_adapters.items() for _ in range(num)]
        joined = [*ranks, view.rank(request.adapter)]
        # nobody there: what a second one like it would add, for a step's constant is no reason to crowd
        there = () if ranks else (request,)
        decode_s = view.decode_s(*there, request)
        added_s = decode_s - view.decode_s(*there) + self._ranks_s(joined) - self._ranks_s(ranks)
        slo = request.slo
        target = self.token_s if slo is None else slo.itl_s or slo.tpot_s or self.token_s
        is_late = decode_s + self._ranks_s(joined) > target
        return (view.prefill_s(request) / max(request.expected_output, 1.0) + added_s + self.penalty_s * is_late) * len(joined)

    def _ranks_s(self, ranks: list[int]) -> float:
        return self.rank_s * (len(ranks) * max(ranks, default=0) if self.kernel == "padded" else sum(ranks))


@dataclass(frozen=True)
class Split:
    """The last `training` replicas take the jobs and the others the requests, each spread by `router`.

    Source: what `StaticSplit` routes by.
    """

    training: int = 1
    router: Any = field(default_factory=LeastLoaded)

    def __post_init__(self) -> None:
        require(self.training >= 1, "training must be at least 1 replica", self.training)

    def check(self, num_replicas: int) -> None:
        """Raise ValueError for a fleet in which nobody would serve."""
        rule = f"at least one of {num_replicas} replicas must serve: training must be below that"
        require(self.training < num_replicas, rule, self.training, "Raise Fleet(replicas=).")

    def route(self, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
        return route(self.router, request, fleet[: -self.training])

    def place(self, job: JobView, fleet: Sequence[ReplicaView]) -> int:
        return len(fleet) - self.training + place(self.router, job, fleet[-self.training :])

    def moves(self, fleet: Sequence[ReplicaView]) -> Iterable[Move]:
        return moves(self.router, fleet[: -self.training])


@dataclass(frozen=True)
class StaticSplit:
    """A fixed share of the replicas serves, the rest trains: a policy for a `Fleet` that brings its own router.

    The last `training` replicas get the fine-tune jobs and run `train`, the others get the requests, by `router` (None: the fleet's),
    and run `serve`. Source: the split of a cluster into serving and fine-tuning, the usual alternative to co-serving (the separate
    clusters that FlexLLM, arXiv 2402.18789, compares with).
    """

    training: int = 1
    serve: Policy = field(default_factory=FCFS)
    train: Policy = field(default_factory=lambda: ServeFirst(step_s=inf))
    router: Any = None

    def routed(self, router: Any) -> Split:
        """The router to use in place of the fleet's."""
        return Split(self.training, router if self.router is None else self.router)

    def __call__(self, view: View, plan: Plan) -> None:
        (self.train if view.jobs else self.serve)(view, plan)


ROUTERS = (RoundRobin, LeastLoaded, PowerOfTwo, AdapterAffinity, RankAware, Split)
"""The shipped routers, as `docs/policies.md` lists them."""


def least_loaded(fleet: Sequence[ReplicaView]) -> int:
    return min(range(len(fleet)), key=lambda k: fleet[k].outstanding_tokens)


def _weight(adapter: str, replica: int) -> bytes:
    return blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest()


def route(router: Any, request: RequestView, fleet: Sequence[ReplicaView]) -> int:
    """Where `router` sends the request."""
    return getattr(router, "route", router)(request, fleet)


def place(router: Any, job: JobView, fleet: Sequence[ReplicaView]) -> int:
    """Where `router` puts the job; without a `place` of its own, where fewest are now, then where fewest were, then the first."""
    if hasattr(router, "place"):
        return router.place(job, fleet)
    return min(range(len(fleet)), key=lambda k: (len(fleet[k].jobs), fleet[k].num_jobs))


def moves(router: Any, fleet: Sequence[ReplicaView]) -> Iterable[Move]:
    """What `router` wants to be moved now."""
    return router.moves(fleet) if hasattr(router, "moves") else ()
