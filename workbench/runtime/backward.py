"""The backward pass of one decoder layer over a whole micro-batch, written out; base weights are frozen.

    down(swiglu(gate_up(norm(m)))) + m,  m = o(attention(rotate(qkv(norm(x))))) + x,  every linear y = x W^T + LoRA(x)

Legend: T rows of the micro-batch, H hidden, I intermediate, L layers.
The forward keeps each layer's input in the arena and, where memory allows, the three tensors of `kv_cache.Kept`; without them a layer
is computed again from its input. Either way the backward sees the whole micro-batch, so cutting the forward at any token and the
backward at any layer leaves the gradients as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import SegmentLayout
from kernels.rms_norm import add_rms_norm, rms_norm_backward
from kernels.rotary import rotary
from kernels.swiglu import swiglu, swiglu_backward
from kernels.varlen_attention import varlen_attention
from workbench.runtime.finetune import TrainState, dropped_group
from workbench.runtime.inputs import TrainSpan
from workbench.runtime.kv_cache import Arena
from workbench.runtime.model import GROUPS
from workbench.runtime.slots import AdapterTable
from workbench.runtime.weights import FusedWeights, LayerWeights


def top_gradient(fused: FusedWeights, arena: Arena, span: TrainSpan) -> Tensor:
    """d loss / d (output of the last layer) [T, H], from the gradient behind the final norm that the loss left in `arena.grad`."""
    here = slice(span.arena, span.arena + span.tokens)
    return rms_norm_backward(arena.grad[here], arena.x[fused.dims.num_layers, here], fused.final_norm, fused.dims.norm_eps)


class BackwardPass:
    """The backward of one micro-batch, layer by layer from the top."""

    def __init__(
        self, fused: FusedWeights, table: AdapterTable, state: TrainState, span: TrainSpan, bounds: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """`span` covers the whole micro-batch, whose documents have the int32 `bounds` [documents + 1]; cos and sin are [T, D]."""
        self.fused, self.dims, self.table, self.state, self.span = fused, fused.dims, table, state, span
        self.bounds, self.longest, self.cos, self.sin = bounds, max(span.queries), cos, sin
        self.layout = SegmentLayout.build([(state.entry, span.tokens)], cos.device)
        self.arena_rows = slice(span.arena, span.arena + span.tokens)

    def top(self, arena: Arena) -> Tensor:
        """d loss / d (output of the last layer) [T, H]."""
        return top_gradient(self.fused, arena, self.span)

    def resume(self, layers_left: int, num_layers: int, arena: Arena) -> Tensor:
        """d loss / d (output of layer `layers_left` - 1) [T, H], for a slice of `num_layers` that goes on below a committed one."""
        return arena.grad[self.arena_rows]

    def keep(self, layers_left: int, grad: Tensor, arena: Arena) -> None:
        """Commit a slice that has left `grad` at the boundary with `layers_left` layers below it."""
        arena.grad[self.arena_rows] = grad

    def layer(self, index: int, arena: Arena, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor | None, dict[int, Tensor]]:
        """d loss / d (input of layer `index`) [T, H] (None at layer 0; in `out` if given), and fp32 gradients by parameter index."""
        w, eps, tokens = self.fused.layers[index], self.dims.norm_eps, self.span.tokens
        found: dict[int, Tensor] = {}
        x = arena.x[index, self.arena_rows]
        h = add_rms_norm(x, None, w.input_norm, eps)[1]
        kept = arena.kept
        qkv = self._adapted(index, "qkv", h, F.linear(h, w.qkv, w.qkv_bias)) if kept is None else kept.qkv[index, self.arena_rows]
        qkv = qkv.view(tokens, -1, self.dims.head_dim)
        q, k, v, attended = self._attention(w, qkv)
        o = attended.detach().reshape(tokens, -1)
        if kept is None:
            middle, h_mlp = add_rms_norm(x, self._adapted(index, "o", o, F.linear(o, w.o, w.o_bias)), w.post_norm, eps)
            gate_up = self._adapted(index, "gate_up", h_mlp, F.linear(h_mlp, w.gate_up))
        else:
            middle, gate_up = kept.middle[index, self.arena_rows], kept.gate_up[index, self.arena_rows]
            h_mlp = add_rms_norm(middle, None, w.post_norm, eps)[1]

        d_a = self._through(index, "down", grad, swiglu(gate_up), w.down, found)
        d_h = self._through(index, "gate_up", swiglu_backward(d_a, gate_up), h_mlp, w.gate_up, found)
        d_middle = rms_norm_backward(d_h, middle, w.post_norm, eps, above=grad)
        d_o = self._through(index, "o", d_middle, o, w.o, found)
        d_q, d_k, d_v = torch.autograd.grad(attended, (q, k, v), d_o.view_as(attended))
        d_qkv = self._heads_backward(w, qkv, d_q, d_k, d_v)
        if index == 0:
            self._lora_gradients(index, "qkv", d_qkv, h, None, found)
            return None, found
        d_h = self._through(index, "qkv", d_qkv, h, w.qkv, found)
        return rms_norm_backward(d_h, x, w.input_norm, eps, above=d_middle, out=out), found

    def _attention(self, w: LayerWeights, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, output [T, Nq, D]): leaves of a small graph around attention alone, whose own backward PyTorch has."""
        heads, kv_heads = self.dims.num_heads, self.dims.num_kv_heads
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if w.q_norm is not None and w.k_norm is not None:
            parts = zip(qk.split((heads, kv_heads), dim=1), (w.q_norm, w.k_norm), strict=True)
            qk = torch.cat([F.rms_norm(t, (self.dims.head_dim,), norm, self.dims.norm_eps) for t, norm in parts], dim=1)
        leaves = [t.detach().requires_grad_() for t in (*rotary(qk, self.cos, self.sin).split((heads, kv_heads), dim=1), v)]
        with torch.enable_grad():
            out = varlen_attention(*leaves, self.bounds, self.bounds, self.longest, self.longest, self.dims.head_dim**-0.5)
        return leaves[0], leaves[1], leaves[2], out

    def _heads_backward(self, w: LayerWeights, qkv: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Tensor:
        """d loss / d (q/k/v projection) [T, (Nq + 2 Nkv) D]: back through the rotation and the head norms."""
        d_qk = rotary(torch.cat((d_q, d_k), dim=1), self.cos, self.sin, inverse=True)
        if w.q_norm is not None and w.k_norm is not None:
            heads, kv_heads, size = self.dims.num_heads, self.dims.num_kv_heads, self.dims.head_dim
            raw = qkv[:, : heads + kv_heads].split((heads, kv_heads), dim=1)
            parts = [
                rms_norm_backward(d.reshape(-1, size), t.reshape(-1, size), norm, self.dims.norm_eps).view(t.shape)
                for d, t, norm in zip(d_qk.split((heads, kv_heads), dim=1), raw, (w.q_norm, w.k_norm), strict=True)
            ]
            d_qk = torch.cat(parts, dim=1)
        return torch.cat((d_qk, d_v), dim=1).flatten(1)

    def _adapted(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        """y + the job's adapter on x, as the forward computed it."""
        if self.state.job.dropout:
            options = {"micro_batch": self.span.micro_batch, "offset": 0}
            return y + dropped_group(self.state.job, self.dims, x, self.state.compute, layer, group, **options)
        return self.table.add_(layer, group, y, x, self.layout, self.table.low(layer, group, x, self.layout))

    def _through(self, layer: int, group: str, dy: Tensor, x: Tensor, weight: Tensor, found: dict[int, Tensor]) -> Tensor:
        """d loss / d x of y = x W^T + LoRA(x); the gradients of the group's LoRA weights go into `found`."""
        dx = dy @ weight
        self._lora_gradients(layer, group, dy, x, dx, found)
        return dx

    def _lora_gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, dx: Tensor | None, found: dict[int, Tensor]) -> None:
        """The adapter's part: added to dx (if there is one to add to) and into `found`."""
        targets = GROUPS[group]
        if self.state.job.dropout:
            self._dropped_gradients(layer, group, dy, x, dx, found)
            return
        gradients = self.table.gradients(layer, group, dy, x, self.layout, dx)
        for (slice, _), pair in gradients.items():
            first = self.state.index_of((layer, targets[slice]))
            found[first], found[first + 1] = (t.float() for t in pair)

    def _dropped_gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, dx: Tensor | None, found: dict[int, Tensor]) -> None:
        keys = [(layer, target) for target in GROUPS[group] if (layer, target) in self.state.master]
        if not keys:
            return
        leaf = x.detach().requires_grad_()
        pairs = {key: tuple(t.detach().requires_grad_() for t in self.state.master[key]) for key in keys}
        options = {"micro_batch": self.span.micro_batch, "offset": 0}
        with torch.enable_grad():
            out = dropped_group(self.state.job, self.dims, leaf, pairs, layer, group, **options)
        d_leaf, *gradients = torch.autograd.grad(out, [leaf, *(t for key in keys for t in pairs[key])], dy)
        if dx is not None:
            dx += d_leaf
        for i, key in enumerate(keys):
            first = self.state.index_of(key)
            found[first], found[first + 1] = gradients[2 * i].float(), gradients[2 * i + 1].float()
