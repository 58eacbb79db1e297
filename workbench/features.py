"""The work in a batch as numbers: what a latency model predicts from, what a step's row records.

Every feature is a sum over the batch's segments (or a count of distinct adapters), so a plan keeps them as running totals.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

from workbench.core import Backward, Batch, Segment

NAMES: tuple[str, ...] = (
    "finetune_tokens",
    "evaluate_tokens",
    "prefill_tokens",
    "decode_tokens",
    "finetune_pairs",  # (query, key) pairs of causal attention, finetune and evaluate
    "prefill_pairs",
    "decode_context",  # tokens read from the KV cache by decode rows
    "requests",
    "samples",  # rows that need logits for sampling
    "adapters",  # distinct (adapter, version) among the rows
    "backward_token_layers",
    "backward_pair_layers",
    "backward_layers",
    "optimizer_steps",
    "loads",
    "load_bytes",
    "backward_starts",  # slices that begin at the model's last layer
)
INDEX = {name: i for i, name in enumerate(NAMES)}


def causal_pairs(documents: Sequence[int], start: int, tokens: int) -> int:
    """Attention pairs of the token range [start, start + tokens) of packed documents; token i of a document sees i + 1 keys."""
    return pairs_until(documents, start + tokens) - pairs_until(documents, start)


def pairs_until(documents: Sequence[int], end: int) -> int:
    """Attention pairs of the first `end` tokens of packed documents."""
    ends, pairs = _sums(tuple(documents))
    whole = bisect_right(ends, end) - 1
    cut = end - ends[whole] if whole + 1 < len(ends) else 0
    return pairs[whole] + cut * (cut + 1) // 2


def totals(documents: tuple[int, ...]) -> tuple[int, int]:
    """Tokens and attention pairs of whole packed documents."""
    ends, pairs = _sums(documents)
    return ends[-1], pairs[-1]


@lru_cache(maxsize=4096)
def _sums(documents: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Tokens and pairs of the first 0, 1, ... documents."""
    return list(accumulate(documents, initial=0)), list(accumulate([n * (n + 1) // 2 for n in documents], initial=0))


class Work:
    """Running totals of `NAMES` for a batch that is being planned. `copy()` and `add_*` make what-ifs cheap.

    `read_s`: declared seconds of reading adapters from disk, which no engine measures, on top of what the features cost.
    """

    __slots__ = ("adapters", "read_s", "values")

    def __init__(self, values: Iterable[float] | None = None, adapters: Iterable[tuple[str, int]] = ()) -> None:
        self.values: list[float] = list(values) if values is not None else [0.0] * len(NAMES)
        self.adapters: set[tuple[str, int]] = set(adapters)
        self.read_s = 0.0

    def copy(self) -> "Work":
        other = Work(self.values, self.adapters)
        other.read_s = self.read_s
        return other

    def add_segment(self, segment: Segment) -> None:
        s, v = segment, self.values
        if s.kind == "decode":
            v[3] += s.tokens
            v[6] += s.end
            v[7] += 1
        elif s.kind == "prefill":
            v[2] += s.tokens
            v[5] += (s.end * (s.end + 1) - s.start * (s.start + 1)) // 2
            v[7] += 1
        else:
            v[0 if s.kind == "finetune" else 1] += s.tokens
            v[4] += causal_pairs(s.documents, s.start, s.tokens)
        v[8] += s.samples
        if s.adapter is not None:
            self.adapters.add((s.adapter if s.kind in ("prefill", "decode") else s.owner, s.version))
            v[9] = len(self.adapters)

    def add_backward(self, backward: Backward) -> None:
        b, v = backward, self.values
        tokens, pairs = totals(b.documents)
        v[10] += tokens * b.num_layers
        v[11] += pairs * b.num_layers
        v[12] += b.num_layers
        v[13] += b.is_last and b.ends_window
        v[16] += b.is_first and b.num_layers > 0

    def drop_backwards(self) -> None:
        """Leave the backward slices and their optimiser steps out."""
        self.values[10:14] = [0.0] * 4
        self.values[16] = 0.0

    def add_load(self, size_bytes: int, read_s: float = 0.0) -> None:
        self.values[14] += 1
        self.values[15] += size_bytes
        self.read_s += read_s

    def __getitem__(self, name: str) -> float:
        return self.values[INDEX[name]]

    @property
    def is_empty(self) -> bool:
        return not any(self.values)


def of_batch(batch: Batch) -> Work:
    """The features of a finished batch."""
    work = Work()
    for segment in batch.segments:
        work.add_segment(segment)
    for backward in batch.backwards:
        work.add_backward(backward)
    for load in batch.loads:
        work.add_load(load.bytes, load.read_s)
    return work
