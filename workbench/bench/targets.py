"""What the numbers should be: the least that must be reached, the stretch, and what vLLM reaches in the same cell.

The Llama-3-8B shape in bf16 on one H100 80GB HBM3, adapters on all seven linears; vLLM 0.24.0 (CUDA graphs, FA3, torch.compile) was
measured apart on such a GPU with torch 2.11.0+cu130, and its numbers are constants here. Replay rows are for two-core machines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

SHAPE, GPU = "llama3-8b", "H100"
WORKLOADS = ("w1", "w2", "w3", "w4", "w5", "w6", "contest", "model", "replay")
BY_DEFAULT = WORKLOADS[:6]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One cell: `p50` of the row must be at most `must` (at least, where `at_least`)."""

    workload: str
    cell: str
    metric: str
    unit: str
    must: float
    stretch: float | None = None
    vllm: float | None = None
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.must if self.at_least else value <= self.must

    def is_stretched(self, value: float) -> bool | None:
        """Whether the stretch is reached; None where there is none."""
        if self.stretch is None:
            return None
        return value >= self.stretch if self.at_least else value <= self.stretch


def _decode() -> Iterator[Target]:
    batches = (1, 16, 64, 256)
    table: dict[str, tuple[Any, Any, Any]] = {
        "no LoRA": ((6.8, 7.3, 8.8, 15.6), (5.8, 6.2, 7.4, 12.9), (6.47, 6.96, 8.40, 14.87)),
        "4 x r8": ((7.3, 8.0, 9.6, 17.0), (6.1, 6.5, 7.9, 13.6), (8.50, 10.03, 11.72, 19.68)),
        "4 x r64": ((7.6, 8.4, 10.0, 17.6), (None,) * 4, (8.91, 10.85, 12.69, 19.65)),
        "32 x r16": ((7.6, 8.8, 11.0, 19.0), (6.2, 7.0, 9.2, 15.0), (8.61, 14.23, 22.50, None)),
    }
    for adapters, columns in table.items():
        for batch, must, stretch, vllm in zip(batches, *columns, strict=True):
            yield Target(workload="w1", cell=f"{adapters}, B={batch}", metric="step", unit="ms", must=must, stretch=stretch, vllm=vllm)
    yield Target(workload="w1", cell="no LoRA row beside 4 x r8, B=16", metric="over no adapters", unit="x", must=1.01)
    for batch in (16, 64):
        yield Target(workload="w1", cell=f"r8 + r24 + r32 + r64, B={batch}", metric="over 4 x r32", unit="x", must=1.1)


def _serving() -> Iterator[Target]:
    yield Target(workload="w2", cell="4 adapters", metric="output", unit="tokens/s", must=4300, stretch=5400, vllm=3621, at_least=True)
    for rate, ttft, tpot, vllm_ttft, vllm_tpot in ((5, 100, 9.0, 105, 10.8), (10, 150, 10, 188, 12.0), (20, 300, 20, 375, 27.2)):
        yield Target(workload="w3", cell=f"{rate} req/s", metric="TTFT p99", unit="ms", must=ttft, vllm=vllm_ttft)
        yield Target(workload="w3", cell=f"{rate} req/s", metric="TPOT p50", unit="ms", must=tpot, vllm=vllm_tpot)


def _finetune() -> Iterator[Target]:
    for cell, must, stretch in (("2 x 1024", 13000, 15500), ("two adapters, 1 x 1024 each", 13000, 15500), ("8 x 1024", 14500, 17500)):
        yield Target(workload="w4", cell=cell, metric="fine-tune", unit="tokens/s", must=must, stretch=stretch, at_least=True)
    for cell, must in (("2 x 1024", 30), ("8 x 1024", 50)):
        yield Target(workload="w4", cell=cell, metric="peak memory", unit="GB", must=must)
    yield Target(workload="w4", cell="2 x 1024, backward in slices of 1 layer", metric="over the uncut pass", unit="x", must=1.10)


def _kernels() -> Iterator[Target]:
    for adapters, n, rows, must, stretch, vllm in (
        (4, 4096, 16, 5, 3, 10.4),
        (4, 4096, 64, 5, 3, 11.1),
        (4, 4096, 1024, 14, 11, 27),
        (4, 4096, 4096, 50, 39, 83),
        (4, 14336, 64, 9, 6, 17),
        (4, 14336, 4096, 130, 102, 210),
        (32, 4096, 64, 10, 6, 34),
        (32, 14336, 64, 18, 12, 77),
        (32, 14336, 4096, 140, 110, 479),
    ):
        cell = f"{adapters} x r8, 4096 -> {n}, T={rows}"
        yield Target(workload="w5", cell=cell, metric="addition", unit="us", must=must, stretch=stretch, vllm=vllm)
        if rows >= 2048:
            yield Target(workload="w5", cell=cell, metric="over the base GEMM", unit="%", must=15, stretch=6)
            yield Target(workload="w5", cell=cell, metric="backward over forward", unit="x", must=2.5)


def _unified() -> Iterator[Target]:
    for cell, attainment, tokens in (
        ("2 req/s, gaps 45 ms", (99, 100), (8000, 10500)),
        ("10 req/s, gaps 45 ms", (99, 99), (6500, 8500)),
        ("2 req/s, gaps 20 ms", (99, 99), (5500, 7500)),
    ):
        for metric, unit, (must, stretch) in (("attainment", "%", attainment), ("fine-tune", "tokens/s", tokens)):
            yield Target(workload="w6", cell=cell, metric=metric, unit=unit, must=must, stretch=stretch, at_least=True)


def _contest() -> Iterator[Target]:
    for share in ("50%", "70%", "90%"):
        cell = f"{share} of capacity"
        yield Target(workload="contest", cell=cell, metric="attainment", unit="%", must=99, at_least=True)
        yield Target(workload="contest", cell=cell, metric="over the best tuned", unit="x", must=1.1, stretch=1.5, at_least=True)
    cell = "70% of capacity"
    yield Target(workload="contest", cell=cell, metric="over temporal sharing", unit="x", must=1.5, stretch=2.5, at_least=True)
    yield Target(workload="contest", cell=cell, metric="fine-tuning kept", unit="%", must=50, stretch=62, at_least=True)
    yield Target(workload="contest", cell=cell, metric="p99 of the requests' p99 gaps", unit="ms", must=45, stretch=35)


def _model() -> Iterator[Target]:
    cell = "all replays"
    yield Target(workload="model", cell=cell, metric="error of attainment", unit="points", must=3, stretch=1)
    yield Target(workload="model", cell=cell, metric="error of finetune_tokens_per_s", unit="%", must=5, stretch=2)
    for metric in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s"):
        yield Target(workload="model", cell=cell, metric=f"error of {metric}", unit="%", must=10, stretch=4)
    for metric in ("attainment", "finetune_tokens_per_s"):
        yield Target(workload="model", cell=cell, metric=f"pairs in order by {metric}", unit="%", must=100, at_least=True)


def _replay() -> Iterator[Target]:
    for cell, must, stretch in (
        ("1 replica, a policy at every step", 1500, 4000),
        ("1 replica, repeat()", 15000, 60000),
        ("8 replicas, repeat()", 5000, 30000),
    ):
        yield Target(workload="replay", cell=cell, metric="requests", unit="per CPU-s", must=must, stretch=stretch, at_least=True)


TARGETS: tuple[Target, ...] = tuple(chain(_decode(), _serving(), _finetune(), _kernels(), _unified(), _contest(), _model(), _replay()))


def applies(workload: str, shape: str, device: str) -> bool:
    """Whether targets are defined for rows of this workload there: one shape on one GPU, or any CPU for the replay itself."""
    return workload == "replay" or (shape == SHAPE and GPU in device)


def find(workload: str, cell: str, metric: str) -> Target | None:
    """The target of a row, if it has one."""
    return next((t for t in TARGETS if (t.workload, t.cell, t.metric) == (workload, cell, metric)), None)
