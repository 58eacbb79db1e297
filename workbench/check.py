"""Does a policy keep the rules? It is run on a synthetic executor over small workloads built to bring out what goes wrong."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Batch, ExecutorInfo, Request
from workbench.loop.plan import Plan
from workbench.loop.plan_accounts import PlanError
from workbench.loop.views import RequestView, View
from workbench.policy import Policy, policy_label
from workbench.replay import Replay, ReplayError, replay
from workbench.testing import FixedCost, FixedShape, fixed_info

FindingKind = Literal[
    "raises", "named twice", "exceeds budgets", "starves a request", "starves a job", "plans nothing", "hidden state", "never ends"
]
MAX_OVERTAKEN = 40
"""A request starves when so many later ones end before it begins."""


@dataclass(frozen=True)
class Finding:
    """One broken rule: what, on which workload, at which step (None: over the whole run), and in words."""

    kind: FindingKind
    workload: str
    step: int | None
    message: str

    def __str__(self) -> str:
        where = self.workload if self.step is None else f"{self.workload}, step {self.step}"
        return f"{self.kind} ({where}): {self.message}"


@dataclass(frozen=True)
class Report:
    """What `check_policy` found. `notes` are no faults: a policy may choose never to fine-tune."""

    policy: str
    workloads: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of rule that were broken."""
        return frozenset(f.kind for f in self.findings)

    def __repr__(self) -> str:
        head = f"{self.policy}: " + ("no finding" if self.ok else f"{len(self.findings)} finding(s)")
        lines = [f"{head} on {len(self.workloads)} workloads ({', '.join(self.workloads)})"]
        return "\n".join(lines + [f"  - {f}" for f in self.findings] + [f"  note: {n}" for n in self.notes])


@dataclass(frozen=True)
class Workload:
    """Requests and jobs with the limits that they meet."""

    name: str
    info: ExecutorInfo
    requests: tuple[Request, ...] = ()
    num_jobs: int = 0
    adapters: dict[str, int] = field(default_factory=lambda: {"a": 8, "b": 8, "c": 16, "d": 16, "e": 32, "f": 64})

    @property
    def jobs(self) -> tuple[FinetuneJob, ...]:
        data = RandomTokens(examples=2, tokens=64)
        return tuple(FinetuneJob(adapter=f"trained-{i}", data=data, steps=1000, publish="never") for i in range(self.num_jobs))


def check_policy(policy: Policy, *, workloads: Iterable[Workload] | None = None, max_steps: int = 3000) -> Report:
    """Run `policy` over small workloads and report what it does wrong; it prints as text.

    Found: exceptions, a request or job named twice, amounts beyond the limits and tampering with a plan, requests overtaken
    without end, a job left standing beside another, planning nothing for ever, and plans that differ when recorded views are shown to a
    fresh copy (state outside the policy's own fields).
    """
    label = policy_label(policy)
    findings: list[Finding] = []
    notes: list[str] = []
    chosen = tuple(standard_workloads() if workloads is None else workloads)
    trains = False
    for workload in chosen:
        if workload.num_jobs and not workload.requests and not trains:
            continue
        first = _Check(policy, workload, max_steps)
        first.run()
        findings += first.findings
        trains = trains or (first.result is not None and not {"finetune", "backward"}.isdisjoint(first.result.work["kind"]))
        if not first.findings:
            findings += _differences(first, policy, workload, max_steps)
    if not trains and any(w.num_jobs for w in chosen):
        notes.append("it never fine-tunes")
    return Report(label, tuple(w.name for w in chosen), tuple(findings), tuple(notes))


def standard_workloads() -> tuple[Workload, ...]:
    """A burst, a steady mix beside two jobs, little KV memory, more adapters than slots, overload, and jobs alone."""
    tight = fixed_info(num_blocks=16, max_model_len=160, max_requests=6)
    few_slots = fixed_info(num_slots=2, max_batch_adapters=2)
    return (
        Workload("burst", fixed_info(), _requests(24, 0.0, seed=1), 0),
        Workload("steady with jobs", fixed_info(), _requests(50, 0.06, seed=2), 2),
        Workload("tight memory", tight, _requests(30, 0.01, seed=3, longest=60), 1),
        Workload("more adapters than slots", few_slots, _requests(40, 0.02, seed=4, adapters="abcdef"), 0),
        Workload("overload", fixed_info(max_requests=4), _requests(110, 0.008, seed=5), 0),
        Workload("jobs alone", fixed_info(), (), 2),
    )


def _requests(num: int, gap_s: float, *, seed: int, longest: int = 120, adapters: str = "abc") -> tuple[Request, ...]:
    rng, now, requests = Random(seed), 0.0, []
    for i in range(num):
        now += rng.expovariate(1 / gap_s) if gap_s else 0.0
        adapter = rng.choice([None, *adapters])
        lengths = rng.randint(1, longest), rng.randint(1, 40)
        requests.append(Request(request_id=f"r{i}", arrival_s=now, prompt_tokens=lengths[0], output_tokens=lengths[1], adapter=adapter))
    return tuple(requests)


class _TooLong(Exception):
    pass


class _Check:
    """One run of a policy on one workload, every plan looked at before it is applied."""

    def __init__(self, policy: Policy, workload: Workload, max_steps: int) -> None:
        self.policy, self.workload, self.max_steps = copy.deepcopy(policy), workload, max_steps
        self.findings: list[Finding] = []
        self.result: Replay | None = None
        self.step = 0
        self.needs = getattr(policy, "needs", frozenset())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Check":
        # the copy of the policy was taken already; findings have to come back here
        return self

    def __call__(self, view: View, plan: Plan) -> None:
        self.step = view.step
        watched = _WatchedPlan(plan, self)
        self.policy(view, watched)
        self._audit(watched)
        for name in Plan.__mro__[1].__slots__:  # type: ignore[attr-defined]
            setattr(plan, name, getattr(watched, name))

    def _audit(self, plan: Plan) -> None:
        """Count the plan again from what it holds, in case it was changed past its verbs."""
        ledger, info = plan._ledger, plan._ledger.info
        chunks = plan.finetunes + plan.evaluates
        tokens = len(plan.decodes) + sum(n for _, n, _ in plan.prefills) + sum(n for _, n in chunks)
        new = sum(s.capacity < s.context for s in plan.decodes)
        new += sum(-(-s.context // info.block_tokens) - len(plan.found.get(s.id, ())) for s, _, _ in plan.prefills if not s.blocks)
        gone = plan.preempted.keys() | plan.rejected.keys()
        held = {block for s in ledger.resident_states() if s.id not in gone for block in s.blocks}
        blocks = new + len(held.union(*plan.found.values()))
        owners = [s.id for s in plan.decodes] + [s.id for s, _, _ in plan.prefills] + [j.id for j, _ in chunks + plan.backwards]
        if tokens > info.max_batch_tokens:
            self.add("exceeds budgets", f"the plan holds {tokens} tokens, max_batch_tokens is {info.max_batch_tokens}")
        if blocks > info.num_blocks:
            self.add("exceeds budgets", f"requests would hold {blocks} blocks, the pool has {info.num_blocks}")
        if len(set(owners)) < len(owners):
            self.add("named twice", f"the plan names {max(owners, key=owners.count)!r} twice")
        if self.findings:
            raise _TooLong

    def add(self, kind: FindingKind, message: str) -> None:
        if kind not in {f.kind for f in self.findings}:
            self.findings.append(Finding(kind, self.workload.name, self.step, message))

    def run(self) -> None:
        workload, jobs = self.workload, self.workload.jobs
        # a job alone has to end: 20 micro-batches show what there is to see
        shapes = {job.id: FixedShape((64, 64), 20 if not workload.requests else self.max_steps, 2) for job in jobs}
        executor = FixedCost(info=workload.info, adapters=workload.adapters, shapes=shapes, fails=self._limit)
        try:
            self.result = replay(workload.requests, executor=executor, policy=self, jobs=jobs, planning=0.0, progress=False)
        except ReplayError as error:
            self.result = error.replay
            self._explain(error)
        except RecursionError as error:
            self.add("raises", repr(error))
        if not self.findings:
            self._look_for_starvation()

    def _limit(self, batch: Batch) -> None:
        if batch.step >= self.max_steps:
            raise _TooLong

    def _explain(self, error: ReplayError) -> None:
        cause = error.__cause__
        if isinstance(cause, _TooLong):
            if not self.findings:
                self._look_for_starvation()
            if not self.findings:
                self.add("never ends", f"{self.max_steps} steps were not enough for {len(self.workload.requests)} requests")
        elif isinstance(cause, PlanError) and "twice" in str(cause):
            self.add("named twice", str(cause))
        elif "planned nothing" in str(error):
            self._look_for_starvation()
            self.add("plans nothing", str(cause))
        else:
            self.add("raises", f"{type(cause).__name__}: {cause}")

    def _look_for_starvation(self) -> None:
        result = self.result
        if result is None or not len(result.events):
            return
        events = result.events
        arrived, begun, ended = ({} for _ in range(3))
        for time_s, kind, owner in zip(events["time_s"], events["kind"], events["owner"], strict=True):
            place = {"arrived": arrived, "scheduled": begun, "rejected": begun, "finished": ended}.get(kind)
            if place is not None:
                place.setdefault(owner, time_s)
        for owner, at in arrived.items():
            until = begun.get(owner, float("inf"))
            overtakers = sum(arrived[o] > at and t < until for o, t in ended.items())
            never = owner not in begun and len(ended) > 0 and result.error is not None
            if overtakers > MAX_OVERTAKEN or never:
                what = "never began" if owner not in begun else f"waited {until - at:.3f} s"
                self.add("starves a request", f"{owner!r} {what}, while {overtakers} requests that came later were served")
                break
        committed: dict[str, float] = dict(zip(result.jobs.index, result.jobs["committed_tokens"], strict=True))
        if len(committed) < 2:
            return
        least, most = min(committed, key=lambda j: committed[j]), max(committed, key=lambda j: committed[j])
        if committed[least] == 0 and committed[most] >= 10 * 128:
            self.add("starves a job", f"{least!r} committed nothing, {most!r} {committed[most]:.0f} tokens")


class _WatchedPlan(Plan):
    """A plan that notes explicit amounts which no step could hold."""

    __slots__ = ("_check",)

    def __init__(self, plan: Plan, check: _Check) -> None:
        super().__init__(plan._ledger)
        self._check = check

    def copy(self) -> Any:
        other = super().copy()
        other._check = self._check
        return other

    def _watch(self, verb: str, amount: int | None, most: int, unit: str) -> None:
        if amount is not None and amount > most:
            self._check.add("exceeds budgets", f"{verb} asked for {amount} {unit}, a step holds {most}")

    def prefill(self, requests: RequestView | Iterable[RequestView], tokens: int | None = None, **options: Any) -> int:
        self._watch("prefill", tokens, self._ledger.info.max_batch_tokens, "tokens")
        return super().prefill(requests, tokens, **options)

    def finetune(self, job: Any, tokens: int | None = None, **options: Any) -> int:
        self._watch("finetune", tokens, self._ledger.info.max_batch_tokens, "tokens")
        return super().finetune(job, tokens, **options)

    def evaluate(self, job: Any, tokens: int | None = None, **options: Any) -> int:
        self._watch("evaluate", tokens, self._ledger.info.max_batch_tokens, "tokens")
        return super().evaluate(job, tokens, **options)

    def backward(self, job: Any, num_layers: int | None = None, **options: Any) -> int:
        self._watch("backward", num_layers, self._ledger.info.num_layers, "layers")
        return super().backward(job, num_layers, **options)


def _differences(first: _Check, policy: Policy, workload: Workload, max_steps: int) -> list[Finding]:
    """Show the recorded views to fresh copies: up to the first plan that differs, the views are the same as then.

    Several times and for different numbers of steps, so that a hidden counter does not happen to stand where it stood.
    """
    if first.result is None:
        return []
    for steps in (max_steps, 7, 13, 30):
        again = _Check(policy, workload, steps)
        again.run()
        then, now = _work_below(first.result, steps), _work_below(again.result, steps)
        if then == now:
            continue
        differing = next((a for a, b in zip(then, now, strict=False) if a != b), max(then, now, key=len)[min(len(then), len(now)) - 1])
        message = (
            f"a fresh copy of the policy planned otherwise from the same view (around {differing[1]!r}): its plans depend on "
            "something outside its own fields. Keep state in fields, and draw from view.rng."
        )
        return [Finding("hidden state", workload.name, int(differing[0]), message)]
    return []


def _work_below(result: Replay | None, steps: int) -> list[tuple[Any, ...]]:
    if result is None:
        return []
    work = result.work
    columns = ["step", "owner", "kind", "start", "tokens", "adapter", "version"]
    return list(work.loc[work["step"] < steps, columns].itertuples(index=False, name=None))
