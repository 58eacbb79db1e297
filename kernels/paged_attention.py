"""Attention of inference rows over the paged KV cache: prefill chunks and decode rows in one op.

    o_i = sum_n softmax_n(scale * q_i . k_n) v_n      over the keys n <= p_i of i's sequence, p_i = context_len - query_len + i

so the last query sees the whole context ("bottom-right" causal): a chunk sees its sequence's earlier blocks, a decode row everything.
Key n of sequence s lives in block block_tables[s, n // block_tokens], offset n % block_tokens.

Legend: T query rows, N sequences, M blocks a sequence, Hq query heads, Hkv key-value heads, G = Hq / Hkv group, D head size.
Ideas: PagedAttention (arXiv 2309.06180), FlashAttention-2 (2307.08691), Flash-Decoding (split over keys, reduced in a fixed order).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64

from kernels.backend import uses_triton
from kernels.counters import count


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


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key-value heads, got {heads} and {kv_heads}")
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != q.shape[2]:
        raise ValueError(f"k_cache and v_cache must share a shape with head size {q.shape[2]}, got {k_cache.shape} and {v_cache.shape}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must share a dtype, got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
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
) -> Float[torch.Tensor, "T Hq D"]:
    """Causal attention of packed queries over their sequences' cached keys and values, the new ones already stored.

    `context_lens` counts the tokens in the cache, new ones included. `max_seqlen_q` and `max_context` are host-side bounds on the query
    and context lengths (1 for a batch of decode rows only, which are split over the keys). A sequence may have no query at all.
    Raises ValueError where shapes or dtypes do not fit.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q)
    if not q.shape[0]:
        return torch.empty_like(q)
    count("paged_attention", "reference", q.device.type)
    if max_seqlen_q == 1 and q.shape[0] == block_tables.shape[0]:
        return _padded_decode(q, k_cache, v_cache, block_tables, context_lens, scale)
    return paged_attention_reference(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)


def store_kv(
    k: Float[torch.Tensor, "T Hkv D"],
    v: Float[torch.Tensor, "T Hkv D"],
    k_cache: Float[torch.Tensor, "num_blocks block_tokens Hkv D"],
    v_cache: Float[torch.Tensor, "num_blocks block_tokens Hkv D"],
    slot_mapping: Int64[torch.Tensor, " T"],
) -> None:
    """Write row t's key and value into KV slot slot_mapping[t] = block * block_tokens + offset. Slots must be distinct."""
    if not k.shape[0]:
        return
    count("store_kv", "reference", k.device.type)
    k_cache.view(-1, *k_cache.shape[2:])[slot_mapping] = k
    v_cache.view(-1, *v_cache.shape[2:])[slot_mapping] = v
