"""The tensors behind the ledger's block and arena numbers.

Legend: L layers, A arena rows, H hidden, I intermediate, B blocks, b tokens a block, Nq query heads, Nkv key/value heads, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.runtime.weights import Dims


class KVPool:
    """A pool of fixed size: `k` and `v` [L, B + 1, b, Nkv, D]. Which block holds what is the ledger's business (PagedAttention, arXiv
    2309.06180); the last block is nobody's: the padding rows of a recorded graph write there.
    """

    def __init__(self, dims: Dims, num_blocks: int, block_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (dims.num_layers, num_blocks + 1, block_tokens, dims.num_kv_heads, dims.head_dim)
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_per_block(dims: Dims, block_tokens: int, dtype: torch.dtype) -> int:
        return 2 * dims.num_layers * block_tokens * dims.num_kv_heads * dims.head_dim * dtype.itemsize


@dataclass(slots=True)
class Kept:
    """What the backward would otherwise compute again: the projection before norms and rotation `qkv` [L, A, (Nq + 2 Nkv) D], the
    residual stream between attention and MLP `middle` [L, A, H], and `gate_up` [L, A, 2 I].
    """

    qkv: Tensor
    middle: Tensor
    gate_up: Tensor


@dataclass(slots=True)
class Arena:
    """Kept activations of fine-tune rows, a fixed number of rows A.

    `x` [L + 1, A, H]: the input of every layer, and the output of the last one. `k`, `v` [L, A, Nkv, D]: what later chunks of the same
    document attend to. `grad` [A, H]: the gradient at the boundary that the backward has reached. `kept` is None where the backward
    recomputes every layer from its input (activation checkpointing, arXiv 1604.06174).
    """

    x: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    kept: Kept | None

    @classmethod
    def allocate(cls, dims: Dims, rows: int, keeps: bool, device: torch.device, dtype: torch.dtype) -> "Arena":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        layers, kv, qkv = dims.num_layers, (dims.num_kv_heads, dims.head_dim), (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim
        kept = None
        if keeps:
            kept = Kept(zeros(layers, rows, qkv), zeros(layers, rows, dims.hidden), zeros(layers, rows, 2 * dims.intermediate))
        grad, x = zeros(rows, dims.hidden), zeros(layers + 1, rows, dims.hidden)
        return cls(x=x, k=zeros(layers, rows, *kv), v=zeros(layers, rows, *kv), grad=grad, kept=kept)

    @staticmethod
    def bytes_per_row(dims: Dims, keeps: bool, dtype: torch.dtype) -> int:
        kv = dims.num_kv_heads * dims.head_dim
        kept = dims.num_heads * dims.head_dim + 2 * kv + dims.hidden + 2 * dims.intermediate if keeps else 0
        return ((dims.num_layers + 2) * dims.hidden + dims.num_layers * (2 * kv + kept)) * dtype.itemsize
