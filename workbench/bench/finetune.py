"""W4: fine-tuning alone, rank 8, AdamW with fp32 state, accumulation 4: committed tokens per second, memory, and backward in slices."""

import statistics
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from workbench.bench import correctness, floors
from workbench.bench.decode import assume_context, compute_keys
from workbench.bench.rows import OURS
from workbench.bench.session import Session
from workbench.config import FinetuneJob, RandomTokens

if TYPE_CHECKING:
    from workbench.runtime.driver import Driver

SECONDS = 40.0
RANK, ACCUMULATION = 8, 4
SLICE_DECODES, SLICE_PASSES = 16, 4


def run(session: Session) -> bool:
    """2 x 1024, two adapters, 8 x 1024, then the backward in slices of one layer with decodes between. False if the check fails."""
    if not session.check(correctness.gradient_errors(session)):
        return False
    for cell, batches in cells(session):
        if session.wants(cell):
            jobs = [tuning_job(session, f"tuned-{i}", batch) for i, batch in enumerate(batches)]
            _reset_peak(session)
            record_rates(session, cell, tune(session, session.engine, jobs))
            _record_peak(session, cell, sum(batches) * session.sizes.example_tokens)
    if session.wants(cell := f"2 x {session.sizes.example_tokens}, backward in slices of 1 layer"):
        _slices(session, cell)
    return True


def cells(session: Session) -> list[tuple[str, tuple[int, ...]]]:
    """(cell, rows of each job's micro-batch)."""
    tokens = session.sizes.example_tokens
    return [(f"2 x {tokens}", (2,)), (f"two adapters, 1 x {tokens} each", (1, 1)), (f"8 x {tokens}", (8,))]


EPOCHS = 100  # of 8 micro-batches: more than any cell runs, and sizes of so many are looked through before each replay


def tuning_job(session: Session, adapter: str, batch: int, accumulation: int = ACCUMULATION) -> FinetuneJob:
    tokens = session.sizes.example_tokens
    return FinetuneJob.example(
        adapter,
        data=RandomTokens(examples=8 * batch, tokens=tokens, seed=session.seed),
        batch_size=batch,
        accumulation=accumulation,
        rank=RANK,
        max_tokens=tokens,
        seed=session.seed,
        publish="never",
        epochs=EPOCHS,
    )


def beside_requests(session: Session) -> FinetuneJob:
    """The job of W6, `contest` and `model`."""
    return tuning_job(session, "tuned", 2)


def warm_up(session: Session) -> None:
    """Train a window of the job beside requests, so that the first backward of a replay compiles nothing."""
    tune(session, session.engine, [beside_requests(session)], windows=0)


def tune(session: Session, executor: Any, jobs: Sequence[FinetuneJob], windows: int | None = None) -> list[float]:
    """Tokens per second of each accumulation window (optimiser step included) after a first one that compiles; jobs go side by side.

    `windows`: after that one, while there is time; those of the sizes unless given.
    """
    from workbench.runtime.driver import Driver

    most = session.sizes.windows if windows is None else windows
    rates: list[float] = []
    try:
        with Driver(executor, jobs, seed=session.seed) as driver:
            _window(driver, jobs)
            while len(rates) < most and (not rates or session.left_s > 0):
                rates.append(_window(driver, jobs))
    finally:
        _unload(executor, jobs)
    return rates


def _window(driver: "Driver", jobs: Sequence[FinetuneJob]) -> float:
    tokens, seconds = 0, 0.0
    for _ in range(ACCUMULATION):
        tokens += sum(driver.shapes[job.id].micro_batch(driver.jobs[job.id].index).tokens for job in jobs)
        for job in jobs:
            driver.finetune(job.id)
        seconds += driver.step().duration_s
        for job in jobs:
            driver.backward(job.id)
        seconds += driver.step().duration_s
    return tokens / seconds


def _unload(executor: Any, jobs: Sequence[FinetuneJob]) -> None:
    """Take the jobs' adapters off an engine; the PEFT baseline replaces its own at its next start."""
    for job in jobs:
        if hasattr(executor, "unload_adapter") and job.adapter in executor.adapter_infos:
            executor.unload_adapter(job.adapter)


def record_rates(session: Session, cell: str, values: Sequence[float], system: str = OURS) -> None:
    """The rate, and the share of the matrix rate that the model's FLOPs are (recomputed ones not counted)."""
    flops = floors.finetune_flops_per_token(session.engine.fused.dims, RANK, session.sizes.example_tokens)
    rates = session.rates()
    floor = None if rates is None else rates[1] / flops
    note = f"accumulation {ACCUMULATION}, a value is one window"
    session.record(cell, "fine-tune", values, "tokens/s", floor=floor, flops=flops, system=system, note=note)
    if rates is not None:
        session.record(cell, "FLOPs utilisation", [100 * v * flops / rates[1] for v in values], "%", system=system)


def _reset_peak(session: Session) -> None:
    if session.on_cuda:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.torch_device)


def _record_peak(session: Session, cell: str, used_rows: int) -> None:
    """Peak allocated memory, as with an empty KV pool and an arena of just the micro-batch's rows. Nothing on the CPU."""
    if not session.on_cuda:
        return
    import torch

    runner = session.engine.runner
    pool_bytes = runner.pool.k.nbytes + runner.pool.v.nbytes
    unused_bytes = num_bytes_of(runner.arena) * (1 - used_rows / session.engine.info.activation_tokens)
    peak = torch.cuda.max_memory_allocated(session.torch_device) - pool_bytes - unused_bytes
    note = f"peak allocated by torch less the KV pool ({pool_bytes / 1e9:.1f} GB) and unused arena rows ({unused_bytes / 1e9:.1f} GB)"
    session.record(cell, "peak memory", [peak / 1e9], "GB", note=note)


def num_bytes_of(value: Any) -> int:
    """Bytes of all tensors in a dataclass of tensors and such dataclasses."""
    if is_dataclass(value):
        return sum(num_bytes_of(getattr(value, f.name)) for f in fields(value))
    return getattr(value, "nbytes", 0)


def _slices(session: Session, cell: str) -> None:
    """Uncut and cut backward passes in turn; between two slices a step of decodes, whose own time does not count."""
    from workbench.runtime.driver import Driver

    job = tuning_job(session, "tuned-0", 2, accumulation=1)
    whole: list[float] = []
    cut: list[float] = []
    compute_keys(session, SLICE_DECODES)
    try:
        with Driver(session.engine, [job], seed=session.seed) as driver:
            ids = assume_context(driver, session, SLICE_DECODES, (None,))
            for _ in range(1 + SLICE_PASSES):
                driver.finetune(job.id)
                driver.step()
                driver.backward(job.id)
                whole.append(driver.step().duration_s)
                driver.finetune(job.id)
                driver.step()
                cut.append(_cut_pass(driver, job, ids))
    finally:
        _unload(session.engine, [job])
    ratio = statistics.median(cut[1:]) / statistics.median(whole[1:])
    medians = f"medians {1e3 * statistics.median(cut[1:]):.2f} and {1e3 * statistics.median(whole[1:]):.2f} ms"
    note = f"{medians}, {SLICE_DECODES} decodes between two slices, optimiser step in both"
    session.record(cell, "over the uncut pass", [ratio], "x", n=SLICE_PASSES, note=note)


def _cut_pass(driver: "Driver", job: FinetuneJob, ids: Sequence[str]) -> float:
    seconds, is_done = 0.0, False
    while not is_done:
        driver.decode(ids)
        driver.step()
        is_done = driver.backward(job.id, 1)
        seconds += driver.step().duration_s
    return seconds
