"""Block sizes, warps, stages and splits of every launch: the one place that chooses them.

A heuristic on sizes that the host knows, so that no launch waits for the device and none is timed at run time. A table of measured
choices can take its place without touching an op.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one kernel is launched. `block` is the extent of the streamed axis, `splits` the parts of the reduction done apart,
    `repeats` the blocks that one program does in turn.
    """

    block: int
    block_rank: int = 16
    splits: int = 1
    repeats: int = 1
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """Triton's own launch options."""
        # AMD GPUs have 64 KB of local memory a workgroup: two stages fit, three may not.
        return {"num_warps": self.num_warps, "num_stages": min(self.num_stages, 2) if torch.version.hip else self.num_stages}


def power_of_two(number: int, low: int, high: int) -> int:
    """The least power of two that is at least `number`, within low..high (powers of two themselves)."""
    return min(max(1 << max(number - 1, 0).bit_length(), low), high)


def splits_for(programs: int, pieces: int, processors: int, high: int) -> int:
    """The power of four that brings `programs` to about two per multiprocessor, at most one per piece of work and at most `high`.

    Of four, not of two: every number of splits is a compilation of its own.
    """
    splits = 1
    while 4 * splits <= min(high, pieces) and programs * splits < 2 * processors:
        splits *= 4
    return splits


@lru_cache(maxsize=4096)
def plan(op: str, *, rows: int, length: int, programs: int, processors: int, itemsize: int, rank: int = 16, head_size: int = 0) -> Launch:
    """The launch of one kernel.

    `rows` is the tile's height, `length` the reduced (shrink, attention) or written (expand, outer) axis, `programs` how many programs
    there are before splitting, `itemsize` the bytes of an element. `op` is shrink, expand, outer, attention or softmax.
    """
    block_rank = power_of_two(rank, 16, 64)
    wide = itemsize > 2
    if op == "shrink":
        block = (64 if rows > 32 else 128) if wide or rows > 64 or block_rank > 32 else 256
        block = power_of_two(length, 16, block)
        splits = splits_for(programs, length // block, processors, 16)
        return Launch(block=block, block_rank=block_rank, splits=splits, num_warps=4, num_stages=2 if wide else 3)
    if op == "expand":
        block = power_of_two(length, 16, 64 if wide or (rows <= 32 and programs < processors) else 128)
        repeats = 4 if programs >= 16 * processors else 1
        return Launch(block=block, block_rank=block_rank, repeats=repeats, num_warps=8 if rows * block > 8192 else 4, num_stages=2)
    if op == "outer":
        return Launch(block=power_of_two(length, 16, 64 if wide else 128), block_rank=block_rank, num_warps=4, num_stages=2 if wide else 3)
    if op == "attention":
        block = power_of_two(length, 16, 32 if wide or head_size > 128 else 64)
        splits = splits_for(programs, length // (2 * block), processors, 16)
        return Launch(block=block, splits=splits, num_warps=4, num_stages=2)
    if op == "softmax":
        return Launch(block=power_of_two(length, 16, 4096), num_warps=8, num_stages=2)
    raise ValueError(f"op must be shrink, expand, outer, attention or softmax, got {op!r}")
