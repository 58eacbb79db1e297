"""`python -m kernels.bench [--quick] [--only OP] [--json PATH]`: microseconds of each op on shapes of the Llama-3-8B size.

Every row's numbers are checked against float64 first (smaller rows of the same kind); a row that fails prints no time, and the program
ends with 1. Times are CUDA-graph replays with a cold L2 cache: what a launch costs the host is not in them. The floor is bytes moved
once over the copy bandwidth, or FLOPs over the matrix rate, of an H100 (3.02 TB/s, 711 TFLOP/s), whichever is larger.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import problems, testing
from kernels.backend import triton
from kernels.layout import SegmentLayout
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.paged_attention import paged_attention
from kernels.segmented_lora import lora_gradients, segmented_lora_

BYTES_PER_S, FLOPS_PER_S = 3.02e12, 711e12
TOLERANCE = 1.5e-2
BF16 = torch.bfloat16
OPS = ("segmented_lora", "lora_gradients", "decode_attention", "prefill_attention", "linear_cross_entropy")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what runs, what checks it, and the least that the hardware must do for it."""

    op: str
    shape: str
    check: Callable[[], dict[str, float]]
    prepare: Callable[[], Callable[[], object]]
    num_bytes: float
    flops: float

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.num_bytes / BYTES_PER_S, self.flops / FLOPS_PER_S)


def _runs(rows: int, adapters: int) -> list[tuple[int | None, int]]:
    slots = testing.adapters_of_rows("distinct", rows, adapters)
    return [(slot, slots.count(slot)) for slot in sorted(set(slots))]


def _lora_case(op: str, adapters: int, k: int, n: int, rows: int, rank: int = 8) -> Case:
    def prepare() -> Callable[[], object]:
        table = testing.random_table(k, (n,), [[rank] * adapters], BF16, "cuda")
        layout = SegmentLayout.build(_runs(rows, adapters), "cuda")
        x, y = (torch.randn(rows, width, dtype=BF16, device="cuda") for width in (k, n))
        if op == "segmented_lora":
            return lambda: segmented_lora_(y, x, table, layout)
        return lambda: lora_gradients(y, x, table, layout)

    used = min(adapters, rows)
    forward = 2 * (rows * (k + 2 * n) + used * rank * (k + n))
    # Backward: x and dy read once, dx written, A and B read, fp32 gradients written.
    backward = 2 * (rows * (2 * k + n) + used * rank * (k + n)) + 4 * used * rank * (k + n)
    products = 1 if op == "segmented_lora" else 3
    return Case(
        op=op,
        shape=f"{adapters} x r{rank}, {k} -> {n}, T={rows}",
        check=lambda: problems.lora_errors(
            _runs(min(rows, 300), adapters), [[rank] * adapters], BF16, "cuda", in_features=k, out_features=(n,)
        ),
        prepare=prepare,
        num_bytes=forward if op == "segmented_lora" else backward,
        flops=products * 2 * rows * rank * (k + n),
    )


def _attention_case(op: str, query: int, context: int, sequences: int) -> Case:
    heads, kv_heads, size = 32, 8, 128

    def prepare() -> Callable[[], object]:
        blocks = -(-context // 16)
        shape = (sequences * blocks, 16, kv_heads, size)
        k_cache, v_cache = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(2))
        tables = torch.randperm(sequences * blocks, device="cuda").view(sequences, blocks).to(torch.int32)
        cu = problems.bounds([query] * sequences, "cuda")
        contexts = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
        q = torch.randn(sequences * query, heads, size, dtype=BF16, device="cuda")
        return lambda: paged_attention(q, k_cache, v_cache, tables, cu, contexts, query, context, size**-0.5)

    checked = min(sequences, 4)
    pairs = sequences * (query * context - query * (query - 1) // 2)
    return Case(
        op=op,
        shape=f"B={sequences}, {query} queries on {context} keys, 32/8 heads of 128",
        check=lambda: problems.paged_attention_errors([query] * checked, [context] * checked, (8, 2), size, BF16, "cuda"),
        prepare=prepare,
        num_bytes=2 * sequences * size * (2 * context * kv_heads + 2 * query * heads),
        flops=4 * pairs * heads * size,
    )


def _cross_entropy_case(rows: int, hidden_size: int = 4096, vocab_size: int = 128256) -> Case:
    def prepare() -> Callable[[], object]:
        hidden = torch.randn(rows, hidden_size, dtype=BF16, device="cuda")
        weight = torch.randn(vocab_size, hidden_size, dtype=BF16, device="cuda") * 0.02
        labels = torch.randint(vocab_size, (rows,), device="cuda")
        return lambda: linear_cross_entropy(hidden, weight, labels, 1.0, True)

    return Case(
        op="linear_cross_entropy",
        shape=f"N={rows}, {hidden_size} -> {vocab_size}",
        check=lambda: problems.cross_entropy_errors(min(rows, 600), 64, vocab_size, BF16, "cuda"),
        prepare=prepare,
        num_bytes=2 * (vocab_size * hidden_size + 2 * rows * hidden_size),
        flops=4 * rows * hidden_size * vocab_size,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The rows of the table; `quick` keeps one or two of each op."""
    shapes = [(4, 4096, 4096, 64), (4, 4096, 14336, 4096)]
    if not quick:
        shapes += [(4, 4096, 4096, rows) for rows in (16, 1024, 4096)] + [(4, 4096, 14336, 64), (32, 4096, 4096, 64)]
        shapes += [(32, 4096, 14336, 64), (32, 4096, 14336, 4096), (4, 14336, 4096, 64), (4, 14336, 4096, 4096)]
    for shape in shapes:
        yield _lora_case("segmented_lora", *shape)
    for shape in [(1, 4096, 4096, 2048), (1, 4096, 14336, 2048)][: 1 if quick else 2]:
        yield _lora_case("lora_gradients", *shape)
    for sequences in (16, 256)[: 1 if quick else 2]:
        yield _attention_case("decode_attention", 1, 512, sequences)
    yield _attention_case("prefill_attention", 512, 1024, 4)
    yield _cross_entropy_case(2048)


def _recorded(run: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


def measure_us(run: Callable[[], object], repeats: int = 10, replays: int = 21) -> tuple[float, float, float]:
    """p20, p50 and p80 of one call in microseconds: graphs of `repeats` (flush the L2 cache, call), less a graph of the flushes alone."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    flushes = _recorded(cache.zero_, repeats)
    both = _recorded(lambda: (cache.zero_(), run()), repeats)
    for graph in (flushes, both):
        _replay_us(graph, 3)
    base = statistics.median(_replay_us(flushes, replays))
    times = sorted((total - base) / repeats for total in _replay_us(both, replays))
    return times[round(0.2 * (replays - 1))], statistics.median(times), times[round(0.8 * (replays - 1))]


def provenance() -> dict[str, str]:
    """GPU, versions and commit: part of every JSON row."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": done.stdout.strip() or "unknown",
    }


def run_case(case: Case, record: dict[str, str]) -> dict[str, object] | None:
    """The row of one case, or None where its check fails. Prints the line."""
    errors = case.check()
    if not all(error < TOLERANCE for error in errors.values()):
        print(f"{case.op:22s} {case.shape:48s} CHECK FAILED: {errors}", flush=True)
        return None
    p20, p50, p80 = measure_us(case.prepare())
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
