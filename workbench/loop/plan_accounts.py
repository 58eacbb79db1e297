"""What a plan has taken and what that leaves: the counting underneath the verbs of `plan.Plan`."""

from collections.abc import Callable
from math import inf, nan
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from workbench.core import AdapterInfo
from workbench.features import Work
from workbench.loop.pools import Arena, Version
from workbench.loop.views import JobView, RequestView, Room

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger
    from workbench.loop.states import JobState, RequestState

Why = Literal[
    "", "tokens", "requests", "blocks", "activation", "batch_adapters", "slots", "adapter_loading", "within_s", "phase", "unsupported"
]
Self = TypeVar("Self", bound="Accounts")


MAX_AIMS = 4
"""How often the search for the largest amount aims along a straight line before it bisects."""


class Trained(NamedTuple):
    """A call of a verb that trains: its arguments, what was served before (`Accounts.served`), and what it took."""

    verb: str
    job: "JobState"
    amount: int | None
    within_s: float
    after: tuple[bool, int, int]
    taken: int


class PlanError(ValueError):
    """A verb was misused: a request named twice, one that has ended, an unknown job, a negative amount."""


class Accounts:
    """The content of a plan and the limits that it leaves. Nothing here touches the ledger.

    `decodes` holds the requests that decode, `named` the owners with work in this plan; where all running requests decode, the plan only
    says so (`decodes_all`). `versions` holds the serving versions that its rows need, `dropped` how many residents
    it takes off each version, `loads` the versions that it copies to the device, `found` the cached blocks that a prefill begins with.
    `trained` holds the calls of the verbs that train, with what each took.
    `refused` holds why a serving verb left a request out altogether, `queue_why` why prefill stopped before the end of its queue.
    """

    __slots__ = (
        "_all",
        "_arena",
        "_blocks",
        "_decodes",
        "_found_s",
        "_kind",
        "_ledger",
        "_named",
        "_predicted_s",
        "_refs",
        "_requests",
        "_slots",
        "_tokens",
        "backwards",
        "dropped",
        "evaluates",
        "evicted",
        "finetunes",
        "found",
        "held",
        "loads",
        "preempted",
        "prefills",
        "queue_why",
        "refused",
        "rejected",
        "repeat_steps",
        "stop_after_s",
        "stops_on_arrival",
        "trained",
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
        self._found_s: float | None = None  # predicted with what `_largest` found, where it knows
        self.why: Why = ""
        self.queue_why: Why = ""
        self.refused: dict[str, Why] = {}
        self.work = Work()
        self._named: set[str] = set()
        self.versions: set[Version] = set()
        self._decodes: list[RequestState] = []
        self._all: tuple[RequestView, ...] | None = None
        self.prefills: list[tuple[RequestState, int, AdapterInfo | None]] = []
        self.finetunes: list[tuple[JobState, int]] = []
        self.evaluates: list[tuple[JobState, int]] = []
        self.backwards: list[tuple[JobState, int]] = []
        self.trained: list[Trained] = []
        self.preempted: dict[str, RequestState] = {}
        self.rejected: dict[str, tuple[RequestState, str]] = {}
        self.found: dict[str, list[int]] = {}
        self.dropped: dict[Version, int] = {}
        self.loads: dict[Version, AdapterInfo] = {}
        self.evicted: set[Version] = set()
        self.held: dict[str, bool] = {}
        self.stops_on_arrival = False
        self.stop_after_s = inf
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
    def decodes_all(self) -> bool:
        """Whether it decodes everything that ran when it was made, in that order, with no other decode beside."""
        return self._all is not None

    @property
    def decodes_some(self) -> bool:
        """Whether it decodes requests one by one."""
        return bool(self._decodes)

    def decodes_all_of(self, running: tuple[RequestView, ...] | None) -> bool:
        """Whether it decodes all running requests, and these very ones."""
        return self._all is not None and self._all is running

    @property
    def decodes(self) -> "list[RequestState]":
        """The requests that decode, in the order of the verbs."""
        return self._decodes if self._all is None else [view._state for view in self._all]

    @property
    def served(self) -> tuple[bool, int, int]:
        """How far it serves: whether everything that runs decodes, how many requests do one by one, and how many prefill."""
        return (self._all is not None, len(self._decodes), len(self.prefills))

    def _note(self, verb: str, job: JobView, amount: int | None, within_s: float, taken: int) -> int:
        self.trained.append(Trained(verb, job._state, amount, within_s, self.served, taken))
        return taken

    @property
    def named(self) -> set[str]:
        """The owners with work in this plan."""
        return self._named if self._all is None else self._named | {view._state.id for view in self._all}

    def is_named(self, name: str) -> bool:
        """Whether an owner has work in this plan; asked before the plan is committed."""
        return name in self._named or (self._all is not None and name in self._ledger.running)

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
        return not (self._all or self._decodes or self.prefills or self.finetunes or self.evaluates or self.backwards or self.loads)

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
        if within_s == inf:
            return
        if not within_s >= 0:
            raise PlanError(f"within_s must be at least 0 seconds, got {within_s}")
        if self._ledger.predictor is None:
            raise PlanError(
                f"within_s needs an executor that predicts durations, {self._ledger.info.name!r} has predictor=None. "
                "Fit a LatencyModel to its steps, or bound the tokens instead."
            )

    def _check_named(self, name: str) -> None:
        if name in self._named or (self._all is not None and name in self._ledger.running):
            raise PlanError(f"a request or job may be named once in a plan, got {name!r} twice")

    # counting

    def _is_kind(self, kind: str) -> bool:
        """Whether this kind of work may join the batch; an executor without "mixed" takes one kind a batch."""
        if not self._kind or self._kind == kind or "mixed" in self._ledger.info.can:
            return True
        self.why = "unsupported"
        return False

    def _took(self, kind: str) -> None:
        self._kind = kind
        self._predicted_s, self._found_s = self._found_s, None

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
            if s is not keep and not self.is_named(s.id) and s.id not in self.preempted and s.id not in self.rejected
            if any(self._holders(block) == 1 for block in reversed(s.blocks))
        ]
        if not victims:
            return False
        victim = max(victims, key=lambda s: (s.arrival_s, s.seq))
        self._release(victim)
        self.preempted[victim.id] = victim
        return True

    def _largest(self, kind: str, most: int, put: Callable[[int], None], within_s: float, *, whole: bool = False) -> int:
        """The largest amount up to `most` with which the plan is predicted to last at most `within_s`; 0 if none. It is put into the work.

        `put(amount)` writes the features of the plan with so much of it. Durations must not fall with the amount. The search begins with
        what was found for this kind of work the last time: mostly it still holds.
        """
        self._found_s = None
        if within_s == inf or most == 0:
            if most:
                put(most)
            return most
        work, found, predictor = self.work, self._ledger.found_amounts, self._ledger.predictor
        assert predictor is not None
        predict, before, read_s = predictor.predict, work.values[:], work.read_s

        def seconds(amount: int) -> float:
            put(amount)
            return predict(work)

        # a forward is found again by the tokens of the whole step, which an executor pads
        others = 0 if kind == "backward" else self._ledger.info.max_batch_tokens - self._tokens
        amount = most if whole or kind not in found else min(max(found[kind] - others, 1), most)
        amount_s = seconds(amount)
        if amount_s > within_s:
            low_s = amount_s if whole or amount == 1 else seconds(1)
            if low_s > within_s:
                work.values[:], work.read_s = before, read_s
                return 0
            amount, amount_s = _between(1, low_s, amount, amount_s, seconds, within_s)
        elif amount < most:
            amount, amount_s, high, high_s = _step_up(amount, amount_s, most, seconds, within_s)
            if amount < high:
                amount, amount_s = _between(amount, amount_s, high, high_s, seconds, within_s)
        if amount < most:
            found[kind] = amount + others
        put(amount)
        self._found_s = amount_s
        return amount


def _step_up(low: int, low_s: float, most: int, seconds: Callable[[int], float], within_s: float) -> tuple[int, float, int, float]:
    """Bounds around the largest amount from one that fits: at most `low`, or between it and `most`; equal where that is known."""
    next_s = seconds(low + 1)
    if next_s > within_s:
        return low, low_s, low, low_s
    most_s = next_s if low + 1 == most else seconds(most)
    return (most, most_s, most, most_s) if most_s <= within_s else (low + 1, next_s, most, most_s)


def _between(low: int, low_s: float, high: int, high_s: float, seconds: Callable[[int], float], within_s: float) -> tuple[int, float]:
    """The largest amount that fits and its seconds, where `low` fits and `high` does not, or is `low`.

    Costs are nearly straight lines: it aims at where the line meets the bound; after a few tries it halves, so that no shape takes long.
    """
    tries = 0
    while high - low > 1:
        part = (within_s - low_s) / (high_s - low_s) if tries < MAX_AIMS else 0.5
        middle = min(max(low + int((high - low) * part), low + 1), high - 1)
        middle_s = seconds(middle)
        if middle_s > within_s:
            high, high_s = middle, middle_s
        else:
            low, low_s = middle, middle_s
            # most likely it is the largest: the next one tells
            if tries < MAX_AIMS and low + 1 < high:
                next_s = seconds(low + 1)
                if next_s > within_s:
                    break
                low, low_s = low + 1, next_s
        tries += 1
    return low, low_s
