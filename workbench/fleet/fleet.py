"""`Fleet`: several runtime instances in one replay, requests and fine-tune jobs spread over them by a router."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.config import require
from workbench.core import AdapterInfo, Executor, ExecutorInfo
from workbench.fleet.routers import LeastLoaded
from workbench.model_error import of_fleet


@dataclass(frozen=True)
class Fleet:
    """Replicas of an executor under one clock: `replay(trace, executor=Fleet(model, 8, router=RoundRobin()), policy=...)`.

    `executor` with `replicas`: instances of that executor, by its `replicas(num)`. Each of a LatencyModel's has all of its limits, as if
    on a device of its own. Those of an `Engine` share its base weights, adapters and recorded graphs, each has an equal share of
    KV blocks, adapter slots and arena rows, and they run one after another under the virtual clock: an executed fleet. A sequence of
    executors (engines on two GPUs, say): each is one replica. With `clock="wall"` these run side by side, every engine's steps in a thread
    of its own; they share one Python, so the host's work of a step must be short beside the device's. Parts of one engine cannot.

    `router` gives each request a replica when it arrives (`wb.routers`; a function `(request, fleet) -> int` will do). A job goes
    to the replica that `placement` names for its id, else where the router says. `homes` names the replicas that have an adapter in host
    memory; one that it leaves out is everywhere. A request for an adapter that its replica lacks waits until that has come from
    another replica, which takes `migration_s` (seconds, or a function of AdapterInfo; None: as long as the sender's predictor says
    that a load lasts) beside the steps; so does every version that a job publishes on its way to the other homes. (On the wall clock the
    loop also waits for the steps that the two replicas are in, when weights go from one engine to another.) Copying it from host
    memory to the device is part of a step, as without a fleet. Routing takes no time on the clock. `plan.stop_on_arrival()` stops a step
    for an arrival at any replica.
    """

    executor: Any
    replicas: int | None = None
    router: Any = field(default_factory=LeastLoaded)
    placement: Mapping[str, int] = field(default_factory=dict)
    homes: Mapping[str, int | Sequence[int]] | None = None
    migration_s: float | Callable[[AdapterInfo], float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.executor, Sequence):
            executors = tuple(self.executor)
            object.__setattr__(self, "executor", executors)
            require(len(executors) >= 1, "a fleet must have at least 1 executor", executors)
            rule = "replicas must be left out, or the number of executors"
            require(self.replicas in (None, len(executors)), rule, self.replicas, f"There are {len(executors)} executors.")
            require(len({id(e) for e in executors}) == len(executors), "executors must differ", executors, "Pass one, and replicas=.")
            layers = sorted({e.info.num_layers for e in executors})
            require(len(layers) == 1, "replicas must run one model: num_layers must be equal", layers)
            object.__setattr__(self, "replicas", len(executors))
        require(self.replicas is not None and self.replicas >= 1, "replicas must be at least 1", self.replicas, "Pass replicas=2, say.")
        require(callable(getattr(self.router, "route", self.router)), "router must have route(request, fleet)", self.router)
        for name, homes in [*self.placement.items(), *(self.homes or {}).items()]:
            for number in homes_of(homes):
                self.check_number(number, f"the replica of {name!r}")
        if isinstance(self.migration_s, (int, float)):
            require(self.migration_s >= 0, "migration_s must be at least 0 seconds", self.migration_s)

    @property
    def num(self) -> int:
        assert self.replicas is not None
        return self.replicas

    def check_number(self, number: Any, what: str) -> None:
        """Raise ValueError unless `number` is one of the replicas'."""
        is_one = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < self.num
        require(is_one, f"{what} must lie in 0..{self.num - 1}", number)

    def open(self) -> tuple[Executor, ...]:
        """An executor for each replica. Raises ValueError for several replicas of one that cannot give them."""
        if isinstance(self.executor, tuple):
            return self.executor
        if self.num == 1:
            return (self.executor,)
        make = getattr(self.executor, "replicas", None)
        if make is None:
            name = type(self.executor).__name__
            raise ValueError(f"several replicas need an executor with replicas(num), got {name}. Pass a list of executors instead.")
        return tuple(make(self.num))

    @property
    def info(self) -> ExecutorInfo:
        """The limits of replica 0, under the fleet's name."""
        executors = self.open()
        names = list(dict.fromkeys(e.info.name for e in executors))
        name, simulated = f"{self.num} x {', '.join(names)}", all(e.info.simulated for e in executors)
        return replace(executors[0].info, name=name, simulated=simulated, model_error=of_fleet([e.info for e in executors]))

    @property
    def redrawn(self) -> tuple[str, ...]:
        """What differs from seed to seed on one trace, as a LatencyModel says of itself."""
        executors = self.executor if isinstance(self.executor, tuple) else (self.executor,)
        return tuple(dict.fromkeys(name for e in executors for name in getattr(e, "redrawn", ())))


def homes_of(value: int | Sequence[int]) -> tuple[int, ...]:
    """The replicas of one entry of `Fleet.homes`."""
    return (value,) if isinstance(value, int) else tuple(value)
