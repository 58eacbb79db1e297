"""The prefix cache: full KV blocks of prompts that are found again by what they hold, shared by reference count, and evicted by age.

The design is vLLM's automatic prefix caching (Kwon et al., arXiv 2309.06180, and vLLM's design notes): a hash map from block content to
block id. RadixAttention (SGLang, arXiv 2312.07104) keeps the same facts in a tree. A block's key is a hash chain over all tokens up to its
end; the maps are kept apart by (adapter, version), which is as if the version were the first link of the chain.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np

from workbench.core import AdapterInfo, Request
from workbench.data import PREFIX_TOKENS
from workbench.loop.pools import Version

BlockKey = bytes | tuple[bytes, int]
"""What a block holds: a digest of all tokens up to its end; or, for drawn prompts, of what they are drawn from, and the block's place."""


def prompt_keys(request: Request, block_tokens: int) -> list[BlockKey]:
    """The keys of a prompt's full blocks, in order: equal exactly where all tokens up to the block's end are.

    Made from `prompt_token_ids` where they are given. From `prefix_ids` otherwise, without drawing any ids: equal entries stand for equal
    tokens (`data.prompt_token_ids`), and what follows them belongs to this request alone. A prompt of which only the length is known,
    and a text that nobody has tokenised, have no keys: such a request finds nothing and leaves nothing to be found.
    """
    num = request.prompt_tokens // block_tokens
    if request.prompt_token_ids is not None:
        return _chain(request.prompt_token_ids, min(num, len(request.prompt_token_ids) // block_tokens), block_tokens)
    if request.prompt is not None or not request.prefix_ids:
        return []
    keys: list[BlockKey] = []
    digest = b""
    for chunk, prefix in enumerate(request.prefix_ids):
        digest = hashlib.blake2b(digest + str(prefix).encode(), digest_size=16).digest()
        end = min((chunk + 1) * PREFIX_TOKENS // block_tokens, num)  # blocks that end within this chunk
        keys += [(digest, i) for i in range(len(keys), end)]
    if len(keys) < num:
        own = hashlib.blake2b(digest + request.request_id.encode(), digest_size=16, person=b"request").digest()
        keys += [(own, i) for i in range(len(keys), num)]
    return keys


def _chain(token_ids: Sequence[int], num: int, block_tokens: int) -> list[BlockKey]:
    data = np.asarray(token_ids[: num * block_tokens], dtype=np.int64).tobytes()
    size, key = 8 * block_tokens, b""
    keys: list[BlockKey] = []
    for start in range(0, num * size, size):
        key = hashlib.blake2b(key + data[start : start + size], digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """The KV pool's blocks when prefixes are cached: a `pools.BlockPool` that also counts references and remembers contents.

    Every block is either held, *cached* (nobody holds it, but it has a key) or free. `refs` counts the holders of a block that has a key
    or several holders; any other held block has one. `take` hands out free blocks first and then evicts cached ones, least recently
    used first; a request gives its blocks back from the last to the first, so that a prefix outlives what follows it. Free and cached
    blocks together are what a plan may take (`num_free`).

    Nothing is ever copied on write, because a block with a key is full and nobody writes to it again: a request that finds k blocks begins
    to compute at token k * block_tokens, and writes only to blocks of its own. At least the last token has to be computed for a token to be
    sampled: where all of a prompt is cached and its length is a multiple of `block_tokens`, its last block is not shared but
    computed again, `block_tokens` tokens where one would do, as vLLM does.
    Only blocks full of prompt tokens get a key: an executor without text does not know the generated ones, and what is found must not
    depend on the executor. Of two requests that compute the same block in one step, the first one's is kept.
    """

    __slots__ = ("_clock", "cached", "evicted", "free", "keys", "num_blocks", "refs", "tables")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, int] = OrderedDict()  # -> when it was given back; in that order
        self.refs: dict[int, int] = {}
        self.keys: dict[int, tuple[Version | None, BlockKey]] = {}
        self.tables: dict[Version | None, dict[BlockKey, int]] = {}
        self.evicted: list[tuple[int, int, Version | None, BlockKey]] = []  # by this step: what `untake` needs
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Blocks that could be taken: free or cached."""
        return len(self.free) + len(self.cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def snapshot(self) -> dict[str, Any]:
        """The pool as a value to compare."""
        return {"free": list(self.free), "cached": list(self.cached), "refs": dict(self.refs), "keys": dict(self.keys)}

    def holders(self, block: int) -> int:
        """How many requests hold a block that is held or cached."""
        return self.refs.get(block, 1)

    # contents

    def find(self, version: Version | None, keys: Sequence[BlockKey], most: int) -> list[int]:
        """The blocks that hold the longest known prefix of `keys` under this adapter version (None: the base), at most `most`."""
        table = self.tables.get(version)
        found: list[int] = []
        if table is not None:
            for key in islice(keys, most):
                block = table.get(key)
                if block is None:
                    break
                found.append(block)
        return found

    def register(self, version: Version | None, keys: Sequence[BlockKey], blocks: Sequence[int]) -> None:
        """Let others find these blocks, which are full and committed; a content that has a block already keeps that one."""
        table = self.tables.setdefault(version, {})
        for key, block in zip(keys, blocks, strict=True):
            if table.setdefault(key, block) == block:
                self.keys[block] = (version, key)
                self.refs[block] = 1

    def forget_stale(self, infos: Mapping[str, AdapterInfo]) -> None:
        """Forget everything computed by a version that is not the current one of `infos`; who holds its blocks keeps them."""
        stale = [v for v in self.tables if v is not None and (v[0] not in infos or infos[v[0]].version != v[1])]
        for version in stale:
            self.forget(list(self.tables[version].values()))

    def forget(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks any more: cached ones become free."""
        for block in blocks:
            self._drop_key(block)
            if self.cached.pop(block, None) is not None:
                del self.refs[block]
                self.free.append(block)
            elif self.refs[block] == 1:
                del self.refs[block]

    def _drop_key(self, block: int) -> tuple[Version | None, BlockKey]:
        version, key = self.keys.pop(block)
        table = self.tables[version]
        del table[key]
        if not table:
            del self.tables[version]
        return version, key

    # blocks that are found

    def hold(self, blocks: list[int]) -> list[int | None]:
        """Share found blocks with one more request; returns what `unhold` needs to undo it."""
        places = [self.cached.pop(block, None) for block in blocks]
        for block in blocks:
            self.refs[block] += 1
        return places

    def unhold(self, blocks: list[int], places: list[int | None]) -> None:
        """Undo a `hold`: each block goes back to its place among the cached ones."""
        for block, place in zip(blocks, places, strict=True):
            self.refs[block] -= 1
            if place is not None:
                self.cached[block] = place
        self.cached = OrderedDict(sorted(self.cached.items(), key=itemgetter(1)))

    # blocks to write to

    def take(self, num: int) -> list[int]:
        """`num` blocks for one owner to write to: free ones, then evicted ones."""
        assert num <= self.num_free, (num, self.num_free)
        if num == 0:
            return []
        taken = self.free[-num:][::-1]
        del self.free[-num:]
        while len(taken) < num:
            block, given = self.cached.popitem(last=False)
            del self.refs[block]
            self.evicted.append((block, given, *self._drop_key(block)))
            taken.append(block)
        return taken

    def untake(self, blocks: list[int]) -> None:
        """Undo a `take` that was the last change of the pool. What it evicted is cached again, for `Ledger.rollback` to forget."""
        for block in reversed(blocks):
            if self.evicted and self.evicted[-1][0] == block:
                _, given, version, key = self.evicted.pop()
                self.cached[block] = given
                self.refs[block] = 0
                self.keys[block] = (version, key)
                self.tables.setdefault(version, {})[key] = block
            else:
                self.free.append(block)

    def give(self, blocks: list[int]) -> None:
        """One request less holds these blocks; those that nobody holds any more become cached, or free without a key."""
        refs = self.refs
        if not refs:
            self.free.extend(reversed(blocks))
            return
        for block in reversed(blocks):
            left = refs.get(block, 1) - 1
            if block in self.keys:
                refs[block] = left
                if left == 0:
                    self.cached[block] = self._clock
                    self._clock += 1
            elif left == 0:
                self.free.append(block)
            elif left == 1:
                del refs[block]
            else:
                refs[block] = left

    def ungive(self, blocks: list[int]) -> None:
        """Undo a `give` that was the last change of the pool."""
        for block in blocks:
            if self.cached.pop(block, None) is not None:
                self.refs[block] = 1
            elif self.free and self.free[-1] == block:
                self.free.pop()
            else:
                self.refs[block] = self.refs.get(block, 1) + 1
