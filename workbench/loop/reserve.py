"""What a plan takes is reserved before its step runs: blocks, slots and arena rows, each with what gives it back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workbench.core import AdapterInfo, AdapterLoad, Backward, Batch, Request, Segment
from workbench.loop.plan import Plan
from workbench.loop.pools import Version
from workbench.loop.states import JobState, RequestState
from workbench.loop.tiers import bring_to_host, choose

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger


class Reservation:
    """Everything that one plan takes from a ledger: `batch` reserves it, `give_back` undoes that in reverse order, bit for bit.

    `at_start` lists what happens at the start of the step, as event rows have it: (kind, owner, adapter, value, note).
    """

    __slots__ = ("at_start", "ledger", "plan", "undo")

    def __init__(self, ledger: "Ledger", plan: Plan) -> None:
        self.ledger, self.plan = ledger, plan
        self.undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.at_start: list[tuple[str, str, str | None, float | None, str]] = []

    def give_back(self) -> None:
        """Undo it all."""
        for undo, args in reversed(self.undo):
            undo(*args)
        self.undo.clear()

    def adapter_moves(self, kind: str, version: Version, value: float | None) -> None:
        """What happens to an adapter at the start of the step."""
        self.at_start.append((kind, version[0], version[0], value, f"version {version[1]}"))

    def batch(self) -> Batch:
        """Reserve it all, and give the step's Batch."""
        ledger, plan, undo = self.ledger, self.plan, self.undo
        if plan.rejected or plan.preempted:
            for s, reason in plan.rejected.values():
                self._release(s)
                self.at_start.append(("aborted" if s.admitted else "rejected", s.id, s.adapter, None, reason))
            for s in plan.preempted.values():
                self._release(s)
                self.at_start.append(("preempted", s.id, s.adapter, None, ""))
        loads = self._swap_slots() if plan.loads or plan.evicted else ()
        segments: list[Segment] = []
        if plan.finetunes or plan.evaluates:
            segments += [self._training_segment(s, n, "finetune") for s, n in plan.finetunes]
            segments += [self._training_segment(s, n, "evaluate") for s, n in plan.evaluates]
        admitted: tuple[Request, ...] = ()
        if plan.prefills:
            # all of them before any block is taken, which may evict what another one has found
            for owner, found in plan.found.items():
                self._hold_found(ledger.requests[owner], found)
            segments += sorted([self._prefill_segment(s, n, info) for s, n, info in plan.prefills], key=_by_adapter)
            admitted = tuple([s.request for s, _, _ in plan.prefills if not s.admitted])
        if plan.decodes_all:
            needed = ledger.decoding.need_block()
            if needed:
                self._grow(tuple(needed))
        elif plan.decodes:
            ledger.apart()
        if not plan.decodes_all or ledger.needs_rows:
            segments += sorted([self._decode_segment(s) for s in plan.decodes], key=_by_adapter)
        released: tuple[str, ...] = ()
        if ledger.released and not plan.empty:
            released = tuple(ledger.released)
            undo.append((ledger.released.extend, (released,)))
            ledger.released.clear()
        backwards = tuple([self._backward(s, n) for s, n in plan.backwards]) if plan.backwards else ()
        return Batch(ledger.step, tuple(segments), backwards, loads, admitted, released)

    def _release(self, s: RequestState) -> None:
        if not s.blocks:
            return
        self.undo.append((self._unrelease, (s, s.blocks, s.capacity, s.prefilled)))
        self.ledger.blocks.give(s.blocks)
        if s.key is not None:
            self.ledger.slots.drop(s.key)
        s.blocks, s.table, s.capacity, s.prefilled = [], (), 0, 0

    def _unrelease(self, s: RequestState, blocks: list[int], capacity: int, prefilled: int) -> None:
        self.ledger.blocks.ungive(blocks)
        if s.key is not None:
            self.ledger.slots.undrop(s.key)
        s.blocks, s.table, s.capacity, s.prefilled = blocks, (), capacity, prefilled

    def _swap_slots(self) -> tuple[AdapterLoad, ...]:
        ledger, plan, slots = self.ledger, self.plan, self.ledger.slots
        for key in sorted(plan.evicted):
            self._evict(key)
        loads: list[AdapterLoad] = []
        keep = plan.versions | plan.loads.keys()
        for key, info in plan.loads.items():
            read_s = bring_to_host(self, key, info, keep)
            if not slots.free:
                self._evict(choose(ledger, "gpu", key[0], slots.idle(keep)) if "gpu" in ledger.evict else slots.victim(keep))
            slot = slots.load(key, info.bytes, ledger.step, fresh=key not in plan.versions)
            self.undo.append((slots.unload, (key,)))
            self.adapter_moves("adapter_loaded", key, float(info.bytes))
            loads.append(AdapterLoad(key[0], key[1], slot.index, info.rank, info.bytes, read_s))
        return tuple(loads)

    def _evict(self, key: Version) -> None:
        self.undo.append((self.ledger.slots.restore, (key, self.ledger.slots.unload(key))))
        self.adapter_moves("adapter_evicted", key, None)

    def _prefill_segment(self, s: RequestState, n: int, info: AdapterInfo | None) -> Segment:
        ledger, block_tokens = self.ledger, self.ledger.info.block_tokens
        if not s.capacity:
            num_found = len(s.blocks)
            self.undo.append((self._unbegin, (s, num_found, s.key, s.info)))
            s.info = info
            s.key = None if info is None else (info.name, info.version)
            s.blocks += ledger.blocks.take(-(-s.context // block_tokens) - num_found)
            s.capacity = len(s.blocks) * block_tokens
            if s.key is not None:
                self.undo.append((ledger.slots.unhold, (s.key, ledger.slots.hold(s.key, ledger.step))))
        end = s.prefilled + n
        blocks = tuple(s.blocks[: -(-end // block_tokens)])
        version = 0 if s.key is None else s.key[1]
        return ledger.segment("prefill", s.id, s.adapter, version, s.prefilled, n, blocks, end == s.context)

    def _unbegin(self, s: RequestState, num_found: int, key: Version | None, info: AdapterInfo | None) -> None:
        self.ledger.blocks.untake(s.blocks[num_found:])
        s.blocks, s.table, s.capacity, s.key, s.info = s.blocks[:num_found], (), 0, key, info

    def _hold_found(self, s: RequestState, found: list[int]) -> None:
        assert self.ledger.cache is not None and not s.blocks
        self.undo.append((self._unhold_found, (s, found, self.ledger.cache.hold(found), s.cached)))
        s.blocks = list(found)
        s.prefilled = s.cached = len(found) * self.ledger.info.block_tokens

    def _unhold_found(self, s: RequestState, found: list[int], places: list[int | None], cached: int) -> None:
        assert self.ledger.cache is not None
        self.ledger.cache.unhold(found, places)
        s.blocks, s.prefilled, s.cached = [], 0, cached

    def _decode_segment(self, s: RequestState) -> Segment:
        if s.capacity < s.context:
            self._grow((s,))
        if not s.table:
            s.table = tuple(s.blocks)
        version = 0 if s.key is None else s.key[1]
        return self.ledger.segment("decode", s.id, s.adapter, version, s.context - 1, 1, s.table, True)

    def _grow(self, states: tuple[RequestState, ...]) -> None:
        self.ledger.grow(states)
        self.undo.append((self._ungrow, (states,)))

    def _ungrow(self, states: tuple[RequestState, ...]) -> None:
        self.ledger.blocks.untake([s.blocks.pop() for s in states])
        for s in states:
            s.table = ()
            s.capacity -= self.ledger.info.block_tokens

    def _training_segment(self, j: JobState, n: int, kind: Any) -> Segment:
        if j.rows is None:
            assert self.plan._arena is not None
            start, rows = self.plan._arena.ranges[j.id]
            self.ledger.arena.ranges[j.id] = (start, rows)
            j.rows = start
            self.undo.append((self._unreserve, (j,)))
        index = j.index if kind == "finetune" else j.eval_index
        return self.ledger.segment(kind, j.id, j.job.adapter, 0, j.offset, n, micro_batch=index, rows=j.rows, documents=j.current.documents)

    def _unreserve(self, j: JobState) -> None:
        self.ledger.arena.release(j.id)
        j.rows = None

    def _backward(self, j: JobState, n: int) -> Backward:
        assert j.rows is not None
        m = j.current
        return Backward(
            j.id, j.job.adapter, j.index, j.rows, m.documents, j.layers_left, n, m.ends_window, j.layers_left == self.ledger.info.num_layers
        )


def _by_adapter(segment: Segment) -> tuple[str, int]:
    return (segment.adapter or "", segment.version)
