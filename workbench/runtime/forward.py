"""One packed forward over all four kinds, and slices of the backward: the device work of a step, without its bookkeeping.

Legend: T packed tokens, H hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.keep import keep_rows_
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.qkv import place_qkv_
from kernels.rms_norm import add_rms_norm
from kernels.swiglu import lora_swiglu, swiglu
from workbench.core import Backward, Segment
from workbench.runtime.attention import StepAttention
from workbench.runtime.backward import BackwardPass
from workbench.runtime.backward_graphs import RecordedPass
from workbench.runtime.finetune import TrainState, dropped_group
from workbench.runtime.inputs import LayerRows, StepInputs, TrainRows
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.parts import Parts
from workbench.runtime.pieces import PieceGraphs
from workbench.runtime.slots import AdapterTable
from workbench.runtime.weights import FusedWeights


@dataclass(slots=True)
class ForwardOutput:
    """Logits [number of samples, V] of the rows that sample, the last layer's output [T, H] (None from a recorded graph), the segments
    that sample, the logits' argmax (where a graph made it too), and (loss sum, labelled tokens) by owner.
    """

    logits: Tensor
    hidden: Tensor | None
    sampled: list[Segment]
    greedy: Tensor | None = None
    losses: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    eval_losses: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


@dataclass(slots=True)
class BackwardOutput:
    """What a slice found: nothing of it is visible in the job's state until the step commits."""

    work: Backward
    layers_done: int
    grad: Tensor | None
    gradients: dict[int, Tensor]


class Runner:
    """Runs steps on one device over the fused weights, the pool, the arena and the adapter table."""

    def __init__(self, fused: FusedWeights, pool: KVPool, table: AdapterTable, max_model_len: int, device: torch.device) -> None:
        self.fused, self.pool, self.table, self.device = fused, pool, table, device
        self.arena: Arena | None = None
        self.pieces: PieceGraphs | None = None
        self.parts = Parts()
        cos, sin = fused.rope(max_model_len)
        self.cos, self.sin = cos.to(device).contiguous(), sin.to(device).contiguous()

    def forward(self, inputs: StepInputs, dropout: Mapping[str, TrainState]) -> ForwardOutput:
        """The packed forward. `dropout` names the jobs whose finetune rows go through dropout (they are left out of `inputs.layout`)."""
        if self.pieces is not None and inputs.bucket is not None:
            return self.outputs(inputs, *self.pieces.layers(inputs))
        dropped = [(rows, dropout[rows.owner]) for rows in inputs.train if rows.is_finetune and rows.owner in dropout]
        trains = bool(inputs.num_train_rows)
        rows = LayerRows(inputs.token_ids, inputs.positions, inputs.places, inputs.layout, trains, inputs.keeps, dropped)
        return self.outputs(inputs, *self._layers(inputs, rows))

    @torch.no_grad()
    def _layers(self, inputs: StepInputs, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The last layer's output [T, H], and behind the final norm."""
        dims = self.fused.dims
        attend = self.attention(inputs)
        x, h = self.embed(rows)
        o = torch.empty((inputs.num_tokens, dims.num_heads, dims.head_dim), dtype=x.dtype, device=x.device)
        for layer in range(dims.num_layers):
            with self.parts("before attention"):
                q = self.before_attention(layer, x, h, rows)
            with self.parts("attention"):
                attend(layer, q, o)
            with self.parts("after attention"):
                h = self.after_attention(layer, x, o, rows)
        self.keep_last(x, rows)
        return x, h

    def attention(self, inputs: StepInputs) -> StepAttention:
        """The attention of one step."""
        return StepAttention(inputs, self.pool, self.arena, self.fused.dims.head_dim**-0.5)

    @torch.no_grad()
    def outputs(self, inputs: StepInputs, x: Tensor, h: Tensor) -> ForwardOutput:
        """Logits of the rows that sample, and the losses, from the last layer's output x [T, H] and its norm h [T, H]."""
        with self.parts("logits"):
            out = ForwardOutput(F.linear(h[inputs.samples], self.fused.lm_head), x, inputs.sampled)
        for rows in inputs.train:
            with self.parts("loss"):
                self._loss(rows, h, out)
        return out

    def embed(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The first layer's input x [T, H], and its norm."""
        x = F.embedding(rows.token_ids, self.fused.embed)
        return add_rms_norm(x, None, self.fused.layers[0].input_norm, self.fused.dims.norm_eps)

    def before_attention(self, layer: int, x: Tensor, h: Tensor, rows: LayerRows, out: Tensor | None = None) -> Tensor:
        """The rotated queries [T, Nq, D] of the layer's input x [T, H] and its norm h; keys and values go to their places, kept rows to the
        arena. The projection [T, (Nq + 2 Nkv) D] is written to `out` where it is given; the queries are a part of it.
        """
        w, dims, arena = self.fused.layers[layer], self.fused.dims, self.arena
        qkv = self._linear(layer, "qkv", h, w.qkv, w.qkv_bias, rows, out)
        if rows.keeps:
            assert arena is not None
            keep_rows_(arena.x[layer], x, rows.places)
            if arena.kept is not None:
                keep_rows_(arena.kept.qkv[layer], qkv, rows.places)
        heads = qkv.view(x.shape[0], -1, dims.head_dim)
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm)
        pool, kept = (self.pool.k[layer], self.pool.v[layer]), None
        if rows.trains:
            assert arena is not None
            kept = (arena.k[layer], arena.v[layer])
        place_qkv_(heads, rows.positions, self.cos, self.sin, norms, dims.norm_eps, pool, kept, rows.places)
        return heads[:, : dims.num_heads]

    def after_attention(self, layer: int, x: Tensor, o: Tensor, rows: LayerRows) -> Tensor:
        """Turns x [T, H] from the layer's input into its output, given the attention's output o [T, Nq, D]; returns the norm of x for what
        comes next.
        """
        fused, eps, o = self.fused, self.fused.dims.norm_eps, o.flatten(1)
        w, last = fused.layers[layer], layer + 1 == len(fused.layers)
        _, h = add_rms_norm(x, self._linear(layer, "o", o, w.o, w.o_bias, rows), w.post_norm, eps, out=x)
        kept = self.arena.kept if rows.keeps and self.arena is not None else None
        if kept is not None:
            keep_rows_(kept.middle[layer], x, rows.places)
        a = self._gated(layer, h, w.gate_up, rows, None if kept is None else kept.gate_up[layer])
        y = self._linear(layer, "down", a, w.down, None, rows)
        return add_rms_norm(x, y, fused.final_norm if last else fused.layers[layer + 1].input_norm, eps, out=x)[1]

    def keep_last(self, x: Tensor, rows: LayerRows) -> None:
        """Keep the last layer's output, which the backward begins from."""
        if rows.keeps:
            assert self.arena is not None
            keep_rows_(self.arena.x[self.fused.dims.num_layers], x, rows.places)

    def _linear(
        self, layer: int, group: str, x: Tensor, weight: Tensor, bias: Tensor | None, rows: LayerRows, out: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias + each row's own adapter [T, N], written to `out` where it is given."""
        low = self.table.low(layer, group, x, rows.layout)
        y = F.linear(x, weight, bias) if out is None else _linear_into(out, x, weight, bias)
        y = self.table.add_(layer, group, y, x, rows.layout, low)
        for train, state in rows.dropped:
            here = slice(train.first, train.first + train.tokens)
            options = {"micro_batch": train.micro_batch, "offset": train.offset}
            y[here] += dropped_group(state.job, self.fused.dims, x[here], state.compute, layer, group, **options)
        return y

    def _gated(self, layer: int, h: Tensor, weight: Tensor, rows: LayerRows, kept: Tensor | None) -> Tensor:
        """swiglu(gate_up(h)) [T, I], gate_up's kept rows in `kept`."""
        # Where nothing is kept, the two ops apart are as fast for hundreds of rows, and faster for a few of high rank.
        low = None if rows.dropped or kept is None else self.table.low(layer, "gate_up", h, rows.layout)
        if low is not None:
            return lora_swiglu(F.linear(h, weight), low, self.table.tables[layer]["gate_up"], rows.layout, kept, rows.places)
        gate_up = self._linear(layer, "gate_up", h, weight, None, rows)
        if kept is not None:
            keep_rows_(kept, gate_up, rows.places)
        return swiglu(gate_up)

    def _loss(self, rows: TrainRows, h: Tensor, out: ForwardOutput) -> None:
        """Add the loss of the labelled rows of h [T, H] (behind the final norm); finetune rows leave its gradient in the arena."""
        loss, grad = linear_cross_entropy(h[rows.labelled], self.fused.lm_head, rows.labels, rows.scale, need_grad=rows.is_finetune)
        into = out.losses if rows.is_finetune else out.eval_losses
        total, count = into.get(rows.owner, (torch.zeros_like(loss), 0))
        into[rows.owner] = (total + loss, count + rows.labels.shape[0])
        if rows.is_finetune:
            assert self.arena is not None
            self.arena.grad[rows.arena : rows.arena + rows.tokens] = 0
            if grad is not None:
                self.arena.grad[rows.labelled - rows.first + rows.arena] = grad.to(self.arena.grad.dtype)

    def backward(self, work: Backward, trainer: BackwardPass | RecordedPass, should_stop: Callable[[], bool]) -> BackwardOutput:
        """`work.num_layers` layers downwards from `work.top_layer`, fewer if `should_stop` says so between two layers."""
        assert self.arena is not None
        grad: Tensor | None = None
        gradients: dict[int, Tensor] = {}
        done = 0
        while done < work.num_layers and not should_stop():
            if done == 0:  # not before: a slice that is stopped at once must leave the gradient where it was
                is_top = work.top_layer == self.fused.dims.num_layers
                grad = trainer.top(self.arena) if is_top else trainer.resume(work.top_layer, work.num_layers, self.arena)
            assert grad is not None
            with self.parts("backward layer"):
                grad, found = trainer.layer(work.top_layer - 1 - done, self.arena, grad)
            gradients |= found
            done += 1
        return BackwardOutput(work, done, grad, gradients)

    def stopper(self, started_s: float, stop_after_s: float | None) -> Callable[[], bool]:
        """Whether the step has run into the next arrival (`plan.stop_on_arrival`); the device is synchronised to know."""
        if stop_after_s is None:
            return lambda: False

        def should_stop() -> bool:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter() - started_s >= stop_after_s

        return should_stop


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, in `out`."""
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
