"""Attention of inference rows over the paged KV cache: prefill chunks and decode rows in one op.

    o_i = sum_n softmax_n(scale * q_i . k_n) v_n      over the keys n <= p_i of i's sequence, p_i = context_len - query_len + i

so the last query sees the whole context ("bottom-right" causal): a chunk sees its sequence's earlier blocks, a decode row everything.
Key n of sequence s lives in block block_tables[s, n // block_tokens], offset n % block_tokens.

Queries lie packed from row cu_seqlens_q[0] on; rows before them and behind them are nobody's business here, and so is their output.

Legend: T query rows, N sequences, M blocks a sequence, Hq query heads, Hkv key-value heads, G = Hq / Hkv group, D head size.
Ideas: PagedAttention (arXiv 2309.06180), FlashAttention-2 (2307.08691), Flash-Decoding (split over keys, reduced in a fixed order).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32

from kernels.backend import IS_INTERPRETED, dot, jit, num_processors, overlapped, tl, uses_triton, wait_for_previous
from kernels.counters import count
from kernels.plan import Launch, plan, power_of_two


def _gather(cache: torch.Tensor, block_tables: torch.Tensor, context: int) -> torch.Tensor:
    """The first `context` tokens of each sequence, [N, context, Hkv, D]."""
    blocks = -(-context // cache.shape[1])
    return cache[block_tables[:, :blocks].long()].flatten(1, 2)[:, :context]


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The specification of `paged_attention`: one sequence after another."""
    out = torch.empty_like(q)
    bounds, contexts = cu_seqlens_q.tolist(), context_lens.tolist()
    for i, context in enumerate(contexts):
        first, end = bounds[i], bounds[i + 1]
        if first == end:
            continue
        k = _gather(k_cache, block_tables[i : i + 1], context).transpose(1, 2)  # [1, Hkv, context, D]
        v = _gather(v_cache, block_tables[i : i + 1], context).transpose(1, 2)
        positions = torch.arange(context - (end - first), context, device=q.device)
        mask = torch.arange(context, device=q.device) <= positions[:, None]
        q_i = q[first:end].transpose(0, 1)[None]
        out[first:end] = F.scaled_dot_product_attention(q_i, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
    return out


def _padded_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query per sequence, all sequences at once over keys padded to the longest: what the CPU runs for decode rows."""
    longest = int(context_lens.max())
    k = _gather(k_cache, block_tables, longest).transpose(1, 2)  # [N, Hkv, longest, D]
    v = _gather(v_cache, block_tables, longest).transpose(1, 2)
    mask = torch.arange(longest, device=q.device) < context_lens[:, None]
    # Padding may be memory that nobody has written, and NaN outlives both a mask of -inf and a weight of 0.
    k, v = (cached.masked_fill(~mask[:, None, :, None], 0) for cached in (k, v))
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], scale=scale, enable_gqa=True)
    return out[:, :, 0]


@jit
def find_sequence(tile, cu_seqlens_q, N, BLOCK_Q: tl.constexpr):
    """The last sequence i whose first tile, cu_seqlens_q[i] // BLOCK_Q + i, is at most `tile`. Every sequence has tiles enough."""
    low = 0
    high = N
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


# Numbers that change from batch to batch: no compilation of their own for 1 or for a multiple of 16.
@jit(do_not_specialize=["table_stride", "N", "T"])
def attention_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    cu_seqlens_q,
    context_lens,
    out,
    logsums,
    q_token_stride,
    q_head_stride,
    block_stride,
    token_stride,
    head_stride,
    table_stride,
    N,
    T,
    scale_log2,
    BLOCK_TOKENS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DECODE: tl.constexpr,
    WIDE: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One tile of BLOCK_Q queries times G heads of one sequence, one key-value head, one split of the keys.

    One split writes `out` [T, Hq, D]; several write normalised parts to `out` [SPLITS, R, Hq, D] fp32 and their log2-sums to `logsums`:
    R = N sequences of decode rows (IS_DECODE), R = T rows otherwise.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * G
    if IS_DECODE:
        sequence = tile
        first = tl.load(cu_seqlens_q + sequence)
        local = 0
    else:
        sequence = find_sequence(tile, cu_seqlens_q, N, BLOCK_Q)
        first = tl.load(cu_seqlens_q + sequence)
        local = (tile - first // BLOCK_Q - sequence) * BLOCK_Q
    num_queries = tl.load(cu_seqlens_q + sequence + 1) - first
    context = tl.load(context_lens + sequence)
    wait_for_previous(WAITS)
    # Tiles of the rows before the first sequence come out negative.
    if (local < 0) | (local >= num_queries):
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = local + m // G
    m_mask = (m < BLOCK_Q * G) & (token < num_queries)
    row = (first + token).to(tl.int64)
    head = kv_head * G + m % G
    q_mask = m_mask[:, None] & (d < D)[None, :]
    query = tl.load(q + row[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :], mask=q_mask, other=0.0)
    position = context - num_queries + token

    # The tile's last query bounds the keys that any of its rows sees.
    last = context - num_queries + tl.minimum(local + BLOCK_Q, num_queries)
    per_split = tl.cdiv(tl.cdiv(last, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, last)

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        n_mask = n < end
        block = tl.load(block_tables + sequence.to(tl.int64) * table_stride + n // BLOCK_TOKENS, mask=n_mask, other=0).to(tl.int64)
        at = block * block_stride + (n % BLOCK_TOKENS) * token_stride + kv_head * head_stride
        key = tl.load(k_cache + at[None, :] + d[:, None], mask=n_mask[None, :] & (d < D)[:, None], other=0.0)
        scores = dot(query, key, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), WIDE) * scale_log2
        scores = tl.where((n[None, :] <= position[:, None]) & n_mask[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that sees no key of this split keeps -inf, and -inf - -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(v_cache + at[:, None] + d[None, :], mask=n_mask[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(weights.to(value.dtype), value, acc * decay[:, None], WIDE)
        peak = new_peak

    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (split.to(tl.int64) * T + row) * num_heads + head
    if SPLITS > 1 and IS_DECODE:
        place = (split.to(tl.int64) * N + sequence) * num_heads + head
    tl.store(out + place[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=q_mask)
    if SPLITS > 1:
        logsum = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(logsums + place, logsum, mask=m_mask)


@jit(do_not_specialize=["N", "rows"])
def merge_kernel(
    parts,
    logsums,
    out,
    cu_seqlens_q,
    N,
    rows,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[query, head] = sum over splits of 2^logsum part / sum of 2^logsum. Rows count (sequence or query, head)."""
    row = tl.program_id(0).to(tl.int64)
    query = row // HEADS
    if IS_DECODE:
        first = tl.load(cu_seqlens_q + query)
        end = tl.load(cu_seqlens_q + query + 1)
        query = first.to(tl.int64)
    else:
        first = tl.load(cu_seqlens_q)
        end = tl.load(cu_seqlens_q + N)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    wait_for_previous(WAITS)
    if (query < first) | (query >= end):
        return
    logsum = tl.load(logsums + split * rows + row)
    weight = tl.exp2(logsum - tl.max(logsum, 0))
    at = parts + (split[:, None] * rows + row) * D + d[None, :]
    part = tl.load(at, mask=(split < SPLITS)[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (query * HEADS + row % HEADS) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def _tiles(q: torch.Tensor, group: int, num_sequences: int, is_decode: bool) -> tuple[int, int, int]:
    """(rows of a tile, queries of a tile, number of tiles): G heads of one query are neighbouring rows."""
    low = 16 if is_decode else (64 if q.shape[2] <= 128 and q.dtype.itemsize <= 2 else 32)
    block_m = power_of_two(group, low, 128)
    block_q = 1 if is_decode else block_m // group
    return block_m, block_q, num_sequences if is_decode else q.shape[0] // block_q + num_sequences


def _paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    max_seqlen_q: int,
    max_context: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    tokens, heads, head_size = q.shape
    kv_heads, num_sequences = k_cache.shape[2], block_tables.shape[0]
    is_decode = max_seqlen_q == 1
    block_m, block_q, num_tiles = _tiles(q, heads // kv_heads, num_sequences, is_decode)
    launch: Launch = plan(
        "attention",
        rows=block_m,
        length=max_context,
        programs=num_tiles * kv_heads,
        processors=num_processors(q.device),
        itemsize=q.dtype.itemsize,
        head_size=head_size,
        device=q.device,
    )
    parts, logsums = out, out
    num_parts = num_sequences if is_decode else tokens
    if launch.splits > 1:
        parts = torch.empty(launch.splits, num_parts, heads, head_size, dtype=torch.float32, device=q.device)
        logsums = torch.empty(launch.splits, num_parts, heads, dtype=torch.float32, device=q.device)
    block_d = power_of_two(head_size, 16, 256)
    attention_kernel[(num_tiles, kv_heads, launch.splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        context_lens,
        parts,
        logsums,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        block_tables.stride(0),
        num_sequences,
        tokens,
        scale * 1.4426950408889634,
        BLOCK_TOKENS=k_cache.shape[1],
        G=heads // kv_heads,
        D=head_size,
        SPLITS=launch.splits,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=launch.block,
        BLOCK_D=block_d,
        IS_DECODE=is_decode,
        WIDE=IS_INTERPRETED,
        **overlapped(q.device),
        **launch.options,
    )
    if launch.splits > 1:
        merge_kernel[(num_parts * heads,)](
            parts,
            logsums,
            out,
            cu_seqlens_q,
            num_sequences,
            num_parts * heads,
            HEADS=heads,
            D=head_size,
            SPLITS=launch.splits,
            IS_DECODE=is_decode,
            BLOCK_D=block_d,
            num_warps=2,
            **overlapped(q.device),
        )


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key-value heads, got {heads} and {kv_heads}")
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != q.shape[2]:
        raise ValueError(f"k_cache and v_cache must share a shape with head size {q.shape[2]}, got {k_cache.shape} and {v_cache.shape}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must share a dtype, got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1):
        raise ValueError(
            f"the caches must be contiguous and q's last stride 1, got {k_cache.stride()}, {v_cache.stride()} and {q.stride()}"
        )
    if cu_seqlens_q.shape[0] != block_tables.shape[0] + 1:
        raise ValueError(
            f"cu_seqlens_q must have one entry more than block_tables, got {cu_seqlens_q.shape[0]} and {block_tables.shape[0]}"
        )


def paged_attention(
    q: Float[torch.Tensor, "T Hq D"],
    k_cache: Float[torch.Tensor, "num_blocks block_tokens Hkv D"],
    v_cache: Float[torch.Tensor, "num_blocks block_tokens Hkv D"],
    block_tables: Int32[torch.Tensor, "N M"],
    cu_seqlens_q: Int32[torch.Tensor, " N1"],
    context_lens: Int32[torch.Tensor, " N"],
    max_seqlen_q: int,
    max_context: int,
    scale: float,
    out: Float[torch.Tensor, "T Hq D"] | None = None,
) -> Float[torch.Tensor, "T Hq D"]:
    """Causal attention of packed queries over their sequences' cached keys and values, the new ones already stored.

    `context_lens` counts the tokens in the cache, new ones included. `max_seqlen_q` and `max_context` are host-side bounds on the query
    and context lengths (1 for a batch of decode rows only, which are split over the keys). A sequence may have no query at all.
    `out`, contiguous, is written and returned where it is given; its rows outside of the sequences' stay as they are. Raises ValueError
    where shapes or dtypes do not fit.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and like q {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
    if not q.shape[0]:
        return out
    if uses_triton(q):
        count("paged_attention", "triton", q.device.type)
        _paged_attention_triton(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, max_seqlen_q, max_context, scale, out)
        return out
    count("paged_attention", "reference", q.device.type)
    if max_seqlen_q == 1:
        decodes = cu_seqlens_q[1:] > cu_seqlens_q[:-1]
        rows = cu_seqlens_q[:-1][decodes].long()
        if len(rows):
            out[rows] = _padded_decode(q[rows], k_cache, v_cache, block_tables[decodes], context_lens[decodes], scale)
        return out
    first, end = int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])
    out[first:end] = paged_attention_reference(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)[first:end]
    return out
