"""The requests that decode together: one count of steps stands for a token of each, so that a decode step costs the same for 1 and 256.

While every running request decodes in every step, nothing is written per request: a `Stint` keeps what a request had when it joined, and
the count of steps since then is the rest. Who needs a block in a step and who ends with it is known from the count, too.
"""

import heapq
from array import array
from collections.abc import Iterable
from typing import Any

from workbench.loop.pools import Version


class Stint:
    """The time that one request decodes in the group: in steps `first` up to (not including) `last` of the group's count.

    After `count` steps it has generated `base + count` tokens. `last` is None while it goes on. `order` sorts as `running` does, `phase`
    is the remainder of the counts at which it needs a block, `end` the count at which it has reached its limit. `blocks` is its block
    table, which only grows until the request is released.
    """

    __slots__ = ("adapter", "base", "blocks", "end", "first", "group", "last", "order", "owner", "phase", "prompt", "state", "version")

    def __init__(self, group: "Decoding", state: Any, block_tokens: int) -> None:
        self.group: Any = group
        self.state: Any = state
        self.owner: str = state.id
        self.adapter: str | None = state.adapter
        self.version: int = 0 if state.key is None else state.key[1]
        self.prompt: int = state.prompt
        self.first: int = group.count
        self.last: int | None = None
        self.base: int = state.own_generated - group.count
        self.order: int = group.num_joined
        self.phase: int = (state.capacity - state.prompt - self.base + 1) % block_tokens
        self.end: int = state.limit - self.base
        self.blocks: list[int] = state.blocks

    @property
    def row(self) -> tuple[str, int, int]:
        """Sorts as the rows of a batch do."""
        return (self.adapter or "", self.version, self.order)


class Decoding:
    """The running requests of a ledger, as sums. `is_open` only while all of them decode together; else each state counts for itself."""

    __slots__ = (
        "block_tokens",
        "context",
        "count",
        "ends",
        "growing",
        "is_open",
        "last_s",
        "moments",
        "num",
        "num_joined",
        "stints",
        "versions",
    )

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.is_open = False
        self.count = 0
        self.last_s = 0.0
        self.num = self.num_joined = 0
        self.context = 0  # KV tokens that the next decode of all reads
        self.versions: dict[Version, int] = {}
        self.growing: list[dict[Any, None]] = [{} for _ in range(block_tokens)]
        self.ends: dict[int, list[Any]] = {}
        self.moments: list[int] = []  # a heap of the keys of `ends`
        self.stints: list[Stint] = []

    def open(self, states: Iterable[Any]) -> None:
        """Let all running requests, in their order, decode together from now on."""
        assert not self.is_open and not self.num
        self.is_open = True
        for state in states:
            self.join(state)

    def close(self, states: Iterable[Any]) -> None:
        """Let each of them count for itself again."""
        for state in states:
            self.leave(state)
        self.is_open = False

    def join(self, state: Any) -> None:
        if not self.is_open:
            return
        stint = state.stint = Stint(self, state, self.block_tokens)
        self.num_joined += 1
        self.num += 1
        self.context += state.prompt + stint.base + self.count
        if state.key is not None:
            self.versions[state.key] = self.versions.get(state.key, 0) + 1
        self.growing[stint.phase][state] = None
        if stint.end in self.ends:
            self.ends[stint.end].append(state)
        else:
            self.ends[stint.end] = [state]
            heapq.heappush(self.moments, stint.end)

    def leave(self, state: Any) -> None:
        stint = state.stint
        if stint is None:
            return
        state.own_generated = stint.base + self.count
        if self.count > stint.first:
            state.own_last_token_s = self.last_s
            stint.last = self.count
            self.stints.append(stint)
        state.stint = stint.group = stint.state = None
        self.num -= 1
        self.context -= state.prompt + stint.base + self.count
        if state.key is not None:
            left = self.versions[state.key] - 1
            if left:
                self.versions[state.key] = left
            else:
                del self.versions[state.key]
        del self.growing[stint.phase][state]
        ends = self.ends.get(stint.end)
        if ends is not None:
            ends.remove(state)

    def need_block(self, ahead: int = 0) -> dict[Any, None]:
        """Those that need a block in the decode after `ahead` more, in the order of `running`."""
        return self.growing[(self.count + ahead) % self.block_tokens]

    def steps_to_block(self, num_free: int) -> int:
        """For how many more decodes of all `num_free` blocks are enough, or at least for how many."""
        whole, left = divmod(num_free, self.num)
        steps = whole * self.block_tokens
        if whole < 64:
            for ahead in range(self.block_tokens):
                left -= len(self.growing[(self.count + ahead) % self.block_tokens])
                if left < 0:
                    break
                steps += 1
        return steps

    def grow_ahead(self, num_steps: int, num_free: int) -> "tuple[list[Any], array[int]]":
        """Who needs a block in the next decodes, in their order, and the free blocks before each of them, of now `num_free`."""
        growing, first, every = self.growing, self.count, self.block_tokens
        states: list[Any] = []
        free = array("q")
        if num_steps <= every:
            for count in range(first, first + num_steps):
                free.append(num_free)
                needed = growing[count % every]
                if needed:
                    states += needed
                    num_free -= len(needed)
            return states, free
        cycle = [(k, needed) for k in range(every) if (needed := growing[(first + k) % every])]
        for more in range(0, num_steps, every):
            for k, needed in cycle:
                if k + more < num_steps:
                    free.extend(array("q", (num_free,)) * (k + more + 1 - len(free)))
                    states += needed
                    num_free -= len(needed)
        free.extend(array("q", (num_free,)) * (num_steps - len(free)))
        return states, free

    @property
    def steps_to_end(self) -> int:
        """After how many more decodes the first of them ends."""
        moments = self.moments
        while not self.ends[moments[0]]:  # left before it ended
            del self.ends[heapq.heappop(moments)]
        return moments[0] - self.count

    def advance(self, num_steps: int, end_s: float) -> list[Any]:
        """All of them decoded `num_steps` times, last until `end_s`; those that have reached their limit."""
        moments = self.moments
        while moments and moments[0] <= self.count:
            del self.ends[heapq.heappop(moments)]
        self.count += num_steps
        self.context += num_steps * self.num
        self.last_s = end_s
        ended = self.ends.get(self.count)
        return [] if not ended else list(ended)
