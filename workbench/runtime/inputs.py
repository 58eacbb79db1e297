"""From a Batch to the tensors of one step.

Legend: T packed tokens, F of them fine-tune and evaluate rows (they come first), N inference sequences, M blocks of the longest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels.layout import SegmentLayout, bare_runs, cut_runs, few_tiles, merge_runs, tile_height
from workbench.core import Batch, Segment
from workbench.data import Document

if TYPE_CHECKING:
    from workbench.runtime.finetune import TrainState

TOKEN_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096)


@dataclass(slots=True)
class TrainRows:
    """One finetune or evaluate segment, or a whole micro-batch in the backward pass, over documents that do not see one another.

    Packed rows [first, first + tokens); arena rows [arena, arena + tokens); its keys are arena rows [keys, arena + tokens).
    `offset` is the place of the first token in the micro-batch: the row number that dropout counts by.
    """

    owner: str
    is_finetune: bool
    micro_batch: int
    first: int
    tokens: int
    offset: int
    arena: int
    keys: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    labelled: Tensor  # packed row of each label
    labels: Tensor
    scale: float


@dataclass(slots=True)
class StepInputs:
    """Everything the forward needs. `samples` lists the packed rows whose logits are sampled, in the order of `sampled`."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    layout: SegmentLayout
    train: list[TrainRows]
    num_train_rows: int
    places: Tensor  # [T]: where keys and values go, as in kernels.qkv
    block_tables: Tensor  # [N, M]
    cu_seqlens_q: Tensor  # [N + 1]
    context_lens: Tensor  # [N]
    max_seqlen_q: int
    max_context: int
    samples: Tensor
    sampled: list[Segment]
    bucket: int | None = None  # rows of the adapter layout, where it was padded for a recorded graph

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def keeps(self) -> bool:
        """Whether there are rows that a backward will need again."""
        return any(rows.is_finetune for rows in self.train)


@dataclass(slots=True)
class LayerRows:
    """What the layers see of a step's packed rows: everything but who attends to whom.

    `trains` says whether some rows have places in the arena, `keeps` whether a backward will need them, `dropped` names the finetune rows
    that go through dropout (they are left out of `layout`).
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    places: Tensor  # [T]
    layout: SegmentLayout
    trains: bool
    keeps: bool
    dropped: Sequence[tuple[TrainRows, "TrainState"]] = ()


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


def train_rows(
    segment: Segment, documents: Sequence[Document], *, first: int, scale: float, device: torch.device
) -> tuple[TrainRows, list[int], list[int]]:
    """The rows of one finetune or evaluate segment, with its token ids and positions."""
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
    queries, keys = [high - low for _, low, high in pieces], [high for _, _, high in pieces]
    labelled = [i for i, label in enumerate(labels) if label is not None]
    rows = TrainRows(
        owner=segment.owner,
        is_finetune=segment.kind == "finetune",
        micro_batch=segment.micro_batch,
        first=first,
        tokens=segment.tokens,
        offset=segment.start,
        arena=segment.rows + segment.start,
        keys=segment.rows + segment.start - pieces[0][1],
        cu_seqlens_q=_cumulative(queries, device),
        cu_seqlens_k=_cumulative(keys, device),
        max_q=max(queries),
        max_k=max(keys),
        labelled=torch.tensor([first + i for i in labelled], dtype=torch.int64, device=device),
        labels=torch.tensor([labels[i] for i in labelled], dtype=torch.int64, device=device),
        scale=scale,
    )
    return rows, token_ids, positions


def padded_layout(row_slots: Sequence[tuple[int | None, int]], bucket: int, device: torch.device) -> SegmentLayout:
    """The layout of a step's rows padded to `bucket`: tile height by bucket alone, and one of two numbers of tiles."""
    row_slots = [*row_slots, (None, bucket - sum(rows for _, rows in row_slots))]
    runs, rows = merge_runs(row_slots)
    block_rows, tiles = tile_height(bucket), few_tiles(bucket)
    if len(cut_runs(runs, block_rows)) + len(cut_runs(bare_runs(runs, rows), block_rows)) > tiles:
        tiles = bucket
    return SegmentLayout.build(row_slots, device, block_rows=block_rows, num_tiles=tiles)


def build(
    batch: Batch,
    *,
    tokens_of: Callable[[Segment], Sequence[int]],
    documents_of: Callable[[Segment], Sequence[Document]],
    entry_of: Callable[[Segment], int | None],
    scale_of: Callable[[Segment], float],
    block_tokens: int,
    device: torch.device,
    bucket: int | None = None,
) -> StepInputs:
    """The step's tensors; `bucket` pads the adapter layout to that many rows, for recorded pieces.

    Raises AssertionError where the batch contradicts the engine's record of a sequence."""
    token_ids: list[int] = []
    positions: list[int] = []
    entries: list[tuple[int | None, int]] = []
    train: list[TrainRows] = []
    inference: list[Segment] = []
    samples: list[int] = []
    for segment in batch.segments:
        first = len(token_ids)
        entry = entry_of(segment)
        entries.append((entry, segment.tokens))
        if segment.kind in ("finetune", "evaluate"):
            assert not inference, "fine-tune and evaluate rows come first"
            rows, ids, places = train_rows(segment, documents_of(segment), first=first, scale=scale_of(segment), device=device)
            train.append(rows)
            token_ids += ids
            positions += places
        else:
            token_ids += tokens_of(segment)
            positions += range(segment.start, segment.end)
            inference.append(segment)
            if segment.samples:
                samples.append(len(token_ids) - 1)
    num_train = sum(r.tokens for r in train)
    context = [s.end for s in inference]
    width = max((len(s.blocks) for s in inference), default=1)
    tables = np.zeros((len(inference), width), dtype=np.int32)
    destinations: list[np.ndarray] = [~np.arange(r.arena, r.arena + r.tokens) for r in train]
    for i, segment in enumerate(inference):
        blocks = np.asarray(segment.blocks, dtype=np.int64)
        tables[i, : len(blocks)] = blocks
        place = np.arange(segment.start, segment.end)
        destinations.append(blocks[place // block_tokens] * block_tokens + place % block_tokens)
    return StepInputs(
        token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
        positions=torch.tensor(positions, dtype=torch.int64).to(device),
        layout=SegmentLayout.build(entries, device) if bucket is None else padded_layout(entries, bucket, device),
        train=train,
        num_train_rows=num_train,
        places=torch.from_numpy(np.concatenate(destinations)).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        cu_seqlens_q=_cumulative([s.tokens for s in inference], device),
        context_lens=torch.tensor(context, dtype=torch.int32).to(device),
        max_seqlen_q=max((s.tokens for s in inference), default=0),
        max_context=max(context, default=0),
        samples=torch.tensor(samples, dtype=torch.int64).to(device),
        sampled=[s for s in inference if s.samples],
        bucket=bucket,
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
