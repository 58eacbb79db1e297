"""Attention of a mixed step: causal varlen for fine-tune and evaluate rows, paged for prefill chunks and decode rows.

Legend: T packed tokens, F fine-tune and evaluate rows (first), Nq query heads, Nkv key/value heads, D head dimension.
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

    def __call__(self, layer: int, q: Tensor, out: Tensor) -> None:
        """q [T, Nq, D], rotated; the result goes to out [T, Nq, D]."""
        step, num_train = self.inputs, self.inputs.num_train_rows
        for rows in step.train:
            assert self.arena is not None
            last = rows.first + rows.tokens
            out[rows.first : last] = varlen_attention(
                q[rows.first : last],
                self.arena.k[layer, rows.keys : rows.arena + rows.tokens],
                self.arena.v[layer, rows.keys : rows.arena + rows.tokens],
                rows.cu_seqlens_q,
                rows.cu_seqlens_k,
                rows.max_q,
                rows.max_k,
                self.scale,
            )
        if step.num_tokens > num_train:
            paged_attention(
                q[num_train:],
                self.pool.k[layer],
                self.pool.v[layer],
                step.block_tables,
                step.cu_seqlens_q,
                step.context_lens,
                step.max_seqlen_q,
                step.max_context,
                self.scale,
                out[num_train:],
            )
