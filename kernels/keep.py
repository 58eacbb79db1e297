"""Keeping rows of the packed batch for the backward pass.

    arena[~place[t]] = x[t]      for the rows with place[t] < 0; the others (inference rows) are left out

Legend: T rows, A arena rows, W features; places as in `kernels.qkv`.
"""

import torch
from jaxtyping import Float, Int64

from kernels.backend import jit, tl, triton, uses_triton
from kernels.counters import count


@jit
def keep_kernel(arena, x, places, W, BLOCK: tl.constexpr):
    """BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    if place >= 0:
        return
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < W
    tl.store(arena + (-1 - place) * W + c, tl.load(x + row * W + c, mask=mask), mask=mask)


def keep_rows_(arena: Float[torch.Tensor, "A W"], x: Float[torch.Tensor, "T W"], places: Int64[torch.Tensor, " T"]) -> None:
    """Copy the rows of x that have a place in the arena there. Both are contiguous and share a dtype; ValueError otherwise."""
    if arena.ndim != 2 or x.ndim != 2 or arena.shape[1] != x.shape[1] or places.shape != x.shape[:1] or arena.dtype != x.dtype:
        raise ValueError(
            f"arena [A, W], x [T, W] and places [T] must fit, got {tuple(arena.shape)}, {tuple(x.shape)}, {tuple(places.shape)}"
        )
    if not (arena.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"arena and x must be contiguous, got strides {arena.stride()} and {x.stride()}")
    if not uses_triton(x):
        count("keep_rows", "reference", x.device.type)
        chosen = places < 0
        arena[~places[chosen]] = x[chosen]
        return
    count("keep_rows", "triton", x.device.type)
    if x.numel():
        block = min(triton.next_power_of_2(x.shape[1]), 2048)
        keep_kernel[(x.shape[0], triton.cdiv(x.shape[1], block))](arena, x, places, x.shape[1], BLOCK=block)
