"""What a plan has taken and what that leaves: the counting underneath the verbs of `plan.Plan`."""

from collections.abc import Callable
from math import inf, isinf, nan
from typing import TYPE_CHECKING, Literal, TypeVar

from workbench.core import AdapterInfo
from workbench.features import Work
from workbench.pools import Arena, Version
from workbench.views import Room

if TYPE_CHECKING:
    from workbench.ledger import Ledger
    from workbench.states import JobState, RequestState

Why = Literal[
    "", "tokens", "requests", "blocks", "activation", "batch_adapters", "slots", "adapter_loading", "within_s", "phase", "unsupported"
]
Self = TypeVar("Self", bound="Accounts")


class PlanError(ValueError):
    """A verb was misused: a request named twice, one that has ended, an unknown job, a negative amount."""


class Accounts:
    """The content of a plan and the limits that it leaves. Nothing here touches the ledger.

    `named` holds the owners with work in this plan, `versions` the serving versions that its rows need, `dropped` how many residents
    it takes off each version, `loads` the versions that it copies to the device, `found` the cached blocks that a prefill begins with.
    `refused` holds why a serving verb left a request out altogether, `queue_why` why prefill stopped before the end of its queue.
    """

    __slots__ = (
        "_arena",
        "_blocks",
        "_kind",
        "_ledger",
        "_predicted_s",
        "_refs",
        "_requests",
        "_slots",
        "_tokens",
        "backwards",
        "decodes",
        "dropped",
        "evaluates",
        "evicted",
        "finetunes",
        "found",
        "held",
        "loads",
        "named",
        "preempted",
        "prefills",
        "queue_why",
        "refused",
        "rejected",
        "repeat_steps",
        "stops_on_arrival",
        "versions",
        "wait_until_s",
        "why",
        "work",
    )

    def __init__(self, ledger: "Ledger") -> None:
        self._ledger = ledger
        self._tokens = ledger.info.max_batch_tokens
        self._requests = ledger.info.max_requests - ledger.num_resident
        self._blocks = ledger.blocks.num_free
        self._refs: dict[int, int] = {}  # by which this plan changes the cache's reference counts
        self._slots = ledger.slots.num_available
        self._arena: Arena | None = None
        self._kind = ""
        self._predicted_s: float | None = 0.0
        self.why: Why = ""
        self.queue_why: Why = ""
        self.refused: dict[str, Why] = {}
        self.work = Work()
        self.named: set[str] = set()
        self.versions: set[Version] = set()
        self.decodes: list[RequestState] = []
        self.prefills: list[tuple[RequestState, int, AdapterInfo | None]] = []
        self.finetunes: list[tuple[JobState, int]] = []
        self.evaluates: list[tuple[JobState, int]] = []
        self.backwards: list[tuple[JobState, int]] = []
        self.preempted: dict[str, RequestState] = {}
        self.rejected: dict[str, tuple[RequestState, str]] = {}
        self.found: dict[str, list[int]] = {}
        self.dropped: dict[Version, int] = {}
        self.loads: dict[Version, AdapterInfo] = {}
        self.evicted: set[Version] = set()
        self.held: dict[str, bool] = {}
        self.stops_on_arrival = False
        self.wait_until_s: float | None = None
        self.repeat_steps: int | None = 0

    def copy(self: Self) -> Self:
        """An independent plan with the same content, for search; the original is the one that runs."""
        other = type(self).__new__(type(self))
        for name in Accounts.__slots__:
            value = getattr(self, name)
            setattr(other, name, value.copy() if isinstance(value, (list, set, dict, Work, Arena)) else value)
        return other

    @property
    def left(self) -> Room:
        """What the verbs so far leave of every limit."""
        arena = self._arena or self._ledger.arena
        return Room(
            tokens=self._tokens,
            requests=self._requests,
            blocks=self._blocks,
            batch_adapters=self._ledger.info.max_batch_adapters - len(self.versions),
            slots=self._slots,
            activation_tokens=arena.num_rows - arena.num_used,
        )

    @property
    def empty(self) -> bool:
        """Whether the executor would have nothing to do (rejecting, preempting, evicting and holding are no work)."""
        return not (self.decodes or self.prefills or self.finetunes or self.evaluates or self.backwards or self.loads)

    @property
    def changes(self) -> bool:
        """Whether it changes the ledger at all, with work or without."""
        return bool(not self.empty or self.rejected or self.preempted or self.evicted or self.held)

    @property
    def predicted_s(self) -> float:
        """Predicted duration of the whole plan in seconds; 0 when empty, NaN on an executor without a predictor."""
        if self._predicted_s is None:
            predictor = self._ledger.predictor
            self._predicted_s = nan if predictor is None else predictor.predict(self.work)
        return self._predicted_s

    def __repr__(self) -> str:
        parts = [f"decode {len(self.decodes)}"] if self.decodes else []
        parts += [f"prefill {s.id}:{n}" for s, n, _ in self.prefills]
        for verb, chunks in (("finetune", self.finetunes), ("evaluate", self.evaluates), ("backward", self.backwards)):
            parts += [f"{verb} {s.id}:{n}" for s, n in chunks]
        parts += [f"{verb} {len(names)}" for verb, names in (("preempt", self.preempted), ("reject", self.rejected)) if names]
        return f"Plan({', '.join(parts) or 'empty'}, why={self.why!r})"

    # checks of misuse

    def _check_amount(self, name: str, amount: int | None) -> None:
        if amount is not None and amount < 0:
            raise PlanError(f"{name} must be at least 0, or None for all that fits, got {amount}")

    def _check_within(self, within_s: float) -> None:
        if isinf(within_s) and within_s > 0:
            return
        if not within_s >= 0:
            raise PlanError(f"within_s must be at least 0 seconds, got {within_s}")
        if self._ledger.predictor is None:
            raise PlanError(
                f"within_s needs an executor that predicts durations, {self._ledger.info.name!r} has predictor=None. "
                "Fit a LatencyModel to its steps, or bound the tokens instead."
            )

    def _check_named(self, name: str) -> None:
        if name in self.named:
            raise PlanError(f"a request or job may be named once in a plan, got {name!r} twice")

    # counting

    def _is_kind(self, kind: str) -> bool:
        """Whether this kind of work may join the batch; an executor without "mixed" takes one kind a batch."""
        if self._kind in ("", kind) or "mixed" in self._ledger.info.can:
            return True
        self.why = "unsupported"
        return False

    def _took(self, kind: str) -> None:
        self._kind = kind
        self._predicted_s = None

    def _is_idle_slot(self, key: Version) -> bool:
        """Whether the slot of `key` would be free to evict after what this plan takes off it."""
        slot = self._ledger.slots.entries.get(key)
        return slot is not None and not slot.fresh and key not in self.versions and slot.refs == self.dropped.get(key, 0)

    def _has_slot(self, key: Version) -> bool:
        """Whether rows of this version could join the batch: it sits in a slot that nothing else takes, or it can be loaded."""
        if key in self.versions or key in self.loads:
            return True
        if key in self.evicted:
            return False
        return (key in self._ledger.slots.entries and not self._is_idle_slot(key)) or self._slots > 0

    def _use(self, key: Version) -> None:
        """Mark a version as needed by this batch, so that it is not evicted for another."""
        if key not in self.versions:
            self._slots -= self._is_idle_slot(key)
            self.versions.add(key)

    def _load(self, key: Version, info: AdapterInfo) -> None:
        self.loads[key] = info
        self._slots -= 1

    def _release(self, s: "RequestState") -> None:
        """Count what a resident request gives back when this plan takes it off."""
        if self._ledger.cache is None:
            self._blocks += len(s.blocks)
        else:
            for block in s.blocks:
                self._refs[block] = self._refs.get(block, 0) - 1
                self._blocks += self._holders(block) == 0
        self._requests += 1
        if s.key is not None:
            self.dropped[s.key] = self.dropped.get(s.key, 0) + 1
            self._slots += self._is_idle_slot(s.key)

    def _holders(self, block: int) -> int:
        """How many requests hold a block once this plan is applied, what it begins included."""
        cache = self._ledger.cache
        return 1 if cache is None else cache.holders(block) + self._refs.get(block, 0)

    def _share(self, s: "RequestState", found: list[int]) -> None:
        """Let a request that begins in this plan hold the blocks that it found."""
        self.found[s.id] = found
        for block in found:
            self._refs[block] = self._refs.get(block, 0) + 1

    def _preempt_youngest(self, keep: "RequestState") -> bool:
        """Preempt the youngest resident request other than `keep` that this plan does not use and that alone holds a block.

        One that shares all its blocks frees none: the others still hold them.
        """
        victims = [
            s
            for s in self._ledger.resident_states()
            if s is not keep and s.id not in self.named and s.id not in self.preempted and s.id not in self.rejected
            if any(self._holders(block) == 1 for block in reversed(s.blocks))
        ]
        if not victims:
            return False
        victim = max(victims, key=lambda s: (s.arrival_s, s.seq))
        self._release(victim)
        self.preempted[victim.id] = victim
        return True

    def _largest(self, most: int, add: Callable[[Work, int], None], within_s: float, *, whole: bool = False) -> int:
        """The largest amount up to `most` with which the plan is predicted to last at most `within_s`; 0 if none. By bisection."""
        if within_s == inf or most == 0:
            return most
        predictor = self._ledger.predictor
        assert predictor is not None

        def fits(amount: int) -> bool:
            work = self.work.copy()
            add(work, amount)
            return predictor.predict(work) <= within_s

        if fits(most):
            return most
        low, high = 0, most
        while high - low > 1 and not whole:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
