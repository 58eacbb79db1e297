"""The tensors behind the ledger's block and arena numbers.

Legend: L layers, A arena rows, H hidden, B blocks, b tokens a block, Nkv key/value heads, D head dimension.
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
class Arena:
    """Kept activations of fine-tune rows, a fixed number of rows A.

    `x` [L + 1, A, H]: the input of every layer, and the output of the last one. `k`, `v` [L, A, Nkv, D]: what later chunks of the same
    document attend to. `grad` [A, H]: the gradient at the boundary that the backward has reached.
    """

    x: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @classmethod
    def allocate(cls, dims: Dims, rows: int, device: torch.device, dtype: torch.dtype) -> "Arena":
        keys = (dims.num_layers, rows, dims.num_kv_heads, dims.head_dim)
        return cls(
            x=torch.zeros((dims.num_layers + 1, rows, dims.hidden), device=device, dtype=dtype),
            k=torch.zeros(keys, device=device, dtype=dtype),
            v=torch.zeros(keys, device=device, dtype=dtype),
            grad=torch.zeros((rows, dims.hidden), device=device, dtype=dtype),
        )

    @staticmethod
    def bytes_per_row(dims: Dims, dtype: torch.dtype) -> int:
        keys = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim
        return ((dims.num_layers + 2) * dims.hidden + keys) * dtype.itemsize
