"""Attention of a mixed step: causal varlen for fine-tune and evaluate rows, paged for prefill chunks and decode rows.

Legend: T packed tokens, Nq query heads, Nkv key/value heads, D head dimension.
"""

from torch import Tensor

from kernels.paged_attention import paged_attention
from kernels.varlen_attention import varlen_attention
from workbench.runtime.inputs import StepInputs
from workbench.runtime.kv_cache import Arena, KVPool


class StepAttention:
    """Attention for every layer of one step, over keys and values that are in their places already (`kernels.qkv`)."""

    def __init__(self, inputs: StepInputs, pool: KVPool, arena: Arena | None, scale: float) -> None:
        self.inputs, self.pool, self.arena, self.scale = inputs, pool, arena, scale

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """The output [T, Nq, D] of q [T, Nq, D], rotated; rows of nobody's are unspecified."""
        step, out = self.inputs, None
        if step.documents is not None:
            d, arena = step.documents, self.arena
            assert arena is not None
            out = varlen_attention(
                q, arena.k[layer], arena.v[layer], d.cu_seqlens_q, d.key_starts, d.max_q, d.max_k, self.scale, key_lens=d.key_lens
            )
            if not step.block_tables.shape[0]:
                return out
        k, v = self.pool.k[layer], self.pool.v[layer]
        bounds = (step.block_tables, step.cu_seqlens_q, step.context_lens, step.max_seqlen_q, step.max_context)
        return paged_attention(q, k, v, *bounds, self.scale, out)
