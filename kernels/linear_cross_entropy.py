"""Linear + cross-entropy without storing [N, V]: chunks of rows, loss and gradient in one pass over each.

    loss = sum_n (logsumexp_v z_nv - z_n,label_n),  z = hidden weight^T        grad_hidden = scale * (softmax(z) - onehot) weight

Legend: N labelled rows, H hidden, V vocabulary. The weight is frozen: it gets no gradient. The softmax is fp32.
Ideas: Liger Kernel's fused linear cross-entropy (arXiv 2410.10989), Cut Cross-Entropy (2411.09009).
"""

import torch
from jaxtyping import Float, Int64

from kernels.backend import jit, num_processors, tl, uses_triton, wide_dtype
from kernels.counters import count
from kernels.plan import plan

CHUNK_ROWS = 512


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of `linear_cross_entropy`, in fp32 (or wider)."""
    wide = wide_dtype(hidden.dtype)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    grad = torch.empty_like(hidden) if need_grad else None
    for first in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        log_p = torch.log_softmax((hidden[rows] @ weight.T).to(wide), dim=-1)  # [rows, V]
        label = labels[rows, None]
        loss -= log_p.gather(1, label).sum()
        if grad is not None:
            dz = log_p.exp_().mul_(scale)
            dz.scatter_add_(1, label, torch.full_like(label, -scale, dtype=wide))
            grad[rows] = dz.to(hidden.dtype) @ weight
    return loss.to(torch.float32), grad


@jit
def softmax_loss_kernel(logits, labels, losses, V, scale, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its cross-entropy, and scale * (softmax - onehot) over its logits in place."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * V
    label = tl.load(labels + row)
    label_logit = tl.load(at + label).to(tl.float32)
    peaks = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        z = tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32)
        new_peaks = tl.maximum(peaks, z)
        base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        totals = totals * tl.exp(peaks - base) + tl.exp(z - base)
        peaks = new_peaks
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * tl.exp(peaks - peak), 0)
    tl.store(losses + row, peak + tl.log(total) - label_logit)
    if NEEDS_GRAD:
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            z = tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(z - peak) / total - tl.where(v == label, 1.0, 0.0)
            tl.store(at + v, (scale * gradient).to(logits.dtype.element_ty), mask=v < V)


def _linear_cross_entropy_triton(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    grad = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_grad else None
    sizes = {"rows": 1, "length": vocab_size, "programs": rows, "itemsize": hidden.dtype.itemsize}
    launch = plan("softmax", processors=num_processors(hidden.device), device=hidden.device, **sizes)
    labels = labels.contiguous()
    for first in range(0, rows, CHUNK_ROWS):
        chunk = slice(first, min(first + CHUNK_ROWS, rows))
        logits = hidden[chunk] @ weight.T  # [chunk, V]
        softmax_loss_kernel[(logits.shape[0],)](
            logits, labels[chunk], losses[chunk], vocab_size, float(scale), NEEDS_GRAD=need_grad, BLOCK=launch.block, **launch.options
        )
        if grad is not None:
            torch.mm(logits, weight, out=grad[chunk])
    return losses.sum(), grad


def linear_cross_entropy(
    hidden: Float[torch.Tensor, "N H"], weight: Float[torch.Tensor, "V H"], labels: Int64[torch.Tensor, " N"], scale: float, need_grad: bool
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, "N H"] | None]:
    """(sum of the rows' cross-entropies, fp32 scalar on the device; gradient of scale * loss by `hidden`, or None).

    Every row is labelled, labels lie in 0..V-1. No synchronisation with the device on CUDA. Raises ValueError where shapes or dtypes
    do not fit, and on the CPU for a label outside the vocabulary.
    """
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != labels.shape[0] or hidden.dtype != weight.dtype:
        raise ValueError(
            "hidden [N, H], weight [V, H] and labels [N] must fit and share a dtype, "
            f"got {tuple(hidden.shape)} {hidden.dtype}, {tuple(weight.shape)} {weight.dtype} and {tuple(labels.shape)}"
        )
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(f"labels must lie in 0..{weight.shape[0] - 1}, got {int(labels.min())}..{int(labels.max())}")
    hidden = hidden.detach()
    if uses_triton(hidden):
        count("linear_cross_entropy", "triton", hidden.device.type)
        return _linear_cross_entropy_triton(hidden, weight.detach(), labels, scale, need_grad)
    count("linear_cross_entropy", "reference", hidden.device.type)
    return linear_cross_entropy_reference(hidden, weight.detach(), labels, scale, need_grad)
