"""SwiGLU of packed rows and its gradient.

    a = silu(g) u        dg = da u (sigma + g sigma (1 - sigma))        du = da silu(g)        with sigma = 1 / (1 + exp(-g))

Legend: T rows, I features; gate and up lie side by side as [T, 2 I] = (g, u). Computed in fp32, rounded once. Source: arXiv 2002.05202.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float

from kernels.backend import jit, num_processors, overlapped, tl, triton, uses_triton, wait_for_previous, wide_dtype
from kernels.counters import count
from kernels.plan import Launch, plan


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The specification of `swiglu`."""
    gate, up = gate_up.to(wide_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_reference(da: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The specification of `swiglu_backward`."""
    wide = wide_dtype(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    sigma, grad = torch.sigmoid(gate), da.to(wide)
    return torch.cat((grad * up * (sigma + gate * sigma * (1 - sigma)), grad * gate * sigma), dim=-1).to(gate_up.dtype)


@jit
def swiglu_kernel(gate_up, out, width, WAITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    wait_for_previous(WAITS)
    at = gate_up + row * 2 * width + c
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + c, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


@jit
def swiglu_backward_kernel(da, gate_up, out, width, BLOCK: tl.constexpr):
    """BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    at = row * 2 * width + c
    g = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + at + width, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(da + row * width + c, mask=mask, other=0.0).to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-g))
    tl.store(out + at, (d * u * (sigma + g * sigma * (1.0 - sigma))).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + width, (d * g * sigma).to(out.dtype.element_ty), mask=mask)


def _check(gate_up: torch.Tensor, da: torch.Tensor | None = None) -> None:
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up must be contiguous [T, 2 I], got shape {tuple(gate_up.shape)} and strides {gate_up.stride()}")
    if da is not None and (da.shape != (gate_up.shape[0], gate_up.shape[1] // 2) or not da.is_contiguous()):
        raise ValueError(f"da must be contiguous [T, I] beside gate_up {tuple(gate_up.shape)}, got {tuple(da.shape)}, {da.stride()}")


def _launch(gate_up: torch.Tensor) -> Launch:
    sizes = {"rows": 1, "length": gate_up.shape[1] // 2, "programs": gate_up.shape[0], "itemsize": gate_up.dtype.itemsize}
    return plan("swiglu", processors=num_processors(gate_up.device), device=gate_up.device, **sizes)


def swiglu(gate_up: Float[torch.Tensor, "T I2"]) -> Float[torch.Tensor, "T I"]:
    """silu(gate) * up [T, I] of the contiguous pair [T, 2 I]. No gradients. Raises ValueError where the shape does not fit."""
    _check(gate_up)
    if not uses_triton(gate_up):
        count("swiglu", "reference", gate_up.device.type)
        return swiglu_reference(gate_up)
    count("swiglu", "triton", gate_up.device.type)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        launch = _launch(gate_up)
        grid, options = (rows, triton.cdiv(width, launch.block)), launch.options | overlapped(gate_up.device)
        swiglu_kernel[grid](gate_up, out, width, BLOCK=launch.block, **options)
    return out


def swiglu_backward(da: Float[torch.Tensor, "T I"], gate_up: Float[torch.Tensor, "T I2"]) -> Float[torch.Tensor, "T I2"]:
    """d loss / d gate_up [T, 2 I] from d loss / d a [T, I]. Raises ValueError where shapes or strides do not fit."""
    _check(gate_up, da)
    if not uses_triton(gate_up):
        count("swiglu_backward", "reference", gate_up.device.type)
        return swiglu_backward_reference(da, gate_up)
    count("swiglu_backward", "triton", gate_up.device.type)
    rows, width = da.shape
    out = torch.empty_like(gate_up)
    if rows:
        launch = _launch(gate_up)
        swiglu_backward_kernel[(rows, triton.cdiv(width, launch.block))](da, gate_up, out, width, BLOCK=launch.block, **launch.options)
    return out
