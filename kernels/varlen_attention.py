"""Attention of fine-tune and evaluate rows: causal, over packed documents, differentiable.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j <= i + (k_len - q_len) of i's own document

so a later chunk of a document attends to the document's earlier ones ("bottom-right" causal). A query that sees no key gives 0.

Legend: Tq, Tk packed query and key rows, Hq query heads, Hkv key-value heads, D head size, N documents.
On CUDA, bf16 and fp16 go through PyTorch's own flash attention operators (FlashAttention-2, arXiv 2307.08691).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32

from kernels.counters import count


def varlen_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, scale: float
) -> torch.Tensor:
    """The specification of `varlen_attention`: one document after another, differentiable by autograd."""
    parts = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        q_len, k_len = bounds_q[i + 1] - bounds_q[i], bounds_k[i + 1] - bounds_k[i]
        if not q_len:
            continue
        q_i = q[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)[None]  # [1, Hq, q_len, D]
        k_i = k[bounds_k[i] : bounds_k[i + 1]].transpose(0, 1)[None]
        v_i = v[bounds_k[i] : bounds_k[i + 1]].transpose(0, 1)[None]
        parts.append(_causal(q_i, k_i, v_i, k_len - q_len, scale)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q * 0


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shift: int, scale: float) -> torch.Tensor:
    """One document; query i sees keys 0..i + shift."""
    if shift == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    blind = max(-shift, 0)
    sees = q[:, :, blind:]
    if not sees.shape[2]:
        return q * 0
    positions = torch.arange(blind + shift, q.shape[2] + shift, device=q.device)
    mask = torch.arange(k.shape[2], device=q.device) <= positions[:, None]
    out = F.scaled_dot_product_attention(sees, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return torch.cat([q[:, :, :blind] * 0, out], dim=2) if blind else out


def varlen_attention(
    q: Float[torch.Tensor, "Tq Hq D"],
    k: Float[torch.Tensor, "Tk Hkv D"],
    v: Float[torch.Tensor, "Tk Hkv D"],
    cu_seqlens_q: Int32[torch.Tensor, " N1"],
    cu_seqlens_k: Int32[torch.Tensor, " N1"],
    max_q: int,
    max_k: int,
    scale: float,
) -> Float[torch.Tensor, "Tq Hq D"]:
    """Causal attention within each packed document, differentiable in q, k and v.

    `max_q` and `max_k` are host-side bounds on the documents' query and key lengths. Raises ValueError where shapes do not fit.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"query heads must be a multiple of key-value heads, with one head size, got {q.shape}, {k.shape} and {v.shape}")
    count("varlen_attention", "reference", q.device.type)
    return varlen_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
