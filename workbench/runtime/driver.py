"""Drives an engine by hand, batch by batch, without ledger, policy or clock: for measuring, calibrating and testing steps.

Blocks, slots and arena rows are handed out in order and given back by `release`; there is no admission and no preemption here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.config import FinetuneJob
from workbench.core import AdapterLoad, Backward, Batch, Request, Segment, StepResult
from workbench.features import Work, of_batch
from workbench.loop.garbage import Garbage

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

ORDER = {"finetune": 0, "evaluate": 1, "prefill": 2, "decode": 3}


@dataclass(slots=True)
class _Run:
    request: Request
    version: int
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    length: int = 0
    is_known: bool = False


@dataclass(slots=True)
class _Job:
    job: FinetuneJob
    rows: int
    index: int = 0
    offset: int = 0
    layers_left: int = 0


class Driver:
    """Collects segments with `prefill`, `decode`, `finetune`, `evaluate` and `backward`; `step` runs them as one batch.

    `batch` is the batch that ran last, `work` its features.
    """

    def __init__(self, engine: "Engine", jobs: Iterable[FinetuneJob] = (), seed: int = 0) -> None:
        self.engine, self.info = engine, engine.info
        jobs = list(jobs)
        self.shapes = engine.begin(jobs, seed=seed)
        self.free_blocks = list(range(self.info.num_blocks))[::-1]
        self.slots: dict[tuple[str, int], int] = {}
        self.runs: dict[str, _Run] = {}
        self.jobs: dict[str, _Job] = {}
        rows = 0
        for job in jobs:
            shape = self.shapes[job.id]
            sizes = [shape.micro_batch(i).tokens for i in range(min(shape.num_micro_batches, 64))] + [m.tokens for m in shape.evaluation()]
            self.jobs[job.id] = _Job(job, rows, shape.first_micro_batch)
            rows += max(sizes)
        assert rows <= self.info.activation_tokens, (
            f"the jobs' micro-batches need {rows} arena rows, there are {self.info.activation_tokens}"
        )
        self.garbage = Garbage()
        self.step_index = 0
        self.batch = Batch(0)
        self._clear()

    def _clear(self) -> None:
        self._segments: list[Segment] = []
        self._backwards: list[Backward] = []
        self._loads: list[AdapterLoad] = []
        self._admitted: list[Request] = []
        self._released: list[str] = []

    def add(self, request: Request) -> None:
        """Make a request known; its prompt is computed by `prefill`."""
        request = self.engine.admissible(request)
        version = 0 if request.adapter is None else self.engine.adapter_infos[request.adapter].version
        self.runs[request.request_id] = _Run(request, version, length=request.prompt_tokens)

    def release(self, request_id: str) -> None:
        """Give back what the request holds; the engine forgets it with the next step."""
        run = self.runs.pop(request_id)
        self.free_blocks += run.blocks
        self._released.append(request_id)

    def prefill(self, request_id: str, tokens: int | None = None) -> None:
        """The next `tokens` prompt tokens (all by default) of a request."""
        run = self.runs[request_id]
        left = run.length - run.cached
        self._inference("prefill", run, left if tokens is None else min(tokens, left))

    def assume(self, request_id: str, tokens: int) -> None:
        """Take the first `tokens` prompt tokens as computed: blocks are handed out, with whatever keys and values they hold.

        For timing decodes at a context without the prefill; the last prompt token must be left (the first decode computes it).
        """
        run = self.runs[request_id]
        assert run.cached == 0 and tokens < run.length, f"{request_id} stands at {run.cached} of {run.length} tokens, got {tokens}"
        self._take_blocks(run, tokens)
        run.cached = tokens

    def decode(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._inference("decode", self.runs[request_id], 1)

    def _inference(self, kind, run: _Run, tokens: int) -> None:
        request, end = run.request, run.cached + tokens
        if not run.is_known:
            self._admitted.append(request)
            run.is_known = True
        self._take_blocks(run, end)
        if request.adapter is not None:
            self._need_slot(request.adapter, run.version)
        samples = end == run.length
        self._segments.append(
            Segment(kind, request.request_id, request.adapter, run.version, run.cached, tokens, tuple(run.blocks), samples)
        )
        run.cached = end
        run.length += samples

    def _take_blocks(self, run: _Run, tokens: int) -> None:
        while len(run.blocks) * self.info.block_tokens < tokens:
            run.blocks.append(self.free_blocks.pop())

    def _need_slot(self, adapter: str, version: int) -> None:
        if (adapter, version) not in self.slots:
            info = self.engine.adapter_infos[adapter]
            taken = set(self.slots.values())
            slot = next((s for s in range(self.info.num_slots) if s not in taken), None)
            assert slot is not None, "the driver evicts by unload() alone: raise EngineConfig.num_slots"
            self.slots[adapter, version] = slot
            self._loads.append(AdapterLoad(adapter, version, slot, info.rank, info.bytes))

    def unload(self, adapter: str) -> None:
        """Take an adapter off its slots, before any of its rows is collected: the next step that needs it loads it again."""
        self.slots = {key: slot for key, slot in self.slots.items() if key[0] != adapter}

    def finetune(self, job_id: str, tokens: int | None = None) -> bool:
        """The next `tokens` of the job's micro-batch (the rest of it by default); True once its forward is complete."""
        state = self.jobs[job_id]
        micro = self.shapes[job_id].micro_batch(state.index)
        left = micro.tokens - state.offset
        tokens = left if tokens is None else min(tokens, left)
        self._segments.append(
            Segment(
                "finetune",
                job_id,
                state.job.adapter,
                0,
                state.offset,
                tokens,
                micro_batch=state.index,
                rows=state.rows,
                documents=micro.documents,
            )
        )
        state.offset += tokens
        if state.offset == micro.tokens:
            state.layers_left = self.info.num_layers
        return state.offset == micro.tokens

    def backward(self, job_id: str, num_layers: int | None = None) -> bool:
        """The next `num_layers` layers (the rest by default) of the backward; True once the micro-batch is committed."""
        state = self.jobs[job_id]
        micro = self.shapes[job_id].micro_batch(state.index)
        layers = state.layers_left if num_layers is None else min(num_layers, state.layers_left)
        self._backwards.append(
            Backward(
                job_id,
                state.job.adapter,
                state.index,
                state.rows,
                micro.documents,
                state.layers_left,
                layers,
                ends_window=micro.ends_window,
                is_first=state.layers_left == self.info.num_layers,
            )
        )
        state.layers_left -= layers
        if state.layers_left:
            return False
        state.index, state.offset = state.index + 1, 0
        return True

    def evaluate(self, job_id: str, index: int = 0) -> None:
        """One evaluation micro-batch; only between micro-batches, since it uses the same arena rows."""
        state = self.jobs[job_id]
        micro = self.shapes[job_id].evaluation()[index]
        self._segments.append(
            Segment(
                "evaluate", job_id, state.job.adapter, 0, 0, micro.tokens, micro_batch=index, rows=state.rows, documents=micro.documents
            )
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the step that is being collected."""
        return sum(segment.tokens for segment in self._segments)

    def take(self) -> Batch:
        """The collected work as a batch, which `step` would run."""
        segments = sorted(self._segments, key=lambda s: (ORDER[s.kind], s.adapter or "" if ORDER[s.kind] > 1 else s.owner, s.version))
        batch = Batch(
            self.step_index, tuple(segments), tuple(self._backwards), tuple(self._loads), tuple(self._admitted), tuple(self._released)
        )
        self.step_index += 1
        self._clear()
        return batch

    def step(self) -> StepResult:
        self.garbage.collect()
        self.batch = self.take()
        return self.engine.step(self.batch)

    @property
    def work(self) -> Work:
        return of_batch(self.batch)

    def close(self) -> None:
        self.engine.end()

    def __enter__(self) -> "Driver":
        self.garbage.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.garbage.__exit__(None, None, None)
        self.close()
