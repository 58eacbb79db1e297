"""The shape of a decoder layer: which linears share an input, and how wide they are.

Architecture: Llama, Mistral, Qwen2, Qwen3 (arXiv 2302.13971, 2310.06825, 2407.10671, 2505.09388). Forward and backward are in
`forward.py` and `backward.py`; weights are the fused buffers of `weights.FusedWeights`, which are the base module's own storage.
"""

from workbench.runtime.weights import Dims

# The linears that share an input, in the order of their rows in the fused buffer.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def group_widths(dims: Dims) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Input width and output widths of each group: {group: (K, (N_1, ...))}."""
    query, key_value = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    return {
        "qkv": (dims.hidden, (query, key_value, key_value)),
        "o": (query, (dims.hidden,)),
        "gate_up": (dims.hidden, (dims.intermediate, dims.intermediate)),
        "down": (dims.intermediate, (dims.hidden,)),
    }
