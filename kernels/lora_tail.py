"""Segmented LoRA inside the base product: y = [x | v] [W | B]^T is one GEMM over K + C columns, without a second pass over y.

    v[t, c] = scale * (x[t] A_s^T)[r]     where column c is rank r of slot s, the adapter of row t; else 0
    B[n, c] = B_s[n, r]                   where column c is rank r of slot s in the slice of output n; else 0

Legend: T rows, K input features, C columns of the tail, N outputs, J slices, S slots, G kinds of tables. Rows of x and of W lie K + C
columns apart, and the tail is what lies between. Each slice has a share of C // J columns, in which a slot has the same columns in every
slice. A step chooses its slots (`LoraTails.choose`): those of the most rows, until the share is full; rows of other slots get their
term behind the product (`segmented_lora.expand_`).
A slot's B that is not finite would spoil the rows of others, as 0 * inf: zeros stand in for it, and the rows of that slot become NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from kernels.backend import IS_INTERPRETED, dot, jit, num_processors, overlapped, tl, triton, uses_triton, wait_for_previous, wide_dtype
from kernels.counters import count
from kernels.layout import SegmentLayout
from kernels.lora_kernels import load_entry
from kernels.lora_table import LoraTable
from kernels.segmented_lora import Low, expand_, plan_for

__all__ = ["LoraTails", "Tail", "columns_behind", "placed_tail", "tail_linear", "weight_with_tail", "with_tail"]

ALIGNED_COLUMNS = 8  # a slot's columns begin at a multiple: 16 bytes of bf16
FILL_ROWS, FILL_STEP = 512, 64  # outputs of one program, and at once
_TARGET_WORDS = tl.constexpr(4)


def with_tail(rows: int, features: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An empty [rows, features] of `like`'s dtype and device with room for `columns` behind every row."""
    return torch.empty(rows, features + columns, dtype=like.dtype, device=like.device)[:, :features]


def weight_with_tail(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """A copy of a weight [N, K] with `columns` of zeros behind every row: what is never written there must be finite."""
    return weight.new_zeros(weight.shape[0], weight.shape[1] + columns)[:, : weight.shape[1]].copy_(weight)


def columns_behind(rows: torch.Tensor) -> int:
    """How many columns lie between the rows of a matrix [rows, features]."""
    return rows.stride(0) - rows.shape[1]


def _with_columns(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[rows, features + columns]: a matrix with the first columns of its tail."""
    return rows.as_strided((rows.shape[0], rows.shape[1] + columns), rows.stride())


@jit
def fill_kernel(
    targets,
    entries,
    chosen,
    flags,
    like,
    num_slots,
    share_of,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    MAX_CHOSEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_N outputs of one slice (row of the stack), one chosen slot: its B in the slice's own share, zeros in the other shares."""
    row = tl.program_id(1)
    target = targets + row * _TARGET_WORDS
    kind = tl.load(target + 2).to(tl.int32)
    share = tl.load(share_of + kind)
    places = chosen + kind * (num_slots + MAX_CHOSEN) * 2
    slot = tl.load(places + (num_slots + tl.program_id(2)) * 2)
    dtype: tl.constexpr = like.dtype.element_ty
    if (share == 0) | (slot < 0):
        return
    first = tl.load(places + slot * 2)
    columns = tl.load(places + slot * 2 + 1)
    _a, b, rank, _scale, _column, width = load_entry(entries, slot, num_slots, row, dtype, RANK_MULTIPLE, COLUMN_MULTIPLE)
    begin = tl.program_id(0) * BLOCK_N
    if begin >= width:
        return
    stride = tl.load(target + 1)
    slice = (tl.load(target + 3) % 256).to(tl.int32)
    slices = (tl.load(target + 3) // 256).to(tl.int32)
    tail = tl.multiple_of(tl.load(target).to(tl.pointer_type(dtype)), 16)  # type: ignore[arg-type]
    r = tl.arange(0, BLOCK_R)
    is_bad = tl.zeros((STEP_N, BLOCK_R), dtype=tl.int32)
    for n0 in range(begin, tl.minimum(begin + BLOCK_N, width), STEP_N):
        n = (n0 + tl.arange(0, STEP_N)).to(tl.int64)[:, None]
        inside = (n < width) & (r < columns)[None, :]
        w = tl.load(b + n * rank + r[None, :], mask=inside & (r < rank)[None, :], other=0.0)
        is_fine = tl.abs(w.to(tl.float32)) < float("inf")  # not so if NaN
        is_bad = tl.maximum(is_bad, 1 - is_fine.to(tl.int32))
        at = tail + n * stride + (first + r)[None, :]
        for j in range(slices):
            tl.store(at + j * share, tl.where(is_fine & (j == slice), w.to(tl.float32), 0.0).to(dtype), mask=inside)
    if tl.max(tl.max(is_bad, 1), 0) > 0:
        tl.store(flags + row * num_slots + slot, 1)


@jit
def shrink_placing_kernel(
    x,
    tiles,
    entries,
    sums,
    placed,
    flags,
    x_stride,
    num_slots,
    slice_stride,
    K,
    share,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One of PARTS stretches of a tile's rows, bare ones too, one slice: v goes to `sums` as in `shrink_kernel`, and scale * v to the
    columns of the rows' slot in the slice's share of the tail, whose other columns become 0.
    """
    tile = tiles + tl.program_id(0) // PARTS * 4
    skipped = tl.program_id(0) % PARTS * BLOCK_T
    slice = tl.program_id(1)
    slot = tl.load(tile)
    num_rows = tl.load(tile + 2) - skipped
    is_bare = tl.load(tile + 3)
    a, _b, rank, scale, _column, _width = load_entry(entries, slot, num_slots, slice, x.dtype.element_ty, RANK_MULTIPLE, COLUMN_MULTIPLE)
    first = tl.load(placed + slot * 2)
    wait_for_previous(WAITS)
    if num_rows <= 0:
        return
    row_mask = (tl.arange(0, BLOCK_T) < num_rows)[:, None]
    rows = (tl.load(tile + 1) + skipped + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    rank = tl.where(is_bare != 0, 0, rank)
    num_placed = tl.where(first < 0, 0, rank)
    is_bad = tl.load(flags + slice * num_slots + slot) > 0
    tail = x + rows * x_stride + K + slice * share
    c = tl.arange(0, BLOCK_C)
    others = (c < share) & ((c < first) | (c >= first + num_placed))
    tl.store(tail + c[None, :], tl.zeros((BLOCK_T, BLOCK_C), dtype=x.dtype.element_ty), mask=row_mask & others[None, :])
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            left = tl.load(x + rows * x_stride + k[None, :], mask=row_mask & (k < K)[None, :], other=0.0)
            right = tl.load(a + r.to(tl.int64)[None, :] * K + k[:, None], mask=(k < K)[:, None] & (r < rank)[None, :], other=0.0)
            acc = dot(left, right, acc, WIDE)
        tl.store(sums + slice * slice_stride + rows * R + r[None, :], acc, mask=row_mask & (r < rank)[None, :])
        v = tl.where(is_bad, float("nan"), scale * acc)
        tl.store(tail + (first + r)[None, :], v.to(x.dtype.element_ty), mask=row_mask & (r < num_placed)[None, :])


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """One table's part of a step's choice: `places` [S + C // 8, 2] int32 (first column in a share, or -1, and number of columns, by
    slot), `flags` [J, S] int32 of slots whose B is not finite, the columns of a share, and
    whether it is known that every row's slot has a place.
    """

    places: torch.Tensor
    flags: torch.Tensor
    share: int
    is_complete: bool = False


class LoraTails:
    """The tails of the weights behind a stack's tables, and what of the adapters' B lies in them.

    `shape` [G, S + C // 8, 2] is that of a choice: for every kind of table the places of each slot, and behind them the chosen slots.
    """

    def __init__(
        self,
        tables: Sequence[LoraTable],
        weights: Sequence[Float[torch.Tensor, "N K"] | None],
        entries: torch.Tensor,
        num_kinds: int = 1,
    ) -> None:
        """`entries` [R, S, 8] holds the rows of all tables, one table behind the other; table i is of kind i % num_kinds. A weight without
        columns behind its rows, or None, takes no part.

        Raises ValueError where a weight does not fit its table, or tables of one kind differ.
        """
        self.tables, self.entries, self.num_kinds = tuple(tables), entries, num_kinds
        self.num_slots, self.columns = tables[0].num_slots, 0
        self.shares = [0] * num_kinds
        targets: list[tuple[int, int, int, int]] = []
        self.first_rows: list[int] = []
        for i, (table, weight) in enumerate(zip(tables, weights, strict=True)):
            kind, columns = i % num_kinds, 0 if weight is None else columns_behind(weight)
            self.first_rows.append(len(targets))
            if weight is not None:
                check_weight(weight, table)
                self.columns = max(self.columns, columns)
            share = columns // table.num_slices // ALIGNED_COLUMNS * ALIGNED_COLUMNS
            if i < num_kinds:
                self.shares[kind] = share
            if share != self.shares[kind] or (columns and columns != self.columns):
                raise ValueError(f"weights of one kind must have equally many columns behind their rows, got {columns} for table {i}")
            address, stride = (0, 0) if weight is None else (weight.data_ptr(), weight.stride(0))
            for j, offset in enumerate(table.out_offsets):
                at = address + (offset * stride + table.in_features) * table.dtype.itemsize  # not read where the share is 0
                targets.append((at, stride, kind, j + 256 * table.num_slices))
        self.weights = tuple(weights)
        self.max_chosen = self.columns // ALIGNED_COLUMNS
        self.shape = (num_kinds, self.num_slots + self.max_chosen, 2)
        self.widest = max(max(table.out_features) for table in tables)
        device = tables[0].device
        self.targets = torch.tensor(targets, dtype=torch.int64).to(device)
        self.share_of = torch.tensor(self.shares, dtype=torch.int32).to(device)
        self.flags = torch.zeros(len(targets), self.num_slots, dtype=torch.int32, device=device)

    def choose(self, rows: Mapping[int, int], rank_of: Callable[[int, int], int]) -> np.ndarray:
        """The choice for a step with so many `rows` of each slot, on the host. `rank_of(kind, slot)`: the largest rank that the slot has in
        tables of that kind."""
        chosen = np.full(self.shape, -1, dtype=np.int32)
        by_rows = sorted(rows, key=lambda slot: (-rows[slot], slot))
        for kind, share in enumerate(self.shares):
            used, slots = 0, []
            for slot in by_rows if share else ():
                columns = -(-rank_of(kind, slot) // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
                if columns and used + columns <= share:
                    chosen[kind, slot] = used, columns
                    slots.append(slot)
                    used += columns
            chosen[kind, self.num_slots : self.num_slots + len(slots), 0] = slots
        return chosen

    def fill_(self, chosen: torch.Tensor) -> None:
        """Write B of the chosen slots into all tails, in one launch: once a step, before `tail_linear`."""
        self.flags.zero_()
        if not self.columns:
            return
        like = next(weight for weight in self.weights if weight is not None)
        block = min(triton.next_power_of_2(max(self.columns // ALIGNED_COLUMNS * len(self.targets), FILL_STEP)), FILL_ROWS)
        grid = (triton.cdiv(self.widest, block), len(self.targets), self.max_chosen)
        fill_kernel[grid](
            self.targets,
            self.entries,
            chosen,
            self.flags,
            like,
            self.num_slots,
            self.share_of,
            RANK_MULTIPLE=min(table.rank_multiple for table in self.tables),
            COLUMN_MULTIPLE=min(table.column_multiple for table in self.tables),
            MAX_CHOSEN=self.max_chosen,
            BLOCK_N=block,
            STEP_N=FILL_STEP,
            BLOCK_R=min(triton.next_power_of_2(max(self.shares)), max(table.rank_bucket for table in self.tables)),
        )

    def of(self, index: int, chosen: torch.Tensor, *, is_complete: bool = False) -> Tail | None:
        """The part of table `index`; None where its weight has no tail. `is_complete`: all slots of the step's rows were chosen."""
        kind, first = index % self.num_kinds, self.first_rows[index]
        if not self.shares[kind]:
            return None
        return Tail(chosen[kind], self.flags[first : first + self.tables[index].num_slices], self.shares[kind], is_complete)


def placed_tail(table: LoraTable, weight: Float[torch.Tensor, "N K"], layout: SegmentLayout) -> Tail:
    """The tail of one linear alone, filled for the rows of a layout. Raises ValueError where the weight has no tail."""
    tails = LoraTails([table], [weight], table.entries)
    rows = {slot: sum(n for s, _, n in layout.runs if s == slot) for slot in layout.slots}
    ranks = {slot: max(w.rank for (_, s), w in table.weights.items() if s == slot) for slot in layout.slots}
    choice = tails.choose(rows, lambda kind, slot: ranks[slot])
    chosen = torch.from_numpy(choice).to(table.device)
    tails.fill_(chosen)
    tail = tails.of(0, chosen, is_complete=bool((choice[0, list(layout.slots), 0] >= 0).all()))
    if tail is None:
        raise ValueError(f"a weight must have columns behind its rows, got strides {weight.stride()}. Make it with weight_with_tail.")
    return tail


def check_weight(weight: torch.Tensor, table: LoraTable) -> None:
    """Raises ValueError for a weight that is not the base of a table's linears."""
    shape = (table.total_out, table.in_features)
    if tuple(weight.shape) != shape or weight.dtype != table.dtype or weight.stride(1) != 1 or columns_behind(weight) < 0:
        raise ValueError(
            f"a weight with a tail must be {shape} in {table.dtype} with adjacent columns, "
            f"got {tuple(weight.shape)} in {weight.dtype} with strides {weight.stride()}"
        )


def tail_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: LoraTable, layout: SegmentLayout
) -> torch.Tensor:
    """The specification of `tail_linear`: base product and LoRA term in fp32 (or wider), rounded once."""
    wide = wide_dtype(x.dtype)
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    for slot, first, rows in layout.runs:
        for j, (offset, width) in enumerate(zip(table.out_offsets, table.out_features, strict=True)):
            found = table.get(j, slot)
            if found is not None:
                term = x[first : first + rows].to(wide) @ found.a.to(wide).T @ found.b.to(wide).T
                y[first : first + rows, offset : offset + width] += found.scale * term
    return y.to(x.dtype)


def tail_linear(
    x: Float[torch.Tensor, "T K"],
    weight: Float[torch.Tensor, "N K"],
    bias: Float[torch.Tensor, " N"] | None,
    table: LoraTable,
    layout: SegmentLayout,
    tail: Tail,
) -> Float[torch.Tensor, "T N"]:
    """x W^T + bias + every row's own LoRA term [T, N]; B is where `LoraTails.fill_` has placed it.

    The tails of x's rows are overwritten. No gradients. Raises ValueError where a tail is missing or shapes do not fit.
    """
    check_weight(weight, table)
    columns = tail.share * table.num_slices  # what lies behind them is never written
    if columns_behind(weight) < columns or columns_behind(x) < columns or x.shape != (layout.num_rows, table.in_features):
        raise ValueError(
            f"x must be {(layout.num_rows, table.in_features)} and x and the weight must have at least {columns} columns behind their rows "
            f"(with_tail makes such a tensor), got {tuple(x.shape)} with {columns_behind(x)} and {columns_behind(weight)}"
        )
    if not uses_triton(x):
        raise ValueError(f"tail_linear needs a GPU, got a tensor on {x.device}. On the CPU, add the term behind F.linear: segmented_lora_.")
    if not layout.runs or not table.max_rank:
        return F.linear(x, weight, bias)
    count("tail_linear", "triton", x.device.type)
    rows = 16 if layout.num_tiles * layout.block_rows * table.num_slices < 32 * num_processors(x.device) else 32
    block_rows = min(rows, layout.block_rows)
    parts, rank = layout.block_rows // block_rows, table.rank_bucket
    launch = plan_for("shrink_placing", table, block_rows, table.in_features, layout.num_tiles * parts * table.num_slices, x.device)
    sums = torch.empty(1, table.num_slices, layout.num_rows, rank, dtype=torch.float32, device=x.device)
    shrink_placing_kernel[(layout.num_tiles * parts, table.num_slices)](
        x,
        layout.tiles,
        table.entries,
        sums,
        tail.places,
        tail.flags,
        x.stride(0),
        table.num_slots,
        sums.stride(1),
        table.in_features,
        tail.share,
        R=rank,
        RANK_MULTIPLE=table.rank_multiple,
        COLUMN_MULTIPLE=table.column_multiple,
        PARTS=parts,
        BLOCK_T=block_rows,
        BLOCK_K=launch.block,
        BLOCK_R=launch.block_rank,
        BLOCK_C=triton.next_power_of_2(tail.share),
        WIDE=IS_INTERPRETED,
        **overlapped(x.device),
        **launch.options,
    )
    y = F.linear(_with_columns(x, columns), _with_columns(weight, columns), bias)
    return y if tail.is_complete else expand_(y, Low(x, sums), table, layout, tail.places)
