"""The decoder as one function per layer, over packed tokens.

Legend: T packed tokens, H hidden, I intermediate, Nq query heads, Nkv key/value heads, D head dimension.
Inference and training run the same layer; only `attend` and `lora` differ. Weights are the fused buffers of `weights.FusedWeights`,
which are the base module's own storage. Architecture: Llama, Mistral, Qwen2, Qwen3 (arXiv 2302.13971, 2310.06825, 2407.10671,
2505.09388).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rotary import rotary
from workbench.runtime.weights import Dims, LayerWeights

# The linears that share an input, in the order of their rows in the fused buffer.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, Nq, D], k and v [T, Nkv, D] -> [T, Nq, D]
Lora = Callable[[str, Tensor, Tensor], Tensor]  # group, input x [T, K], base output y [T, N] -> y + adapters [T, N]


def group_widths(dims: Dims) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Input width and output widths of each group: {group: (K, (N_1, ...))}."""
    query, key_value = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    return {
        "qkv": (dims.hidden, (query, key_value, key_value)),
        "o": (query, (dims.hidden,)),
        "gate_up": (dims.hidden, (dims.intermediate, dims.intermediate)),
        "down": (dims.intermediate, (dims.hidden,)),
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean square in fp32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def decoder_layer(weights: LayerWeights, dims: Dims, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, lora: Lora) -> Tensor:
    """One decoder layer: x [T, H] -> [T, H]; cos and sin [T, D] fp32."""
    w, tokens = weights, x.shape[0]
    query = dims.num_heads * dims.head_dim
    h = rms_norm(x, w.input_norm, dims.norm_eps)
    heads = lora("qkv", h, F.linear(h, w.qkv, w.qkv_bias)).view(tokens, -1, dims.head_dim)
    qk, v = heads.split((dims.num_heads + dims.num_kv_heads, dims.num_kv_heads), dim=1)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = qk.split((dims.num_heads, dims.num_kv_heads), dim=1)
        qk = torch.cat((rms_norm(q, w.q_norm, dims.norm_eps), rms_norm(k, w.k_norm, dims.norm_eps)), dim=1)
    q, k = rotary(qk, cos, sin).split((dims.num_heads, dims.num_kv_heads), dim=1)
    o = attend(q, k, v).reshape(tokens, query)
    x = x + lora("o", o, F.linear(o, w.o, w.o_bias))
    h = rms_norm(x, w.post_norm, dims.norm_eps)
    gate, up = lora("gate_up", h, F.linear(h, w.gate_up)).chunk(2, dim=-1)
    a = F.silu(gate) * up
    return x + lora("down", a, F.linear(a, w.down))
