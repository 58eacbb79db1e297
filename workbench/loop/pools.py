"""The countable resources of an executor: KV blocks, adapter slots, rows of the activation arena.

Each pool changes only through `take`/`give`-like pairs that undo each other exactly, so that a step can be rolled back bit for bit.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

Version = tuple[str, int]
"""(adapter name, version): what occupies a slot."""


class BlockPool:
    """Ids of free KV blocks, as a stack. `untake` and `ungive` undo the last `take` or `give` exactly."""

    __slots__ = ("free", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self.free)

    def snapshot(self) -> dict[str, Any]:
        """The pool as a value to compare."""
        return {"free": list(self.free)}

    def take(self, num: int) -> list[int]:
        """The next `num` free block ids."""
        assert num <= len(self.free), (num, len(self.free))
        if num == 0:
            return []
        taken = self.free[-num:][::-1]
        del self.free[-num:]
        return taken

    def give(self, blocks: list[int]) -> None:
        """Return blocks."""
        self.free.extend(reversed(blocks))

    def untake(self, blocks: list[int]) -> None:
        """Undo a `take` of these blocks that was the last change of the pool."""
        self.free.extend(reversed(blocks))

    def ungive(self, blocks: list[int]) -> None:
        """Undo a `give` of these blocks that was the last change of the pool."""
        taken = self.take(len(blocks))
        assert taken == blocks


@dataclass(slots=True)
class Slot:
    """One adapter version on the device. `fresh`: loaded ahead and not used yet, so that it is not evicted on demand.

    The protection ends when no request is resident: else versions that nobody came for could block every slot for ever.
    """

    index: int
    bytes: int
    refs: int = 0
    last_used: int = 0
    fresh: bool = False


class SlotTable:
    """Which adapter version sits in which device slot, with reference counts; least recently used first out."""

    __slots__ = ("entries", "free", "num_evictable", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.free = list(range(num_slots - 1, -1, -1))
        self.entries: dict[Version, Slot] = {}
        self.num_evictable = 0

    @property
    def num_used(self) -> int:
        """Slots that a resident request holds."""
        return sum(slot.refs > 0 for slot in self.entries.values())

    @property
    def num_available(self) -> int:
        """Slots that a new version could take."""
        return len(self.free) + self.num_evictable

    def is_evictable(self, version: Version) -> bool:
        slot = self.entries.get(version)
        return slot is not None and slot.refs == 0 and not slot.fresh

    def load(self, version: Version, size_bytes: int, step: int, fresh: bool) -> Slot:
        slot = Slot(self.free.pop(), size_bytes, last_used=step, fresh=fresh)
        self.entries[version] = slot
        self.num_evictable += not fresh
        return slot

    def unload(self, version: Version) -> Slot:
        slot = self.entries.pop(version)
        assert slot.refs == 0, (version, slot)
        self.free.append(slot.index)
        self.num_evictable -= not slot.fresh
        return slot

    def restore(self, version: Version, slot: Slot) -> None:
        """Undo an `unload` that was the table's last change."""
        index = self.free.pop()
        assert index == slot.index
        self.entries[version] = slot
        self.num_evictable += not slot.fresh

    def hold(self, version: Version, step: int) -> tuple[int, bool]:
        """Count one more request on it; returns what `unhold` needs to undo it."""
        slot = self.entries[version]
        before = (slot.last_used, slot.fresh)
        self.num_evictable -= slot.refs == 0 and not slot.fresh
        slot.refs += 1
        slot.last_used, slot.fresh = step, False
        return before

    def unhold(self, version: Version, before: tuple[int, bool]) -> None:
        slot = self.entries[version]
        slot.refs -= 1
        slot.last_used, slot.fresh = before
        self.num_evictable += slot.refs == 0 and not slot.fresh

    def drop(self, version: Version) -> None:
        """Count one request less on it."""
        slot = self.entries[version]
        slot.refs -= 1
        self.num_evictable += slot.refs == 0

    def undrop(self, version: Version) -> None:
        slot = self.entries[version]
        self.num_evictable -= slot.refs == 0
        slot.refs += 1

    def unprotect(self) -> None:
        """What was loaded ahead and not used yet may be evicted on demand, too."""
        for slot in self.entries.values():
            self.num_evictable += slot.fresh
            slot.fresh = False

    def victim(self, keep: Container[Version]) -> Version:
        """The least recently used version that nobody holds and `keep` does not name."""
        return min(self.idle(keep), key=lambda v: (self.entries[v].last_used, self.entries[v].index))

    def idle(self, keep: Container[Version]) -> list[Version]:
        """The versions that nobody holds, that were used since they came, and that `keep` does not name."""
        return [v for v, slot in self.entries.items() if slot.refs == 0 and not slot.fresh and v not in keep]


class Arena:
    """Rows for kept fine-tune activations; each owner has one contiguous range, placed first fit."""

    __slots__ = ("num_rows", "ranges")

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.ranges: dict[str, tuple[int, int]] = {}

    @property
    def num_used(self) -> int:
        return sum(rows for _, rows in self.ranges.values())

    def copy(self) -> "Arena":
        other = Arena(self.num_rows)
        other.ranges = dict(self.ranges)
        return other

    def find(self, rows: int) -> int | None:
        """First row of the first gap of `rows` rows, or None."""
        first = 0
        for start, length in sorted(self.ranges.values()):
            if start - first >= rows:
                return first
            first = start + length
        return first if self.num_rows - first >= rows else None

    def reserve(self, owner: str, rows: int) -> int | None:
        """Reserve a range for `owner`; its first row, or None when there is no gap of that length."""
        assert owner not in self.ranges, owner
        first = self.find(rows)
        if first is not None:
            self.ranges[owner] = (first, rows)
        return first

    def release(self, owner: str) -> None:
        del self.ranges[owner]
