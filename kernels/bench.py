"""`python -m kernels.bench [--quick] [--only OP] [--json PATH]`: microseconds of each op on shapes of the Llama-3-8B size.

Every row's numbers are checked against float64 first (smaller rows of the same kind); a row that fails prints no time, and the program
ends with 1. Times are CUDA-graph replays with a cold L2 cache (each call of a replay has inputs of its own): what a launch costs the
host is not in them. The floor is bytes moved once over the copy bandwidth, or FLOPs over the matrix rate, of an H100 (3.02 TB/s, 711
TFLOP/s), whichever is larger. Beside segmented LoRA stand the base GEMM alone, both together (from 1,024 rows on as one product, see
`lora_tail`), and a torch loop over the adapters.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import problems, testing
from kernels.backend import triton
from kernels.layout import SegmentLayout
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lora_loop import lora_loop_
from kernels.lora_table import LoraTable, SlotWeights
from kernels.lora_tail import placed_tail, tail_linear, weight_with_tail, with_tail
from kernels.paged_attention import paged_attention
from kernels.segmented_lora import lora_gradients, segmented_lora_

BYTES_PER_S, FLOPS_PER_S = 3.02e12, 711e12
TOLERANCE = 1.5e-2
BF16 = torch.bfloat16
LORA_OPS = ("segmented_lora", "lora_gradients", "lora_loop", "base_gemm", "base_gemm_lora")
OPS = (*LORA_OPS, "decode_attention", "prefill_attention", "linear_cross_entropy")
# Inputs of all calls of one replay together: thrice an H100's L2 cache, so that a call finds none of its own there.
COLD_BYTES, MAX_COPIES = 160e6, 256
CHECKED_ROWS = 300
TAIL_ROWS = 1024  # from here on base product and LoRA are one product, with the adapters in the weight's tail
REPLAYS = 21


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what runs (`prepare` makes inputs anew and gives the call), what checks it, and the least that the hardware must do."""

    op: str
    shape: str
    check: Callable[[], dict[str, float]]
    prepare: Callable[[], Callable[[], object]]
    num_bytes: float
    flops: float

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.num_bytes / BYTES_PER_S, self.flops / FLOPS_PER_S)

    @property
    def num_copies(self) -> int:
        """How many calls with inputs of their own one replay holds."""
        return min(MAX_COPIES, max(2, math.ceil(COLD_BYTES / self.num_bytes)))


def _runs(rows: int, adapters: int) -> list[tuple[int | None, int]]:
    slots = testing.adapters_of_rows("distinct", rows, adapters)
    return [(slot, slots.count(slot)) for slot in sorted(set(slots))]


def _table(adapters: int, k: int, n: int, rank: int, device: str) -> LoraTable:
    """One slice of random weights, drawn on the device."""
    a = torch.randn(adapters, rank, k, dtype=BF16, device=device) * k**-0.5
    b = torch.randn(adapters, n, rank, dtype=BF16, device=device) * rank**-0.5
    weights = {(0, slot): SlotWeights(a[slot], b[slot], 0.5) for slot in range(adapters)}
    return LoraTable(k, (n,), adapters, device=device, dtype=BF16, weights=weights)


def _lora_check(op: str, adapters: int, k: int, n: int, rows: int, rank: int, device: str) -> dict[str, float]:
    """Errors against float64, on at most `CHECKED_ROWS` rows."""
    runs = _runs(min(rows, CHECKED_ROWS), adapters)
    if op == "base_gemm_lora" and in_one_product(rows, device):
        sizes = {"columns": tail_columns(adapters, rank), "in_features": k, "out_features": (n,)}
        return problems.tail_errors(runs, [[rank] * adapters], BF16, device, **sizes)
    if op not in ("lora_loop", "base_gemm"):
        return problems.lora_errors(runs, [[rank] * adapters], BF16, device, in_features=k, out_features=(n,))
    layout = SegmentLayout.build(runs, device)
    x, y = (torch.randn(layout.num_rows, width, dtype=BF16, device=device) for width in (k, n))
    if op == "base_gemm":
        weight = torch.randn(n, k, dtype=BF16, device=device) * k**-0.5
        return {"y": testing.relative_error(F.linear(x, weight), F.linear(x.float(), weight.float()))}
    table = _table(adapters, k, n, rank, device)
    expected = y.double().cpu()
    for slot, first, count in layout.runs:
        weights = table.weights[0, slot]
        low = x[first : first + count].double().cpu() @ weights.a.double().cpu().T
        expected[first : first + count] += weights.scale * low @ weights.b.double().cpu().T
    return {"y": testing.relative_error(lora_loop_(y, x, table, layout), expected)}


def tail_columns(adapters: int, rank: int) -> int:
    """Columns of a tail with room for all adapters: a whole number of lines of 128 bytes."""
    return -(-adapters * rank // 64) * 64


def in_one_product(rows: int, device: str) -> bool:
    """Whether `base_gemm_lora` is the base product with the adapters in the weight's tail."""
    return rows >= TAIL_ROWS and device != "cpu"


def _with_tail(x: torch.Tensor, weight: torch.Tensor, table: LoraTable, layout: SegmentLayout, columns: int) -> Callable[[], object]:
    """Base product and LoRA term in one; the adapters lie in the weight's tail."""
    wide_x, wide = with_tail(*x.shape, columns, x).copy_(x), weight_with_tail(weight, columns)
    tail = placed_tail(table, wide, layout)
    return lambda: tail_linear(wide_x, wide, None, table, layout, tail)


def lora_case(op: str, adapters: int, k: int, n: int, rows: int, rank: int = 8, device: str = "cuda") -> Case:
    """One of `LORA_OPS` on one projection [T, k] -> [T, n], rows dealt out to the adapters."""

    def prepare() -> Callable[[], object]:
        table = _table(adapters, k, n, rank, device)
        layout = SegmentLayout.build(_runs(rows, adapters), device)
        x, y = (torch.randn(rows, width, dtype=BF16, device=device) for width in (k, n))
        if op.startswith("base_gemm"):
            weight = torch.randn(n, k, dtype=BF16, device=device) * k**-0.5
            if op == "base_gemm":
                return lambda: F.linear(x, weight)
            if in_one_product(rows, device):
                return _with_tail(x, weight, table, layout, tail_columns(adapters, rank))
            return lambda: segmented_lora_(F.linear(x, weight), x, table, layout)
        if op == "lora_gradients":
            return lambda: lora_gradients(y, x, table, layout)
        return (lambda: segmented_lora_(y, x, table, layout)) if op == "segmented_lora" else (lambda: lora_loop_(y, x, table, layout))

    used, low_rank = min(adapters, rows), 2 * rows * rank * (k + n)
    weights, base = 2 * used * rank * (k + n), 2 * (rows * (k + n) + k * n)
    num_bytes, flops = {
        "segmented_lora": (2 * rows * (k + 2 * n) + weights, low_rank),
        "lora_loop": (2 * rows * (k + 2 * n) + weights, low_rank),
        # x and dy read once, dx written, A and B read, fp32 gradients written.
        "lora_gradients": (2 * rows * (2 * k + n) + 3 * weights, 3 * low_rank),
        "base_gemm": (base, 2 * rows * k * n),
        "base_gemm_lora": (base + weights, 2 * rows * k * n + low_rank),
    }[op]
    return Case(
        op=op,
        shape=f"{adapters} x r{rank}, {k} -> {n}, T={rows}",
        check=lambda: _lora_check(op, adapters, k, n, rows, rank, device),
        prepare=prepare,
        num_bytes=num_bytes,
        flops=flops,
    )


def attention_case(op: str, query: int, context: int, sequences: int, device: str = "cuda") -> Case:
    """Paged attention of `sequences` with `query` new tokens each."""
    heads, kv_heads, size = 32, 8, 128

    def prepare() -> Callable[[], object]:
        blocks = -(-context // 16)
        shape = (sequences * blocks, 16, kv_heads, size)
        k_cache, v_cache = (torch.randn(shape, dtype=BF16, device=device) for _ in range(2))
        tables = torch.randperm(sequences * blocks, device=device).view(sequences, blocks).to(torch.int32)
        cu = problems.bounds([query] * sequences, device)
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=device)
        q = torch.randn(sequences * query, heads, size, dtype=BF16, device=device)
        return lambda: paged_attention(q, k_cache, v_cache, tables, cu, contexts, query, context, size**-0.5)

    checked = min(sequences, 4)
    pairs = sequences * (query * context - query * (query - 1) // 2)
    return Case(
        op=op,
        shape=f"B={sequences}, {query} queries on {context} keys, 32/8 heads of 128",
        check=lambda: problems.paged_attention_errors([query] * checked, [context] * checked, (8, 2), size, BF16, device),
        prepare=prepare,
        num_bytes=2 * sequences * size * (2 * context * kv_heads + 2 * query * heads),
        flops=4 * pairs * heads * size,
    )


def cross_entropy_case(rows: int, hidden_size: int = 4096, vocab_size: int = 128256, device: str = "cuda") -> Case:
    """Linear + cross-entropy with its gradient."""

    def prepare() -> Callable[[], object]:
        hidden = torch.randn(rows, hidden_size, dtype=BF16, device=device)
        weight = torch.randn(vocab_size, hidden_size, dtype=BF16, device=device) * 0.02
        labels = torch.randint(vocab_size, (rows,), device=device)
        return lambda: linear_cross_entropy(hidden, weight, labels, 1.0, True)

    return Case(
        op="linear_cross_entropy",
        shape=f"N={rows}, {hidden_size} -> {vocab_size}",
        check=lambda: problems.cross_entropy_errors(min(rows, 600), 64, vocab_size, BF16, device),
        prepare=prepare,
        num_bytes=2 * (vocab_size * hidden_size + 2 * rows * hidden_size),
        flops=4 * rows * hidden_size * vocab_size,
    )


def lora_shapes(quick: bool) -> list[tuple[int, int, int, int]]:
    """(adapters, K, N, T) of the table."""
    shapes = [(4, 4096, 4096, 64), (4, 4096, 14336, 4096)]
    if not quick:
        shapes += [(4, 4096, 4096, rows) for rows in (16, 1024, 4096)] + [(4, 4096, 14336, 64), (32, 4096, 4096, 64)]
        shapes += [(32, 4096, 14336, 64), (32, 4096, 14336, 4096), (4, 14336, 4096, 64), (4, 14336, 4096, 4096)]
    return shapes


def other_cases(quick: bool) -> Iterator[Case]:
    """Attention and cross-entropy."""
    for sequences in (16, 256)[: 1 if quick else 2]:
        yield attention_case("decode_attention", 1, 512, sequences)
    yield attention_case("prefill_attention", 512, 1024, 4)
    yield cross_entropy_case(2048)


def cases(quick: bool) -> Iterator[Case]:
    """The rows of the table; `quick` keeps one or two of each op."""
    for op in LORA_OPS:
        if op == "lora_gradients":
            for shape in [(1, 4096, 4096, 2048), (1, 4096, 14336, 2048)][: 1 if quick else 2]:
                yield lora_case(op, *shape)
            continue
        for shape in lora_shapes(quick):
            yield lora_case(op, *shape)
    yield from other_cases(quick)


def _recorded(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Device time of one replay in microseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _call_us(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - started)


def measure_us(case: Case, replays: int = REPLAYS, device: str = "cuda") -> tuple[float, float, float]:
    """p20, p50 and p80 of one call in microseconds: replays of a graph of calls with inputs of their own, over their number.

    On the CPU, where there are no graphs, plain calls.
    """
    if device == "cpu":
        runs = [case.prepare() for _ in range(2)]
        times = sorted([_call_us(runs[i % 2]) for i in range(replays + 2)][2:])
    else:
        runs = [case.prepare() for _ in range(case.num_copies)]
        for run in runs:
            run()
        graph = _recorded(runs)
        for _ in range(3):
            replay_us(graph)
        times = sorted(replay_us(graph) / len(runs) for _ in range(replays))
    return times[round(0.2 * (replays - 1))], statistics.median(times), times[round(0.8 * (replays - 1))]


def provenance() -> dict[str, str]:
    """GPU, versions and commit (LOQUETIER_COMMIT says it where the history is not at hand): part of every JSON row."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("LOQUETIER_COMMIT") or done.stdout.strip() or "unknown",
    }


def passes(errors: dict[str, float]) -> bool:
    """Whether every error is within `TOLERANCE` (NaN is not)."""
    return all(error < TOLERANCE for error in errors.values())


def run_case(case: Case, record: dict[str, str]) -> dict[str, object] | None:
    """The row of one case, or None where its check fails. Prints the line."""
    errors = case.check()
    if not passes(errors):
        print(f"{case.op:22s} {case.shape:48s} CHECK FAILED: {errors}", flush=True)
        return None
    p20, p50, p80 = measure_us(case)
    print(f"{case.op:22s} {case.shape:48s} {case.floor_us:8.1f} {p50:9.1f} {p50 / case.floor_us:6.2f}x {p20:9.1f} {p80:9.1f}", flush=True)
    times = {"floor_us": case.floor_us, "ratio": p50 / case.floor_us, "p20_us": p20, "p50_us": p50, "p80_us": p80}
    return {"op": case.op, "shape": case.shape, **times, "errors": errors, **record}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time the kernels, each checked first.")
    parser.add_argument("--quick", action="store_true", help="one or two rows of each op")
    parser.add_argument("--only", choices=OPS, help="this op alone")
    parser.add_argument("--json", type=Path, help="also write the rows here, one JSON object a line")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels.bench needs a CUDA device, and torch finds none here. Run it on a machine with a GPU.", file=sys.stderr)
        return 2
    record = provenance()
    print(f"{record['gpu']}, torch {record['torch']}, triton {record['triton']}, commit {record['commit']}; CUDA-graph replay, L2 cold")
    print(f"{'op':22s} {'shape':48s} {'floor us':>8s} {'p50 us':>9s} {'ratio':>7s} {'p20':>9s} {'p80':>9s}")
    chosen = [case for case in cases(options.quick) if options.only in (None, case.op)]
    rows = [run_case(case, record) for case in chosen]
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
