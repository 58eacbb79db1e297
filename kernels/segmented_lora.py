"""Segmented LoRA: every row of the packed batch gets its own adapter's low-rank term (the paper calls it SMLM).

    y[t, off_j : off_j + N_j] += scale_js * (x[t] A_js^T) B_js^T        for every slice j, with s = slot of row t

    dv_js = scale_js * dy_j B_js      dX += dv_js A_js      dA_js = dv_js^T x      dB_js = scale_js * dy_j^T (x A_js^T)

Legend: T rows, K input features, N = sum of N_j output features, J slices, S slots, r rank (1..256, different per slot and slice).
Accumulation is fp32 and every reduction has a fixed order. Rows without an adapter are neither read nor written.
Ideas: Punica's SGMV (arXiv 2310.18547), S-LoRA, Loquetier (arXiv 2511.00101).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32

from kernels.backend import IS_INTERPRETED, Beside, num_processors, overlapped, triton, uses_triton, wide_dtype
from kernels.counters import count
from kernels.layout import SegmentLayout
from kernels.lora_kernels import expand_dx_kernel, expand_kernel, outer_kernel, shrink_kernel
from kernels.lora_table import LoraTable, SlotWeights
from kernels.plan import Launch, plan

__all__ = ["LoraTable", "Low", "SlotWeights", "expand_", "lora_gradients", "segmented_lora", "segmented_lora_", "shrink"]

SHRINK_ROWS = 32  # rows of a program that reduces over features: more programs, each with a longer stretch of features
OUTER_ROWS = 64  # rows of one step of a program that reduces over rows

Gradients = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Low:
    """v = x A^T of every row's own adapter, between `shrink` and what adds scale * v B^T to the rows.

    `partials` [P, J, T, R] fp32 are its P split sums, to be added up in order; without them, the reference computes v from `x` [T, K].
    """

    x: torch.Tensor
    partials: torch.Tensor | None = None


def segmented_lora_reference(
    y: torch.Tensor, x: torch.Tensor, table: LoraTable, layout: SegmentLayout, placed: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification of `segmented_lora_` (and of `expand_`): in fp32 (or wider), rounded once, added to y in place."""
    wide = wide_dtype(x.dtype)
    for slot, first, rows in layout.runs:
        if placed is not None and placed[slot, 0] >= 0:
            continue
        x_run = x[first : first + rows].to(wide)  # [rows, K]
        for j, (offset, width) in enumerate(zip(table.out_offsets, table.out_features, strict=True)):
            weights = table.get(j, slot)
            if weights is not None:
                out = y[first : first + rows, offset : offset + width]
                out.copy_(out.to(wide) + weights.scale * (x_run @ weights.a.to(wide).T @ weights.b.to(wide).T))
    return y


def lora_gradients_reference(
    dy: torch.Tensor, x: torch.Tensor, table: LoraTable, layout: SegmentLayout, needs_dx: bool
) -> tuple[torch.Tensor | None, Gradients]:
    """The specification of `lora_gradients`."""
    wide = wide_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if needs_dx else None
    gradients: Gradients = {}
    for (j, slot), weights in table.weights.items():
        if slot not in layout.slots:
            continue
        a, b = weights.a.to(wide), weights.b.to(wide)
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for _, first, rows in (run for run in layout.runs if run[0] == slot):
            x_run = x[first : first + rows].to(wide)
            dy_run = dy[first : first + rows, table.out_offsets[j] : table.out_offsets[j] + table.out_features[j]].to(wide)
            dv = weights.scale * (dy_run @ b)  # [rows, r]
            da += dv.T @ x_run
            db += weights.scale * (dy_run.T @ (x_run @ a.T))
            if dx is not None:
                dx[first : first + rows] += dv @ a
        gradients[(j, slot)] = (da, db)
    return None if dx is None else dx.to(x.dtype), gradients


def _check(name: str, tensor: torch.Tensor, features: int, table: LoraTable, layout: SegmentLayout) -> None:
    """Host-side facts only: nothing here waits for the device."""
    if tuple(tensor.shape) != (layout.num_rows, features):
        raise ValueError(f"{name} must have shape {(layout.num_rows, features)} by the layout and the table, got {tuple(tensor.shape)}")
    if tensor.dtype != table.dtype:
        raise ValueError(f"{name} must be {table.dtype}, as the table, got {tensor.dtype}")
    if tensor.stride(1) != 1 and tensor.numel():
        raise ValueError(f"{name} must have adjacent columns (stride 1), got strides {tensor.stride()}")
    if layout.slots and layout.slots[-1] >= table.num_slots:
        raise ValueError(f"slots of the layout must be below the table's num_slots {table.num_slots}, got {layout.slots[-1]}")


def plan_for(op: str, table: LoraTable, rows: int, length: int, programs: int, device: torch.device) -> Launch:
    """The launch of an op on rows of a table; arguments as for `kernels.plan.plan`."""
    return plan(
        op,
        rows=rows,
        length=length,
        programs=programs,
        processors=num_processors(device),
        itemsize=table.dtype.itemsize,
        rank=table.max_rank,
        device=device,
    )


def _shrink(source: torch.Tensor, table: LoraTable, layout: SegmentLayout, *, is_backward: bool = False) -> torch.Tensor:
    """Split sums fp32 [P, J, T, R]: v = x A^T forward, dv = scale * dy B backward."""
    slices = table.num_slices
    length = max(table.out_features) if is_backward else table.in_features
    block_rows = min(layout.block_rows, SHRINK_ROWS)
    parts = layout.block_rows // block_rows
    launch = plan_for(
        "shrink_backward" if is_backward else "shrink", table, block_rows, length, layout.num_tiles * parts * slices, source.device
    )
    rank = table.rank_bucket
    partials = torch.empty(launch.splits, slices, layout.num_rows, rank, dtype=torch.float32, device=source.device)
    shrink_kernel[(layout.num_tiles * parts, launch.splits, slices)](
        source,
        layout.tiles,
        table.entries,
        partials,
        source.stride(0),
        table.num_slots,
        partials.stride(1),
        partials.stride(0),
        table.in_features,
        IS_BACKWARD=is_backward,
        R=rank,
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        SPLITS=launch.splits,
        PARTS=parts,
        BLOCK_T=block_rows,
        BLOCK_K=launch.block,
        BLOCK_R=launch.block_rank,
        WIDE=IS_INTERPRETED,
        **overlapped(source.device),
        **launch.options,
    )
    return partials


def _expand_(y: torch.Tensor, partials: torch.Tensor, table: LoraTable, layout: SegmentLayout, placed: torch.Tensor | None) -> None:
    """y += scale * v B^T, but for rows of slots with a place."""
    widest = max(table.out_features)
    launch = plan_for("expand", table, layout.block_rows, widest, layout.num_tiles * table.num_slices * (widest // 128), y.device)
    expand_kernel[(layout.num_tiles * launch.parts, triton.cdiv(widest, launch.block * launch.repeats), table.num_slices)](
        y,
        layout.tiles,
        table.entries,
        partials,
        layout.tiles if placed is None else placed,
        y.stride(0),
        table.num_slots,
        partials.stride(1),
        partials.stride(0),
        R=partials.shape[3],
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        SPLITS=partials.shape[0],
        REPEATS=launch.repeats,
        PARTS=launch.parts,
        BLOCK_T=layout.block_rows // launch.parts,
        BLOCK_N=launch.block,
        BLOCK_R=launch.block_rank,
        WIDE=IS_INTERPRETED,
        SKIPS=placed is not None,
        **overlapped(y.device),
        **launch.options,
    )


def _expand_dx(x: torch.Tensor, dv: torch.Tensor, table: LoraTable, layout: SegmentLayout, into: torch.Tensor | None) -> torch.Tensor:
    """dx = sum over slices of dv A, added to `into` where it is given; in a new dx, rows without an adapter are 0."""
    dx = into
    if dx is None:
        covered = sum(rows for _, _, rows in layout.runs) == layout.num_rows
        dx = (torch.empty if covered else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
    launch = plan_for("expand_dx", table, layout.block_rows, table.in_features, layout.num_tiles * (table.in_features // 128), x.device)
    expand_dx_kernel[(layout.num_tiles * launch.parts, triton.cdiv(table.in_features, launch.block))](
        dx,
        layout.tiles,
        table.entries,
        dv,
        table.num_slots,
        dv.stride(1),
        dv.stride(0),
        table.in_features,
        table.num_slices,
        ADDS=into is not None,
        R=dv.shape[3],
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        SPLITS=dv.shape[0],
        PARTS=launch.parts,
        BLOCK_T=layout.block_rows // launch.parts,
        BLOCK_N=launch.block,
        BLOCK_R=launch.block_rank,
        WIDE=IS_INTERPRETED,
        **launch.options,
    )
    return dx


def _outer(source: torch.Tensor, v: torch.Tensor, table: LoraTable, layout: SegmentLayout, *, is_db: bool) -> list[torch.Tensor]:
    """One gradient per slot of the layout, fp32: dB [total_out, R], or dA [J, R, K]. The second stage adds a slot's chunks in order."""
    chunks, slices, rank = layout.chunks.shape[0], table.num_slices, v.shape[3]
    length = max(table.out_features) if is_db else table.in_features
    launch = plan_for("outer_db" if is_db else "outer_da", table, layout.block_rows, length, chunks * slices, source.device)
    shape = (chunks, table.total_out, rank) if is_db else (chunks, slices, rank, table.in_features)
    sums = torch.empty(shape, dtype=torch.float32, device=source.device)
    outer_kernel[(chunks, triton.cdiv(length, launch.block), slices)](
        source,
        layout.chunks,
        table.entries,
        v,
        sums,
        source.stride(0),
        table.num_slots,
        v.stride(1),
        v.stride(0),
        table.in_features,
        slices,
        table.total_out,
        IS_DB=is_db,
        R=rank,
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        SPLITS=v.shape[0],
        BLOCK_T=OUTER_ROWS,
        BLOCK_M=launch.block,
        BLOCK_R=launch.block_rank,
        WIDE=IS_INTERPRETED,
        **launch.options,
    )
    parts = sums.split(layout.chunks_per_slot)
    return [part[0] if part.shape[0] == 1 else part.sum(0) for part in parts]


def _sum(partials: torch.Tensor) -> torch.Tensor:
    """The splits added up in order, once, for kernels of many programs that all read them."""
    return partials.sum(0, keepdim=True) if partials.shape[0] > 1 else partials


def _lora_gradients_triton(
    dy: torch.Tensor, x: torch.Tensor, table: LoraTable, layout: SegmentLayout, needs_dx: bool, into: torch.Tensor | None
) -> tuple[torch.Tensor | None, Gradients]:
    beside = Beside(dy.device)
    with beside:
        all_db = _outer(dy, _sum(_shrink(x, table, layout)), table, layout, is_db=True)
    dv = _sum(_shrink(dy, table, layout, is_backward=True))
    all_da = _outer(x, dv, table, layout, is_db=False)
    dx = _expand_dx(x, dv, table, layout, into) if needs_dx else None
    beside.join()
    gradients: Gradients = {}
    for slot, da, db in zip(layout.slots, all_da, all_db, strict=True):
        for j, (offset, width) in enumerate(zip(table.out_offsets, table.out_features, strict=True)):
            weights = table.get(j, slot)
            if weights is not None:
                gradients[(j, slot)] = (da[j, : weights.rank], db[offset : offset + width, : weights.rank])
    return dx, gradients


def shrink(x: Float[torch.Tensor, "T K"], table: LoraTable, layout: SegmentLayout) -> Low | None:
    """The first half of `segmented_lora_`; None where no row has an adapter.

    It may be launched before the base product that y comes from, so that only the second half comes behind it. Raises ValueError
    where x does not fit.
    """
    _check("x", x, table.in_features, table, layout)
    if not layout.runs or not table.max_rank:
        return None
    return Low(x, _shrink(x, table, layout) if uses_triton(x) else None)


def expand_(
    y: Float[torch.Tensor, "T N"],
    low: Low | None,
    table: LoraTable,
    layout: SegmentLayout,
    placed: Int32[torch.Tensor, "P 2"] | None = None,
) -> Float[torch.Tensor, "T N"]:
    """The second half of `segmented_lora_`: add scale * v B^T to y in place and return y. Raises ValueError where y does not fit.

    Rows of slots s with placed[s, 0] >= 0 are left as they are: they have their term already (`lora_tail`).
    """
    _check("y", y, table.total_out, table, layout)
    if low is None:
        return y
    count("segmented_lora", "reference" if low.partials is None else "triton", y.device.type)
    if low.partials is None:
        return segmented_lora_reference(y, low.x, table, layout, placed)
    _expand_(y, low.partials, table, layout, placed)
    return y


def segmented_lora_(
    y: Float[torch.Tensor, "T N"], x: Float[torch.Tensor, "T K"], table: LoraTable, layout: SegmentLayout
) -> Float[torch.Tensor, "T N"]:
    """Add every row's LoRA term to y in place and return y. No gradients, no synchronisation with the device.

    x [T, K] and y [T, N] may be row slices of larger tensors (columns adjacent); both have the table's dtype (bf16, fp16 or fp32).
    Raises ValueError where shapes, dtypes or slots do not fit.
    """
    _check("y", y, table.total_out, table, layout)
    return expand_(y, shrink(x, table, layout), table, layout)


def lora_gradients(
    dy: Float[torch.Tensor, "T N"],
    x: Float[torch.Tensor, "T K"],
    table: LoraTable,
    layout: SegmentLayout,
    *,
    needs_dx: bool = True,
    into: Float[torch.Tensor, "T K"] | None = None,
) -> tuple[Float[torch.Tensor, "T K"] | None, Gradients]:
    """Gradients of `segmented_lora_`: dX [T, K] of the LoRA term alone (in x's dtype; rows without adapter are 0), or None; and
    {(slice, slot): (dA [r, K], dB [N_j, r])} in fp32 for every slot of the layout that has weights.

    `into` (contiguous, the gradient through the base linear, say) is added to in place and returned as dX. For an engine that runs its
    own backward; `segmented_lora` is the autograd version. Raises ValueError as `segmented_lora_`.
    """
    _check("x", x, table.in_features, table, layout)
    _check("dy", dy, table.total_out, table, layout)
    if into is not None and (into.shape != x.shape or into.dtype != x.dtype or not into.is_contiguous() or not needs_dx):
        raise ValueError(
            f"into must be contiguous and like x {tuple(x.shape)} {x.dtype}, with needs_dx, got {tuple(into.shape)} {into.dtype}"
        )
    if not layout.runs or not table.max_rank:
        return (None if not needs_dx else torch.zeros_like(x) if into is None else into), {}
    if not uses_triton(dy):
        count("lora_gradients", "reference", dy.device.type)
        dx, gradients = lora_gradients_reference(dy, x, table, layout, needs_dx)
        return (dx if into is None or dx is None else into.add_(dx)), gradients
    count("lora_gradients", "triton", dy.device.type)
    return _lora_gradients_triton(dy, x, table, layout, needs_dx, into)


class _SegmentedLora(torch.autograd.Function):
    """y_out = y + LoRA(x), y overwritten; inputs after `places` are A, B of each (slice, slot) in `places`."""

    @staticmethod
    def forward(ctx, x, y, table, layout, places, *flat):  # type: ignore[override]
        segmented_lora_(y, x, table, layout)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *flat)
        ctx.table, ctx.layout, ctx.places = table, layout, places
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, *flat = ctx.saved_tensors
        dx, gradients = lora_gradients(dy.contiguous(), x, ctx.table, ctx.layout, needs_dx=ctx.needs_input_grad[0])
        grads: list[torch.Tensor | None] = []
        for i, place in enumerate(ctx.places):
            pair = gradients.get(place, (None, None))
            for tensor, grad in zip(flat[2 * i : 2 * i + 2], pair, strict=True):
                # A slot without rows in this batch has a zero gradient, not a missing one.
                grads.append(torch.zeros_like(tensor) if grad is None else grad.to(tensor.dtype))
        return (dx, dy, None, None, None, *grads)


def segmented_lora(
    x: Float[torch.Tensor, "T K"],
    y: Float[torch.Tensor, "T N"],
    layout: SegmentLayout,
    slices: Sequence[Sequence[SlotWeights | None]],
    out_features: Sequence[int],
) -> Float[torch.Tensor, "T N"]:
    """y + LoRA(x), differentiable in x, y and every `slices[slice][slot].a` [r, K] and `.b` [N_j, r].

    y is overwritten (autograd knows), so it must not be a leaf that requires a gradient. Weights of another dtype than x are cast for the
    product and get their gradient in their own dtype, accumulated in fp32: fp32 masters under bf16 activations work. `out_features` are
    the N_j. Raises ValueError where shapes, dtypes or slots do not fit.
    """
    given = {(j, slot): weights for j, row in enumerate(slices) for slot, weights in enumerate(row) if weights is not None}
    if not given:
        return y
    if len(slices) != len(out_features) or len({len(row) for row in slices}) != 1:
        raise ValueError(f"slices must be {len(out_features)} rows of equal length, got lengths {[len(row) for row in slices]}")
    flat = [tensor for weights in given.values() for tensor in (weights.a, weights.b)]
    cast = {
        place: SlotWeights(w.a.detach().to(x.dtype).contiguous(), w.b.detach().to(x.dtype).contiguous(), w.scale)
        for place, w in given.items()
    }
    table = LoraTable(x.shape[1], out_features, len(slices[0]), device=x.device, dtype=x.dtype, weights=cast)
    return _SegmentedLora.apply(x, y, table, layout, tuple(given), *flat)
