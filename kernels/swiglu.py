"""SwiGLU of packed rows and its gradient.

    a = silu(g) u        dg = da u (sigma + g sigma (1 - sigma))        du = da silu(g)        with sigma = 1 / (1 + exp(-g))

Legend: T rows, I features; gate and up lie side by side as [T, 2 I] = (g, u). Computed in fp32, rounded once. Source: arXiv 2002.05202.

`lora_swiglu` takes (g, u) before their adapters' term: it adds scale * v B^T on the way (`kernels.segmented_lora`), rounds as the separate
op does, and copies the sum of the rows that a backward will need. (g, u) is the widest tensor of a layer: this saves reading it twice
and writing it once.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64

from kernels.backend import IS_INTERPRETED, jit, num_processors, overlapped, tl, triton, uses_triton, wait_for_previous, wide_dtype
from kernels.counters import count
from kernels.keep import keep_rows_
from kernels.layout import SegmentLayout
from kernels.lora_kernels import low_term
from kernels.lora_table import LoraTable
from kernels.lora_tail import with_tail
from kernels.plan import Launch, plan
from kernels.segmented_lora import Low, expand_


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
def swiglu_kernel(gate_up, out, out_stride, width, WAITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    wait_for_previous(WAITS)
    at = gate_up + row * 2 * width + c
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + c, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


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


@jit
def lora_swiglu_kernel(
    gate_up,
    out,
    tiles,
    entries,
    partials,
    kept,
    places,
    out_stride,
    num_slots,
    slice_stride,
    split_stride,
    width,
    KEEPS: tl.constexpr,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    WAITS: tl.constexpr,
):
    """BLOCK_N features of one of PARTS stretches of a tile's rows."""
    tile = tiles + tl.program_id(0) // PARTS * 4
    skipped = tl.program_id(0) % PARTS * BLOCK_T
    slot = tl.load(tile)
    num_rows = tl.load(tile + 2) - skipped
    is_bare = tl.load(tile + 3)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    wait_for_previous(WAITS)
    if num_rows <= 0:
        return
    rows = (tl.load(tile + 1) + skipped + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_mask = tl.arange(0, BLOCK_T) < num_rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (n < width)[None, :]
    at = rows[:, None] * 2 * width + n[None, :]
    g = tl.load(gate_up + at, mask=mask, other=0.0)
    u = tl.load(gate_up + at + width, mask=mask, other=0.0)
    if is_bare == 0:
        g = (
            g.to(tl.float32)
            + low_term(
                entries,
                slot,
                num_slots,
                0,
                partials,
                rows,
                row_mask,
                n,
                slice_stride,
                split_stride,
                dtype,
                R,
                RANK_MULTIPLE,
                COLUMN_MULTIPLE,
                SPLITS,
                BLOCK_T,
                BLOCK_N,
                BLOCK_R,
                WIDE,
            )
        ).to(dtype)
        u = (
            u.to(tl.float32)
            + low_term(
                entries,
                slot,
                num_slots,
                1,
                partials,
                rows,
                row_mask,
                n,
                slice_stride,
                split_stride,
                dtype,
                R,
                RANK_MULTIPLE,
                COLUMN_MULTIPLE,
                SPLITS,
                BLOCK_T,
                BLOCK_N,
                BLOCK_R,
                WIDE,
            )
        ).to(dtype)
    if KEEPS:
        place = tl.load(places + rows, mask=row_mask, other=0).to(tl.int64)
        kept_at = kept + (-1 - place)[:, None] * 2 * width + n[None, :]
        kept_mask = mask & (place < 0)[:, None]
        tl.store(kept_at, g, mask=kept_mask)
        tl.store(kept_at + width, u, mask=kept_mask)
    wide_g = g.to(tl.float32)
    a = wide_g / (1.0 + tl.exp(-wide_g)) * u.to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + n[None, :], a.to(dtype), mask=mask)


def _check(gate_up: torch.Tensor, da: torch.Tensor | None = None) -> None:
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up must be contiguous [T, 2 I], got shape {tuple(gate_up.shape)} and strides {gate_up.stride()}")
    if da is not None and (da.shape != (gate_up.shape[0], gate_up.shape[1] // 2) or not da.is_contiguous()):
        raise ValueError(f"da must be contiguous [T, I] beside gate_up {tuple(gate_up.shape)}, got {tuple(da.shape)}, {da.stride()}")


def _launch(gate_up: torch.Tensor) -> Launch:
    sizes = {"rows": 1, "length": gate_up.shape[1] // 2, "programs": gate_up.shape[0], "itemsize": gate_up.dtype.itemsize}
    return plan("swiglu", processors=num_processors(gate_up.device), device=gate_up.device, **sizes)


def swiglu(gate_up: Float[torch.Tensor, "T I2"], *, tail: int = 0) -> Float[torch.Tensor, "T I"]:
    """silu(gate) * up [T, I] of the contiguous pair [T, 2 I], with `tail` columns behind each row (`lora_tail`). No gradients.

    Raises ValueError where the shape does not fit.
    """
    _check(gate_up)
    if not uses_triton(gate_up):
        count("swiglu", "reference", gate_up.device.type)
        a = swiglu_reference(gate_up)
        return with_tail(*a.shape, tail, a).copy_(a) if tail else a
    count("swiglu", "triton", gate_up.device.type)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = with_tail(rows, width, tail, gate_up)
    if rows:
        launch = _launch(gate_up)
        grid, options = (rows, triton.cdiv(width, launch.block)), launch.options | overlapped(gate_up.device)
        swiglu_kernel[grid](gate_up, out, out.stride(0), width, BLOCK=launch.block, **options)
    return out


def lora_swiglu(
    gate_up: Float[torch.Tensor, "T I2"],
    low: Low,
    table: LoraTable,
    layout: SegmentLayout,
    kept: Float[torch.Tensor, "A I2"] | None = None,
    places: Int64[torch.Tensor, " T"] | None = None,
    *,
    tail: int = 0,
) -> Float[torch.Tensor, "T I"]:
    """`swiglu(expand_(gate_up, low, table, layout))` [T, I], bit for bit, of a table with the two slices gate and up. No gradients.

    With `kept`, the sum of rows with a negative place goes to kept[~place], as `keep_rows_` would. gate_up itself need not hold the sum
    afterwards; `tail` columns lie behind each row of the output. Raises ValueError where shapes or strides do not fit.
    """
    _check(gate_up)
    width = gate_up.shape[1] // 2
    if table.out_features != (width, width) or layout.num_rows != gate_up.shape[0] or gate_up.dtype != table.dtype:
        raise ValueError(
            f"table and layout must be of {gate_up.shape[0]} rows with slices ({width}, {width}) in {gate_up.dtype}, "
            f"got {layout.num_rows}, {table.out_features} and {table.dtype}"
        )
    if (kept is None) != (places is None) or (kept is not None and (kept.shape[1] != 2 * width or not kept.is_contiguous())):
        raise ValueError(f"kept must be contiguous [A, {2 * width}], and given with places, got {kept if kept is None else kept.shape}")
    if low.partials is None:
        gate_up = expand_(gate_up, low, table, layout)
        if kept is not None and places is not None:
            keep_rows_(kept, gate_up, places)
        return swiglu(gate_up, tail=tail)
    count("lora_swiglu", "triton", gate_up.device.type)
    partials, rows = low.partials, layout.block_rows
    sizes = {"rows": rows, "length": width, "programs": layout.num_tiles, "itemsize": gate_up.dtype.itemsize, "rank": table.max_rank}
    launch = plan("lora_swiglu", processors=num_processors(gate_up.device), device=gate_up.device, **sizes)
    out = with_tail(gate_up.shape[0], width, tail, gate_up)
    lora_swiglu_kernel[(layout.num_tiles * launch.parts, triton.cdiv(width, launch.block))](
        gate_up,
        out,
        layout.tiles,
        table.entries,
        partials,
        gate_up if kept is None else kept,
        layout.tiles if places is None else places,
        out.stride(0),
        table.num_slots,
        partials.stride(1),
        partials.stride(0),
        width,
        KEEPS=kept is not None,
        R=partials.shape[3],
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        SPLITS=partials.shape[0],
        PARTS=launch.parts,
        BLOCK_T=rows // launch.parts,
        BLOCK_N=launch.block,
        BLOCK_R=launch.block_rank,
        WIDE=IS_INTERPRETED,
        **overlapped(gate_up.device),
        **launch.options,
    )
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
