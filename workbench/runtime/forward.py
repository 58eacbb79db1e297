"""One packed forward over all four kinds, and slices of the backward: the device work of a step, without its bookkeeping.

Legend: T packed tokens, H hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from workbench.core import Backward
from workbench.runtime.attention import StepAttention
from workbench.runtime.finetune import LayerTrainer, TrainState, dropped_lora
from workbench.runtime.inputs import StepInputs
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.model import GROUPS, decoder_layer, group_widths, rms_norm
from workbench.runtime.slots import AdapterTable
from workbench.runtime.weights import FusedWeights


@dataclass(slots=True)
class ForwardOutput:
    """Logits [number of samples, V] of the rows that sample, the last layer's output [T, H] (None from a recorded graph), and (loss
    sum, labelled tokens) by owner.
    """

    logits: Tensor
    hidden: Tensor | None
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
        cos, sin = self.cos[inputs.positions], self.sin[inputs.positions]
        attention = StepAttention(inputs, self.pool, self.arena, dims.head_dim**-0.5)
        x = F.embedding(inputs.token_ids, fused.embed)
        for index, weights in enumerate(fused.layers):
            self._keep(index, inputs, x)
            x = decoder_layer(
                weights,
                dims,
                x,
                cos,
                sin,
                lambda q, k, v, layer=index: attention(layer, q, k, v),
                lambda group, h, y, layer=index: self._lora(layer, group, h, y, inputs, dropout),
            )
        self._keep(dims.num_layers, inputs, x)
        out = ForwardOutput(F.linear(rms_norm(x[inputs.samples], fused.final_norm, dims.norm_eps), fused.lm_head), x)
        for rows in inputs.train:
            self._loss(rows, x, out)
        return out

    def _keep(self, layer: int, inputs: StepInputs, x: Tensor) -> None:
        """Copy the finetune rows' input of a layer to the arena (a view would pin the whole packed tensor)."""
        for rows in inputs.train:
            if rows.is_finetune:
                assert self.arena is not None
                self.arena.x[layer, rows.arena : rows.arena + rows.tokens] = x[rows.first : rows.first + rows.tokens]

    def _lora(self, layer: int, group: str, x: Tensor, y: Tensor, inputs: StepInputs, dropout: Mapping[str, TrainState]) -> Tensor:
        y = self.table.add_(layer, group, y, x, inputs.layout)
        for rows in inputs.train:
            if rows.is_finetune and rows.owner in dropout:
                state, last = dropout[rows.owner], rows.first + rows.tokens
                widths = group_widths(self.fused.dims)[group][1]
                for target, columns in zip(GROUPS[group], y[rows.first : last].split(widths, dim=-1), strict=True):
                    columns += dropped_lora(
                        state.job,
                        x[rows.first : last],
                        state.compute.get((layer, target)),
                        columns.shape[-1],
                        micro_batch=rows.micro_batch,
                        layer=layer,
                        target=target,
                        offset=rows.offset,
                    )
        return y

    def _loss(self, rows, x: Tensor, out: ForwardOutput) -> None:
        hidden = rms_norm(x[rows.labelled], self.fused.final_norm, self.fused.dims.norm_eps)
        loss, grad = linear_cross_entropy(hidden, self.fused.lm_head, rows.labels, rows.scale, need_grad=rows.is_finetune)
        into = out.losses if rows.is_finetune else out.eval_losses
        total, count = into.get(rows.owner, (torch.zeros_like(loss), 0))
        into[rows.owner] = (total + loss, count + rows.labels.shape[0])
        if rows.is_finetune:
            assert self.arena is not None
            self.arena.grad[rows.arena : rows.arena + rows.tokens] = 0
            if grad is not None:
                self.arena.grad[rows.labelled - rows.first + rows.arena] = grad.to(self.arena.grad.dtype)

    def backward(self, work: Backward, trainer: LayerTrainer, should_stop: Callable[[], bool]) -> BackwardOutput:
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
