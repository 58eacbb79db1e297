"""The state of one fine-tune job on the device, and the backward pass of one decoder layer.

Legend: T rows of the micro-batch, H hidden, L layers, K input and N output width of a linear, r rank.
The forward runs without autograd and keeps the input of every layer in the arena; the backward of a layer recomputes that layer
under autograd (activation checkpointing, arXiv 1604.06174) over the whole micro-batch, so cutting the forward at any token and the
backward at any layer leaves the gradients as they are.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.counter import dropout_mask
from kernels.layout import SegmentLayout
from kernels.segmented_lora import SlotWeights, segmented_lora
from kernels.varlen_attention import varlen_attention
from workbench.config import LINEARS, FinetuneJob
from workbench.data import PreparedJob
from workbench.runtime.adapters import AdapterWeights
from workbench.runtime.inputs import TrainRows
from workbench.runtime.kv_cache import Arena
from workbench.runtime.model import GROUPS, decoder_layer, group_widths, rms_norm
from workbench.runtime.weights import FusedWeights

Key = tuple[int, str]  # layer, target


def learning_rate_factor(job: FinetuneJob, step: int, num_steps: int) -> float:
    """The schedule's factor at optimiser step `step` (from 0): linear warm-up, then constant, linear or cosine decay to 0."""
    if step < job.warmup_steps:
        return (step + 1) / (job.warmup_steps + 1)
    done = (step - job.warmup_steps) / max(1, num_steps - job.warmup_steps)
    if job.schedule == "linear":
        return max(0.0, 1.0 - done)
    if job.schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * min(1.0, done), dtype=torch.float64))))
    return 1.0


@dataclass(eq=False)
class TrainState:
    """Master weights in fp32, AdamW state in fp32, accumulated gradients in fp32, and where the job stands.

    `compute` holds the copies in the model's dtype that the kernels read; they change only when a window ends. `pending` holds the
    gradients of the micro-batch in flight: they join `accumulated` when its backward is complete.
    """

    job: FinetuneJob
    prepared: PreparedJob
    entry: int
    master: dict[Key, tuple[Tensor, Tensor]]
    compute: dict[Key, tuple[Tensor, Tensor]]
    optimizer: torch.optim.AdamW
    accumulated: list[Tensor]
    pending: dict[int, Tensor] = field(default_factory=dict)
    micro_batches_done: int = 0
    optimizer_steps: int = 0
    layers_left: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = {key: 2 * i for i, key in enumerate(self.master)}

    @classmethod
    def create(
        cls, job: FinetuneJob, prepared: PreparedJob, weights: AdapterWeights, entry: int, device: torch.device, dtype: torch.dtype
    ) -> "TrainState":
        """Master copies of `weights` on `device`; the optimiser's state is allocated now, so that no step can run out of memory for it."""
        master = {
            key: (a.to(device, torch.float32, copy=True), b.to(device, torch.float32, copy=True)) for key, (a, b) in weights.tensors.items()
        }
        compute = {key: (a.to(dtype, copy=True).contiguous(), b.to(dtype, copy=True).contiguous()) for key, (a, b) in master.items()}
        params = [t for pair in master.values() for t in pair]
        optimizer = torch.optim.AdamW(params, lr=job.learning_rate, betas=job.betas, eps=job.eps, weight_decay=job.weight_decay, fused=True)
        for p in params:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return cls(job, prepared, entry, master, compute, optimizer, [torch.zeros_like(p) for p in params])

    @property
    def params(self) -> list[Tensor]:
        return [t for pair in self.master.values() for t in pair]

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole job."""
        return -(-self.prepared.num_micro_batches // self.job.accumulation)

    def index_of(self, key: Key) -> int:
        """The place of a target's A in `params` (its B follows)."""
        return self._index[key]

    def discard_pending(self) -> None:
        """Forget the micro-batch in flight; it will be redone from its forward."""
        self.pending.clear()
        self.layers_left = None

    def commit_micro_batch(self, ends_window: bool) -> None:
        """The backward has reached layer 0: add its gradients, and step the optimiser where the accumulation window ends."""
        for index, gradient in self.pending.items():
            self.accumulated[index].add_(gradient)
        self.pending.clear()
        self.layers_left = None
        self.micro_batches_done += 1
        if ends_window:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        params = self.params
        for p, gradient in zip(params, self.accumulated, strict=True):
            p.grad = gradient
        if self.job.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.job.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.job.learning_rate * learning_rate_factor(self.job, self.optimizer_steps, self.num_steps)
        self.optimizer.step()
        self.optimizer_steps += 1
        for p, gradient in zip(params, self.accumulated, strict=True):
            p.grad = None
            gradient.zero_()
        for key, (a, b) in self.master.items():
            self.compute[key][0].copy_(a)
            self.compute[key][1].copy_(b)


class LayerTrainer:
    """Recomputes one layer of a micro-batch under autograd and gives the gradients of its input and of its LoRA weights."""

    def __init__(self, fused: FusedWeights, state: TrainState, rows: TrainRows, cos: Tensor, sin: Tensor) -> None:
        """`rows` covers the whole micro-batch; cos and sin [T, D]."""
        self.fused, self.state, self.rows, self.cos, self.sin = fused, state, rows, cos, sin
        self.scale = fused.dims.head_dim**-0.5
        self.layout = SegmentLayout.build([(0, rows.tokens)], cos.device)

    def top(self, arena: Arena) -> Tensor:
        """The gradient through the final norm: d loss / d (output of the last layer) [T, H], from what the loss left in `arena.grad`."""
        rows, dims = slice(self.rows.arena, self.rows.arena + self.rows.tokens), self.fused.dims
        x = arena.x[dims.num_layers, rows].detach().requires_grad_()
        with torch.enable_grad():
            y = rms_norm(x, self.fused.final_norm, dims.norm_eps)
        return torch.autograd.grad(y, x, arena.grad[rows])[0]

    def layer(self, index: int, arena: Arena, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """d loss / d (input of layer `index`) [T, H] (None at layer 0), and fp32 gradients by parameter index."""
        rows = slice(self.rows.arena, self.rows.arena + self.rows.tokens)
        x = arena.x[index, rows].detach()
        keys = [key for key in self.state.master if key[0] == index]
        leaves = {key: tuple(t.detach().requires_grad_() for t in self.state.master[key]) for key in keys}
        inputs = [t for pair in leaves.values() for t in pair]
        if index > 0:
            inputs.append(x.requires_grad_())
        if not inputs:
            return None, {}
        with torch.enable_grad():
            y = decoder_layer(
                self.fused.layers[index],
                self.fused.dims,
                x,
                self.cos,
                self.sin,
                self._attend,
                lambda group, h, base: self._lora(index, group, h, base, leaves),
            )
        gradients = list(torch.autograd.grad(y, inputs, grad))
        below = gradients.pop() if index > 0 else None
        found: dict[int, Tensor] = {}
        for key in keys:
            first = self.state.index_of(key)
            found[first], found[first + 1] = gradients.pop(0).float(), gradients.pop(0).float()
        return below, found

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        r = self.rows
        return varlen_attention(q, k, v, r.cu_seqlens_q, r.cu_seqlens_k, r.max_q, r.max_k, self.scale)

    def _lora(self, layer: int, group: str, x: Tensor, y: Tensor, leaves: dict[Key, tuple[Tensor, ...]]) -> Tensor:
        targets = GROUPS[group]
        if not any((layer, t) in leaves for t in targets):
            return y
        widths = group_widths(self.fused.dims)[group][1]
        job = self.state.job
        if job.dropout:
            return y + torch.cat(
                [
                    dropped_lora(job, x, leaves.get((layer, t)), width, micro_batch=self.rows.micro_batch, layer=layer, target=t, offset=0)
                    for t, width in zip(targets, widths, strict=True)
                ],
                dim=-1,
            )
        pairs = [leaves.get((layer, t)) for t in targets]
        slices = [[None if pair is None else SlotWeights(*pair, job.scaling)] for pair in pairs]
        return segmented_lora(x, y, self.layout, slices, widths)


def dropped_lora(
    job: FinetuneJob, x: Tensor, pair: tuple[Tensor, ...] | None, width: int, *, micro_batch: int, layer: int, target: str, offset: int
) -> Tensor:
    """scale * (dropout(x) A^T) B^T [T, N]; the mask is a counter-based function of the row's place in the job, not in the batch."""
    if pair is None:
        return x.new_zeros((x.shape[0], width))
    a, b = (t.to(x.dtype) for t in pair)
    rows = torch.arange(offset, offset + x.shape[0], device=x.device)
    mask = dropout_mask(job.seed, micro_batch, layer, LINEARS.index(target), rows, x.shape[1], job.dropout, x.dtype)
    return job.scaling * F.linear(F.linear(x * mask, a), b)
