"""Rotary position embedding (arXiv 2104.09864) of packed rows, each at its own position.

    y[t, h, :D/2] = x1 cos[t] - x2 sin[t]        y[t, h, D/2:] = x2 cos[t] + x1 sin[t]        with x = (x1, x2) halves of x[t, h]

    dx is the same with -sin, because the rotation is orthogonal and both halves share their angles.

Legend: T rows, N heads, D head size. cos and sin [T, D] fp32 repeat their D/2 angles (transformers' layout). Computed in fp32.
"""

import torch
from jaxtyping import Float

from kernels.backend import jit, tl, triton, uses_triton, wide_dtype
from kernels.counters import count


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The specification of `rotary`."""
    wide = x.to(wide_dtype(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]).to(x.dtype)


@jit
def rotary_kernel(x, cos, sin, y, sign, token_stride, head_stride, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """One program rotates BLOCK_N heads of one row; y [T, N, D] is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_HALF)
    d_mask = d < D // 2
    mask = (head < N)[:, None] & d_mask[None, :]
    c = tl.load(cos + token * D + d, mask=d_mask)[None, :]
    s = sign * tl.load(sin + token * D + d, mask=d_mask)[None, :]
    at = x + token * token_stride + head[:, None] * head_stride + d[None, :]
    first = tl.load(at, mask=mask).to(tl.float32)
    second = tl.load(at + D // 2, mask=mask).to(tl.float32)
    to = y + (token * N + head[:, None]) * D + d[None, :]
    tl.store(to, (first * c - second * s).to(y.dtype.element_ty), mask=mask)
    tl.store(to + D // 2, (second * c + first * s).to(y.dtype.element_ty), mask=mask)


def rotary(
    x: Float[torch.Tensor, "T N D"], cos: Float[torch.Tensor, "T D"], sin: Float[torch.Tensor, "T D"], *, inverse: bool = False
) -> Float[torch.Tensor, "T N D"]:
    """x rotated by each row's angles, contiguous; `inverse` turns the other way, which is the gradient. No autograd.

    x may be a slice of a wider buffer with adjacent head elements; cos and sin are contiguous fp32. Raises ValueError where shapes,
    dtypes or strides do not fit.
    """
    tokens, heads, size = x.shape
    if size % 2 or cos.shape != (tokens, size) or sin.shape != cos.shape:
        raise ValueError(f"x [T, N, D] with even D needs cos and sin [T, D], got {tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"cos and sin must be contiguous fp32, got {cos.dtype}, {sin.dtype}, strides {cos.stride()}, {sin.stride()}")
    if x.stride(2) != 1:
        raise ValueError(f"x must have adjacent head elements (stride 1), got strides {x.stride()}")
    sign = -1.0 if inverse else 1.0
    if not uses_triton(x):
        count("rotary", "reference", x.device.type)
        return rotary_reference(x, cos, sign * sin)
    count("rotary", "triton", x.device.type)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block = min(triton.next_power_of_2(heads), 16)
        rotary_kernel[(tokens, triton.cdiv(heads, block))](
            x, cos, sin, y, sign, x.stride(0), x.stride(1), heads, D=size, BLOCK_N=block, BLOCK_HALF=triton.next_power_of_2(size // 2)
        )
    return y
