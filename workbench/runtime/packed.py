"""One adapter version in one buffer: every A and B at an aligned place, so that it moves between host and device in one copy.

Legend: K input and N output features of a linear, r its rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGN_BYTES = 256
Key = tuple[int, str]  # layer, target
Pairs = Mapping[Key, tuple[Tensor, Tensor]]  # A [r, K], B [N, r]
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where A and B of each linear lie in a flat buffer of `size` numbers: `offsets` in bytes, multiples of ALIGN_BYTES."""

    dtype: torch.dtype
    shapes: Mapping[Key, tuple[Shape, Shape]]
    offsets: Mapping[Key, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, shapes: Mapping[Key, tuple[Shape, Shape]], dtype: torch.dtype) -> "PackedLayout":
        """One tensor after another, in the order of `shapes`."""
        end = 0
        offsets = {}
        for key, pair in shapes.items():
            places = []
            for shape in pair:
                places.append(end)
                end += -(-prod(shape) * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
            offsets[key] = (places[0], places[1])
        return cls(dtype, dict(shapes), offsets, end // dtype.itemsize)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def widened(self, dtype: torch.dtype) -> "PackedLayout":
        """The same places, counted in numbers, for a wider dtype: one copy converts a whole buffer."""
        scale = dtype.itemsize // self.dtype.itemsize
        return PackedLayout(dtype, self.shapes, {key: (a * scale, b * scale) for key, (a, b) in self.offsets.items()}, self.size)

    def view(self, buffer: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of one linear, as views of `buffer` [size]."""
        (a, b), (a_offset, b_offset) = self.shapes[key], self.offsets[key]
        size = self.dtype.itemsize
        return buffer.as_strided(a, (a[1], 1), a_offset // size), buffer.as_strided(b, (b[1], 1), b_offset // size)


def shapes_of(tensors: Pairs) -> dict[Key, tuple[Shape, Shape]]:
    """The shapes of A and B of each linear; nothing is read, so a copy that is under way is not waited for."""
    if isinstance(tensors, PackedTensors):
        return dict(tensors.layout.shapes)
    return {key: ((a.shape[0], a.shape[1]), (b.shape[0], b.shape[1])) for key, (a, b) in tensors.items()}


class PackedTensors(Mapping[Key, tuple[Tensor, Tensor]]):
    """A version in host memory: `host` [size] (pinned for a CUDA device), read as (A, B) by (layer, target), views of it.

    `staged` is a device copy that the version came with, until it is taken or dropped; `arrival` the end of a copy from the device that
    may still be under way: reading a pair waits for it, and nothing else does.
    """

    def __init__(self, layout: PackedLayout, host: Tensor, staged: Tensor | None = None) -> None:
        self.layout, self.host, self.staged = layout, host, staged
        self.arrival: torch.cuda.Event | None = None

    @classmethod
    def allocate(cls, layout: PackedLayout, device: torch.device, *, staged: bool = False) -> "PackedTensors":
        """Buffers of unwritten numbers; with `staged` one on the device too. Raises torch.OutOfMemoryError where there is no room.

        torch's pinned allocator keeps what is freed for the next version, in sizes of powers of two.
        """
        host = torch.empty(layout.size, dtype=layout.dtype, pin_memory=device.type == "cuda")
        return cls(layout, host, torch.empty(layout.size, dtype=layout.dtype, device=device) if staged else None)

    def write(self, tensors: Pairs) -> None:
        """Copy `tensors` into the device copy where there is one, else into `host`, cast; nothing is allocated on the device."""
        into = self.host if self.staged is None else self.staged
        ours = [t for key in tensors for t in self.layout.view(into, key)]
        with torch.no_grad():
            torch._foreach_copy_(ours, [t for pair in tensors.values() for t in pair])  # pyright: ignore[reportPrivateImportUsage]

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        if self.arrival is not None:
            self.arrival.synchronize()
            self.arrival = None
        return self.layout.view(self.host, key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.layout.shapes)

    def __len__(self) -> int:
        return len(self.layout.shapes)
