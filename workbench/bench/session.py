"""One run of the bench: the engine that its workloads share, what is left of the time, and the rows that it writes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import traces
from workbench.bench import machine, targets
from workbench.bench.rows import CORRECTNESS, OURS, Row, append, over_floor, quantiles
from workbench.config import EngineConfig
from workbench.core import Request

if TYPE_CHECKING:
    from workbench.latency import LatencyModel
    from workbench.runtime.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the workloads are. `max_prompt_tokens`, `max_output_tokens`, `max_requests`: None runs the traces as they are."""

    config: EngineConfig
    batches: tuple[int, ...]
    context_tokens: int
    steps: tuple[int, int]  # timed ones: at least, at most
    example_tokens: int
    windows: int
    check_requests: int
    check_tokens: int
    calibrate_s: float
    horizon_s: float
    lora: tuple[tuple[int, int, int, int], ...]  # (adapters, K, N, T)
    note: str = ""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_requests: int | None = None


# The KV pool holds 256 sequences of 512 tokens and what a cell decodes: 19 GB of the 8B shape. Workloads record the graphs that they
# need themselves: each of W1's sets of ranks would have all of them recorded otherwise.
GPU_SIZES = Sizes(
    config=EngineConfig(max_model_len=2048, num_blocks=9216, num_slots=32, max_batch_adapters=32, activation_tokens=8192, warm_up=False),
    batches=(1, 16, 64, 256),
    context_tokens=512,
    steps=(8, 24),
    example_tokens=1024,
    windows=3,
    check_requests=12,
    check_tokens=40,
    calibrate_s=6.0,
    horizon_s=30.0,
    lora=(
        (4, 4096, 4096, 16),
        (4, 4096, 4096, 64),
        (4, 4096, 4096, 1024),
        (4, 4096, 4096, 4096),
        (4, 4096, 14336, 64),
        (4, 4096, 14336, 4096),
        (32, 4096, 4096, 64),
        (32, 4096, 14336, 64),
        (32, 4096, 14336, 4096),
    ),
)
# For tests of the bench itself: the same cells on a model of two layers.
CPU_SIZES = Sizes(
    config=EngineConfig(max_model_len=128, num_blocks=160, num_slots=32, max_batch_adapters=32, activation_tokens=256),
    batches=(1, 16),
    context_tokens=24,
    steps=(3, 3),
    example_tokens=16,
    windows=1,
    check_requests=5,
    check_tokens=12,
    calibrate_s=0.2,
    horizon_s=2.0,
    lora=((4, 64, 64, 16), (4, 64, 128, 2048)),
    note="small sizes, to try the bench on a CPU",
    max_prompt_tokens=24,
    max_output_tokens=6,
    max_requests=12,
)


class Session:
    """Workloads call `check`, ask `wants` for each cell and give what they measured to `record`.

    `seconds` is each workload's time, begun by `start`: a cell is begun while some of it is left, and a cell of repeated steps repeats
    fewer of them when it runs short. `only` keeps the cells whose name contains one of these. `profile` is the model that policies
    predict with, which the workload `model` judges (None: one fitted in the run); `replays` the folder in which it and
    `contest` keep what they measured.
    """

    def __init__(
        self,
        *,
        shape: str,
        into: Path,
        seconds: float | None = None,
        only: Sequence[str] = (),
        seed: int = 0,
        device: str | None = None,
        profile: "LatencyModel | None" = None,
        replays: Path | None = None,
    ) -> None:
        self.shape, self.into, self.seconds, self.only, self.seed = shape, into, seconds, tuple(only), seed
        self.device, self.profile, self.replays = device, profile, replays
        self.workload = ""
        self.offered: list[str] = []
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.rows_with_keys = 0  # of this many sequences the KV pool holds keys and values that were really computed
        self._ends_s = 0.0

    # ---- the engine

    @cached_property
    def engine(self) -> "Engine":
        """Random weights of the shape, for all workloads of this run; built when one of them first needs it."""
        from workbench.runtime.engine import Engine

        print(f"# building {self.shape} on {self.device_name}", flush=True)
        return Engine.random(self.shape, device=self.torch_device, seed=self.seed, config=self.sizes.config)

    @cached_property
    def torch_device(self) -> Any:
        """The torch.device: CUDA where there is one, unless the run names another."""
        from workbench.runtime.memory import resolve_device

        return resolve_device(self.device)

    @property
    def on_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        return GPU_SIZES if self.on_cuda else CPU_SIZES

    @property
    def device_name(self) -> str:
        """The GPU's name, or CPU."""
        if not self.on_cuda:
            return "CPU"
        import torch

        return torch.cuda.get_device_name(self.torch_device)

    @contextmanager
    def adapters(self, ranks: Sequence[int], std: float = 0.02) -> Iterator[tuple[str, ...]]:
        """Random adapters of these ranks on the engine, taken off again at the end."""
        names = self.engine.add_random_adapters(ranks, seed=self.seed + 1, std=std)
        try:
            yield names
        finally:
            for name in names:
                self.engine.unload_adapter(name)

    def requests(self, trace: str | traces.Trace, *, duration_s: float | None = None) -> list[Request]:
        """A shipped trace's requests (those before `duration_s`), made as small as the sizes ask."""
        made = traces.load(trace) if isinstance(trace, str) else trace
        sizes = self.sizes
        if duration_s is not None and duration_s < made.frame["arrival_s"].max():
            made = made.slice(0, duration_s)
        chosen = list(made.requests)[: sizes.max_requests]
        return [
            replace(
                request,
                prompt_tokens=min(request.prompt_tokens, sizes.max_prompt_tokens or request.prompt_tokens),
                output_tokens=min(request.output_tokens or 1, sizes.max_output_tokens or request.output_tokens or 1),
            )
            for request in chosen
        ]

    def predict_with(self, seconds: float) -> "LatencyModel":
        """The model that the engine's policies predict with from now on: the run's profile, or one fitted to `seconds` of steps."""
        if self.profile is None:
            return self.engine.calibrate(seconds=seconds)
        self.engine.predictor = self.profile
        return self.profile

    # ---- time

    def start(self, workload: str, seconds: float) -> None:
        """Begin a workload; `seconds` is its time unless the run has its own."""
        self.workload = workload
        self._ends_s = time.perf_counter() + (self.seconds or seconds)

    @property
    def left_s(self) -> float:
        return self._ends_s - time.perf_counter()

    def wants(self, cell: str, needs_s: float = 0.0) -> bool:
        """Whether to measure this cell: it is asked for, and more time is left than it needs. A cell that time leaves out is named."""
        self.offered.append(cell)
        if self.only and not any(part in cell for part in self.only):
            return False
        if self.left_s <= needs_s:
            self.skipped.append(f"{self.workload} {cell}")
            left = "the time is used up" if self.left_s <= 0 else f"it needs {needs_s:.0f} s, {self.left_s:.0f} s are left"
            print(f"{self.workload:6s} {cell:44s} not measured: {left}. Raise --seconds.", flush=True)
            return False
        return True

    def times(self, run: Callable[[], float], *, warm: int = 3, share: float = 0.1) -> list[float]:
        """What `run` returns, again and again: as often as the sizes say, fewer times once `share` of the time that was left is used."""
        least, most = self.sizes.steps
        for _ in range(warm):
            run()
        ends_s = time.perf_counter() + share * max(0.0, self.left_s)
        found: list[float] = []
        while len(found) < most and (len(found) < least or time.perf_counter() < ends_s):
            found.append(run())
        return found

    # ---- rows

    def check(self, errors: dict[str, tuple[float, float]]) -> bool:
        """Write the row of a workload's own check from {what: (error, tolerance)}; False, with a sentence, if one is beyond it."""
        worst = max(_badness(*pair) for pair in errors.values())
        note = "; ".join(f"{what}: {error:.2g} (at most {tolerance:.2g})" for what, (error, tolerance) in errors.items())
        correct = worst <= 1
        self.record(CORRECTNESS, "error over tolerance", [worst], "x", correct=correct, note=note)
        if not correct:
            self.failed.append(self.workload)
            print(f"{self.workload:6s} CHECK FAILED, so no number is written: {note}", flush=True)
        return correct

    def record(
        self,
        cell: str,
        metric: str,
        values: Sequence[float],
        unit: str,
        *,
        system: str = OURS,
        n: int | None = None,
        floor: float | None = None,
        spread: tuple[float, float] | None = None,
        num_bytes: float | None = None,
        flops: float | None = None,
        correct: bool = True,
        device: str | None = None,
        shape: str | None = None,
        note: str = "",
    ) -> Row:
        """Write one row and print its line. `spread` gives p20 and p80 where `values` is one number already.

        `device` and `shape`: where and on what it was measured, if not by this session's engine.
        """
        p20, p50, p80 = quantiles(values)
        p20, p80 = spread or (p20, p80)
        on_device = device is None
        device = device or self.device_name
        target = targets.find(self.workload, cell, metric) if system == OURS else None
        target = target if targets.applies(self.workload, shape or self.shape, device) else None
        uses_cuda = on_device and self.on_cuda
        row = Row(
            workload=self.workload,
            cell=cell,
            system=system,
            metric=metric,
            unit=unit,
            p20=p20,
            p50=p50,
            p80=p80,
            n=len(values) if n is None else n,
            floor=floor,
            ratio=over_floor(unit, p50, floor),
            must=None if target is None else target.must,
            stretch=None if target is None else target.stretch,
            correct=correct,
            num_bytes=num_bytes,
            flops=flops,
            shape=self.shape if on_device else shape or "",
            device=device,
            date=machine.now(),
            seed=self.seed,
            note="; ".join(filter(None, (note, self.sizes.note if on_device else ""))),
            **machine.provenance(uses_cuda),
            **(machine.gpu_state() if uses_cuda else {"sm_clock_mhz": None, "temperature_c": None, "throttle": ""}),
        )
        append(self.into, row)
        self.rows.append(row)
        print(line(row, target), flush=True)
        return row

    def rates(self) -> tuple[float, float] | None:
        """(bytes/s, FLOP/s) of the device, None where nobody measured them."""
        return machine.rates(self.device_name)


def line(row: Row, target: targets.Target | None) -> str:
    """One line of the terminal for one row."""
    text = f"{row.workload:6s} {row.cell:44s} {row.system:12s} {row.metric:22s} {row.p50:10.4g} {row.unit:9s}"
    if row.p20 is not None and row.p80 is not None:
        text += f" ({row.p20:.4g} to {row.p80:.4g})"
    if row.ratio is not None:
        text += f" {row.ratio:.2f} x floor"
    if target is not None:
        text += f"; must {target.must:g}: {'met' if target.is_met(row.p50) else 'MISSED'}"
    return text


def _badness(error: float, tolerance: float) -> float:
    return error / tolerance if error == error else float("inf")  # NaN is the worst error
