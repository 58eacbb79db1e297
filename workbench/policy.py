"""The interface that policies, routers and eviction rules are written against.

A policy is anything that can be called with a View and a Plan: a plain function, or a frozen dataclass whose fields are its parameters.
It may declare `needs = frozenset({"oracle"})`. It is copied for each replay.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from workbench.loop.plan import Plan
from workbench.loop.plan_accounts import PlanError, Why
from workbench.loop.views import AdapterView, JobView, Oracle, RequestView, Room, StepView, View

if TYPE_CHECKING:
    from workbench.fleet.view import ReplicaView

__all__ = [
    "AdapterView",
    "Evict",
    "JobView",
    "Oracle",
    "Plan",
    "PlanError",
    "Policy",
    "RequestView",
    "Room",
    "Router",
    "StepView",
    "View",
    "Why",
    "policy_label",
]

Policy = Callable[[View, Plan], None]
Evict = Callable[[AdapterView, Sequence[AdapterView], View], Sequence[str]]
"""(wanted, evictable, view) -> the names to evict."""


class Router(Protocol):
    """Spreads requests and jobs over the replicas of a `Fleet`: what `workbench.fleet.routers` says of it.

    `route` and `place` give a position in `fleet`, `moves` the adapters to be copied to a replica that lacks them.
    """

    def route(self, request: RequestView, fleet: Sequence["ReplicaView"]) -> int: ...

    def place(self, job: JobView, fleet: Sequence["ReplicaView"]) -> int: ...

    def moves(self, fleet: Sequence["ReplicaView"]) -> Iterable[tuple[Literal["adapter"], str, int]]: ...


def policy_label(policy: Callable[..., Any]) -> str:
    """What names a policy in tables and legends: its repr, or a function's name."""
    name = getattr(policy, "__name__", None)
    return name if isinstance(name, str) else repr(policy)
