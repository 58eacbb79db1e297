"""Block sizes, warps, stages and splits of every launch: the one place that chooses them.

A choice is a function of sizes that the host knows, so that no launch waits for the device and none is timed at run time. What was
measured on a GPU of this kind comes first (`kernels.tuned`); `default_launch`, a heuristic, serves every other GPU and shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from kernels import tuned
from kernels.launch import Launch, ShapeClass, power_of_two

__all__ = ["Launch", "ShapeClass", "default_launch", "overridden", "plan", "power_of_two"]

OPS = (
    "shrink",
    "shrink_backward",
    "shrink_placing",
    "expand",
    "expand_dx",
    "outer_da",
    "outer_db",
    "attention",
    "softmax",
    "rms_norm",
    "swiglu",
    "lora_swiglu",
)
Choose = Callable[[ShapeClass, Launch], Launch]
_choose: ContextVar[Choose | None] = ContextVar("choose", default=None)


def splits_for(programs: int, pieces: int, processors: int, high: int) -> int:
    """The power of four that brings `programs` to about two per multiprocessor, at most one per piece of work and at most `high`.

    Of four, not of two: every number of splits is a compilation of its own.
    """
    splits = 1
    while 4 * splits <= min(high, pieces) and programs * splits < 2 * processors:
        splits *= 4
    return splits


def default_launch(
    op: str, *, rows: int, length: int, programs: int, processors: int, itemsize: int, rank: int = 16, head_size: int = 0
) -> Launch:
    """The heuristic's launch; arguments as for `plan`."""
    block_rank = power_of_two(rank, 16, 64)
    wide = itemsize > 2
    if op in ("shrink", "shrink_backward"):
        block = (64 if rows > 32 else 128) if wide or rows > 64 or block_rank > 32 else 256
        block = power_of_two(length, 16, block)
        splits = splits_for(programs, length // block, processors, 16)
        return Launch(block=block, block_rank=block_rank, splits=splits, num_warps=4, num_stages=2 if wide else 3)
    if op == "shrink_placing":
        block = power_of_two(length, 16, 128 if wide or block_rank > 32 else 256)
        return Launch(block=block, block_rank=block_rank, num_warps=4, num_stages=2 if wide else 4)
    if op in ("expand", "expand_dx"):
        block = power_of_two(length, 16, 64 if wide or (rows <= 32 and programs < processors) else 128)
        repeats = 4 if programs >= 16 * processors else 1
        return Launch(block=block, block_rank=block_rank, repeats=repeats, num_warps=8 if rows * block > 8192 else 4, num_stages=2)
    if op in ("outer_da", "outer_db"):
        return Launch(block=power_of_two(length, 16, 64 if wide else 128), block_rank=block_rank, num_warps=4, num_stages=2 if wide else 3)
    if op == "attention":
        block = power_of_two(length, 16, 32 if wide or head_size > 128 else 64)
        splits = splits_for(programs, length // (2 * block), processors, 16)
        return Launch(block=block, splits=splits, num_warps=4, num_stages=2)
    if op == "softmax":
        return Launch(block=power_of_two(length, 16, 4096), num_warps=8, num_stages=2)
    if op == "rms_norm":
        # One program holds a whole row.
        block = power_of_two(length, 1, 1 << 30)
        return Launch(block=block, num_warps=min(max(block // 512, 1), 16))
    if op == "lora_swiglu":
        # Two accumulators: a high tile goes to several programs.
        block, parts = power_of_two(length, 16, 64 if wide else 128), max(rows // 32, 1)
        return Launch(block=block, block_rank=block_rank, parts=parts, num_warps=4, num_stages=2)
    if op == "swiglu":
        return Launch(block=power_of_two(length, 1, 1024))
    raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")


@lru_cache(maxsize=4096)
def _settled(
    op: str, rows: int, length: int, programs: int, processors: int, itemsize: int, rank: int, head_size: int, device: torch.device | None
) -> tuple[Launch, Launch, ShapeClass]:
    """(what is launched, what would be by default, the class of shapes)."""
    sizes = {"rows": rows, "length": length, "programs": programs, "itemsize": itemsize, "rank": rank, "head_size": head_size}
    shape = ShapeClass.of(op, **sizes)
    found = None if device is None else tuned.of_device(device)
    measured = None if found is None else found.launch(shape)
    default = default_launch(op, processors=processors, **sizes)
    return measured or default, default, shape


def plan(
    op: str,
    *,
    rows: int,
    length: int,
    programs: int,
    processors: int,
    itemsize: int,
    rank: int = 16,
    head_size: int = 0,
    device: torch.device | None = None,
) -> Launch:
    """The launch of one kernel; the same for equal arguments for as long as the process lives.

    `rows` is the tile's height, `length` the reduced (shrink, attention) or written (expand, outer) axis, `programs` how many programs
    there are before splitting, `itemsize` the bytes of an element, `op` one of OPS. With a CUDA `device`, what was measured on such a GPU
    comes before the heuristic.
    """
    launch, default, shape = _settled(op, rows, length, programs, processors, itemsize, rank, head_size, device)
    choose = _choose.get()
    return launch if choose is None else choose(shape, default)


@contextmanager
def overridden(choose: Choose) -> Iterator[None]:
    """Within this, in this thread, `choose(shape class, the default launch)` has the last word: for tuning and for tests."""
    token = _choose.set(choose)
    try:
        yield
    finally:
        _choose.reset(token)
