"""What the tuner measures, in the order of importance: the kernels of a step on shapes of the Llama-3-8B size, bf16.

A problem holds inputs of its own on the device; it runs one op and compares what a run gives with the op's reference, computed in fp32 on
the same inputs and the same device. Layouts are padded as the engine's recorded steps pad them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from kernels.layout import FEW_RUNS, SegmentLayout, few_tiles, tile_height
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.lora_table import LoraTable, SlotWeights
from kernels.lora_tail import placed_tail, tail_linear, tail_linear_reference, weight_with_tail, with_tail
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.problems import bounds
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from kernels.segmented_lora import lora_gradients, lora_gradients_reference, segmented_lora_, segmented_lora_reference, shrink
from kernels.swiglu import lora_swiglu, swiglu, swiglu_reference
from kernels.testing import adapters_of_rows, poisoned_memory

# (K, N of each slice): the four groups of linears that share an input.
GROUPS = {
    "gate_up": (4096, (14336, 14336)),
    "qkv": (4096, (4096, 1024, 1024)),
    "down": (14336, (4096,)),
    "o": (4096, (4096,)),
}
TAIL = 64  # columns behind a weight's rows
TILE_ROWS = 16  # of a recorded decode step of many runs
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One set of inputs: `run` is what is timed, `outputs` a run that leaves the inputs as they were, `reference` what it must give."""

    run: Callable[[], object]
    outputs: Callable[[], Tensors]
    reference: Callable[[], Tensors]

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        return [tensor.float() for tensor in self.reference()]

    def error(self) -> float:
        """max |a - b| / max |b| over the outputs, with everything poisoned that the op allocates; infinite where it is not finite."""
        with poisoned_memory():
            found = self.outputs()
        worst = 0.0
        for a, b in zip(found, self.expected, strict=True):
            if not b.numel():
                continue
            difference = float((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
        return worst


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An op on one shape. `prepare` makes inputs anew; `num_bytes` is what one run of it reads and writes."""

    op: str
    name: str
    prepare: Callable[[], Instance]
    num_bytes: float


def _lora_inputs(
    group: str, adapters: int, rank: int, rows: int, device: str, dtype: torch.dtype, groups: dict[str, tuple[int, tuple[int, ...]]]
) -> tuple[LoraTable, SegmentLayout, torch.Tensor, torch.Tensor]:
    k, widths = groups[group]
    weights = {}
    for j, width in enumerate(widths):
        a = torch.randn(adapters, rank, k, dtype=dtype, device=device) * k**-0.5
        b = torch.randn(adapters, width, rank, dtype=dtype, device=device) * rank**-0.5
        weights |= {(j, slot): SlotWeights(a[slot], b[slot], 0.5) for slot in range(adapters)}
    table = LoraTable(k, widths, adapters, device=device, dtype=dtype, weights=weights)
    slots = adapters_of_rows("distinct", rows, adapters)
    runs = [(slot, slots.count(slot)) for slot in sorted(set(slots))]
    is_decode = rows <= 256
    height, tiles = (tile_height(rows), few_tiles(rows)) if len(runs) <= FEW_RUNS else (TILE_ROWS, rows)
    layout = SegmentLayout.build(runs, device, block_rows=height, num_tiles=tiles if is_decode else None)
    x, y = (torch.randn(rows, width, dtype=dtype, device=device) for width in (k, sum(widths)))
    return table, layout, x, y


def lora(
    group: str,
    adapters: int,
    rank: int,
    rows: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    groups: dict[str, tuple[int, tuple[int, ...]]] = GROUPS,
) -> Problem:
    """The addition of one group's adapters to y."""

    def prepare() -> Instance:
        table, layout, x, y = _lora_inputs(group, adapters, rank, rows, device, dtype, groups)
        before = y.clone()  # timed runs go on adding to y
        return Instance(
            run=lambda: segmented_lora_(y, x, table, layout),
            outputs=lambda: [segmented_lora_(before.clone(), x, table, layout)],
            reference=lambda: [segmented_lora_reference(before.to(torch.float32, copy=True), x, table, layout)],
        )

    k, widths = groups[group]
    num_bytes = 2 * rows * (k + 2 * sum(widths)) + 2 * min(adapters, rows) * rank * (len(widths) * k + sum(widths))
    return Problem(op="segmented_lora", name=f"{group}, {adapters} x r{rank}, T={rows}", prepare=prepare, num_bytes=num_bytes)


def gated_lora(
    adapters: int,
    rank: int,
    rows: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    groups: dict[str, tuple[int, tuple[int, ...]]] = GROUPS,
) -> Problem:
    """The adapters of gate and up, and the SwiGLU that adds them on the way and keeps every row's sum."""

    def prepare() -> Instance:
        table, layout, x, gate_up = _lora_inputs("gate_up", adapters, rank, rows, device, dtype, groups)
        kept, places = torch.empty_like(gate_up), ~torch.arange(rows, device=device)

        def run() -> torch.Tensor:
            low = shrink(x, table, layout)
            assert low is not None
            return lora_swiglu(gate_up, low, table, layout, kept, places)

        def reference() -> list[torch.Tensor]:
            total = segmented_lora_reference(gate_up.to(torch.float32, copy=True), x, table, layout)
            return [swiglu_reference(total), total]

        return Instance(run=run, outputs=lambda: [run(), kept], reference=reference)

    k, (width, _) = groups["gate_up"]
    num_bytes = 2 * rows * (k + 5 * width) + 4 * min(adapters, rows) * rank * (k + width)
    return Problem(op="lora_swiglu", name=f"{adapters} x r{rank}, T={rows}", prepare=prepare, num_bytes=num_bytes)


def in_tail(
    group: str,
    adapters: int,
    rank: int,
    rows: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    groups: dict[str, tuple[int, tuple[int, ...]]] = GROUPS,
) -> Problem:
    """One group's base product with the adapters in its tail."""

    def prepare() -> Instance:
        table, layout, given, _ = _lora_inputs(group, adapters, rank, rows, device, dtype, groups)
        k, n = table.in_features, table.total_out
        weight = weight_with_tail(torch.randn(n, k, dtype=dtype, device=device) * k**-0.5, TAIL)
        x = with_tail(rows, k, TAIL, given).copy_(given)
        tail = placed_tail(table, weight, layout)

        def run() -> torch.Tensor:
            return tail_linear(x, weight, None, table, layout, tail)

        return Instance(run=run, outputs=lambda: [run()], reference=lambda: [tail_linear_reference(x, weight, None, table, layout)])

    k, widths = groups[group]
    num_bytes = 2 * (rows * (k + sum(widths)) + k * sum(widths))
    return Problem(op="tail_linear", name=f"{group}, {adapters} x r{rank}, T={rows}", prepare=prepare, num_bytes=num_bytes)


def lora_forward(group: str, adapters: int, rank: int, rows: int, device: str) -> Problem:
    """A group's adapters as the engine runs them: fine-tune rows add those of gate and up within SwiGLU."""
    return (gated_lora if group == "gate_up" and rows > 256 else partial(lora, group))(adapters, rank, rows, device)


def lora_backward(
    group: str,
    adapters: int,
    rank: int,
    rows: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    groups: dict[str, tuple[int, tuple[int, ...]]] = GROUPS,
) -> Problem:
    """dX, dA and dB of one group's adapters."""

    def prepare() -> Instance:
        table, layout, x, dy = _lora_inputs(group, adapters, rank, rows, device, dtype, groups)

        def flat(found: tuple[torch.Tensor | None, dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]]) -> list[torch.Tensor]:
            dx, gradients = found
            assert dx is not None
            return [dx, *(t for _, pair in sorted(gradients.items()) for t in pair)]

        return Instance(
            run=lambda: lora_gradients(dy, x, table, layout),
            outputs=lambda: flat(lora_gradients(dy, x, table, layout)),
            reference=lambda: flat(lora_gradients_reference(dy, x, table, layout, True)),
        )

    k, widths = groups[group]
    num_bytes = 2 * rows * (2 * k + sum(widths)) + 6 * min(adapters, rows) * rank * (len(widths) * k + sum(widths))
    return Problem(op="lora_gradients", name=f"{group}, {adapters} x r{rank}, T={rows}", prepare=prepare, num_bytes=num_bytes)


def attention(
    sequences: int,
    query: int,
    context: int,
    max_context: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int, int] = (32, 8, 128),
) -> Problem:
    """Paged attention of `sequences` with `query` new tokens each, in a step that knows `max_context` as its bound."""
    num_heads, kv_heads, size = heads

    def prepare() -> Instance:
        blocks = -(-context // 16)
        shape = (sequences * blocks, 16, kv_heads, size)
        caches = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        tables = torch.zeros(sequences, -(-max_context // 16), dtype=torch.int32, device=device)
        tables[:, :blocks] = torch.randperm(sequences * blocks, device=device).view(sequences, blocks).to(torch.int32)
        cu = bounds([query] * sequences, device)
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=device)
        q = torch.randn(sequences * query, num_heads, size, dtype=dtype, device=device)
        run = lambda: paged_attention(q, *caches, tables, cu, contexts, query, max_context, size**-0.5)
        return Instance(
            run=run,
            outputs=lambda: [run()],
            reference=lambda: [paged_attention_reference(q.float(), *(c.float() for c in caches), tables, cu, contexts, size**-0.5)],
        )

    name = f"B={sequences}, {query} queries on {context} keys, at most {max_context}"
    num_bytes = 4 * sequences * size * (context * kv_heads + query * num_heads)
    return Problem(op="paged_attention", name=name, prepare=prepare, num_bytes=num_bytes)


def cross_entropy(rows: int, hidden_size: int, vocab_size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Linear + cross-entropy with its gradient."""

    def prepare() -> Instance:
        hidden = torch.randn(rows, hidden_size, dtype=dtype, device=device)
        weight = torch.randn(vocab_size, hidden_size, dtype=dtype, device=device) * hidden_size**-0.5
        labels = torch.randint(vocab_size, (rows,), device=device)

        def flat(found: tuple[torch.Tensor, torch.Tensor | None]) -> list[torch.Tensor]:
            loss, grad = found
            assert grad is not None
            return [loss, grad]

        return Instance(
            run=lambda: linear_cross_entropy(hidden, weight, labels, 1.0, True),
            outputs=lambda: flat(linear_cross_entropy(hidden, weight, labels, 1.0, True)),
            # The logits as the op rounds them: their own rounding is no launch's doing.
            reference=lambda: flat(linear_cross_entropy_reference(hidden, weight, labels, 1.0, True)),
        )

    num_bytes = 2 * (vocab_size * hidden_size + 2 * rows * hidden_size)
    return Problem(op="linear_cross_entropy", name=f"N={rows}, {hidden_size} -> {vocab_size}", prepare=prepare, num_bytes=num_bytes)


def norm(rows: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """RMS norm with the residual addition before it."""

    def prepare() -> Instance:
        x, delta = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        weight = torch.randn(width, dtype=dtype, device=device)
        return Instance(
            run=lambda: add_rms_norm(x, delta, weight, 1e-5),
            outputs=lambda: add_rms_norm(x, delta, weight, 1e-5),
            reference=lambda: add_rms_norm_reference((x + delta).float(), None, weight.float(), 1e-5),
        )

    return Problem(op="add_rms_norm", name=f"T={rows}, H={width}", prepare=prepare, num_bytes=8 * rows * width)


def activation(rows: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """SwiGLU."""

    def prepare() -> Instance:
        gate_up = torch.randn(rows, 2 * width, dtype=dtype, device=device)
        return Instance(
            run=lambda: swiglu(gate_up),
            outputs=lambda: [swiglu(gate_up)],
            reference=lambda: [swiglu_reference(gate_up.float())],
        )

    return Problem(op="swiglu", name=f"T={rows}, I={width}", prepare=prepare, num_bytes=6 * rows * width)


def problems(device: str = "cuda") -> Iterator[Problem]:
    """Every problem, the most important first: decode, then fine-tuning and prefill, then what is rarer."""
    for rows in (64, 16, 256):
        if rows == 256:
            yield lora_forward("o", 4, 8, 1024, device)  # the shrink shares a class with that of 256 rows of gate_up
        for group in GROUPS:
            yield lora_forward(group, 4, 8, rows, device)
        # A recorded step knows its bucket of the context, not the context.
        yield attention(rows, 1, 512, 512, device)
        yield attention(rows, 1, 600, 2048, device)
    for rows in (64, 16, 256):
        for group in GROUPS:
            yield lora_forward(group, 32, 16, rows, device)
    for group in GROUPS:
        yield lora_forward(group, 1, 8, 2048, device)
        yield lora_backward(group, 1, 8, 2048, device)
    yield lora_backward("o", 4, 8, 4096, device)
    for rows in (64, 16, 256):
        for group in GROUPS:
            yield lora_forward(group, 4, 64, rows, device)
    for rows in (64, 16, 256, 2048):
        yield norm(rows, 4096, device)
        yield activation(rows, 14336, device)
    for rows in (1024, 4096):
        for group in GROUPS:
            if (group, rows) != ("o", 1024):  # is above
                yield lora_forward(group, 4, 8, rows, device)
    for adapters, rows in ((4, 1024), (1, 2048), (4, 2048)):
        for group in ("qkv", "gate_up", "down"):
            yield in_tail(group, adapters, 8, rows, device)
    yield attention(4, 512, 1024, 1024, device)
    yield attention(1, 2048, 2048, 2048, device)
    yield cross_entropy(512, 4096, 128256, device)
    for group in GROUPS:
        yield lora_forward(group, 1, 8, 1, device)
        yield lora_forward(group, 4, 16, 1024, device)
        yield lora_backward(group, 1, 16, 2048, device)
        yield lora_forward(group, 4, 64, 1024, device)
        yield lora_backward(group, 1, 64, 2048, device)
    yield attention(1, 1, 600, 2048, device)
    yield attention(16, 1, 4096, 8192, device)
