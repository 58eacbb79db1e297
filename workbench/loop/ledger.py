"""The only mutable state: who waits, who runs, which KV blocks, adapter slots and arena rows they hold, where each job stands.

`apply(plan)` reserves what a plan took and gives the Batch; then either `commit(batch, result, now)` or `rollback(batch)`, which restores
everything bit for bit, but for cached blocks that the step evicted and may have written over. Arrivals may come in between.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from random import Random
from typing import Any

from workbench.config import SLO, FinetuneJob
from workbench.core import (
    AdapterInfo,
    Batch,
    Command,
    ExecutorInfo,
    JobShape,
    Predictor,
    Request,
    Segment,
    StepResult,
)
from workbench.loop.commit import commit_decodes, commit_jobs, commit_prefills, commit_together, log_refused
from workbench.loop.decoding import Decoding
from workbench.loop.history import EventRow, History
from workbench.loop.plan import Plan
from workbench.loop.pools import Arena, BlockPool, SlotTable, Version
from workbench.loop.prefix_cache import PrefixCache, prompt_keys
from workbench.loop.reserve import Reservation
from workbench.loop.states import JobState, Queue, RequestState, check_job
from workbench.loop.tiers import HostMemory, Rule
from workbench.loop.views import JobView, RequestView, Room, StepView, View


class Ledger:
    """State of one replay on one executor. A policy sees it through `View`; only `replay` calls its methods.

    `away` holds adapters that are not in this replica's host memory, and when they will be (inf: not on their way); see `fleet.Fleet`.
    `rows` holds the event rows that were written out; the tokens of steps in which all running requests decoded are in `decoding`.
    Without `needs_rows` a batch leaves those decode rows out, and holds a `Row` for any other Segment: for an executor that only wants the
    sums.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        adapter_infos: Mapping[str, AdapterInfo],
        *,
        predictor: Predictor | None = None,
        slo: SLO | Mapping[str, SLO] | None = None,
        expected_output: Callable[[Request, int], float] | None = None,
    ) -> None:
        self.info = info
        self.adapter_infos = adapter_infos
        self.predictor = predictor
        self.slo = slo
        self.expected_output = expected_output
        self.now_s = 0.0
        self.step = 0
        self.cache = PrefixCache(info.num_blocks) if info.prefix_cache else None
        self.blocks: BlockPool | PrefixCache = self.cache or BlockPool(info.num_blocks)
        self.slots = SlotTable(info.num_slots)
        self.host = HostMemory(info)
        self.evict: Mapping[str, Rule] = {}
        self.view = View(self, Random(0))  # what an eviction rule is shown
        self.arena = Arena(info.activation_tokens)
        self.requests: dict[str, RequestState] = {}
        self.running = Queue()
        self.decoding = Decoding(info.block_tokens)
        self.needs_rows = True
        self.segment: Callable[..., Segment] = Segment
        self.begun, self.preempted, self.fresh = Queue(), Queue(), Queue()
        self.jobs: dict[str, JobState] = {}
        self.uses: dict[str, tuple[int, float]] = {}
        self.away: dict[str, float] = {}
        self.released: list[str] = []
        self.refused: dict[str, str] = {}
        self.history = History(self.decoding)
        self.rows: list[EventRow] = self.history.events
        self.ended: list[RequestState] = []
        self.found_amounts: dict[str, int] = {}  # by kind of work: where a search for the largest amount ended, and the next one begins
        self.num_arrived = 0
        self.last: tuple[Batch, StepResult | float, float, float, float] | None = None
        self.last_plan: Plan | None = None
        self.jump_step_s = 0.0  # what a step of the latest jump took
        self.limits = Room(
            tokens=info.max_batch_tokens,
            requests=info.max_requests,
            blocks=info.num_blocks,
            batch_adapters=info.max_batch_adapters,
            slots=info.num_slots,
            activation_tokens=info.activation_tokens,
        )
        self.applied: Reservation | None = None  # between `apply` and what ends it
        self._running_views: tuple[RequestView, ...] | None = ()
        self._waiting_views: tuple[RequestView, ...] | None = ()
        self._job_views: tuple[JobView, ...] = ()
        self._job_tokens: dict[str, int] = {}
        self._arrived: list[RequestView] = []
        self._finished: list[RequestView] = []

    # reading

    @property
    def events(self) -> list[EventRow]:
        """All event rows so far, in their order within each step, tokens included. Made anew at every call."""
        return self.history.event_rows()

    def together(self) -> Decoding:
        """The running requests as a group that decodes together."""
        if not self.decoding.is_open:
            self.decoding.open(self.running.values())
        return self.decoding

    def apart(self) -> None:
        """From now on each running request counts for itself."""
        if self.decoding.is_open:
            self.decoding.close(self.running.values())

    @property
    def num_resident(self) -> int:
        return len(self.running) + len(self.begun)

    def resident_states(self) -> Iterator[RequestState]:
        yield from self.running.values()
        yield from self.begun.values()

    def waiting_states(self) -> Iterator[RequestState]:
        """Those already begun first, then preempted ones, then the rest, each by arrival."""
        yield from self.begun.values()
        yield from self.preempted.values()
        yield from self.fresh.values()

    @property
    def running_views(self) -> tuple[RequestView, ...]:
        if self._running_views is None:
            self._running_views = tuple(self.running.views.values())
        return self._running_views

    @property
    def waiting_views(self) -> tuple[RequestView, ...]:
        if self._waiting_views is None:
            begun, preempted, fresh = self.begun.views, self.preempted.views, self.fresh.views
            self._waiting_views = (*begun.values(), *preempted.values(), *fresh.values())
        return self._waiting_views

    @property
    def job_views(self) -> tuple[JobView, ...]:
        return self._job_views

    @property
    def arrived_views(self) -> tuple[RequestView, ...]:
        return tuple(self._arrived)

    @property
    def finished_views(self) -> tuple[RequestView, ...]:
        return tuple(self._finished)

    @property
    def last_step(self) -> StepView | None:
        if self.last is None:
            return None
        batch, result, start_s, predicted_s, plan_s = self.last
        if not isinstance(result, StepResult):
            result = StepResult(duration_s=result, gpu_s=result)
        plan = None if self.needs_rows else self.last_plan
        work = partial(_work_done, batch, result, plan)
        return StepView(start_s, result.duration_s, predicted_s, plan_s, result.stopped_early, work)

    def free_room(self) -> Room:
        """What a plan could take now."""
        return Room(
            tokens=self.info.max_batch_tokens,
            requests=self.info.max_requests - self.num_resident,
            blocks=self.blocks.num_free,
            batch_adapters=self.info.max_batch_adapters,
            slots=self.slots.num_available,
            activation_tokens=self.info.activation_tokens - self.arena.num_used,
        )

    @property
    def is_possible(self) -> bool:
        """Whether a policy could have anything to plan."""
        return bool(self.requests or self.jobs)

    def in_use(self) -> dict[str, int]:
        """Blocks, arena rows and slots held now; all zero once everything has ended."""
        return {"blocks": self.blocks.num_used, "arena_rows": self.arena.num_used, "slots": self.slots.num_used}

    def snapshot(self) -> dict[str, Any]:
        """Everything that a rollback has to restore, as a value to compare."""
        fields = (
            "id",
            "phase",
            "key",
            "generated",
            "prefilled",
            "cached",
            "context",
            "capacity",
            "preemptions",
            "admitted",
            "first_token_s",
        )
        job_fields = ("id", "phase", "paused", "index", "offset", "layers_left", "rows", "eval_index", "committed_tokens", "loss_sum")
        return {
            "blocks": self.blocks.snapshot(),
            "slots_free": list(self.slots.free),
            "slots": {v: (s.index, s.bytes, s.refs, s.last_used, s.fresh) for v, s in self.slots.entries.items()},
            "evictable": self.slots.num_evictable,
            "host": (dict(self.host.entries), set(self.host.gone), self.host.used),
            "arena": dict(self.arena.ranges),
            "queues": [list(q) for q in (self.requests, self.running, self.begun, self.preempted, self.fresh)],
            "requests": [(*(getattr(s, f) for f in fields), tuple(s.blocks), tuple(s.outputs)) for s in self.requests.values()],
            "jobs": [tuple(getattr(j, f) for f in job_fields) for j in self.jobs.values()],
            "released": list(self.released),
            "num_events": len(self.rows),
            "step": self.step,
        }

    # what happens outside steps

    def log(self, time_s: float, kind: str, owner: str, adapter: str | None = None, value: float | None = None, note: str = "") -> None:
        self.rows.append((time_s, self.step, kind, owner, adapter, value, note))

    def arrive(self, request: Request, now_s: float) -> bool:
        """A request (resolved by `executor.admissible`) joins the queue; False when it could never run, and is rejected."""
        max_tokens = self.info.max_model_len - request.prompt_tokens if request.max_tokens is None else request.max_tokens
        state = RequestState(request, self.num_arrived, now_s, max_tokens, self._slo_of(request))
        state.view = RequestView(state, self)
        self.log(now_s, "arrived", state.id, state.adapter)
        self.num_arrived += 1
        reason = self._never_fits(state)
        if reason:
            return self._turn_away(state, now_s, reason)
        if self.expected_output is not None:
            state.expected_output = float(self.expected_output(request, max_tokens))
        self.requests[state.id] = state
        self.fresh.enter(state)
        self._arrived.append(state.view)
        if self._waiting_views is not None:
            self._waiting_views += (state.view,)
        return True

    def refuse(self, request: Request, now_s: float, reason: str) -> None:
        """A request arrives that the executor cannot run at all."""
        state = RequestState(request, self.num_arrived, now_s, request.max_tokens or 1, self._slo_of(request))
        state.view = RequestView(state, self)
        self.log(now_s, "arrived", state.id, state.adapter)
        self.num_arrived += 1
        self._turn_away(state, now_s, reason)

    def _turn_away(self, state: RequestState, now_s: float, reason: str) -> bool:
        state.phase = "rejected"
        self.log(now_s, "rejected", state.id, state.adapter, None, reason)
        self.ended.append(state)
        self._finished.append(state.view)
        return False

    def _slo_of(self, request: Request) -> SLO | None:
        if not isinstance(self.slo, Mapping):
            return self.slo
        return self.slo.get(request.slo_class, self.slo.get(""))

    def _never_fits(self, s: RequestState) -> str:
        info, prompt = self.info, s.request.prompt_tokens
        if prompt < 1:
            return f"prompt_tokens must be at least 1, got {prompt}"
        if s.limit < 1:
            return f"at least 1 token must be generated, got output_tokens={s.request.output_tokens}, max_tokens={s.max_tokens}"
        room, wanted = info.max_model_len - prompt, s.request.output_tokens
        # where the context alone bounds the output, a longer one would be cut without anybody having asked for it
        asked = wanted if wanted is not None and wanted > s.max_tokens == room else s.limit
        if asked > room:
            return f"prompt and output must fit max_model_len={info.max_model_len}, got {prompt} + {asked} tokens"
        context = prompt + s.limit - 1
        if -(-context // info.block_tokens) > info.num_blocks:
            return f"prompt and output must fit the pool of {info.num_blocks} blocks of {info.block_tokens}, got {context} tokens"
        if "chunk" not in info.can and context > info.max_batch_tokens:
            return (
                f"a prefill must fit max_batch_tokens={info.max_batch_tokens} on an executor that cannot cut it, got up to {context} tokens"
            )
        return ""

    def check_job(self, job: FinetuneJob, shape: JobShape) -> None:
        """Raise ValueError when the job could never run here."""
        info = self.info
        self._job_tokens[job.id] = check_job(
            job, shape, activation_tokens=info.activation_tokens, max_batch_tokens=info.max_batch_tokens, can=info.can
        )

    def add_job(self, job: FinetuneJob, shape: JobShape, now_s: float) -> None:
        """A job arrives. Raises ValueError when its id is taken or a micro-batch is larger than the arena."""
        if job.id in self.jobs:
            raise ValueError(f"job ids must be unique, got {job.id!r} twice. Give one of them a job_id.")
        if job.id not in self._job_tokens:
            self.check_job(job, shape)
        state = JobState(job, shape, self.info.num_layers, self._job_tokens[job.id])
        state.arrival_s = state.last_progress_s = now_s
        state.view = JobView(state)
        self.log(now_s, "job_arrived", state.id, job.adapter)
        if not state.is_active:
            self.log(now_s, "job_finished", state.id, job.adapter)
            return
        self.jobs[state.id] = state
        self.refresh_jobs()

    def refresh_jobs(self) -> None:
        self._job_views = tuple(j.view for j in self.jobs.values())

    def sync_adapters(self, now_s: float) -> None:
        """Reject waiting requests whose adapter was unloaded before they began; those in flight keep their version.

        What versions that are not current any more have computed leaves the prefix cache.
        """
        known = self.adapter_infos
        if not self.host.is_seeded:
            self.host.seed(self)
        self.forget_stale()
        gone = [s for s in self.fresh.values() if s.adapter is not None and s.adapter not in known]
        for s in gone:
            self.end(s, "rejected", now_s, f"adapter {s.adapter!r} was unloaded while the request waited")

    def forget_stale(self) -> None:
        """Let nobody find in the prefix cache what an adapter's earlier version has computed."""
        if self.cache is not None and self.cache.tables:
            self.cache.forget_stale(self.adapter_infos)

    def command(self, command: Command, now_s: float) -> None:
        """A user's command on a job: pause, resume, stop; publish is logged when the executor reports the version."""
        verb, owner = command
        job = self.jobs.get(owner) or next((j for j in self.jobs.values() if j.job.adapter == owner), None)
        if job is None:
            return
        if verb in ("pause", "resume"):
            self.set_paused(job, verb == "pause", now_s)
        elif verb == "stop":
            self.stop_job(job, now_s)

    def set_paused(self, job: JobState, paused: bool, now_s: float) -> None:
        if job.paused != paused:
            job.paused = paused
            self.log(now_s, "job_paused" if paused else "job_resumed", job.id, job.job.adapter)

    def stop_job(self, job: JobState, now_s: float) -> None:
        """End a job where it stands; the micro-batch in flight is lost."""
        job.phase = "stopped"
        self.log(now_s, "job_stopped", job.id, job.job.adapter)
        self.drop_job(job)

    def drop_job(self, job: JobState) -> None:
        if job.rows is not None:
            self.arena.release(job.id)
            job.rows = None
        del self.jobs[job.id]
        self.released.append(job.id)
        self.refresh_jobs()

    def end(self, s: RequestState, phase: str, time_s: float, note: str = "") -> None:
        """A request ends; it gives back what it holds."""
        self.free(s)
        s.phase = phase  # type: ignore[assignment]
        self.leave_queues(s)
        del self.requests[s.id]
        s.keys = None
        if s.admitted:
            self.released.append(s.id)
        self.log(time_s, phase, s.id, s.adapter, None, note)
        self.ended.append(s)
        self._finished.append(s.view)

    def free(self, s: RequestState) -> None:
        if s.blocks:
            self.blocks.give(s.blocks)
            if s.key is not None:
                self.slots.drop(s.key)
                self.slots.entries[s.key].last_used = self.step
            s.blocks, s.table, s.capacity, s.prefilled = [], (), 0, 0

    def leave_queues(self, s: RequestState) -> None:
        if self.running.leave(s.id):
            self._running_views = None
        elif self.fresh.leave(s.id) or self.begun.leave(s.id) or self.preempted.leave(s.id):
            self._waiting_views = None
        if s.stint is not None:
            self.decoding.leave(s)

    def enter_queue(self, s: RequestState, queue: Queue) -> None:
        self.leave_queues(s)
        queue.enter(s)
        if queue is self.running:
            self._running_views = None
            self.decoding.join(s)
        else:
            self._waiting_views = None

    def close(self, time_s: float) -> None:
        """The replay ends: everything that is held is given back; requests still there stay unfinished."""
        if self.applied is not None:
            self.rollback(None)
        self.apart()
        for s in list(self.requests.values()):
            self.free(s)
            s.phase = "aborted"
        for job in list(self.jobs.values()):
            self.drop_job(job)
        self.requests.clear()
        for queue in (self.running, self.begun, self.preempted, self.fresh):
            queue.clear()
        if self.cache is not None:
            self.cache.forget(list(self.cache.keys))
        self._running_views = self._waiting_views = ()
        assert not any(self.in_use().values()), self.in_use()

    # the prefix cache

    def cached_blocks(self, s: RequestState) -> list[int]:
        """The blocks that a prefill of this waiting request would share if it began now; its last token at least is left to compute."""
        if self.cache is None or s.blocks or s.phase != "waiting":
            return []
        if s.keys is None:
            s.keys = prompt_keys(s.request, self.info.block_tokens)
        if not s.keys:
            return []
        version = s.key
        if version is None and s.adapter is not None:
            info = self.adapter_infos.get(s.adapter)
            if info is None:
                return []
            version = (s.adapter, info.version)
        return self.cache.find(version, s.keys, (s.context - 1) // self.info.block_tokens)

    def share(self, s: RequestState, segment: Segment) -> None:
        """A prefill chunk is committed: from now on others find the blocks that it filled with prompt tokens."""
        if self.cache is None or not s.keys:
            return
        first, last = (min(at // self.info.block_tokens, len(s.keys)) for at in (segment.start, segment.end))
        if first < last:
            self.cache.register(s.key, s.keys[first:last], s.blocks[first:last])

    # one step

    def planned(self) -> None:
        """A plan was made: what arrived and finished before it is no news any more."""
        self._arrived, self._finished = [], []

    def apply(self, plan: Plan) -> Batch:
        """Reserve everything that the plan took, and give the step's Batch. Queues and jobs change at commit only."""
        assert self.applied is None, "a plan is already applied"
        self.applied = Reservation(self, plan)
        if self.cache is not None:
            self.cache.evicted.clear()
        try:
            return self.applied.batch()
        except BaseException:
            self.rollback(None)
            raise

    def grow(self, states: Collection[RequestState]) -> None:
        """One more block for each request whose next decode needs it, in their order."""
        block_tokens = self.info.block_tokens
        for s, block in zip(states, self.blocks.take(len(states)), strict=True):
            s.blocks.append(block)
            s.capacity += block_tokens
            s.table = ()

    def rollback(self, batch: Batch | None) -> None:
        """Undo the applied plan: everything is as it was before `apply`, bit for bit.

        Only what the step evicted from the prefix cache is not found any more: the executor may have written over it.
        """
        assert self.applied is not None, f"nothing is applied to roll back {batch}"
        evicted = [] if self.cache is None else [block for block, *_ in self.cache.evicted]
        self.applied.give_back()
        if self.cache is not None:
            self.cache.forget(evicted)
        self.applied = None

    def commit(self, batch: Batch, result: StepResult, now_s: float, *, accepted_s: float | None = None) -> None:
        """The step is done: queues, jobs and outputs move on, and its events are written.

        `accepted_s` is when the plan was accepted: the time of what happened at the step's start.
        Raises RuntimeError when the executor reports tokens, but not for every sampled row; roll back then.
        """
        applied = self.applied
        assert applied is not None, "nothing is applied to commit"
        plan = applied.plan
        if result.tokens:
            missing = [s.owner for s in batch.segments if s.samples and s.owner not in result.tokens]
            if missing:
                raise RuntimeError(f"an executor that reports tokens must report one for each sampled row, missing {missing}")
        self.applied = None
        applied.undo.clear()  # it refers back
        start_s = now_s if accepted_s is None else accepted_s
        if applied.at_start:
            rejected = {f: s for f, (s, _) in plan.rejected.items()}
            for kind, owner, adapter, value, note in applied.at_start:
                if owner in rejected and kind in ("rejected", "aborted"):
                    self.end(rejected[owner], kind, start_s, note)
                    continue
                self.log(start_s, kind, owner, adapter, value, note)
        for s in plan.preempted.values():
            s.phase = "waiting"
            s.preemptions += 1
            self.enter_queue(s, self.preempted)
        if plan.preempted and len(self.preempted) > 1:
            self.preempted.sort()
        for owner, paused in plan.held.items():
            self.set_paused(self.jobs[owner], paused, start_s)
        if plan.refused or self.refused:
            log_refused(self, plan, start_s)
        # before anybody joins them
        ended = self.decoding.advance(1, now_s) if plan.decodes_all else None
        if plan.prefills:
            commit_prefills(self, batch, result, start_s, now_s)
        if ended is not None:
            commit_together(self, batch, result, ended, now_s)
        elif plan.decodes:
            commit_decodes(self, batch, result, now_s)
        if plan.finetunes or plan.backwards or plan.evaluates or result.published:
            commit_jobs(self, batch, result, now_s)
        if not self.num_resident:
            self.slots.unprotect()
        self.step += not plan.empty


def _by_version(s: RequestState) -> Version:
    return s.key or ("", 0)


def _work_done(batch: Batch, result: StepResult, plan: Plan | None) -> tuple[tuple[str, str, int], ...]:
    """What a step really did, row by row; `plan` knows the decodes that the batch lacks."""
    work: list[tuple[str, str, int]] = [(s.owner, s.kind, s.tokens) for s in batch.segments]
    if plan is not None and plan.decodes_all:
        work += [(s.id, "decode", 1) for s in sorted(plan.decodes, key=_by_version)]
    return (*work, *((b.owner, "backward", result.layers_done.get(b.owner, b.num_layers)) for b in batch.backwards))
