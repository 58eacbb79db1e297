"""The Triton kernels of segmented LoRA; `segmented_lora.py` has the equation, the reference and the ops.

shrink   v[t, r] = sum_k x[t, k] A[r, k]      (forward)     dv[t, r] = scale * sum_n dy[t, n] B[n, r]   (backward)
expand   y[t, n] += scale * sum_r v[t, r] B[n, r]           dx[t, k] = sum_j sum_r dv_j[t, r] A_j[r, k]
outer    dB[n, r] = scale * sum_t dy[t, n] v[t, r]          dA[r, k] = sum_t dv[t, r] x[t, k]

Legend: T rows, J slices, R padded rank, P splits of the reduction, C chunks of rows. v and dv are fp32 [P, J, T, R]: the split sums are
added up by their reader, always in the same order. One program owns one tile (or chunk) of one adapter's rows, so that no two write
to one address and nothing is atomic. v is rounded to the input's dtype before the second product, as in PEFT.
"""

from kernels.backend import dot, jit, tl, wait_for_previous

_WORDS = tl.constexpr(8)


@jit
def load_entry(entries, slot, num_slots, slice, dtype: tl.constexpr, RANK_MULTIPLE: tl.constexpr, COLUMN_MULTIPLE: tl.constexpr):
    """(A, B, rank, scale, first column, width) of a table entry."""
    entry = entries + (slice * num_slots + slot).to(tl.int64) * _WORDS
    # Addresses come from memory, so the compiler must be told their alignment, or it emits one scalar load per element.
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)  # type: ignore[arg-type]
    b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(dtype)), 16)  # type: ignore[arg-type]
    rank = tl.multiple_of(tl.load(entry + 2).to(tl.int32), RANK_MULTIPLE)
    scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
    column = tl.multiple_of(tl.load(entry + 4).to(tl.int32), COLUMN_MULTIPLE)
    width = tl.multiple_of(tl.load(entry + 5).to(tl.int32), COLUMN_MULTIPLE)
    return a, b, rank, scale, column, width


@jit
def load_partials(partials, rows, row_mask, r, rank, split_stride, R: tl.constexpr, SPLITS: tl.constexpr):
    """v [rows, ranks] in fp32: the sum of its splits, in order. `partials` points at the slice."""
    at = partials + rows[:, None] * R + r[None, :]
    mask = row_mask[:, None] & (r < rank)[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for _ in range(1, SPLITS):
        at += split_stride
        total += tl.load(at, mask=mask, other=0.0)
    return total


@jit
def tile_rows(tile):
    """Rows of a tile that have an adapter: all of them or none."""
    return tl.load(tile + 2) * (1 - tl.load(tile + 3))


@jit
def low_term(
    entries,
    slot,
    num_slots,
    slice,
    partials,
    rows,
    row_mask,
    n,
    slice_stride,
    split_stride,
    dtype: tl.constexpr,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """scale * v B^T [rows, n] in fp32, for columns n of one slice; 0 where the slot has no weights for it."""
    _a, b, rank, scale, _column, width = load_entry(entries, slot, num_slots, slice, dtype, RANK_MULTIPLE, COLUMN_MULTIPLE)
    partials += slice * slice_stride
    b_at = b + n.to(tl.int64)[None, :] * rank
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        v = load_partials(partials, rows, row_mask, r, rank, split_stride, R, SPLITS)
        w = tl.load(b_at + r[:, None], mask=(n < width)[None, :] & (r < rank)[:, None], other=0.0)
        acc = dot(v.to(dtype), w, acc, WIDE)
    return scale * acc


@jit
def shrink_kernel(
    source,
    tiles,
    entries,
    partials,
    source_stride,
    num_slots,
    slice_stride,
    split_stride,
    K,
    IS_BACKWARD: tl.constexpr,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One of PARTS stretches of a tile's rows, one split, one slice. Forward reads x and A [r, K]; backward the slice's columns of dy
    and B [N_j, r].
    """
    tile = tiles + tl.program_id(0) // PARTS * 4
    skipped = tl.program_id(0) % PARTS * BLOCK_T
    split = tl.program_id(1)
    slice = tl.program_id(2)
    slot = tl.load(tile)
    num_rows = tile_rows(tile) - skipped
    a, b, rank, scale, column, width = load_entry(entries, slot, num_slots, slice, source.dtype.element_ty, RANK_MULTIPLE, COLUMN_MULTIPLE)
    wait_for_previous(WAITS)
    if num_rows <= 0:
        return
    row = tl.load(tile + 1) + skipped + tl.arange(0, BLOCK_T)
    row_mask = tl.arange(0, BLOCK_T) < num_rows
    rows = row.to(tl.int64)
    length = K
    source_rows = source + rows[:, None] * source_stride
    if IS_BACKWARD:
        length = width
        source_rows += column
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_K) * BLOCK_K
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    out = partials + split.to(tl.int64) * split_stride + slice.to(tl.int64) * slice_stride + rows[:, None] * R
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for k0 in range(begin, end, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(source_rows + k[None, :], mask=row_mask[:, None] & (k < end)[None, :], other=0.0)
            w_mask = (k < end)[:, None] & (r < rank)[None, :]
            if IS_BACKWARD:
                w = tl.load(b + k.to(tl.int64)[:, None] * rank + r[None, :], mask=w_mask, other=0.0)
            else:
                w = tl.load(a + r.to(tl.int64)[None, :] * K + k[:, None], mask=w_mask, other=0.0)
            acc = dot(x, w, acc, WIDE)
        if IS_BACKWARD:
            acc *= scale
        tl.store(out + r[None, :], acc, mask=row_mask[:, None] & (r < rank)[None, :])


@jit
def expand_kernel(
    y,
    tiles,
    entries,
    partials,
    placed,
    y_stride,
    num_slots,
    slice_stride,
    split_stride,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    REPEATS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    SKIPS: tl.constexpr,
    WAITS: tl.constexpr,
):
    """y += scale * v B^T for one of PARTS stretches of a tile's rows, REPEATS blocks of columns, one slice. With SKIPS, rows of slots
    that have a place in `placed` [S, 2] are left as they are.
    """
    tile = tiles + tl.program_id(0) // PARTS * 4
    skipped = tl.program_id(0) % PARTS * BLOCK_T
    slice = tl.program_id(2)
    slot = tl.load(tile)
    num_rows = tile_rows(tile) - skipped
    _a, b, rank, scale, column, width = load_entry(entries, slot, num_slots, slice, y.dtype.element_ty, RANK_MULTIPLE, COLUMN_MULTIPLE)
    begin = tl.program_id(1) * (REPEATS * BLOCK_N)
    if SKIPS:
        num_rows = tl.where(tl.load(placed + slot * 2) >= 0, 0, num_rows)
    wait_for_previous(WAITS)
    if (num_rows <= 0) | (rank == 0) | (begin >= width):
        return
    rows = (tl.load(tile + 1) + skipped + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_mask = tl.arange(0, BLOCK_T) < num_rows
    partials += slice.to(tl.int64) * slice_stride
    first_r = tl.arange(0, BLOCK_R)
    # Almost every rank fits one block: its v is read once for all columns.
    first_v = load_partials(partials, rows, row_mask, first_r, rank, split_stride, R, SPLITS).to(y.dtype.element_ty)
    for n0 in range(begin, tl.minimum(begin + REPEATS * BLOCK_N, width), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        y_at = y + rows[:, None] * y_stride + (column + n)[None, :]
        y_mask = row_mask[:, None] & (n < width)[None, :]
        # Asked for first, used last: the loads overlap with the product.
        old = tl.load(y_at, mask=y_mask, other=0.0)
        b_at = b + n.to(tl.int64)[None, :] * rank
        w = tl.load(b_at + first_r[:, None], mask=(n < width)[None, :] & (first_r < rank)[:, None], other=0.0)
        acc = dot(first_v, w, tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32), WIDE)
        for r0 in range(BLOCK_R, rank, BLOCK_R):
            r = r0 + first_r
            v = load_partials(partials, rows, row_mask, r, rank, split_stride, R, SPLITS)
            w = tl.load(b_at + r[:, None], mask=(n < width)[None, :] & (r < rank)[:, None], other=0.0)
            acc = dot(v.to(y.dtype.element_ty), w, acc, WIDE)
        tl.store(y_at, (old.to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=y_mask)


@jit
def expand_dx_kernel(
    dx,
    tiles,
    entries,
    partials,
    num_slots,
    slice_stride,
    split_stride,
    K,
    J,
    ADDS: tl.constexpr,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx = sum over slices of dv A (added to dx where ADDS) for one of PARTS stretches of a tile's rows and one block of columns."""
    tile = tiles + tl.program_id(0) // PARTS * 4
    skipped = tl.program_id(0) % PARTS * BLOCK_T
    slot = tl.load(tile)
    num_rows = tile_rows(tile) - skipped
    if num_rows <= 0:
        return
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tl.load(tile + 1) + skipped + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_mask = tl.arange(0, BLOCK_T) < num_rows
    at = dx + rows[:, None] * K + k[None, :]
    mask = row_mask[:, None] & (k < K)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    if ADDS:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for slice in range(0, J):
        a, _b, rank, _scale, _column, _width = load_entry(
            entries, slot, num_slots, slice, dx.dtype.element_ty, RANK_MULTIPLE, COLUMN_MULTIPLE
        )
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            dv = load_partials(partials, rows, row_mask, r, rank, split_stride, R, SPLITS)
            w = tl.load(a + r.to(tl.int64)[:, None] * K + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
            acc = dot(dv.to(dx.dtype.element_ty), w, acc, WIDE)
        partials += slice_stride
    tl.store(at, acc.to(dx.dtype.element_ty), mask=mask)


@jit
def outer_kernel(
    source,
    chunks,
    entries,
    partials,
    out,
    source_stride,
    num_slots,
    slice_stride,
    split_stride,
    K,
    J,
    total_out,
    IS_DB: tl.constexpr,
    R: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    COLUMN_MULTIPLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One chunk, one block of features, one slice. dB [C, total_out, R] from dy and v, or dA [C, J, R, K] from x and dv, both fp32."""
    chunk = tl.program_id(0).to(tl.int64)
    slice = tl.program_id(2)
    slot = tl.load(chunks + chunk * 4)
    first = tl.load(chunks + chunk * 4 + 1)
    num_rows = tl.load(chunks + chunk * 4 + 2)
    _a, _b, rank, scale, column, width = load_entry(
        entries, slot, num_slots, slice, source.dtype.element_ty, RANK_MULTIPLE, COLUMN_MULTIPLE
    )
    length = K
    if IS_DB:
        length = width
    if tl.program_id(1) * BLOCK_M >= length:
        return
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for t0 in range(0, num_rows, BLOCK_T):
            row_mask = t0 + tl.arange(0, BLOCK_T) < num_rows
            rows = (first + t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
            at = source + rows[None, :] * source_stride + m[:, None]
            if IS_DB:
                at += column
            left = tl.load(at, mask=row_mask[None, :] & (m < length)[:, None], other=0.0)
            v = load_partials(partials + slice.to(tl.int64) * slice_stride, rows, row_mask, r, rank, split_stride, R, SPLITS)
            acc = dot(left, v.to(source.dtype.element_ty), acc, WIDE)
        mask = (m < length)[:, None] & (r < rank)[None, :]
        if IS_DB:
            acc *= scale
            tl.store(out + (chunk * total_out + column + m[:, None]) * R + r[None, :], acc, mask=mask)
        else:
            tl.store(out + ((chunk * J + slice) * R + r[None, :]) * K + m[:, None], acc, mask=mask)
