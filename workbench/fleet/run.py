"""The serving loops of a fleet: one clock, a ledger and a policy for each replica, and a router that every arrival passes."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from random import Random
from typing import Any

from simpy.core import EmptySchedule

from workbench.config import FinetuneJob, UnknownAdapterError, did_you_mean, require
from workbench.core import AdapterInfo, Executor, Request, StepResult
from workbench.fleet import routers
from workbench.fleet.fleet import Fleet, homes_of
from workbench.fleet.replay import FleetReplay
from workbench.fleet.view import ArrivalView, Book, ReplicaView
from workbench.loop.arrivals import Arrivals
from workbench.loop.checks import check_slo, checked_requests, warn_of_refusals, warn_of_ties
from workbench.loop.clock import Clock, WallClock
from workbench.loop.expected import length_predictor
from workbench.loop.garbage import Garbage
from workbench.loop.options import Options
from workbench.loop.states import JobState, RequestState
from workbench.loop.views import JobView
from workbench.policy import Policy, policy_label
from workbench.results.conservation import ConservationError, check_conservation
from workbench.results.replay import Replay
from workbench.seeds import generator
from workbench.serving_loop import ReplayError, ServingLoop

SWITCH_S = 1e-4
"""How long a thread that comes back from its device waits for one that computes. Python's usual 5 ms are half a decode step."""


class ReplicaRun(ServingLoop):
    """The serving loop of one replica; what arrives, and when it is over, the fleet says.

    On the wall clock an executor that really runs steps does so in a thread of its own. Everything else (planning, routing, the ledgers,
    what is asked of an executor between its steps) stays in the thread of the loop.
    """

    def __init__(self, fleet: "FleetRun", number: int, executor: Executor, policy: Policy, options: Options) -> None:
        self.fleet, self.number, self.book = fleet, number, Book()
        super().__init__((), executor, policy, options, fleet.arrivals, number)
        self.receive = fleet.deliver
        self.garbage, self.lengths = fleet.garbage, fleet.lengths
        self.ledger.expected_output = fleet.expected
        self.seen: Any = None
        if self.is_wall and not executor.info.simulated:
            self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"replica-{number}")

    @property
    def infos(self) -> Mapping[str, AdapterInfo]:
        """The executor's adapters; while a step runs in a thread, those that it had before: to ask would wait for the step's end."""
        is_busy = self.thread is not None and self.ledger.applied is not None
        return self.ledger.adapter_infos if is_busy else self.executor.adapter_infos

    def close(self) -> None:
        """As for one executor, once the step that may still run in its thread has ended; nothing of that one is kept."""
        try:
            if self.thread is not None:
                self.thread.shutdown()
        finally:
            super().close()

    def begin(self) -> None:
        """Begin the executor's replay; replicas that are simulated draw residuals of their own, real ones the tokens of a single one."""
        seed = self.seed
        if self.number and self.executor.info.simulated:
            seed = int(generator("replica", seed, self.number).integers(2**63))
        self.shapes = self.tape.shapes = self.executor.begin(self.jobs, seed=seed)

    @property
    def failure(self) -> BaseException | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.fleet.failure

    @failure.setter
    def failure(self, error: BaseException | None) -> None:
        if error is not None:
            self.fleet.fail(error, f"replica {self.number}: {self.where}")

    def take(self, request: Request, at: float) -> None:
        """A request arrives here."""
        self.book.num_routed += 1
        self._arrive(request, at)
        state = self.ledger.requests.get(request.request_id)
        if state is not None:
            self.book.begin(state)

    def _settle(self) -> None:
        for s in self.ledger.ended:
            self.book.end(s.id)
        super()._settle()

    def _is_over(self) -> bool:
        is_over = super()._is_over()
        if is_over:
            # replicas that sleep see it too; those in a step do at its end
            self.fleet.wake_all()
        return is_over

    def _poll(self, now: float):
        changed = super()._poll(now)
        last = self.ledger.last
        if last is not None and last is not self.seen:
            self.seen = last
            if isinstance(last[1], StepResult):
                for adapter in last[1].published:
                    self.fleet.published(adapter, self.number)
        return changed

    def _is_pending(self) -> bool:
        return super()._is_pending() or any(ready < math.inf for ready in self.ledger.away.values())

    def _horizon_s(self) -> float:
        """Before this time nothing is known to reach the ledger from outside; an arrival cuts what was looked ahead at, as jobs do."""
        until_s = self.until if isinstance(self.until, (int, float)) else math.inf
        return min([until_s, *self.ledger.away.values()])

    def check_arrivals(self) -> None:
        """Raise ConservationError unless every request that was given to this replica arrived here."""
        if self.ledger.num_arrived != self.book.num_routed:
            raise ConservationError(
                f"replica {self.number}: {self.ledger.num_arrived} arrivals of {self.book.num_routed} requests given to it"
            )

    def part(self, requests: Sequence[Request], jobs: Sequence[FinetuneJob], interrupted: bool, error: str | None) -> Replay:
        """What happened here, with the requests and jobs that came here."""
        self.trace, self.requests, self.jobs = self.fleet.trace, tuple(requests), tuple(jobs)
        return self._result(interrupted, error)


def check_apart(executors: Sequence[Executor]) -> None:
    """Raise ValueError where replicas that really run steps could not do so at the same time."""
    real = [getattr(executor, "engine", executor) for executor in executors if not executor.info.simulated]
    names = [executor.info.name for executor in real]
    rule = "clock='wall' needs an engine of its own for every replica, for parts of one run one after another"
    require(len({id(executor) for executor in real}) == len(real), rule, names, "Use clock='virtual', or Fleet([engine_0, engine_1]).")


@contextmanager
def switching(interval_s: float) -> Iterator[None]:
    """Within this block Python lets another thread compute after `interval_s`, where one waits for that."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class FleetRun:
    """One replay on a fleet while it runs."""

    def __init__(self, trace: Any, fleet: Fleet, policy: Policy, options: Options) -> None:
        require(options.events is None, "events= writes the rows of one executor; on a fleet it must be None", options.events)
        self.trace, self.fleet, self.jobs, self.slo = trace, fleet, options.jobs, options.slo
        self.requests = checked_requests(trace)
        check_slo(self.slo, self.requests)
        executors = fleet.open()
        self.env = WallClock() if options.clock == "wall" else Clock()
        if options.clock == "wall":
            check_apart(executors)
        self.arrivals = Arrivals(self.env, self.requests, self.jobs)
        self.until = options.until if options.until is not None else "requests" if self.requests else "jobs"
        self.lengths = length_predictor(options.lengths, options.seed)
        self.router = copy.deepcopy(fleet.router)
        if hasattr(policy, "routed"):
            self.router = copy.deepcopy(policy).routed(self.router)  # type: ignore[attr-defined]
        if hasattr(self.router, "check"):
            self.router.check(fleet.num)
        self.failure: BaseException | None = None
        self.where = "router"
        options = replace(options, until=self.until)
        self.is_watched = False
        self.garbage = Garbage(often=options.clock == "wall")
        self.runs = [ReplicaRun(self, k, executor, policy, options) for k, executor in enumerate(executors)]
        rng = Random(f"router:{options.seed}")
        self.views = tuple(ReplicaView(run.ledger, rng, run.number, run.book, self.env, self._watch) for run in self.runs)
        self._predicted: tuple[tuple[str, int], float] = ("", 0), 0.0
        self.routed: dict[str, int] = {}
        self.placed: dict[str, int] = {}

    # the outside of the loop

    def run(self, progress: bool | None) -> FleetReplay:
        warn_of_ties(self.arrivals.open)
        interrupted = False
        with ExitStack() as begun:
            for run in self.runs:
                run.begin()
                begun.callback(run.close)
            try:
                self._check_jobs()
                self._check_adapters()
                self._open_bar(progress)
                with switching(SWITCH_S if any(run.thread for run in self.runs) else sys.getswitchinterval()):
                    self._drive()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                if self.runs[0].bar is not None:
                    self.runs[0].bar.close()
        if isinstance(self.failure, KeyboardInterrupt):
            interrupted, self.failure = True, None
        warn_of_refusals({name: reason for run in self.runs for name, reason in run.tape.refusals.items()}, len(self.requests))
        if self.failure is not None:
            message = f"{self.where}: {type(self.failure).__name__}: {self.failure}"
            raise ReplayError(message, self._result(False, message)) from self.failure
        result = self._result(interrupted, None)
        if not interrupted:
            try:
                for run in self.runs:
                    run.check_arrivals()
                check_conservation(result)
            except ConservationError as error:
                raise ReplayError(str(error), result) from error
        return result

    def _check_jobs(self) -> None:
        """A job that could run on no replica, or not on the one that is named for it, is an error before anything runs."""
        ids = [job.id for job in self.jobs]
        for name in self.fleet.placement:
            if name not in ids:
                raise ValueError(f"placement must name jobs of this replay, got {name!r}. {did_you_mean(name, ids)}")
        for job in self.jobs:
            runs = self.runs if job.id not in self.fleet.placement else [self.runs[self.fleet.placement[job.id]]]
            errors: list[ValueError] = []
            for run in runs:
                try:
                    run.ledger.check_job(job, run.shapes[job.id])
                except ValueError as error:
                    errors.append(error)
            if len(errors) == len(runs):
                raise errors[0]

    def _check_adapters(self) -> None:
        """A name that no replica knows is a mistake; then `homes` takes effect."""
        for request in {r.adapter: r for r in reversed(self.requests) if r.adapter is not None}.values():
            unknown: list[UnknownAdapterError] = []
            for run in self.runs:
                try:
                    run.executor.admissible(request)
                except UnknownAdapterError as error:
                    unknown.append(error)
                except (ValueError, RuntimeError):
                    continue  # what else is wrong with it is an outcome; a recording knows only the requests that came to it
            if len(unknown) == len(self.runs):
                raise unknown[0]
        known = {name for run in self.runs for name in run.executor.adapter_infos}
        for name, value in (self.fleet.homes or {}).items():
            if name not in known:
                raise ValueError(
                    f"homes must name adapters of the executor or the trace, got {name!r}. {did_you_mean(name, sorted(known))}"
                )
            homes = [k for k in homes_of(value) if name in self.runs[k].executor.adapter_infos]
            require(len(homes) > 0, f"at least one of the homes of {name!r} must have it", value)
            for run in self.runs:
                if run.number not in homes:
                    run.ledger.away[name] = math.inf

    def _drive(self) -> None:
        env = self.env
        env.process(self.arrivals.bring_jobs(self._start_job))
        env.process(self.arrivals.bring_requests(self.deliver))
        servers = env.all_of([env.process(run._guarded(run._serve())) for run in self.runs])
        if isinstance(env, WallClock):
            env.sync()
        with self.garbage:
            while not servers.triggered and self.failure is None:
                try:
                    env.step()
                except EmptySchedule:
                    # every replica sleeps, each for something that another one would have to bring about
                    if self.arrivals.is_stalled:
                        left = self.arrivals.num_requests - self.arrivals.num_ended
                        self.fail(RuntimeError(f"all replicas wait for one another, and {left} requests have not ended"), "fleet")
                        return
                    self.arrivals.is_stalled = True
                    self.wake_all()

    def fail(self, error: BaseException, where: str) -> None:
        """End the replay with the first failure."""
        if self.failure is None:
            self.failure, self.where = error, where

    def wake_all(self) -> None:
        """Let every replica that sleeps look again."""
        for run in self.runs:
            run._wake()

    def _watch(self) -> None:
        """The router looks at how far replicas are: now, and at every arrival to come, they are where the clock is."""
        if not self.is_watched:
            self.is_watched = True
            self._cut()

    def _cut(self) -> None:
        if self.is_watched:
            for run in self.runs:
                run._cut()

    # arrivals

    def deliver(self, request: Request, at: float) -> None:
        """Give an arrival to the replica that the router chooses."""
        self._cut()
        number = self._ask("route", routers.route, self._view_of(request, at))
        if number is None:
            return
        self.routed[request.request_id] = number
        try:
            if request.adapter is not None:
                self._migrate(request.adapter, number)
        except BaseException as error:
            self.fail(error, f"replica {number} could not take adapter {request.adapter!r}")
            return
        self.runs[number].take(request, at)
        self._move()

    def expected(self, request: Request, max_tokens: int) -> float:
        """What the predictor of lengths has said to the router, once it is known which replica asks again."""
        name, value = self._predicted
        return value if name == (request.request_id, max_tokens) else self.lengths.predict(request, max_tokens)

    def _view_of(self, request: Request, at: float) -> ArrivalView:
        ledger = self.runs[0].ledger
        room = max(1, ledger.info.max_model_len - request.prompt_tokens)
        most = room if request.max_tokens is None else request.max_tokens
        slo = self.slo.get(request.slo_class, self.slo.get("")) if isinstance(self.slo, Mapping) else self.slo
        state = RequestState(request, len(self.routed), at, most, slo)
        state.expected_output = float(self.lengths.predict(request, most))
        self._predicted = (request.request_id, most), state.expected_output
        state.view = ArrivalView(state, ledger)
        return state.view

    def _start_job(self, job: FinetuneJob) -> None:
        self._cut()
        number = self.fleet.placement.get(job.id)
        if number is None:
            run = self.runs[0]
            shape = run.shapes[job.id]
            total = sum(shape.micro_batch(i).tokens for i in range(shape.first_micro_batch, shape.num_micro_batches))
            number = self._ask("place", routers.place, JobView(JobState(job, shape, run.ledger.info.num_layers, total)))
            if number is None:
                return
        self.placed[job.id] = number
        run = self.runs[number]
        run.book.num_jobs += 1
        try:
            run._start_job(job)
        except ValueError as error:
            self.fail(error, f"replica {number}")

    def _ask(self, verb: str, function: Callable[..., int], subject: Any) -> int | None:
        """The router's answer; None once it has failed."""
        try:
            number = function(self.router, subject, self.views)
            self.fleet.check_number(number, f"{verb}({subject.id!r})")
        except BaseException as error:
            self.fail(error, f"router {policy_label(self.router)} failed")
            return None
        return int(number)

    # adapters

    def _move(self) -> None:
        try:
            for what, name, to in routers.moves(self.router, self.views):
                require(what == "adapter", "moves must be of adapters: requests and jobs stay where they are", what)
                self.fleet.check_number(to, f"the move of {name!r}")
                self._migrate(name, to)
        except BaseException as error:
            self.fail(error, f"router {policy_label(self.router)} failed")

    def _has(self, run: ReplicaRun, name: str) -> bool:
        return name in run.infos and name not in run.ledger.away

    def _migrate(self, name: str, to: int) -> None:
        """Start to copy an adapter that a replica lacks, from the first one that has it; nothing if it has it, or nobody does."""
        run = self.runs[to]
        source = next((other for other in self.runs if self._has(other, name)), None)
        if source is None or self._has(run, name) or run.ledger.away.get(name, math.inf) < math.inf:
            return
        info = source.infos[name]
        run._cut()
        if name in run.infos:
            run.ledger.adapter_infos = run.infos
        else:
            self._adopt(run, info, source)
            run.ledger.adapter_infos = run.executor.adapter_infos
        run.ledger.away[name] = self._carry(info, source, run, is_new=True)

    def published(self, name: str, by: int) -> None:
        """A job has published a version: it goes to the other homes of its adapter."""
        source = self.runs[by]
        info = source.executor.adapter_infos.get(name)
        homes = (self.fleet.homes or {}).get(name)
        for run in self.runs:
            if run is not source and info is not None and (homes is None or run.number in homes_of(homes)):
                self._carry(info, source, run, is_new=False)

    def _carry(self, info: AdapterInfo, source: ReplicaRun, run: ReplicaRun, *, is_new: bool) -> float:
        """Let an adapter arrive at `run` after its migration time; when that is."""
        ready_s = float(self.env.now) + self._migration_s(info, source)

        def bring() -> Any:
            yield self.env.timeout(ready_s - self.env.now)
            run._cut()
            try:
                if is_new:
                    del run.ledger.away[info.name]
                else:
                    self._adopt(run, info, source)
                note = f"version {info.version} from replica {source.number}"
                run.ledger.log(float(self.env.now), "adapter_migrated", info.name, info.name, float(info.bytes), note)
                run._wake()
            except BaseException as error:
                self.fail(error, f"replica {run.number} could not take adapter {info.name!r}")

        self.env.process(bring())
        return ready_s

    def _adopt(self, run: ReplicaRun, info: AdapterInfo, source: ReplicaRun) -> None:
        adopt = getattr(run.executor, "adopt", None)
        if adopt is None:
            raise ValueError(f"an adapter can only go to an executor with adopt(info, source), got {run.executor.info.name!r}")
        adopt(info, source.executor)

    def _migration_s(self, info: AdapterInfo, source: ReplicaRun) -> float:
        given = self.fleet.migration_s
        if given is not None:
            return float(given(info) if callable(given) else given)
        if source.ledger.predictor is None:
            raise ValueError("a migration needs an executor with a predictor, or Fleet(migration_s=seconds)")
        return source.view.adapters[info.name].load_s

    # the result

    def _open_bar(self, progress: bool | None) -> None:
        first = self.runs[0]
        first.requests = self.requests
        first._open_bar(progress)
        for run in self.runs:
            run.bar = first.bar

    def _result(self, interrupted: bool, error: str | None) -> FleetReplay:
        parts = []
        for run in self.runs:
            requests = [r for r in self.requests if self.routed.get(r.request_id) == run.number]
            jobs = [job for job in self.jobs if self.placed.get(job.id) == run.number]
            parts.append(run.part(requests, jobs, interrupted, error))
        return FleetReplay(parts, requests=self.requests, jobs=self.jobs, executor=self.fleet.info, router=policy_label(self.router))
