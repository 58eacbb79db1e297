"""The state of one fine-tune job on the device: weights, optimiser, accumulated gradients, and dropout.

Legend: T rows, K input and N output width of a linear, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.counter import dropout_mask
from workbench.config import LINEARS, FinetuneJob
from workbench.data import PreparedJob
from workbench.runtime.adapters import AdapterWeights
from workbench.runtime.model import GROUPS, group_widths
from workbench.runtime.packed import PackedLayout, shapes_of
from workbench.runtime.weights import Dims

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
    Everything of a kind lies in one buffer, which the optimiser sees as one parameter: a step launches a few kernels, however many linears
    are adapted. `weights` and `gradients` [P] hold what `master` and `accumulated` are views of, `copies` what `compute` is.
    """

    job: FinetuneJob
    prepared: PreparedJob
    entry: int
    layout: PackedLayout
    weights: Tensor
    gradients: Tensor
    copies: Tensor
    master: dict[Key, tuple[Tensor, Tensor]]
    compute: dict[Key, tuple[Tensor, Tensor]]
    optimizer: torch.optim.AdamW
    pending: dict[int, Tensor] = field(default_factory=dict)
    micro_batches_done: int = 0
    optimizer_steps: int = 0
    layers_left: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = {key: 2 * i for i, key in enumerate(self.master)}
        self.params, self.accumulated = self.views(self.weights), self.views(self.gradients)

    @classmethod
    def create(
        cls, job: FinetuneJob, prepared: PreparedJob, adapter: AdapterWeights, entry: int, device: torch.device, dtype: torch.dtype
    ) -> "TrainState":
        """Master copies of `adapter` on `device`; the optimiser's state is allocated now, so that no step can run out of memory for it."""
        shapes = shapes_of(adapter.tensors)
        compute_layout = PackedLayout.of(shapes, dtype)
        layout = compute_layout.widened(torch.float32)
        weights, gradients = (torch.zeros(layout.size, dtype=torch.float32, device=device) for _ in range(2))
        copies = torch.zeros(compute_layout.size, dtype=dtype, device=device)
        master = {key: layout.view(weights, key) for key in shapes}
        compute = {key: compute_layout.view(copies, key) for key in shapes}
        for key, pair in adapter.tensors.items():
            for place, tensor in zip(master[key], pair, strict=True):
                place.copy_(tensor)
        copies.copy_(weights)
        optimizer = torch.optim.AdamW(
            [weights], lr=job.learning_rate, betas=job.betas, eps=job.eps, weight_decay=job.weight_decay, fused=True
        )
        optimizer.state[weights] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(weights),
            "exp_avg_sq": torch.zeros_like(weights),
        }
        return cls(job, prepared, entry, layout, weights, gradients, copies, master, compute, optimizer)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A and B of every linear in turn, in a buffer like `weights`."""
        return [t for key in self.layout.shapes for t in self.layout.view(buffer, key)]

    def optimizer_tensors(self) -> list[dict[str, Tensor]]:
        """Of every tensor of `params` its step (one for all), mean and mean square of the gradient."""
        state = self.optimizer.state[self.weights]
        means = zip(self.views(state["exp_avg"]), self.views(state["exp_avg_sq"]), strict=True)
        return [{"step": state["step"], "exp_avg": mean, "exp_avg_sq": square} for mean, square in means]

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
        if self.pending:
            torch._foreach_add_([self.accumulated[index] for index in self.pending], list(self.pending.values()))  # pyright: ignore[reportPrivateImportUsage]
        self.pending.clear()
        self.layers_left = None
        self.micro_batches_done += 1
        if ends_window:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        self.weights.grad = self.gradients
        if self.job.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.weights], self.job.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.job.learning_rate * learning_rate_factor(self.job, self.optimizer_steps, self.num_steps)
        self.optimizer.step()
        self.optimizer_steps += 1
        self.weights.grad = None
        self.gradients.zero_()
        self.refresh_compute()

    def refresh_compute(self) -> None:
        """Let `compute` be what `master` is now; tensor by tensor where a table has moved it to memory of its own (`PaddedTable`)."""
        tensors = [t for pair in self.compute.values() for t in pair]
        if tensors and tensors[0].data_ptr() != self.copies.data_ptr():
            torch._foreach_copy_(tensors, self.params)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self.copies.copy_(self.weights)


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


def dropped_group(
    job: FinetuneJob,
    dims: Dims,
    x: Tensor,
    pairs: Mapping[Key, tuple[Tensor, ...]],
    layer: int,
    group: str,
    *,
    micro_batch: int,
    offset: int,
) -> Tensor:
    """`dropped_lora` of every linear of a group, side by side [T, N]; `pairs` holds the job's weights by (layer, target)."""
    parts = [
        dropped_lora(job, x, pairs.get((layer, target)), width, micro_batch=micro_batch, layer=layer, target=target, offset=offset)
        for target, width in zip(GROUPS[group], group_widths(dims)[group][1], strict=True)
    ]
    return torch.cat(parts, dim=-1)
