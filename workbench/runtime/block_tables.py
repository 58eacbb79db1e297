"""Where the KV of every known sequence lies, on the host."""

import numpy as np


class BlockTables:
    """One row of KV blocks a sequence, kept from step to step: a step gathers its rows, and only what has changed is written.

    `rows` [R, M] int32, M blocks of the longest sequence; behind a sequence's blocks a row may hold anything.
    """

    def __init__(self, width: int, num_rows: int = 64) -> None:
        self.rows = np.zeros((num_rows, width), dtype=np.int32)
        self._shown: list[tuple[int, ...]] = [()] * num_rows
        self._free = list(range(num_rows))

    def take(self) -> int:
        """A row for one more sequence; there are twice as many once all are taken."""
        if not self._free:
            held = len(self._shown)
            self._free = list(range(held, 2 * held))
            self._shown += [()] * held
            self.rows = np.concatenate((self.rows, np.zeros_like(self.rows)))
        return self._free.pop()

    def give(self, row: int) -> None:
        """Its sequence is over."""
        self._shown[row] = ()
        self._free.append(row)

    def show(self, row: int, blocks: tuple[int, ...]) -> int:
        """Let the row hold these blocks; the row."""
        if blocks is not self._shown[row]:
            self.rows[row, : len(blocks)] = blocks
            self._shown[row] = blocks
        return row

    def gather(self, rows: list[int], width: int | None = None) -> np.ndarray:
        """Their first `width` blocks [len(rows), width] int32 (None: M), a copy."""
        return self.rows[np.array(rows, dtype=np.intp), :width]


def places_of(tables: np.ndarray, sequences: np.ndarray, positions: np.ndarray, block_tokens: int) -> np.ndarray:
    """Where the tokens at `positions` [n] of these `sequences` [n] (rows of `tables`) are kept, as in kernels.qkv [n] int64."""
    blocks = tables[sequences, positions // block_tokens]
    return blocks.astype(np.int64) * block_tokens + positions % block_tokens
