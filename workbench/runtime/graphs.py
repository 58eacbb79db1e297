"""CUDA graphs of decode steps: one launch for a batch of decode rows, whatever its adapters.

A graph holds grids and pointers, so each is recorded for a bucket of rows and of context length, and for batches with and without
adapters apart. Inputs are staged in one buffer that the graph reads; adapters change in the device table that it reads; padding rows
write to a KV block of nobody's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import SegmentLayout, few_tiles, tile_height
from workbench.runtime.block_tables import places_of
from workbench.runtime.inputs import StepInputs
from workbench.runtime.kv_cache import KVPool
from workbench.runtime.recording import Recorder, Replayable
from workbench.runtime.staging import Staging

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CONTEXT_BUCKETS = (512, 2048, 8192, 32768)
TILE_ROWS = 16  # of a step of many runs: most have fewer rows
Key = tuple[int, int, int, tuple[tuple[bool, int, int], ...] | None]


def row_bucket(rows: int) -> int | None:
    """The least recorded number of rows that holds `rows`; None beyond the largest."""
    return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), None)


def context_bucket(context: int, max_model_len: int) -> int:
    """The least of CONTEXT_BUCKETS that holds `context`, or else the model's own context: it bounds how far a graph splits its keys."""
    return min(next((bucket for bucket in CONTEXT_BUCKETS if bucket >= context), max_model_len), max_model_len)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """A batch of decode rows on the host, in packed order: last token, its position, KV blocks [rows, M] int32 (more may follow), and entry
    of the adapter table (None: base).
    """

    token_ids: list[int]
    positions: list[int]
    tables: np.ndarray
    entries: list[int | None]


@dataclass(slots=True)
class _Recorded:
    """A graph with the inputs that it reads (kept alive here), and what it leaves: logits [rows, V] and their argmax [rows]."""

    graph: Replayable
    inputs: StepInputs
    staging: Staging
    logits: Tensor
    greedy: Tensor


class DecodeGraphs:
    """Records a graph at the first batch of its kind and replays it from then on. Not used outside CUDA."""

    def __init__(self, runner, max_model_len: int) -> None:
        self.runner, self.max_model_len = runner, max_model_len
        self.recorded: dict[Key, _Recorded] = {}
        self.recorder = Recorder(runner.device)

    def run(self, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Logits [rows, V] and their argmax [rows] of at most `ROW_BUCKETS[-1]` decode rows; valid until the next step."""
        rows = len(batch.token_ids)
        bucket = row_bucket(rows)
        assert bucket is not None
        context = context_bucket(max(batch.positions) + 1, self.max_model_len)
        tiles = bucket_tiles([*batch.entries, *[None] * (bucket - rows)])
        has_adapters = any(entry is not None for entry in batch.entries)
        found = self._find(bucket, context, tile_bucket(bucket, len(tiles)), has_adapters)
        write_rows(found.staging.host, batch, tiles, self.runner.pool)
        found.staging.upload()
        found.graph.replay()
        return found.logits[:rows], found.greedy[:rows]

    def recordings(self, max_rows: int, *, has_adapters: bool) -> list[Callable[[], object]]:
        """What records every bucket up to `max_rows` for batches of few runs, one call each, so that no step pays for it."""
        largest = row_bucket(min(max_rows, ROW_BUCKETS[-1]))
        contexts = {context_bucket(bucket, self.max_model_len) for bucket in (*CONTEXT_BUCKETS, self.max_model_len)}
        return [
            partial(self._find, bucket, context, tile_bucket(bucket, 1), with_adapters)
            for bucket in (b for b in ROW_BUCKETS if largest is not None and b <= largest)
            for context in sorted(contexts)
            for with_adapters in (False, True)[: 1 + has_adapters]
        ]

    def _find(self, bucket: int, context: int, tiles: int, has_adapters: bool) -> _Recorded:
        key = self.key(bucket, context, tiles, has_adapters)
        if key not in self.recorded:
            self.recorded[key] = self._record(bucket, context, tiles, has_adapters)
        return self.recorded[key]

    def key(self, bucket: int, context: int, tiles: int, has_adapters: bool) -> Key:
        """What a recorded graph depends on: another key needs another graph."""
        # A recorded layer launches nothing where no adapter has weights, and is specialised on what the table's ranks have in common;
        # both may differ from layer to layer.
        return bucket, context, tiles, self.runner.table.facts if has_adapters else None

    def _record(self, bucket: int, context: int, tiles: int, has_adapters: bool) -> _Recorded:
        pool, device = self.runner.pool, self.runner.device
        staging = Staging(decode_fields(bucket, -(-context // pool.block_tokens), tiles), device)
        nobody = DecodeBatch([], [], np.zeros((0, 1), dtype=np.int32), [])
        write_rows(staging.host, nobody, decode_tiles([], TILE_ROWS), pool)  # padding rows alone
        staging.upload()
        inputs = self._inputs(staging, context, has_adapters)
        outputs: list[Tensor] = []

        def run() -> None:
            logits = F.linear(self.runner.layers(inputs), self.runner.fused.lm_head)
            outputs[:] = logits, logits.argmax(-1)

        for _ in range(2):  # padding rows leave no trace
            self.recorder.warm_up(run)
        graph = self.recorder.record(run)
        return _Recorded(graph, inputs, staging, *outputs)

    def _inputs(self, staging: Staging, context: int, has_adapters: bool) -> StepInputs:
        """Inputs that read the staged arrays."""
        there, device = staging.device, self.runner.device
        bucket = there["token_ids"].shape[0]
        layout = SegmentLayout.build(
            [(0 if has_adapters else None, bucket)],
            device,
            block_rows=tile_rows(bucket, there["tiles"].shape[0]),
            num_tiles=there["tiles"].shape[0],
        )
        return StepInputs(
            token_ids=there["token_ids"],
            positions=there["positions"],
            places=there["places"],
            layout=replace(layout, tiles=there["tiles"]),
            documents=None,
            keeps=False,
            block_tables=there["block_tables"],
            cu_seqlens_q=torch.arange(bucket + 1, dtype=torch.int32, device=device),
            context_lens=there["context_lens"],
            max_seqlen_q=1,
            max_context=context,
            samples=torch.arange(bucket, device=device),
        )


def tile_bucket(rows: int, tiles: int) -> int:
    """How many tiles a graph of `rows` rows has room for: one of two numbers, that of batches of few runs or one a row."""
    few = few_tiles(rows)
    return few if tiles <= few else rows


def tile_rows(rows: int, tiles: int) -> int:
    """Tile height of a graph of `rows` rows with room for so many tiles."""
    return TILE_ROWS if tiles == rows else tile_height(rows)


def bucket_tiles(entries: Sequence[int | None]) -> np.ndarray:
    """`decode_tiles` of a whole bucket of rows, as high as the graph that has room for them wants them."""
    rows = len(entries)
    tiles = decode_tiles(entries, tile_height(rows))
    return tiles if len(tiles) <= few_tiles(rows) else decode_tiles(entries, TILE_ROWS)


def decode_fields(rows: int, width: int, tiles: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a step of `rows` decode rows with at most `width` blocks each, in at most `tiles` tiles, stages."""
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: ((rows,), torch.int64) for name in ("token_ids", "positions", "places")}
    return fields | {
        "context_lens": ((rows,), torch.int32),
        "tiles": ((tiles, 4), torch.int32),
        "block_tables": ((rows, width), torch.int32),
    }


def write_rows(host: Mapping[str, np.ndarray], batch: DecodeBatch, tiles: np.ndarray, pool: KVPool) -> None:
    """Stage a batch and its tiles, padding rows behind it: token 0 at position 0, one key, in the block that is nobody's."""
    rows, size, table = len(batch.token_ids), pool.block_tokens, host["block_tables"]
    host["token_ids"][:rows], host["token_ids"][rows:] = batch.token_ids, 0
    host["positions"][:rows], host["positions"][rows:] = batch.positions, 0
    host["context_lens"][:rows], host["context_lens"][rows:] = host["positions"][:rows] + 1, 1
    places = places_of(batch.tables, np.arange(rows), host["positions"][:rows], size)
    host["places"][:rows], host["places"][rows:] = places, pool.num_blocks * size
    width = min(table.shape[1], batch.tables.shape[1])
    table[:rows, :width], table[rows:, 0] = batch.tables[:, :width], pool.num_blocks
    host["tiles"][: len(tiles)], host["tiles"][len(tiles) :] = tiles, 0


def decode_tiles(entries: Sequence[int | None], height: int) -> np.ndarray:
    """The tiles [n, 4] of `kernels.layout` for rows of one token each: (entry, first row, rows, bare), at most `height` rows each."""
    slots = np.array([-1 if entry is None else entry for entry in entries], dtype=np.int64)
    first = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1]))) if len(slots) else np.zeros(0, dtype=np.int64)
    length = np.diff(np.append(first, len(slots)))
    order = np.argsort(slots[first] < 0, kind="stable")  # runs of an adapter first
    first, length = (first[order], length[order]) if (slots >= 0).any() else (first[:0], length[:0])
    pieces = -(-length // height)
    run = np.repeat(np.arange(len(first)), pieces)
    skipped = height * (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    owner = slots[first][run]
    return np.stack((np.maximum(owner, 0), first[run] + skipped, np.minimum(length[run] - skipped, height), owner < 0), axis=1)
