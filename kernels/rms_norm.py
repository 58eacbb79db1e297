"""RMS norm of packed rows with the residual addition before it, and its gradient; weights are frozen.

    s = x + delta        h[t] = s[t] rsqrt(mean(s[t]^2) + eps) * w
    dx[t] = r (w dh[t]) - s[t] r^3 mean(s[t] w dh[t]) + above[t]        with r = rsqrt(mean(s[t]^2) + eps)

Legend: T rows, H features, `delta` the output of the block before (or none), `above` the gradient that came down the residual path.
s is rounded to the input's dtype before the norm, as transformers does; the norm is fp32. Source: arXiv 1910.07467.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float

from kernels.backend import jit, num_processors, overlapped, tl, uses_triton, wait_for_previous, wide_dtype
from kernels.counters import count
from kernels.lora_tail import with_tail
from kernels.plan import plan


def add_rms_norm_reference(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `add_rms_norm`."""
    total = x if delta is None else torch.add(x, delta, out=out)
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


def rms_norm_backward_reference(
    dh: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, above: torch.Tensor | None
) -> torch.Tensor:
    """The specification of `rms_norm_backward`, in fp32 (or wider)."""
    wide = wide_dtype(x.dtype)
    s, g = x.to(wide), dh.to(wide) * weight.to(wide)
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    dx = r * g - s * r.pow(3) * (s * g).mean(-1, keepdim=True)
    return (dx if above is None else dx + above.to(wide)).to(x.dtype)


@jit
def add_rms_norm_kernel(x, delta, weight, total, h, h_stride, eps, H, HAS_DELTA: tl.constexpr, WAITS: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = row * H
    c = tl.arange(0, BLOCK)
    mask = c < H
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(WAITS)
    s = tl.load(x + at + c, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        s = (s + tl.load(delta + at + c, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + at + c, s.to(total.dtype.element_ty), mask=mask)
    r = tl.rsqrt(tl.sum(s * s, 0) / H + eps)
    tl.store(h + row * h_stride + c, (s * r * w).to(h.dtype.element_ty), mask=mask)


@jit
def rms_norm_backward_kernel(dh, x, weight, above, dx, eps, H, HAS_ABOVE: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    at = tl.program_id(0).to(tl.int64) * H
    c = tl.arange(0, BLOCK)
    mask = c < H
    s = tl.load(x + at + c, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dh + at + c, mask=mask, other=0.0).to(tl.float32) * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 0) / H + eps)
    result = r * g - s * (r * r * r * (tl.sum(s * g, 0) / H))
    if HAS_ABOVE:
        result += tl.load(above + at + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at + c, result.to(dx.dtype.element_ty), mask=mask)


def _check(weight: torch.Tensor, **rows: torch.Tensor | None) -> None:
    given = {name: tensor for name, tensor in rows.items() if tensor is not None}
    shape = next(iter(given.values())).shape
    for name, tensor in given.items():
        if tensor.ndim != 2 or tensor.shape != shape or tensor.shape[1] != weight.shape[0]:
            raise ValueError(
                f"{name} must be [T, H] with H = {weight.shape[0]}, all alike, got {tuple(tensor.shape)} beside {tuple(shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}. Call .contiguous() first.")


def _launch(x: torch.Tensor) -> dict[str, int]:
    sizes = {"rows": 1, "length": x.shape[1], "programs": x.shape[0], "itemsize": x.dtype.itemsize}
    launch = plan("rms_norm", processors=num_processors(x.device), device=x.device, **sizes)
    return {"BLOCK": launch.block, **launch.options}


def add_rms_norm(
    x: Float[torch.Tensor, "T H"],
    delta: Float[torch.Tensor, "T H"] | None,
    weight: Float[torch.Tensor, " H"],
    eps: float,
    *,
    out: Float[torch.Tensor, "T H"] | None = None,
    tail: int = 0,
) -> tuple[Float[torch.Tensor, "T H"], Float[torch.Tensor, "T H"]]:
    """(s = x + delta, its RMS norm times weight); without `delta`, s is x itself. No gradients.

    s is written to `out` where it is given, which may be x itself. Tensors are contiguous and share a dtype; the norm has `tail`
    columns behind each row (`lora_tail`). Raises ValueError where shapes or strides do not fit.
    """
    _check(weight, x=x, delta=delta, out=out)
    if not uses_triton(x):
        count("add_rms_norm", "reference", x.device.type)
        total, h = add_rms_norm_reference(x, delta, weight, eps, out)
        return total, with_tail(*x.shape, tail, x).copy_(h) if tail else h
    count("add_rms_norm", "triton", x.device.type)
    total, h = x, with_tail(x.shape[0], x.shape[1], tail, x)
    if delta is not None:
        total = torch.empty_like(x) if out is None else out
    if x.shape[0]:
        other = x if delta is None else delta
        launch = _launch(x) | overlapped(x.device)
        add_rms_norm_kernel[(x.shape[0],)](x, other, weight, total, h, h.stride(0), eps, x.shape[1], HAS_DELTA=delta is not None, **launch)
    return total, h


def rms_norm_backward(
    dh: Float[torch.Tensor, "T H"],
    x: Float[torch.Tensor, "T H"],
    weight: Float[torch.Tensor, " H"],
    eps: float,
    above: Float[torch.Tensor, "T H"] | None = None,
    *,
    out: Float[torch.Tensor, "T H"] | None = None,
) -> Float[torch.Tensor, "T H"]:
    """d loss / d x [T, H] in x's dtype from d loss / d h, plus `above`, what reaches x past the norm; in `out` where it is given.

    Raises ValueError as `add_rms_norm`.
    """
    _check(weight, x=x, dh=dh, above=above, out=out)
    if not uses_triton(x):
        count("rms_norm_backward", "reference", x.device.type)
        dx = rms_norm_backward_reference(dh, x, weight, eps, above)
        return dx if out is None else out.copy_(dx)
    count("rms_norm_backward", "triton", x.device.type)
    dx = torch.empty_like(x) if out is None else out
    if x.shape[0]:
        other = x if above is None else above
        launch = _launch(x)
        rms_norm_backward_kernel[(x.shape[0],)](dh, x, weight, other, dx, eps, x.shape[1], HAS_ABOVE=above is not None, **launch)
    return dx
