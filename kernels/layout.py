"""Which rows of the packed batch use which adapter slot, as one small device tensor.

Legend: a *run* is a stretch of consecutive rows with one slot; a *tile* is at most `block_rows` rows of one run (one program's rows);
a *chunk* is at most an eighth of a run, or 512 rows (one partial sum of a weight gradient).
Rows without an adapter are in no run. They have tiles of their own, marked as bare: LoRA kernels leave those at once, kernels that do other
work on every row besides visit them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_BLOCK_ROWS = 128
FEW_RUNS = 8  # a recorded step of few runs of one adapter each has its own, shorter table of tiles
CHUNK_ROWS, MAX_CHUNKS = 512, 8
Run = tuple[int, int, int]
Tile = tuple[int, int, int, int]


def merge_runs(row_slots: Sequence[tuple[int | None, int]]) -> tuple[tuple[Run, ...], int]:
    """((slot, first row, rows), ...) of the rows that have a slot, neighbours of one slot merged; and the number of all rows."""
    runs: list[Run] = []
    row = 0
    for slot, rows in row_slots:
        if rows < 0:
            raise ValueError(f"num_rows of a run must be at least 0, got {rows}")
        if slot is not None and slot < 0:
            raise ValueError(f"slot must be at least 0, or None for rows without an adapter, got {slot}")
        if slot is not None and rows:
            last = runs[-1] if runs else None
            if last is not None and last[0] == slot and last[1] + last[2] == row:
                runs[-1] = (slot, last[1], last[2] + rows)
            else:
                runs.append((slot, row, rows))
        row += rows
    return tuple(runs), row


def cut_runs(runs: Sequence[Run], size: int) -> list[Run]:
    """Every run in pieces of at most `size` rows."""
    return [(slot, first + i, min(size, rows - i)) for slot, first, rows in runs for i in range(0, rows, size)]


def bare_runs(runs: Sequence[Run], num_rows: int) -> list[Run]:
    """The rows between the runs, as (0, first row, rows)."""
    ends = [0, *(first + rows for _, first, rows in runs)]
    starts = [*(first for _, first, _ in runs), num_rows]
    return [(0, end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]


def tiles_of(row_slots: Sequence[tuple[int | None, int]], block_rows: int) -> list[Tile]:
    """The tiles of rows listed in packed order: (slot, first row, rows, 0), behind them the bare ones (0, first row, rows, 1); none at all
    where no row has a slot.
    """
    runs, num_rows = merge_runs(row_slots)
    tiles: list[Tile] = [(*tile, 0) for tile in cut_runs(runs, block_rows)]
    return tiles + [(*tile, 1) for tile in cut_runs(bare_runs(runs, num_rows) if runs else (), block_rows)]


def block_rows_for(runs: Sequence[Run]) -> int:
    """Tile height: the power of two (16..128) that wastes few rows on runs of this mean length."""
    mean = sum(rows for _, _, rows in runs) / max(len(runs), 1)
    block = 16
    while block < MAX_BLOCK_ROWS and mean > 4 * block:
        block *= 2
    return block


def tile_height(rows: int) -> int:
    """Tile height of a recorded step of so many rows: what suits two to four runs."""
    return 16 if rows <= 64 else 32 if rows <= 256 else 64 if rows <= 1024 else 128


def few_tiles(rows: int) -> int:
    """How many tiles of that height a recorded step of `rows` rows in at most `FEW_RUNS` runs needs."""
    return min(rows, -(-rows // tile_height(rows)) + FEW_RUNS)


@dataclass(frozen=True, eq=False)
class SegmentLayout:
    """Device tables of a batch's runs, built with one host-to-device copy and read without any synchronisation.

    `runs` are host-side. `tiles` [num_tiles, 4] int32: slot, first row, rows, whether they are bare (a tile of 0 rows is padding; none
    at all where no row has an adapter).
    `chunks` [num_chunks, 4] int32, ordered by slot: slot, first row, rows, 0. `slots` are the distinct slots in ascending order, and
    `chunks_per_slot` their numbers of chunks.
    """

    num_rows: int
    runs: tuple[Run, ...]
    slots: tuple[int, ...]
    block_rows: int
    tiles: torch.Tensor
    chunks: torch.Tensor
    chunks_per_slot: tuple[int, ...]

    @property
    def num_tiles(self) -> int:
        return self.tiles.shape[0]

    @classmethod
    def build(
        cls,
        row_slots: Sequence[tuple[int | None, int]],
        device: torch.device | str,
        *,
        block_rows: int | None = None,
        num_tiles: int | None = None,
    ) -> "SegmentLayout":
        """The layout of rows listed in packed order as (slot or None, number of rows).

        `block_rows` (16, 32, 64 or 128) fixes the tile height and `num_tiles` pads the tile table, so that a recorded CUDA graph can
        be replayed with another batch's layout through `copy_`. Raises ValueError for negative slots or counts, or too few tiles.
        """
        device = torch.device(device)
        runs, num_rows = merge_runs(row_slots)
        block_rows = block_rows or block_rows_for(runs)
        if block_rows not in (16, 32, 64, 128):
            raise ValueError(f"block_rows must be 16, 32, 64 or 128, got {block_rows}")
        tiles = tiles_of(row_slots, block_rows)
        if num_tiles is not None:
            if len(tiles) > num_tiles:
                raise ValueError(f"num_tiles must be at least the {len(tiles)} tiles of these rows, got {num_tiles}. Take a larger bucket.")
            tiles += [(0, 0, 0, 0)] * (num_tiles - len(tiles))
        longest = max((rows for _, _, rows in runs), default=0)
        chunks = [(*chunk, 0) for chunk in cut_runs(sorted(runs), max(CHUNK_ROWS, -(-longest // MAX_CHUNKS)))]
        slots = tuple(sorted({slot for slot, _, _ in runs}))
        owners = [slot for slot, *_ in chunks]
        table = torch.tensor([*tiles, *chunks], dtype=torch.int32).reshape(-1, 4)
        if device.type == "cuda":
            # From pinned memory the copy is asynchronous; torch's pinned allocator keeps the buffer until the stream has read it.
            table = table.pin_memory().to(device, non_blocking=True)
        tile_table, chunk_table = table.split([len(tiles), len(chunks)])
        return cls(num_rows, runs, slots, block_rows, tile_table, chunk_table, tuple(owners.count(slot) for slot in slots))

    def copy_(self, other: "SegmentLayout") -> None:
        """Overwrite the tile table in place with another layout's (same tile height, same number of tiles), for a recorded CUDA graph.

        Only the tile table moves: a recorded forward reads nothing else. Raises ValueError where the shapes differ.
        """
        ours, theirs = (self.block_rows, self.num_tiles, self.num_rows), (other.block_rows, other.num_tiles, other.num_rows)
        if ours != theirs:
            raise ValueError(f"a layout takes over one with equal (block_rows, num_tiles, num_rows) {ours}, got {theirs}. Pad it in build.")
        self.tiles.copy_(other.tiles, non_blocking=True)

    def resize_(self, slot: int, rows: int) -> None:
        """Let the rows of a layout of one run belong to `slot`, and only the first `rows` of them, in place, for a recorded CUDA graph.

        The host-side facts stay those of the whole run. Raises ValueError for a layout of another kind, or too many rows.
        """
        if len(self.runs) != 1 or self.runs[0][2] != self.num_rows or not 0 <= rows <= self.num_rows:
            raise ValueError(f"resize_ needs one run of all rows and at most as many, got runs {self.runs} and {rows}. Build a new layout.")
        for table, size in ((self.tiles, self.block_rows), (self.chunks, max(CHUNK_ROWS, -(-self.num_rows // MAX_CHUNKS)))):
            table[:, 0] = slot
            table[:, 2] = (rows - table[:, 1]).clamp(0, size)
