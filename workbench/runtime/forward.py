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
from kernels.swiglu import swiglu
from workbench.core import Backward, Segment
from workbench.runtime.attention import StepAttention
from workbench.runtime.backward import BackwardPass
from workbench.runtime.finetune import TrainState, dropped_group
from workbench.runtime.inputs import StepInputs, TrainRows
from workbench.runtime.kv_cache import Arena, KVPool
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
        cos, sin = fused.rope(max_model_len)
        self.cos, self.sin = cos.to(device).contiguous(), sin.to(device).contiguous()

    @torch.no_grad()
    def forward(self, inputs: StepInputs, dropout: Mapping[str, TrainState]) -> ForwardOutput:
        """The packed forward. `dropout` names the jobs whose finetune rows go through dropout (they are left out of `inputs.layout`)."""
        fused, dims = self.fused, self.fused.dims
        attend = StepAttention(inputs, self.pool, self.arena, dims.head_dim**-0.5)
        x = F.embedding(inputs.token_ids, fused.embed)
        h = add_rms_norm(x, None, fused.layers[0].input_norm, dims.norm_eps)[1]
        for layer in range(dims.num_layers):
            q = self._before_attention(layer, x, h, inputs, dropout)
            x, h = self._after_attention(layer, x, attend(layer, q), inputs, dropout)
        if inputs.keeps:
            assert self.arena is not None
            keep_rows_(self.arena.x[dims.num_layers], x, inputs.places)
        out = ForwardOutput(F.linear(h[inputs.samples], fused.lm_head), x, inputs.sampled)
        for rows in inputs.train:
            self._loss(rows, h, out)
        return out

    def _before_attention(self, layer: int, x: Tensor, h: Tensor, inputs: StepInputs, dropout: Mapping[str, TrainState]) -> Tensor:
        """The rotated queries [T, Nq, D] from the normed input h [T, H]; new keys and values go to their places, kept rows to the arena."""
        w, dims, arena = self.fused.layers[layer], self.fused.dims, self.arena
        qkv = self._lora(layer, "qkv", h, F.linear(h, w.qkv, w.qkv_bias), inputs, dropout)
        if inputs.keeps:
            assert arena is not None
            keep_rows_(arena.x[layer], x, inputs.places)
            if arena.kept is not None:
                keep_rows_(arena.kept.qkv[layer], qkv, inputs.places)
        heads = qkv.view(x.shape[0], -1, dims.head_dim)
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm)
        pool, rows = (self.pool.k[layer], self.pool.v[layer]), None
        if inputs.num_train_rows:
            assert arena is not None
            rows = (arena.k[layer], arena.v[layer])
        place_qkv_(heads, inputs.positions, self.cos, self.sin, norms, dims.norm_eps, pool, rows, inputs.places)
        return heads[:, : dims.num_heads]

    def _after_attention(
        self, layer: int, x: Tensor, o: Tensor, inputs: StepInputs, dropout: Mapping[str, TrainState]
    ) -> tuple[Tensor, Tensor]:
        """The layer's output [T, H] and its norm for what comes next, from the layer's input x and the attention's output o [T, Nq D]."""
        fused, eps = self.fused, self.fused.dims.norm_eps
        w, last = fused.layers[layer], layer + 1 == len(fused.layers)
        x, h = add_rms_norm(x, self._lora(layer, "o", o, F.linear(o, w.o, w.o_bias), inputs, dropout), w.post_norm, eps)
        gate_up = self._lora(layer, "gate_up", h, F.linear(h, w.gate_up), inputs, dropout)
        if inputs.keeps and self.arena is not None and self.arena.kept is not None:
            keep_rows_(self.arena.kept.middle[layer], x, inputs.places)
            keep_rows_(self.arena.kept.gate_up[layer], gate_up, inputs.places)
        a = swiglu(gate_up)
        y = self._lora(layer, "down", a, F.linear(a, w.down), inputs, dropout)
        return add_rms_norm(x, y, fused.final_norm if last else fused.layers[layer + 1].input_norm, eps)

    def _lora(self, layer: int, group: str, x: Tensor, y: Tensor, inputs: StepInputs, dropout: Mapping[str, TrainState]) -> Tensor:
        y = self.table.add_(layer, group, y, x, inputs.layout)
        for rows in inputs.train:
            if rows.is_finetune and rows.owner in dropout:
                state, here = dropout[rows.owner], slice(rows.first, rows.first + rows.tokens)
                options = {"micro_batch": rows.micro_batch, "offset": rows.offset}
                y[here] += dropped_group(state.job, self.fused.dims, x[here], state.compute, layer, group, **options)
        return y

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

    def backward(self, work: Backward, trainer: BackwardPass, should_stop: Callable[[], bool]) -> BackwardOutput:
        """`work.num_layers` layers downwards from `work.top_layer`, fewer if `should_stop` says so between two layers."""
        assert self.arena is not None
        rows = slice(trainer.rows.arena, trainer.rows.arena + trainer.rows.tokens)
        grad: Tensor | None = None
        gradients: dict[int, Tensor] = {}
        done = 0
        while done < work.num_layers and not should_stop():
            if done == 0:  # not before: a slice that is stopped at once must leave the gradient where it was
                grad = trainer.top(self.arena) if work.top_layer == self.fused.dims.num_layers else self.arena.grad[rows]
            assert grad is not None
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
