"""From a Batch to the packed rows of one step, on the host (`pack`) and on the device (`on_device`).

Legend: T packed tokens (fine-tune and evaluate rows come first), D documents of the latter, N sequences, M blocks of the longest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels.layout import SegmentLayout, Tile, few_tiles, tile_height, tiles_of
from workbench.core import Batch, Segment
from workbench.data import Document
from workbench.runtime.block_tables import BlockTables, places_of

if TYPE_CHECKING:
    from workbench.runtime.engine_adapters import KnownSequence, Version
    from workbench.runtime.finetune import TrainState

# 448 is left out: on an H100 its products take longer than those of 512 rows.
TOKEN_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096)


@dataclass(slots=True)
class TrainSpan:
    """One finetune or evaluate segment, or a whole micro-batch in the backward pass, over documents that do not see one another.

    Packed rows [first, first + tokens); arena rows [arena, arena + tokens). `queries` counts each document's rows; its keys are the
    `keys` arena rows from `key_starts` on. `labelled` lists the packed rows that have a label, `labels` their labels.
    `offset` is the place of the first token in the micro-batch: the row number that dropout counts by.
    """

    owner: str
    is_finetune: bool
    micro_batch: int
    first: int
    tokens: int
    offset: int
    arena: int
    queries: list[int]
    key_starts: list[int]
    keys: list[int]
    labelled: list[int]
    labels: list[int]
    scale: float


@dataclass(slots=True)
class Documents:
    """The documents of the fine-tune and evaluate rows on the device, for `kernels.varlen_attention`: D of them, and some empty ones.

    cu_seqlens_q [D + 1], key_starts [D + 1] (rows of the arena; the last says nothing) and key_lens [D], int32; `max_q` and `max_k` bound
    their lengths.
    """

    cu_seqlens_q: Tensor
    key_starts: Tensor
    key_lens: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, train: Sequence[TrainSpan], device: torch.device) -> "Documents":
        """Those of these spans, in packed order."""
        queries, keys = ([n for span in train for n in getattr(span, name)] for name in ("queries", "keys"))
        starts = [n for span in train for n in span.key_starts]
        bounds = (_cumulative(queries, device), _int32([*starts, 0], device), _int32(keys, device))
        return cls(*bounds, max(queries), max(keys))


@dataclass(slots=True)
class PackedStep:
    """The packed rows of a step on the host: fine-tune and evaluate rows first, then each sequence's.

    `entries` says (entry of the adapter table or None, rows) in packed order. Sequence n has `queries[n]` rows, `contexts[n]` tokens in the
    cache once the step has stored its own, and lies in the blocks of row n of `tables` [N, M]. `samples` lists the packed rows that are
    sampled, in the order of `sampled`.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    entries: list[tuple[int | None, int]] = field(default_factory=list)
    train: list[TrainSpan] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    tables: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int32))
    samples: list[int] = field(default_factory=list)
    sampled: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_train_rows(self) -> int:
        return sum(span.tokens for span in self.train)

    @property
    def keeps(self) -> bool:
        """Whether there are rows that a backward will need again."""
        return any(span.is_finetune for span in self.train)

    @property
    def slots(self) -> set[int]:
        """The entries of the adapter table that some row reads."""
        return {entry for entry, rows in self.entries if entry is not None and rows}


@dataclass(slots=True)
class StepInputs:
    """Everything the layers need, on the device. `documents` is None without fine-tune and evaluate rows; N may be 0.

    Rows behind those of the last sequence are padding: nobody attends to them, and they write nowhere that anybody reads.
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    places: Tensor  # [T]: where keys and values go, as in kernels.qkv
    layout: SegmentLayout
    documents: Documents | None
    keeps: bool
    block_tables: Tensor  # [N, M]
    cu_seqlens_q: Tensor  # [N + 1], from the first row that is no fine-tune row
    context_lens: Tensor  # [N]
    max_seqlen_q: int
    max_context: int
    samples: Tensor  # packed rows whose logits are wanted
    chosen: Tensor | None = None  # [G, S + 8, 2]: whose adapters lie in the weights' tails (`kernels.lora_tail`); None: no tails are used
    dropped: Sequence[tuple[TrainSpan, "TrainState"]] = ()  # finetune rows that go through dropout: left out of `layout`

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def token_bucket(tokens: int, max_tokens: int) -> int | None:
    """The least bucket that holds `tokens`, at most `max_tokens` itself; None beyond."""
    if tokens > max_tokens:
        return None
    return min(next((bucket for bucket in TOKEN_BUCKETS if bucket >= tokens), max_tokens), max_tokens)


def spans(documents: Sequence[int], start: int, tokens: int) -> list[tuple[int, int, int]]:
    """The pieces of the range [start, start + tokens) of packed documents: (document, first, end), offsets inside the document."""
    pieces, first = [], 0
    for index, length in enumerate(documents):
        low, high = max(start - first, 0), min(start + tokens - first, length)
        if low < high:
            pieces.append((index, low, high))
        first += length
    return pieces


def train_span(segment: Segment, documents: Sequence[Document], *, first: int, scale: float) -> tuple[TrainSpan, list[int], list[int]]:
    """The rows of one finetune or evaluate segment from packed row `first` on, with its token ids and positions."""
    assert segment.rows is not None and segment.micro_batch is not None
    token_ids: list[int] = []
    positions: list[int] = []
    labels: list[int | None] = []
    pieces = spans([len(d.token_ids) for d in documents], segment.start, segment.tokens)
    for index, low, high in pieces:
        token_ids += documents[index].token_ids[low:high]
        labels += documents[index].labels[low:high]
        positions += range(low, high)
    assert len(token_ids) == segment.tokens, "a segment reaches beyond its micro-batch"
    arena = segment.rows + segment.start
    # the documents of a micro-batch lie one behind the other in the arena
    starts = [arena + done - low for done, (_, low, _) in zip(accumulate([0, *(high - low for _, low, high in pieces)]), pieces)]
    span = TrainSpan(
        owner=segment.owner,
        is_finetune=segment.kind == "finetune",
        micro_batch=segment.micro_batch,
        first=first,
        tokens=segment.tokens,
        offset=segment.start,
        arena=arena,
        queries=[high - low for _, low, high in pieces],
        key_starts=starts,
        keys=[high for _, _, high in pieces],
        labelled=[first + i for i, label in enumerate(labels) if label is not None],
        labels=[label for label in labels if label is not None],
        scale=scale,
    )
    return span, token_ids, positions


def padded_tiles(row_slots: Sequence[tuple[int | None, int]], bucket: int) -> tuple[list[Tile], int, int]:
    """The tiles of a step's rows padded to `bucket`, their height (by bucket alone), and how many there may be: one of two numbers."""
    row_slots = [*row_slots, (None, bucket - sum(rows for _, rows in row_slots))]
    height, few = tile_height(bucket), few_tiles(bucket)
    tiles = tiles_of(row_slots, height)
    return tiles, height, few if len(tiles) <= few else bucket


def pack(
    batch: Batch,
    *,
    sequences: "Mapping[str, KnownSequence]",
    slot_of: "Mapping[Version, int]",
    tables: BlockTables,
    documents_of: Callable[[Segment], Sequence[Document]],
    entry_of: Callable[[Segment], int | None],
    scale_of: Callable[[Segment], float],
    block_tokens: int,
) -> PackedStep:
    """The step's rows; `documents_of`, `entry_of` and `scale_of` say what finetune and evaluate segments have.

    Raises AssertionError where the batch contradicts the engine's record of a sequence.
    """
    step = PackedStep()
    token_ids, positions, entries = step.token_ids, step.positions, step.entries
    queries, contexts, samples, sampled = step.queries, step.contexts, step.samples, step.sampled
    places: list[np.ndarray] = []
    rows: list[int] = []
    for segment in batch.segments:
        count = segment.tokens
        if segment.kind in ("finetune", "evaluate"):
            assert not queries, "fine-tune and evaluate rows come first"
            span, ids, at = train_span(segment, documents_of(segment), first=len(token_ids), scale=scale_of(segment))
            step.train.append(span)
            entries.append((entry_of(segment), count))
            token_ids += ids
            positions += at
            places.append(~np.arange(span.arena, span.arena + span.tokens))
            continue
        sequence, start = sequences[segment.owner], segment.start
        known, end = sequence.tokens, start + count
        assert end <= len(known) and segment.samples == (end == len(known)), f"segment {segment} does not fit {len(known)} known tokens"
        entry = None if segment.adapter is None else slot_of[segment.adapter, segment.version]
        if entries and entries[-1][0] == entry:
            entries[-1] = entry, entries[-1][1] + count
        else:
            entries.append((entry, count))
        if count == 1:
            token_ids.append(known[start])
            positions.append(start)
        else:
            token_ids += known[start:end]
            positions += range(start, end)
        queries.append(count)
        contexts.append(end)
        rows.append(tables.show(sequence.row, segment.blocks))
        if segment.samples:
            samples.append(len(token_ids) - 1)
            sampled.append(segment)
    step.tables = tables.gather(rows, -(-max(contexts, default=1) // block_tokens))
    at_rows, owners = np.array(positions[step.num_train_rows :], dtype=np.int64), np.repeat(np.arange(len(rows)), queries)
    step.places = np.concatenate((*places, places_of(step.tables, owners, at_rows, block_tokens)))
    return step


def on_device(step: PackedStep, device: torch.device) -> StepInputs:
    """The step's tensors as they are, without padding."""
    return StepInputs(
        token_ids=torch.tensor(step.token_ids, dtype=torch.int64).to(device),
        positions=torch.tensor(step.positions, dtype=torch.int64).to(device),
        places=torch.from_numpy(step.places).to(device),
        layout=SegmentLayout.build(step.entries, device),
        documents=Documents.of(step.train, device) if step.train else None,
        keeps=step.keeps,
        block_tables=torch.from_numpy(step.tables).to(device),
        cu_seqlens_q=_cumulative(step.queries, device, step.num_train_rows),
        context_lens=_int32(step.contexts, device),
        max_seqlen_q=max(step.queries, default=0),
        max_context=max(step.contexts, default=0),
        samples=torch.tensor(step.samples, dtype=torch.int64).to(device),
    )


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)


def _cumulative(lengths: Sequence[int], device: torch.device, first: int = 0) -> Tensor:
    return _int32(list(accumulate(lengths, initial=first)), device)
