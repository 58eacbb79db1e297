"""Measure an engine: steps of every kind and size, for the latency model beside it and for profiles that travel."""

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.config import FinetuneJob, RandomTokens, require
from workbench.core import ExecutorInfo, Request, StepResult
from workbench.features import NAMES
from workbench.latency import LatencyModel
from workbench.progress import progress_bar
from workbench.runtime.covering import Cover, Reach
from workbench.runtime.driver import Driver

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

JOB = "calibration"
SETTLING = 8  # unmeasured steps before a measured one, at most: in a model with hardly any context no sequence lasts
MIN_STEPS = 36  # a fit of fewer would say little, however slow the machine


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How far the steps reach: resident requests, prompt tokens, tokens of a chunk, decode rows, and the jobs' micro-batches as
    (rows, tokens of each); the first is the one that matters most.
    """

    max_resident: int
    max_prompt_tokens: int
    max_chunk_tokens: int
    max_rows: int
    micro_batches: tuple[tuple[int, int], ...]

    @classmethod
    def for_engine(cls, engine: "Engine") -> "Mix":
        """Small on the CPU (a few seconds), up to the engine's own limits on a GPU."""
        info = engine.info
        on_cpu = engine.device.type == "cpu"
        prompt = min(96 if on_cpu else 2048, info.max_model_len // 2)
        example = min(64 if on_cpu else 1024, info.activation_tokens // 4)
        other = not on_cpu and example >= 4 and engine.config.max_jobs > 1
        rows = min(8 if on_cpu else 256, info.max_requests, info.max_batch_tokens, info.num_blocks // 8)
        return cls(
            max_resident=min(6 if on_cpu else 128, info.max_requests, info.num_blocks * info.block_tokens // (2 * prompt + 1)),
            max_prompt_tokens=prompt,
            max_chunk_tokens=min(96 if on_cpu else 2048, info.max_batch_tokens // 2),
            max_rows=max(1, rows),
            micro_batches=((1 if on_cpu else 2, example), *([(1, example // 2)] if other else [])),
        )

    def reach(self, info: ExecutorInfo) -> Reach:
        """How far the covering points reach on an executor of these limits."""
        # where nothing is padded, a few chunks' length says what longer ones cost; buckets are all to be seen
        tokens = info.max_batch_tokens if info.token_buckets else min(info.max_batch_tokens, 2 * self.max_chunk_tokens)
        context = info.max_model_len if info.token_buckets else min(info.max_model_len, 4 * self.max_prompt_tokens)
        return Reach(max_rows=self.max_rows, max_prompt_tokens=self.max_prompt_tokens, max_tokens=tokens, max_context=context)

    def jobs(self) -> list[FinetuneJob]:
        """A job for each micro-batch; the first one is evaluated, too."""
        made = []
        for place, (rows, tokens) in enumerate(self.micro_batches):
            name = JOB if place == 0 else f"{JOB}-{place + 1}"
            made.append(
                FinetuneJob(
                    adapter=name,
                    job_id=name,
                    data=RandomTokens(examples=4 * rows, tokens=tokens),
                    batch_size=rows,
                    accumulation=2,
                    epochs=1_000,
                    max_tokens=tokens,
                    publish="never",
                    evaluation=None if place else RandomTokens(examples=rows, tokens=tokens),
                )
            )
        return made


class _Mixer:
    """Draws one step after another; the same seed draws the same steps."""

    def __init__(self, driver: Driver, mix: Mix, adapters: list[str | None], job_id: str, seed: int) -> None:
        self.driver, self.mix, self.adapters, self.job_id = driver, mix, adapters, job_id
        self.draw = random.Random(seed)
        self.count = 0

    def _size(self, most: int) -> int:
        """Log-uniform in 1..most, so that small and large both occur."""
        return max(1, round(most ** self.draw.random()))

    def collect(self) -> None:
        mode = self.draw.choices(("decode", "serve", "train", "both"), (0.25, 0.25, 0.2, 0.3))[0]
        if mode == "decode" and self._ready():
            self._decode()
            return
        if mode != "train":
            self._serve()
        if mode in ("train", "both"):
            self._train()

    def _ready(self) -> list[str]:
        """Requests whose prompt is computed."""
        return [r for r, run in self.driver.runs.items() if run.is_known and run.length - run.cached == 1]

    def _decode(self) -> None:
        ready = self._ready()
        self.driver.decode(self.draw.sample(ready, min(len(ready), self._size(2 * len(ready)))))

    def _serve(self) -> None:
        driver, mix = self.driver, self.mix
        for request_id, run in list(driver.runs.items()):
            if run.length + 1 >= min(driver.info.max_model_len, 2 * mix.max_prompt_tokens) or self.draw.random() < 0.03:
                driver.release(request_id)
        if len(driver.runs) < self._size(mix.max_resident) or not driver.runs:
            for _ in range(self._size(max(1, mix.max_resident // 4))):
                if len(driver.runs) < mix.max_resident:
                    self._arrive()
        ready = self._ready()
        unfinished = [r for r in driver.runs if r not in ready]
        budget = self._size(min(mix.max_chunk_tokens, driver.info.max_batch_tokens - len(ready)))
        for request_id in unfinished:
            if budget > 0:
                run = driver.runs[request_id]
                tokens = min(budget, run.length - run.cached)
                driver.prefill(request_id, tokens)
                budget -= tokens
        for request_id in ready:
            if self.draw.random() < 0.8:
                driver.decode([request_id])

    def _arrive(self) -> None:
        self.count += 1
        self.driver.add(
            Request(
                request_id=f"{JOB}-{self.count}",
                arrival_s=0.0,
                prompt_tokens=self._size(self.mix.max_prompt_tokens),
                output_tokens=1,
                adapter=self.draw.choice(self.adapters),
            )
        )

    def _train(self) -> None:
        driver, state = self.driver, self.driver.jobs[self.job_id]
        layers = driver.info.num_layers
        if state.layers_left:
            driver.backward(self.job_id, self.draw.choice((layers, layers, max(1, layers // 2), max(1, layers // 4))))
        else:
            # no step is measured that no plan could ask for
            room = driver.info.max_batch_tokens - driver.num_tokens
            left = min(driver.shapes[self.job_id].micro_batch(state.index).tokens - state.offset, room)
            if left > 0:
                driver.finetune(self.job_id, left if self.draw.random() < 0.5 else self._size(left))


def measure(
    engine: "Engine",
    *,
    max_steps: int = 1000,
    seconds: float = 6.0,
    rounds: int | None = None,
    seed: int = 0,
    mix: Mix | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Steps of every kind, one row a step: `features.NAMES`, durations in seconds, and the `round` that it belongs to.

    First `rounds` times every point of `covering` (each bucket that the engine pads to, in each kind of step), a dozen steps of one kind in
    a row, then random mixes (round -1) for the rest. None: nothing but such rounds where steps are padded, none elsewhere, where a mix
    says as much in less time.
    Stops after `max_steps`, or after `seconds` and at least MIN_STEPS steps. On CUDA exactly the same steps run once before, so that
    compilation and recording stay out of the numbers; elsewhere the first step of each kind is left out.
    `progress` shows a bar, or never (False); None takes `EngineConfig.progress`. Raises RuntimeError while a replay is running.
    """
    if engine.is_running:
        raise RuntimeError("calibration needs the engine to be idle, got a running replay. Call engine.calibrate() before it.")
    rounds = (max_steps if engine.info.token_buckets else 0) if rounds is None else rounds
    require(rounds >= 0, "rounds must be at least 0", rounds)
    mix = mix or Mix.for_engine(engine)
    progress = engine.config.progress if progress is None else progress
    engine.warm_up(progress)
    rows: list[dict[str, float]] = []
    is_repeat = False
    for is_measured in (False, True):
        if not is_measured and engine.device.type == "cpu":
            continue
        what = "measuring steps" if is_measured else "running them once before"
        try:
            with progress_bar(max_steps, what, "step", progress) as bar, Driver(engine, mix.jobs(), seed=seed) as driver:
                started, rows, steps = time.perf_counter(), [], _Steps(driver, mix, _adapters(engine), rounds, seed)
                while len(rows) < max_steps and (is_repeat or len(rows) < MIN_STEPS or time.perf_counter() - started < seconds):
                    rows.append(steps.run())
                    bar.update()
        finally:
            for job in mix.jobs():
                engine.unload_adapter(job.adapter)
        max_steps, is_repeat = len(rows), True
    frame = pd.DataFrame(rows)
    return frame[_is_settled(frame)] if engine.device.type == "cpu" else frame


class _Steps:
    """Runs one step after another: rounds of covering points, then random mixes."""

    def __init__(self, driver: Driver, mix: Mix, adapters: list[str | None], rounds: int, seed: int) -> None:
        self.driver, self.rounds = driver, rounds
        job_ids = [job.id for job in mix.jobs()]
        self.cover = Cover(driver, mix.reach(driver.info), adapters, job_ids, seed)
        self.mixer = _Mixer(driver, mix, adapters, job_ids[0], seed)
        self.covers = rounds > 0

    def run(self) -> dict[str, float]:
        """One measured step, after whatever it needs that is not."""
        if self.covers and self.cover.rounds >= self.rounds:
            self.covers = False
            self.cover.clear()
        if not self.covers:
            self.mixer.collect()
            return _row(self.driver, self.driver.step(), -1)
        for _ in range(SETTLING):
            if not self.cover.settle():
                break
            self.driver.step()
        self.cover.collect()
        return _row(self.driver, self.driver.step(), self.cover.round)


def _adapters(engine: "Engine") -> list[str | None]:
    """The base and as many adapters as have slots, and may run beside a job."""
    return [None, *sorted(engine.adapters)][: 1 + min(engine.config.num_slots, engine.config.max_batch_adapters - 1)]


def _is_settled(frame: pd.DataFrame) -> np.ndarray:
    """Which steps [n] are not the first with a kind of work: it pays for what is done once."""
    there = frame[list(NAMES)].to_numpy() > 0
    return ~(there & (there.cumsum(axis=0) == 1)).any(axis=1)


def _row(driver: Driver, result: StepResult, round: int) -> dict[str, float]:
    times = {"duration_s": result.duration_s, "gpu_s": result.gpu_s, "host_s": result.host_s, "round": round}
    return dict(zip(NAMES, driver.work.values, strict=True)) | times


def calibrate(engine: "Engine", **options: object) -> LatencyModel:
    """A latency model fitted to `measure(engine)`; its `report` says how well it predicts steps that were held out."""
    steps = measure(engine, **options)  # type: ignore[arg-type]
    return LatencyModel.fit(
        steps, info=engine.info, adapters=dict(engine.adapters), vocab_size=engine.fused.dims.vocab_size, tokenizer=engine.tokenizer
    )
