"""Attention of fine-tune and evaluate rows: causal, over packed documents, differentiable.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j <= i + (k_len - q_len) of i's own document

so a later chunk of a document attends to the document's earlier ones ("bottom-right" causal). A query that sees no key gives 0.
Queries lie packed from row 0 on; what is returned for rows behind the last document is unspecified. Keys lie packed too, unless `key_lens`
says how many rows from cu_seqlens_k[i] on are document i's.

Legend: Tq, Tk packed query and key rows, Hq query heads, Hkv key-value heads, D head size, N documents.
On CUDA, bf16 and fp16 go through PyTorch's own flash attention operators (FlashAttention-2, arXiv 2307.08691).
"""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32

from kernels.counters import count


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    key_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `varlen_attention`: one document after another, differentiable by autograd; 0 behind the last one."""
    parts = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [end - first for first, end in pairwise(bounds_k)] if key_lens is None else key_lens.tolist()
    for i, k_len in enumerate(lengths):
        q_len = bounds_q[i + 1] - bounds_q[i]
        if not q_len:
            continue
        q_i = q[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)[None]  # [1, Hq, q_len, D]
        k_i, v_i = (t[bounds_k[i] : bounds_k[i] + k_len].transpose(0, 1)[None] for t in (k, v))
        parts.append(_causal(q_i, k_i, v_i, k_len - q_len, scale)[0].transpose(0, 1))
    return torch.cat([*parts, q[bounds_q[-1] :] * 0])


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


class _Flash(torch.autograd.Function):
    """PyTorch's flash attention over packed documents. Its causal mask is bottom-right; its backward follows torch's deterministic mode."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale):  # type: ignore[override]
        out, logsums, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsums, cu_seqlens_q, cu_seqlens_k, rng_state, unused)
        ctx.sizes = (max_q, max_k, scale)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, out, logsums, cu_seqlens_q, cu_seqlens_k, rng_state, unused = ctx.saved_tensors
        max_q, max_k, scale = ctx.sizes
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, logsums, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, True, rng_state, unused, scale=scale
        )
        return dq, dk, dv, None, None, None, None, None


@cache
def flash_accepts_groups(device_index: int) -> bool:
    """Whether this torch's flash operators take fewer key-value heads than query heads, forward and backward; tried once per device."""
    device = torch.device("cuda", device_index)
    q, k, v = (torch.ones(16, heads, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for heads in (2, 1, 1))
    bounds = torch.tensor([0, 16], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            _Flash.apply(q, k, v, bounds, bounds, 16, 16, 0.125).sum().backward()
    except RuntimeError:
        return False
    return k.grad is not None and k.grad.shape == k.shape


def expand_heads(kv: torch.Tensor, group: int) -> torch.Tensor:
    """[T, Hkv, D] -> [T, Hkv * group, D], every head `group` times in a row; its backward adds the group up."""
    return kv.repeat_interleave(group, dim=1)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    key_lens: torch.Tensor | None,
) -> torch.Tensor:
    group, head_size = q.shape[1] // k.shape[1], q.shape[2]
    if group > 1 and not flash_accepts_groups(q.device.index):
        k, v = expand_heads(k, group), expand_heads(v, group)
    if head_size % 8:
        # Columns of zeros change neither scores nor outputs; the operators take multiples of 8.
        q, k, v = (F.pad(t, (0, 8 - head_size % 8)) for t in (q, k, v))
    # At a bound of 1 the forward swaps groups for rows and keeps its log-sums in a shape that the backward does not expect.
    max_q = max(max_q, 2)
    if key_lens is not None:
        bounds = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, 0.0, True, False, scale=scale, seqused_k=key_lens)[0]
    else:
        out: torch.Tensor = _Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale)  # type: ignore[assignment]
    return out[..., :head_size]


def varlen_attention(
    q: Float[torch.Tensor, "Tq Hq D"],
    k: Float[torch.Tensor, "Tk Hkv D"],
    v: Float[torch.Tensor, "Tk Hkv D"],
    cu_seqlens_q: Int32[torch.Tensor, " N1"],
    cu_seqlens_k: Int32[torch.Tensor, " N1"],
    max_q: int,
    max_k: int,
    scale: float,
    key_lens: Int32[torch.Tensor, " N"] | None = None,
) -> Float[torch.Tensor, "Tq Hq D"]:
    """Causal attention within each packed document, differentiable in q, k and v unless `key_lens` is given.

    `max_q` and `max_k` are host-side bounds on the documents' query and key lengths. With `key_lens` document i has that many keys from row
    cu_seqlens_k[i] on, wherever that is, and may have none. fp32 takes the reference on every device, which reads the bounds on the host.
    Raises ValueError where shapes do not fit.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"query heads must be a multiple of key-value heads, with one head size, got {q.shape}, {k.shape} and {v.shape}")
    if not q.shape[0]:
        return q * 0
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        count("varlen_attention", "flash", q.device.type)
        return _flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, key_lens)
    count("varlen_attention", "reference", q.device.type)
    return varlen_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, key_lens)
