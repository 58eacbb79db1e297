"""How one kernel is launched, and the class of shapes that shares one measured choice."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one kernel is launched. `block` is the extent of the streamed axis, `splits` the parts of the reduction done apart,
    `repeats` the blocks that one program does in turn, `parts` the programs that share the rows of a tile.
    """

    block: int
    block_rank: int = 16
    splits: int = 1
    repeats: int = 1
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("block", "block_rank", "splits", "repeats", "parts", "num_warps", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a launch must be a whole number of at least 1, got {value!r}")
        for name in ("block", "block_rank", "splits", "parts", "num_warps"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} of a launch must be a power of two, got {value}")

    @property
    def options(self) -> dict[str, int]:
        """Triton's own launch options."""
        # AMD GPUs have 64 KB of local memory a workgroup: two stages fit, three may not.
        return {"num_warps": self.num_warps, "num_stages": min(self.num_stages, 2) if torch.version.hip else self.num_stages}


def power_of_two(number: int, low: int, high: int) -> int:
    """The least power of two that is at least `number`, within low..high (powers of two themselves)."""
    return min(max(1 << max(number - 1, 0).bit_length(), low), high)


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class ShapeClass:
    """Launches that share one choice: `rows` of a tile, and the others rounded up to powers of two.

    `length`, `programs`, `itemsize` (bytes) and `head_size` are those of `kernels.plan.plan`; `rank` counts from 8, since a rank that is no
    multiple of 16 loads narrower.
    """

    op: str
    rows: int
    length: int
    programs: int
    itemsize: int
    rank: int = 16
    head_size: int = 0

    @classmethod
    def of(cls, op: str, *, rows: int, length: int, programs: int, itemsize: int, rank: int = 16, head_size: int = 0) -> "ShapeClass":
        """The class of one launch."""
        size, count = power_of_two(length, 1, 1 << 30), power_of_two(programs, 1, 1 << 30)
        return cls(op=op, rows=rows, length=size, programs=count, itemsize=itemsize, rank=power_of_two(rank, 8, 256), head_size=head_size)
