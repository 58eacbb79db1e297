"""The naive way: a torch loop over the runs of one adapter, three launches each. The baseline that segmented LoRA is measured against.

    y[run] += scale * (x[run] A^T) B^T,   run by run, in the inputs' own dtype

Legend: T rows, K input features, N = sum of N_j output features, J slices, S slots, r rank.
It reads the layout's runs on the host, so a recorded CUDA graph would hold one batch's runs for ever. Its calls count as "loop": they were
asked for, unlike a "reference" on CUDA.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float

from kernels.counters import count
from kernels.layout import SegmentLayout
from kernels.lora_table import LoraTable


def lora_loop_(
    y: Float[torch.Tensor, "T N"], x: Float[torch.Tensor, "T K"], table: LoraTable, layout: SegmentLayout
) -> Float[torch.Tensor, "T N"]:
    """`segmented_lora_`, run by run: add every row's LoRA term to y in place and return y."""
    count("segmented_lora", "loop", y.device.type)
    for slot, first, rows in layout.runs:
        for j, (offset, width) in enumerate(zip(table.out_offsets, table.out_features, strict=True)):
            weights = table.get(j, slot)
            if weights is not None:
                low = F.linear(x[first : first + rows], weights.a)  # [rows, r]
                y[first : first + rows, offset : offset + width].addmm_(low, weights.b.T, alpha=weights.scale)
    return y


def lora_loop_gradients(
    dy: Float[torch.Tensor, "T N"],
    x: Float[torch.Tensor, "T K"],
    table: LoraTable,
    layout: SegmentLayout,
    *,
    into: Float[torch.Tensor, "T K"] | None = None,
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """`lora_gradients`, run by run: {(slice, slot): (dA [r, K], dB [N_j, r])} in fp32; dX is added to `into` where it is given."""
    count("lora_gradients", "loop", dy.device.type)
    gradients: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for slot, first, rows in layout.runs:
        here = slice(first, first + rows)
        for j, (offset, width) in enumerate(zip(table.out_offsets, table.out_features, strict=True)):
            weights = table.get(j, slot)
            if weights is None:
                continue
            dy_run = dy[here, offset : offset + width]
            dv = weights.scale * (dy_run @ weights.b)  # [rows, r]
            da, db = (dv.T @ x[here]).float(), weights.scale * (dy_run.T @ F.linear(x[here], weights.a)).float()
            before = gradients.get((j, slot))
            gradients[j, slot] = (da, db) if before is None else (before[0] + da, before[1] + db)
            if into is not None:
                into[here].addmm_(dv, weights.a)
    return gradients
