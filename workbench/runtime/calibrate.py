"""Measure an engine: a random mix of steps of every kind, for the latency model beside it and for profiles that travel."""

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request, StepResult
from workbench.features import NAMES
from workbench.latency import LatencyModel
from workbench.progress import progress_bar
from workbench.runtime.driver import Driver

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

JOB = "calibration"
MIN_STEPS = 24  # a fit of fewer would say little, however slow the machine


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How far the mix reaches: resident requests, prompt tokens, tokens of a chunk, and the fine-tune micro-batch."""

    max_resident: int
    max_prompt_tokens: int
    max_chunk_tokens: int
    example_tokens: int
    batch_size: int

    @classmethod
    def for_engine(cls, engine: "Engine") -> "Mix":
        """Small on the CPU (a few seconds), up to the engine's own limits on a GPU."""
        info = engine.info
        on_cpu = engine.device.type == "cpu"
        prompt = min(96 if on_cpu else 2048, info.max_model_len // 2)
        example = min(64 if on_cpu else 1024, info.activation_tokens // 2)
        return cls(
            max_resident=min(6 if on_cpu else 128, info.max_requests, info.num_blocks * info.block_tokens // (2 * prompt + 1)),
            max_prompt_tokens=prompt,
            max_chunk_tokens=min(96 if on_cpu else 2048, info.max_batch_tokens // 2),
            example_tokens=example,
            batch_size=1 if on_cpu else 2,
        )


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
    max_steps: int = 200,
    seconds: float = 6.0,
    seed: int = 0,
    mix: Mix | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Steps of every kind in random mixes: one row a step, `features.NAMES` and durations in seconds.

    Stops after `max_steps`, or after `seconds` and at least MIN_STEPS steps. On CUDA exactly the same steps run once before, so that
    compilation stays out of the numbers. `progress` shows a bar, or never (False); None takes `EngineConfig.progress`.
    Raises RuntimeError while a replay is running.
    """
    if engine.is_running:
        raise RuntimeError("calibration needs the engine to be idle, got a running replay. Call engine.calibrate() before it.")
    mix = mix or Mix.for_engine(engine)
    adapters: list[str | None] = [None, *sorted(engine.adapters)][: 1 + engine.config.num_slots]
    rows: list[dict[str, float]] = []
    progress = engine.config.progress if progress is None else progress
    engine.warm_up(progress)
    is_repeat = False
    for is_measured in (False, True):
        if not is_measured and engine.device.type == "cpu":
            continue
        rows, started = [], time.perf_counter()
        job = FinetuneJob(
            adapter=JOB,
            job_id=JOB,
            data=RandomTokens(examples=8, tokens=mix.example_tokens),
            batch_size=mix.batch_size,
            accumulation=2,
            epochs=1_000,
            max_tokens=mix.example_tokens,
            publish="never",
        )
        try:
            what = "measuring steps" if is_measured else "running them once before"
            with progress_bar(max_steps, what, "step", progress) as bar, Driver(engine, [job], seed=seed) as driver:
                mixer = _Mixer(driver, mix, adapters, job.id, seed)
                while len(rows) < max_steps and (is_repeat or len(rows) < MIN_STEPS or time.perf_counter() - started < seconds):
                    mixer.collect()
                    rows.append(_row(driver, driver.step()))
                    bar.update()
        finally:
            engine.unload_adapter(JOB)
        max_steps, is_repeat = len(rows), True
    return pd.DataFrame(rows[1:])  # the first step pays for warming up


def _row(driver: Driver, result: StepResult) -> dict[str, float]:
    times = {"duration_s": result.duration_s, "gpu_s": result.gpu_s, "host_s": result.host_s}
    return dict(zip(NAMES, driver.work.values, strict=True)) | times


def calibrate(engine: "Engine", **options: object) -> LatencyModel:
    """A latency model fitted to `measure(engine)`; its `report` says how well it predicts steps that were held out."""
    steps = measure(engine, **options)  # type: ignore[arg-type]
    return LatencyModel.fit(
        steps, info=engine.info, adapters=dict(engine.adapters), vocab_size=engine.fused.dims.vocab_size, tokenizer=engine.tokenizer
    )
