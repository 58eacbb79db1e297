"""One packed forward over all four kinds, and slices of the backward: the device work of a step, without its bookkeeping.

Legend: T packed tokens, H hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Beside
from kernels.keep import keep_rows_
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lora_tail import tail_linear
from kernels.qkv import place_qkv_
from kernels.rms_norm import add_rms_norm
from kernels.swiglu import lora_swiglu, swiglu
from workbench.core import Backward, Segment
from workbench.runtime.attention import StepAttention
from workbench.runtime.backward import BackwardPass
from workbench.runtime.backward_graphs import RecordedPass
from workbench.runtime.finetune import TrainState, dropped_group
from workbench.runtime.inputs import PackedStep, StepInputs, TrainSpan, on_device
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.mixed_graphs import MixedGraphs
from workbench.runtime.model import GROUPS
from workbench.runtime.parts import Parts
from workbench.runtime.slots import AdapterTable
from workbench.runtime.weights import FusedWeights

BESIDE_ROWS = 256  # the adapters' first half runs beside a base product that is bound by the bytes of its weights
GROUP_NUMBERS = {group: number for number, group in enumerate(GROUPS)}


@dataclass(slots=True)
class ForwardOutput:
    """Logits [number of samples, V] of the rows that sample, the last layer's output behind the final norm [T, H] (None from a recorded
    decode step), the segments that sample, the logits' argmax (where a graph made it too), and (loss sum, labelled tokens) by owner.
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
        self.mixed: MixedGraphs | None = None
        self.tails = table.tails([{group: getattr(layer, group) for group in GROUPS} for layer in fused.layers])
        self.parts = Parts()
        cos, sin = fused.rope(max_model_len)
        self.cos, self.sin = cos.to(device).contiguous(), sin.to(device).contiguous()

    @property
    def arena_rows(self) -> int:
        """How many rows of fine-tuning there is room for."""
        return 0 if self.arena is None else self.arena.grad.shape[0]

    @torch.no_grad()
    def forward(self, step: PackedStep, dropout: Mapping[str, TrainState]) -> ForwardOutput:
        """The packed forward, recorded where it can be. `dropout` names the jobs whose finetune rows go through dropout: their rows have no
        entry of the adapter table.
        """
        recorded = None if self.mixed is None or dropout else self.mixed.run(step)
        if recorded is not None:
            out = ForwardOutput(recorded.logits, recorded.hidden, step.sampled, recorded.greedy)
            self._losses(step, recorded.hidden, recorded.labelled, recorded.labels, out)
            return out
        inputs = on_device(step, self.device)
        inputs.dropped = [(span, dropout[span.owner]) for span in step.train if span.is_finetune and span.owner in dropout]
        h = self.layers(inputs)
        with self.parts("logits"):
            out = ForwardOutput(F.linear(h[inputs.samples], self.fused.lm_head), h, step.sampled)
        labelled, labels = (
            torch.tensor([n for span in step.train for n in numbers(span)], dtype=torch.int64).to(self.device)
            for numbers in (lambda span: span.labelled, lambda span: span.labels)
        )
        self._losses(step, h, labelled, labels, out)
        return out

    @torch.no_grad()
    def layers(self, inputs: StepInputs) -> Tensor:
        """The last layer's output behind the final norm [T, H]."""
        attend = StepAttention(inputs, self.pool, self.arena, self.fused.dims.head_dim**-0.5)
        x, h = self.embed(inputs)
        for layer in range(self.fused.dims.num_layers):
            with self.parts("before attention"):
                q = self.before_attention(layer, x, h, inputs)
            with self.parts("attention"):
                o = attend(layer, q)
            with self.parts("after attention"):
                h = self.after_attention(layer, x, o, inputs)
        if inputs.keeps:
            assert self.arena is not None
            keep_rows_(self.arena.x[self.fused.dims.num_layers], x, inputs.places)  # which the backward begins from
        return h

    def _losses(self, step: PackedStep, h: Tensor, labelled: Tensor, labels: Tensor, out: ForwardOutput) -> None:
        """The losses of all spans; `labelled` and `labels` list theirs one behind the other."""
        first = 0
        for span in step.train:
            here = slice(first, first + len(span.labels))
            first = here.stop
            with self.parts("loss"):
                self._loss(span, labelled[here], labels[here], h, out)

    def embed(self, rows: StepInputs) -> tuple[Tensor, Tensor]:
        """The first layer's input x [T, H], and its norm."""
        x = F.embedding(rows.token_ids, self.fused.embed)
        return add_rms_norm(x, None, self.fused.layers[0].input_norm, self.fused.dims.norm_eps, tail=self._tail(rows))

    def before_attention(self, layer: int, x: Tensor, h: Tensor, rows: StepInputs) -> Tensor:
        """The rotated queries [T, Nq, D] of the layer's input x [T, H] and its norm h; keys and values go to their places, kept rows to the
        arena.
        """
        w, dims, arena = self.fused.layers[layer], self.fused.dims, self.arena
        qkv = self._linear(layer, "qkv", h, w.qkv, w.qkv_bias, rows)
        if rows.keeps:
            assert arena is not None
            keep_rows_(arena.x[layer], x, rows.places)
            if arena.kept is not None:
                keep_rows_(arena.kept.qkv[layer], qkv, rows.places)
        heads = qkv.view(x.shape[0], -1, dims.head_dim)
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm)
        pool, kept = (self.pool.k[layer], self.pool.v[layer]), None
        if rows.documents is not None:
            assert arena is not None
            kept = (arena.k[layer], arena.v[layer])
        place_qkv_(heads, rows.positions, self.cos, self.sin, norms, dims.norm_eps, pool, kept, rows.places)
        return heads[:, : dims.num_heads]

    def after_attention(self, layer: int, x: Tensor, o: Tensor, rows: StepInputs) -> Tensor:
        """Turns x [T, H] from the layer's input into its output, given the attention's output o [T, Nq, D]; returns the norm of x for what
        comes next.
        """
        fused, eps, o = self.fused, self.fused.dims.norm_eps, o.flatten(1)
        w, last = fused.layers[layer], layer + 1 == len(fused.layers)
        _, h = add_rms_norm(x, self._linear(layer, "o", o, w.o, w.o_bias, rows), w.post_norm, eps, out=x, tail=self._tail(rows))
        kept = self.arena.kept if rows.keeps and self.arena is not None else None
        if kept is not None:
            keep_rows_(kept.middle[layer], x, rows.places)
        a = self._gated(layer, h, w.gate_up, rows, None if kept is None else kept.gate_up[layer])
        y = self._linear(layer, "down", a, w.down, None, rows)
        next_norm = fused.final_norm if last else fused.layers[layer + 1].input_norm
        return add_rms_norm(x, y, next_norm, eps, out=x, tail=0 if last else self._tail(rows))[1]

    def _linear(self, layer: int, group: str, x: Tensor, weight: Tensor, bias: Tensor | None, rows: StepInputs) -> Tensor:
        """x W^T + bias + each row's own adapter [T, N]."""
        if rows.chosen is not None and self.tails is not None:
            tail = self.tails.of(layer * len(GROUPS) + GROUP_NUMBERS[group], rows.chosen)
            if tail is not None:
                return tail_linear(x, weight, bias, self.table.tables[layer][group], rows.layout, tail)
        beside = Beside(x.device, applies=rows.num_tokens <= BESIDE_ROWS and bool(rows.layout.runs))
        with beside:
            low = self.table.low(layer, group, x, rows.layout)
        y = F.linear(x, weight, bias)
        beside.join()
        y = self.table.add_(layer, group, y, x, rows.layout, low)
        for train, state in rows.dropped:
            here = slice(train.first, train.first + train.tokens)
            options = {"micro_batch": train.micro_batch, "offset": train.offset}
            y[here] += dropped_group(state.job, self.fused.dims, x[here], state.compute, layer, group, **options)
        return y

    def _gated(self, layer: int, h: Tensor, weight: Tensor, rows: StepInputs, kept: Tensor | None) -> Tensor:
        """swiglu(gate_up(h)) [T, I], gate_up's kept rows in `kept`."""
        # Where nothing is kept, the two ops apart are as fast for hundreds of rows, and faster for a few of high rank.
        low = None if rows.dropped or kept is None else self.table.low(layer, "gate_up", h, rows.layout)
        if low is not None:
            return lora_swiglu(
                F.linear(h, weight), low, self.table.tables[layer]["gate_up"], rows.layout, kept, rows.places, tail=self._tail(rows)
            )
        gate_up = self._linear(layer, "gate_up", h, weight, None, rows)
        if kept is not None:
            keep_rows_(kept, gate_up, rows.places)
        return swiglu(gate_up, tail=self._tail(rows))

    def _tail(self, rows: StepInputs) -> int:
        """The columns behind the rows that a linear with adapters reads."""
        return 0 if rows.chosen is None or self.tails is None else self.tails.columns

    def _loss(self, span: TrainSpan, labelled: Tensor, labels: Tensor, h: Tensor, out: ForwardOutput) -> None:
        """Add the loss of the span's labelled rows of h [T, H] (behind the final norm); finetune rows leave its gradient in the arena."""
        loss, grad = linear_cross_entropy(h[labelled], self.fused.lm_head, labels, span.scale, need_grad=span.is_finetune)
        into = out.losses if span.is_finetune else out.eval_losses
        total, count = into.get(span.owner, (torch.zeros_like(loss), 0))
        into[span.owner] = (total + loss, count + labels.shape[0])
        if span.is_finetune:
            assert self.arena is not None
            self.arena.grad[span.arena : span.arena + span.tokens] = 0
            if grad is not None:
                self.arena.grad[labelled - span.first + span.arena] = grad.to(self.arena.grad.dtype)

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
