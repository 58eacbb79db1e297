"""What the hardware allows at best: bytes over the measured bandwidth, or FLOPs over the measured matrix rate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.config import LINEARS

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine
    from workbench.runtime.weights import Dims


def num_multiplied(dims: "Dims") -> int:
    """Weights that every token is multiplied with: the seven linears of all layers and the head (the embedding is looked up)."""
    per_layer = sum(k * n for k, n in map(dims.linear, LINEARS))
    return dims.num_layers * per_layer + dims.vocab_size * dims.hidden


def lora_weights(dims: "Dims", rank: int) -> int:
    """Weights of one adapter of this rank on all seven linears."""
    return dims.num_layers * sum(rank * (k + n) for k, n in map(dims.linear, LINEARS))


def decode_bytes(engine: "Engine", ranks: Sequence[int], rows: int, context_tokens: int) -> float:
    """Bytes that a decode step reads at least: the weights, the adapters, and the keys and values of every row."""
    dims, size = engine.fused.dims, engine.dtype.itemsize
    cached = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * size
    return size * (num_multiplied(dims) + sum(lora_weights(dims, r) for r in ranks)) + rows * context_tokens * cached


def finetune_flops_per_token(dims: "Dims", rank: int, example_tokens: int) -> float:
    """Forward and backward over frozen weights (no gradient for them, nothing recomputed), causal attention, one adapter."""
    attention = 4 * dims.num_heads * dims.head_dim * dims.num_layers * (example_tokens + 1) / 2
    return 4 * num_multiplied(dims) + 3 * attention + 6 * lora_weights(dims, rank)
