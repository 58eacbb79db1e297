"""The one serving loop: SimPy processes that bring arrivals to a ledger and its plans to an executor."""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random
from typing import Any, cast

import pandas as pd
import simpy

from workbench.config import FinetuneJob, Provenance, UnknownAdapterError, require
from workbench.core import NOTHING, AdapterInfo, Batch, Executor, JobShape, Request, Row, Segment, StepResult
from workbench.features import Work
from workbench.loop.arrivals import Arrivals
from workbench.loop.checks import check_duration, check_options, check_slo, checked_requests, warn_of_refusals, warn_of_ties
from workbench.loop.clock import Clock, WallClock
from workbench.loop.expected import length_predictor
from workbench.loop.garbage import Garbage
from workbench.loop.jump import Run, is_alone
from workbench.loop.ledger import Ledger
from workbench.loop.options import Options
from workbench.loop.plan import Plan
from workbench.loop.redo import again, redo
from workbench.loop.states import RequestState
from workbench.loop.tape import Tape
from workbench.loop.tiers import eviction_rules
from workbench.loop.views import Oracle, View
from workbench.policy import Policy, policy_label
from workbench.progress import progress_bar
from workbench.results.conservation import ConservationError, check_conservation
from workbench.results.replay import Replay, commit_of_code, versions_of_code
from workbench.results.stream import Stream

MAX_IDLE_TRIES = 100
"""How often a policy may plan nothing in a row while there is work and nothing else will ever happen."""


class ReplayError(RuntimeError):
    """The policy or the executor failed; `replay` holds what was done until then, and the cause is chained."""

    def __init__(self, message: str, replay: Replay) -> None:
        super().__init__(message)
        self.replay = replay

    def __reduce__(self) -> tuple[type["ReplayError"], tuple[str, Replay]]:
        """So that it comes through from another process as what it is."""
        return type(self), (str(self), self.replay)


def done_work(planned: Work, batch: Batch, result: StepResult) -> Work:
    """The features of what a step that stopped early really did: as planned, but for the layers of its backwards."""
    work = planned.copy()
    work.drop_backwards()
    for backward in batch.backwards:
        work.add_backward(replace(backward, num_layers=result.layers_done.get(backward.owner, backward.num_layers)))
    return work


def _checksum(requests: Sequence[Request]) -> str:
    """Of the requests' repr as a tuple, which is not made as a whole."""
    found = hashlib.blake2b(b"(", digest_size=8)
    for k, request in enumerate(requests):
        found.update(f"{', ' if k else ''}{request!r}".encode())
    found.update(b",)" if len(requests) == 1 else b")")
    return found.hexdigest()


class ServingLoop:
    """One replay while it runs."""

    def __init__(
        self,
        trace: Any,
        executor: Executor,
        policy: Policy,
        options: Options,
        arrivals: Arrivals | None = None,
        replica: int = 0,
    ) -> None:
        """`arrivals`: those of a fleet, which gives this replica its requests; None: the trace's own."""
        self.trace, self.executor, self.jobs = trace, executor, options.jobs
        self.seed, self.slo, self.measure, until = options.seed, options.slo, options.measure, options.until
        self.requests = checked_requests(trace)
        self.is_wall, self.overlap, self.planning = options.clock == "wall", options.overlap, options.planning
        check_options(policy, self.jobs, options.clock, self.planning, self.overlap, self.measure, executor)
        check_slo(self.slo, self.requests)
        self.until = until if until is not None else "requests" if self.requests else "jobs"
        require(
            self.until in ("requests", "jobs") or (isinstance(self.until, (int, float)) and self.until > 0),
            "until must be 'requests', 'jobs' or a time above 0 seconds",
            self.until,
        )
        self.stream = None if options.events is None else Stream(options.events)
        self.policy: Policy = copy.deepcopy(policy)
        self.label = policy_label(policy)
        self.where_policy = f"policy {self.label} failed"
        if arrivals is None:
            clock_env = WallClock() if self.is_wall else Clock()
            arrivals = Arrivals(clock_env, self.requests, self.jobs)
        self.arrivals, self.env = arrivals, arrivals.env
        self.garbage = Garbage(often=self.is_wall)
        self.receive: Callable[[Request, float], None] = self._arrive
        self.ledger = Ledger(executor.info, executor.adapter_infos, predictor=executor.predictor, slo=self.slo)
        self.ledger.evict = copy.deepcopy(eviction_rules(options.evict))
        self.simulate: Callable[..., StepResult | float] | None = getattr(executor, "simulate", None)
        self.thread: ThreadPoolExecutor | None = None
        self.ledger.needs_rows = self.simulate is None
        self.ledger.segment = Segment if self.ledger.needs_rows else cast(Any, Row)
        self.can_jump = hasattr(executor, "preview") and isinstance(self.env, Clock) and not self.overlap
        self.lengths = length_predictor(options.lengths, self.seed)
        self.ledger.expected_output = self.lengths.predict
        arrivals.ledgers.append(self.ledger)
        oracle = Oracle(arrivals.to_come) if "oracle" in getattr(policy, "needs", ()) else None
        self.view = View(self.ledger, Random(f"{self.seed}:{replica}" if replica else self.seed), oracle, replica)
        self.shapes: Mapping[str, JobShape] = {}
        self.wake: simpy.Event | None = None
        self.failure: BaseException | None = None
        self.where = "replay"
        self.old_plan: tuple[Plan, float] | None = None
        self.repeating: tuple[Plan, int | None] | None = None
        self.ahead: Run | None = None
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.resolved: dict[str, Request] = {}
        self.bar: Any = None
        self.tape = Tape()
        self.num_polls = 0
        self.names: pd.Index | None = None
        self.known_adapters: dict[str, AdapterInfo] = {}

    # the outside of the loop

    def run(self, progress: bool | None) -> Replay:
        warn_of_ties(self.arrivals.open)
        self.begin()
        interrupted = False
        try:
            for job in self.jobs:
                self.ledger.check_job(job, self.shapes[job.id])
            self._check_adapters()
            if self.stream is not None:
                self.stream.open()
            self._open_bar(progress)
            self._drive()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if self.bar is not None:
                self.bar.close()
            self.close()
        if isinstance(self.failure, KeyboardInterrupt):
            interrupted, self.failure = True, None
        warn_of_refusals(self.tape.refusals, len(self.requests))
        if self.failure is None:
            return self._checked(self._result(interrupted, None))
        message = f"{self.where}: {type(self.failure).__name__}: {self.failure}"
        raise ReplayError(message, self._result(False, message)) from self.failure

    def begin(self) -> None:
        self.shapes = self.tape.shapes = self.executor.begin(self.jobs, seed=self.seed)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.stop(self.env.now)
        self._collect_outputs()
        try:
            self.ledger.close(float(self.env.now))
            self._write(at_end=True)
        finally:
            self.executor.end()

    def _checked(self, result: Replay) -> Replay:
        """The result, once its rows agree with one another. Ctrl-C may fall between two rows of a step: then they need not."""
        if not result.interrupted:
            try:
                check_conservation(result)
            except ConservationError as error:
                raise ReplayError(str(error), result) from error
        return result

    def _check_adapters(self) -> None:
        """A name that no adapter has is a mistake in the trace, not an outcome: it is raised before anything runs."""
        for request in {r.adapter: r for r in reversed(self.requests) if r.adapter is not None}.values():
            try:
                self.executor.admissible(request)
            except UnknownAdapterError:
                raise
            except ValueError:
                continue  # what else is wrong with this one request becomes its outcome

    def _drive(self) -> None:
        env = self.env
        if isinstance(env, WallClock):
            env.sync()
        env.process(self.arrivals.bring_jobs(self._start_job))
        env.process(self.arrivals.bring_requests(self._arrive))
        server = env.process(self._guarded(self._serve()))
        with self.garbage:
            while server.is_alive and self.failure is None:
                env.step()

    def _guarded(self, process: Generator[simpy.Event, Any, None]) -> Generator[simpy.Event, Any, None]:
        """Keep an exception as it is: SimPy would raise a copy of it."""
        try:
            yield from process
        except GeneratorExit:
            raise
        except BaseException as error:
            self.failure = error

    # arrivals

    def _start_job(self, job: FinetuneJob) -> None:
        self._cut()
        self.ledger.add_job(job, self.shapes[job.id], job.arrival_s)
        self.repeating = None
        self._wake()

    def _arrive(self, request: Request, at: float) -> None:
        self._cut()
        try:
            resolved = self.executor.admissible(request)
        except ValueError as error:
            self.tape.refusals[request.request_id] = str(error)
            self.ledger.refuse(request, at, str(error))
        except BaseException as error:
            self.failure, self.where = error, "executor.admissible failed"
            return
        else:
            if self.stream is None or resolved.prompt_tokens != request.prompt_tokens:
                self.resolved[request.request_id] = resolved
            try:
                self.ledger.arrive(resolved, at)
            except Exception as error:
                self.failure, self.where = error, f"the prediction of {request.request_id}'s length failed"
                return
        self._settle()
        self._wake()

    def _wake(self) -> None:
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()

    def _settle(self) -> None:
        """Follow up on requests that ended: outputs, history, the next turn of their session."""
        ended = self.ledger.ended
        if not ended:
            return
        self.ledger.ended = []
        for s in ended:
            if s.phase == "finished":
                self.lengths.learn(s.request, s.generated)
            self._keep_output(s)
            s.view = None  # which holds the state: without a circle both go when nobody looks any more
            self.arrivals.ended(s.id, self.receive)
        if self.bar is not None:
            self.bar.update(len(ended))

    def _keep_output(self, s: RequestState) -> None:
        if s.outputs:
            self.outputs[s.id] = tuple(s.outputs)

    def _collect_outputs(self) -> None:
        for s in self.ledger.requests.values():
            self._keep_output(s)

    # the serving loop

    def _is_over(self) -> bool:
        return self.arrivals.is_over(self.until)

    def _is_pending(self) -> bool:
        """Whether an arrival is still to come by itself."""
        return self.arrivals.is_pending

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        env, ledger = self.env, self.ledger
        # arrivals at time 0 come first
        yield env.timeout(0)
        idle_tries = 0
        while True:
            self.garbage.collect()
            now = float(env.now)
            ledger.now_s = now
            if self._poll(now) or not ledger.host.is_seeded:
                ledger.sync_adapters(now)
            elif ledger.cache is not None:
                ledger.forget_stale()
            if ledger.ended:
                self._settle()
            if self.stream is not None:
                self._write()
            if self._is_over():
                return
            if not ledger.is_possible:
                if not self._is_pending() and not isinstance(self.until, (int, float)):
                    return
                yield from self._sleep(math.inf)
                continue
            plan, plan_s = self._plan()
            if not plan.empty:
                idle_tries = 0
                if self.can_jump and self.repeating is not None and is_alone(plan):
                    yield from self._jump(plan, plan_s)
                else:
                    yield from self._step(plan, plan_s)
                continue
            # an arrival while the policy thought is seen by the next plan, not slept through
            self.wake = env.event()
            if plan_s > 0:
                yield env.timeout(plan_s)
            was_woken, self.wake = self.wake.triggered, None
            has_ended = bool(plan.rejected)
            if plan.changes:
                batch = ledger.apply(plan)
                ledger.commit(batch, StepResult(duration_s=0.0), float(env.now))
                self._settle()
            if has_ended or was_woken:
                idle_tries = 0
            elif plan.wait_until_s is not None:
                yield from self._sleep(plan.wait_until_s)
            elif not ledger.requests and all(j.paused for j in ledger.jobs.values()):
                if not self._is_pending() and not isinstance(self.until, (int, float)):
                    # only paused jobs are left, and the policy has just not resumed them
                    return
                yield from self._sleep(math.inf)
            elif (self._is_pending() or isinstance(self.until, (int, float))) and not plan.changes:
                yield from self._sleep(math.inf)
            else:
                idle_tries += 1
                if idle_tries >= MAX_IDLE_TRIES:
                    self.where = "policy planned nothing"
                    raise RuntimeError(
                        f"{self.label} planned no work in {idle_tries} calls while {len(ledger.requests)} requests and "
                        f"{len(ledger.jobs)} jobs could go on and nothing was to arrive (last reason: {plan.why or 'none given'!r}). "
                        "Plan some of view.running, view.waiting or view.jobs, reject what you refuse, or call plan.wait."
                    )

    def _poll(self, now: float) -> bool:
        """Commands to jobs, and adapters that were loaded, published or unloaded: whether any were."""
        for command in self.executor.poll():
            self.tape.commands.append((self.num_polls, command))
            self.ledger.command(command, now)
            self.repeating = None
        infos = self.ledger.adapter_infos = self.executor.adapter_infos
        known = self.known_adapters
        changed = known != infos
        if changed:
            for name in [*infos, *(n for n in known if n not in infos)]:
                if known.get(name) != infos.get(name):
                    self.tape.adapters.append((self.num_polls, name, infos.get(name)))
            self.known_adapters = dict(infos)
        self.num_polls += 1
        return changed

    def _sleep(self, until_s: float) -> Generator[simpy.Event, Any, None]:
        """Until something arrives, or `until_s`, or the end that was asked for."""
        if isinstance(self.until, (int, float)):
            until_s = min(until_s, self.until)
        self.wake = self.env.event()
        if until_s < math.inf:
            yield self.wake | self.env.timeout(max(0.0, until_s - self.env.now))
        else:
            yield self.wake
        self.wake = None

    def _plan(self) -> tuple[Plan, float]:
        """The next plan, and what its making adds to the clock."""
        repeated = self._repeat()
        if repeated is not None:
            return repeated, 0.0
        if not self.overlap:
            plan, plan_s = self._ask()
        elif self.old_plan is not None:
            old, plan_s = self.old_plan
            self.old_plan = None
            plan = redo(old, self.ledger)
            if plan.empty:
                plan, plan_s = self._ask()
        else:
            plan, plan_s = self._ask()
        self.repeating = (plan, plan.repeat_steps) if plan.repeat_steps != 0 and not plan.empty and not self.overlap else None
        return plan, plan_s

    def _repeat(self) -> Plan | None:
        if self.repeating is None:
            return None
        old, left = self.repeating
        self.repeating = None
        ledger = self.ledger
        if left == 0 or ledger._arrived or ledger._finished or old.loads or old.preempted:
            return None
        plan = again(old, ledger)
        if plan is None:
            return None
        self.repeating = (plan, None if left is None else left - 1)
        return plan

    def _ask(self) -> tuple[Plan, float]:
        """Call the policy on the ledger as it is."""
        self.where = self.where_policy
        begin = time.perf_counter()
        plan = Plan(self.ledger)
        self.policy(self.view, plan)
        took_s = time.perf_counter() - begin
        self.ledger.planned()
        self.where = "replay"
        if isinstance(self.planning, str):
            planning_s = getattr(self.executor, "planning_s", None)
            plan_s = took_s if planning_s is None else planning_s(len(self.tape.plan_times_s))
        else:
            plan_s = float(self.planning)
        self.tape.plan_times_s.append(plan_s)
        return plan, plan_s

    def _step(self, plan: Plan, plan_s: float) -> Generator[simpy.Event, Any, None]:
        env, ledger = self.env, self.ledger
        start_s = float(env.now)
        accepted_s = start_s + plan_s
        predicted_s = plan.predicted_s
        num_running = len(ledger.running)
        counts = (len(ledger.requests) - num_running, num_running, ledger.blocks.num_free)
        ahead = self._ask() if self.overlap else None
        batch = ledger.apply(plan)
        stop_s = plan.stop_after_s
        if plan.stops_on_arrival:
            stop_s = min(stop_s, max(0.0, self.arrivals.next_s - accepted_s))
        if stop_s < math.inf:
            batch = replace(batch, stop_after_s=stop_s)
        ended = None
        if self.thread is not None:
            # arrivals and other replicas go on; a step that fails raises below, when its result is asked for
            assert isinstance(env, WallClock)
            ended = yield env.run_in(self.thread, self.executor.step, batch)
        try:
            self.where = "executor failed"
            if ended is not None:
                reported: StepResult | float = ended.result()
            elif self.simulate is None:
                reported = self.executor.step(batch)
            else:
                reported = self.simulate(plan.work, batch, predicted_s if ledger.predictor is self.executor else None)
            result, lasted_s = (reported, reported.duration_s) if isinstance(reported, StepResult) else (NOTHING, reported)
            check_duration(lasted_s)
        except BaseException:
            ledger.rollback(batch)
            raise
        end_s = start_s + (plan_s + lasted_s)
        try:
            if isinstance(env, Clock):
                if not env.is_free(end_s):
                    yield env.at(end_s)
            else:
                assert isinstance(env, WallClock)
                yield env.timeout(max(end_s - env.now, env.wall_s - env.now, 0.0))
                end_s = float(env.now)
            ledger.commit(batch, result, end_s, accepted_s=accepted_s)
        except RuntimeError:
            ledger.rollback(batch)
            raise
        self.where = "replay"
        self._record(batch, reported, plan, (start_s, end_s, plan_s, predicted_s), counts)
        if ledger.ended:
            self._settle()
        if ahead is not None:
            self.old_plan = (ahead[0], max(0.0, ahead[1] - lasted_s))

    def _write(self, *, at_end: bool = False) -> None:
        """Let the rows go to where they are wanted, once there are many."""
        stream, history = self.stream, self.ledger.history
        if stream is not None and stream.is_open and (at_end or stream.is_due(history)):
            if self.names is None:
                self.names = pd.Index([r.request_id for r in self.requests], dtype=object)
            stream.take(history, self.ledger.predictor, self.executor.info.num_layers, self.names)
            if at_end:
                stream.close()

    def _jump(self, plan: Plan, plan_s: float) -> Generator[simpy.Event, Any, None]:
        """The step of a plan that is to be repeated, and its repetitions as far as nothing happens."""
        clock = self.env
        assert isinstance(clock, Clock) and self.repeating is not None
        left = self.repeating[1]
        most = math.inf if left is None else left + 1
        run = self.ahead = Run(self.ledger, self.executor, plan, float(clock.now), plan_s, most, self._horizon_s())
        if not clock.is_free(run.end_s):
            run.event = clock.at(run.end_s)
            yield run.event
        run.finish()
        self.ahead = None
        # a job that came meanwhile ends the repetition
        if self.repeating is not None:
            self.repeating = (plan, None if left is None else left + 1 - run.num)
        self.num_polls += run.num - 1
        self._settle()

    def _cut(self) -> None:
        """Something comes from outside: the ledger gets to where it would be by now."""
        if self.ahead is not None:
            assert isinstance(self.env, Clock)
            self.ahead.cut(self.env.now, self.env)

    def _horizon_s(self) -> float:
        """Before this time nothing reaches the ledger from outside."""
        until_s = self.until if isinstance(self.until, (int, float)) else math.inf
        return min(self.env.peek(), until_s)

    def _record(
        self, batch: Batch, result: StepResult | float, plan: Plan, times: tuple[float, float, float, float], counts: tuple[int, int, int]
    ) -> None:
        start_s, _, plan_s, predicted_s = times
        done = None
        if isinstance(result, StepResult) and result.stopped_early:
            done = done_work(plan.work, batch, result).values
        ledger = self.ledger
        ledger.history.add_step(
            batch, result, times, counts, plan.work.values, plan.queue_why, done=done, has_rows=ledger.needs_rows or plan.decodes_some
        )
        ledger.last, ledger.last_plan = (batch, result, start_s, predicted_s, plan_s), plan

    # the result

    def _open_bar(self, progress: bool | None) -> None:
        if progress is False or not self.requests:
            return
        self.bar = progress_bar(len(self.requests), self.label, "req", progress)

    def _result(self, interrupted: bool, error: str | None) -> Replay:
        info = self.executor.info
        checksum = getattr(self.trace, "checksum", None) or _checksum(self.requests)
        settings = {
            "clock": "wall" if self.is_wall else "virtual",
            "planning": self.planning,
            "overlap": self.overlap,
            "lengths": self.lengths.name,
            "evict": {tier: policy_label(rule) for tier, rule in self.ledger.evict.items()},
            "until": self.until,
            "loop": "closed" if self.arrivals.is_closed_loop else "open",
            "trace": getattr(self.trace, "name", "requests"),
            "notes": list(getattr(self.trace, "notes", ())),
            "redrawn": list(getattr(self.trace, "redrawn", ())),
        }
        return Replay(
            history=self.stream or self.ledger.history,
            outputs=self.outputs,
            trace_requests=[self.resolved.get(r.request_id, r) for r in self.requests],
            finetune_jobs=self.jobs,
            executor=info,
            provenance=Provenance(
                commit=commit_of_code(),
                versions=versions_of_code(),
                device=info.device,
                seed=self.seed,
                policy=self.label,
                trace_checksum=checksum,
            ),
            settings=settings,
            tape=self.tape,
            predictor=self.ledger.predictor,
            slo=self.slo,
            measure=self.measure,
            interrupted=interrupted,
            error=error,
        )
