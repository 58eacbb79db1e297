"""A synthetic executor with fixed costs, for tests, `check_policy` and examples: no model, no GPU, no text."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.config import FinetuneJob, RandomTokens, UnknownAdapterError, did_you_mean, require
from workbench.core import AdapterInfo, Batch, Command, ExecutorInfo, JobShape, MicroBatch, Request, StepResult
from workbench.features import INDEX, Work, of_batch


@dataclass(frozen=True)
class FixedShape:
    """A job's sizes with every micro-batch alike: `documents` token counts, a window of `accumulation`, evaluation every few windows."""

    documents: tuple[int, ...]
    num_micro_batches: int
    accumulation: int = 1
    evaluate_every: int | None = None
    evaluation_documents: tuple[tuple[int, ...], ...] = ()
    first_micro_batch: int = 0

    def micro_batch(self, index: int) -> MicroBatch:
        is_end = (index + 1) % self.accumulation == 0 or index + 1 == self.num_micro_batches
        labelled = sum(self.documents) - len(self.documents)
        return MicroBatch(self.documents, labelled, is_end, labelled * self.accumulation)

    def evaluation(self) -> Sequence[MicroBatch]:
        return [MicroBatch(d, sum(d) - len(d), False, sum(d) - len(d)) for d in self.evaluation_documents]

    def evaluates_after(self, index: int) -> bool:
        if self.evaluate_every is None or not self.micro_batch(index).ends_window:
            return False
        window = -(-(index + 1) // self.accumulation)
        return window % self.evaluate_every == 0 or index + 1 == self.num_micro_batches


def fixed_shape(job: FinetuneJob) -> FixedShape:
    """The shape of a job on RandomTokens (rows of one length). Raises ValueError for other data."""
    if not isinstance(job.data, RandomTokens):
        raise ValueError(f"FixedCost prepares RandomTokens only, got {type(job.data).__name__}. Pass shapes={{job.id: FixedShape(...)}}.")
    per_epoch = -(-job.data.examples // job.batch_size)
    num = per_epoch * job.epochs if job.epochs is not None else job.accumulation * (job.steps or 0)
    every, held_out = job.evaluate_every, ()
    if isinstance(job.evaluation, RandomTokens):
        held_out = ((job.evaluation.tokens,) * job.batch_size,) * -(-job.evaluation.examples // job.batch_size)
    return FixedShape((job.data.tokens,) * job.batch_size, num, job.accumulation, every, held_out)


def fixed_info(**changes: Any) -> ExecutorInfo:
    """Limits of a small executor: 64 blocks of 16 tokens, 256 tokens a step, 8 residents, 4 slots, an arena of 512 tokens, 4 layers."""
    info = ExecutorInfo(
        name="FixedCost",
        device="none",
        num_layers=4,
        max_model_len=512,
        max_batch_tokens=256,
        max_requests=8,
        num_blocks=64,
        block_tokens=16,
        num_slots=4,
        max_batch_adapters=4,
        activation_tokens=512,
        simulated=True,
    )
    return replace(info, **changes)


@dataclass
class FixedCost:
    """An executor whose step lasts `step_s` plus fixed seconds per token of each kind, per backward token and layer, per adapter load.

    `sleeps=True` really sleeps so long and reports the measured time. `token` gives the sampled token id of (request id, index from 0);
    without it there is no text. `fails(step)` may raise, as an executor would in the middle of a step.
    """

    step_s: float = 0.004
    finetune_s: float = 5e-5
    evaluate_s: float = 4e-5
    prefill_s: float = 4e-5
    decode_s: float = 2e-4
    context_s: float = 1e-8
    backward_s: float = 2e-5
    load_s: float = 0.002
    info: ExecutorInfo = field(default_factory=fixed_info)
    adapters: Mapping[str, int] = field(default_factory=lambda: {"a": 8, "b": 8, "c": 16, "d": 16, "e": 32, "f": 64})
    shapes: Mapping[str, JobShape] = field(default_factory=dict)
    sleeps: bool = False
    token: Callable[[str, int], int] | None = None
    fails: Callable[[Batch], None] | None = None

    def __post_init__(self) -> None:
        self.adapter_infos: dict[str, AdapterInfo] = {
            name: AdapterInfo(name=name, version=1, rank=rank, bytes=rank * 4096) for name, rank in self.adapters.items()
        }
        self.commands: list[Command] = []
        self.batches: list[Batch] = []
        self.num_open = 0
        self._generated: dict[str, int] = {}
        self._jobs: dict[str, FinetuneJob] = {}

    @property
    def predictor(self) -> "FixedCost":
        return self

    def predict(self, work: Work) -> float:
        """Seconds of a step with this work; exact."""
        v = work.values
        seconds = self.step_s + v[0] * self.finetune_s + v[1] * self.evaluate_s + v[2] * self.prefill_s + v[3] * self.decode_s
        return seconds + v[6] * self.context_s + v[10] * self.backward_s + v[INDEX["loads"]] * self.load_s + work.read_s

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, JobShape]:
        self.num_open += 1
        self.batches.clear()
        self._generated.clear()
        self._jobs = {job.id: job for job in jobs}
        return {job.id: self.shapes[job.id] if job.id in self.shapes else fixed_shape(job) for job in jobs}

    def admissible(self, request: Request) -> Request:
        if request.adapter is not None and request.adapter not in self.adapter_infos:
            raise UnknownAdapterError(f"unknown adapter {request.adapter!r}. {did_you_mean(request.adapter, list(self.adapter_infos))}")
        needed, longest = request.prompt_tokens + (request.output_tokens or 1), self.info.max_model_len
        rule = f"{request.request_id}: prompt_tokens and output_tokens must fit the context of {longest} tokens"
        require(needed <= longest, rule, needed)
        if request.max_tokens is None:
            return replace(request, max_tokens=self.info.max_model_len - request.prompt_tokens)
        return request

    def step(self, batch: Batch) -> StepResult:
        begin = time.perf_counter()
        if self.fails is not None:
            self.fails(batch)
        duration_s = self.predict(of_batch(batch))
        layers_done, stopped_early = {}, False
        if batch.stop_after_s is not None and batch.stop_after_s < duration_s:
            duration_s, layers_done, stopped_early = self._stop_early(batch, duration_s)
        if self.sleeps:
            time.sleep(max(0.0, duration_s - (time.perf_counter() - begin)))
            duration_s = time.perf_counter() - begin
        self.batches.append(batch)
        return StepResult(
            duration_s=duration_s,
            gpu_s=duration_s,
            tokens=self._sample(batch),
            layers_done=layers_done,
            stopped_early=stopped_early,
            losses={s.owner: (2.0 * s.tokens, s.tokens) for s in batch.of("finetune")},
            eval_losses={s.owner: (3.0 * s.tokens, s.tokens) for s in batch.of("evaluate")},
            published=self._publish(batch, layers_done),
        )

    def _stop_early(self, batch: Batch, duration_s: float) -> tuple[float, dict[str, int], bool]:
        """Backward layers run one after another at the step's end; it stops at the first boundary after `stop_after_s`."""
        assert batch.stop_after_s is not None
        layers_s = [(b.owner, b.tokens * self.backward_s) for b in batch.backwards for _ in range(b.num_layers)]
        now_s = duration_s - sum(s for _, s in layers_s)
        done = {b.owner: 0 for b in batch.backwards}
        for owner, seconds in layers_s:
            if now_s >= batch.stop_after_s:
                return now_s, done, True
            now_s += seconds
            done[owner] += 1
        return duration_s, {}, False

    def _sample(self, batch: Batch) -> dict[str, int]:
        if self.token is None:
            return {}
        tokens = {}
        for s in batch.segments:
            if s.samples:
                index = self._generated.get(s.owner, 0)
                tokens[s.owner] = self.token(s.owner, index)
                self._generated[s.owner] = index + 1
        return tokens

    def _publish(self, batch: Batch, layers_done: Mapping[str, int]) -> dict[str, int]:
        published = {}
        for b in batch.backwards:
            job = self._jobs[b.owner]
            is_done = b.is_last and layers_done.get(b.owner, b.num_layers) == b.num_layers
            if job.publish == "step" and is_done and b.ends_window:
                old = self.adapter_infos.get(job.adapter)
                version = 1 if old is None else old.version + 1
                self.adapter_infos[job.adapter] = AdapterInfo(name=job.adapter, version=version, rank=job.rank, bytes=job.rank * 4096)
                published[job.adapter] = version
        return published

    def replicas(self, num: int) -> "list[FixedCost]":
        """`num` executors of the same costs and limits for a `Fleet`."""
        return [replace(self) for _ in range(num)]

    def adopt(self, info: AdapterInfo, source: object) -> None:
        """Serve an adapter, or a new version of one, that another replica has."""
        old = self.adapter_infos.get(info.name)
        self.adapter_infos[info.name] = replace(info, version=max(info.version, old.version + 1)) if old else info

    def poll(self) -> Sequence[Command]:
        commands, self.commands = self.commands, []
        return commands

    def end(self) -> None:
        self.num_open -= 1
