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
        if self.pending:
            torch._foreach_add_([self.accumulated[index] for index in self.pending], list(self.pending.values()))  # pyright: ignore[reportPrivateImportUsage]
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
        for p in params:
            p.grad = None
        torch._foreach_zero_(self.accumulated)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_([t for pair in self.compute.values() for t in pair], params)  # pyright: ignore[reportPrivateImportUsage]


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
