"""What many policies do alike: serve what is resident, begin new requests one by one, share training among jobs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import compress, product
from math import inf

from workbench.features import INDEX
from workbench.policy import JobView, Plan, RequestView, StepView, View, Why

ELSEWHERE: tuple[Why, ...] = ("slots", "batch_adapters", "adapter_loading")
"""Reasons that hold for one adapter only: a request for another one may still fit."""


FINETUNE, EVALUATE, PREFILL, DECODE, BACKWARD = (
    INDEX[name] for name in ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens", "backward_layers")
)
PARTS = ("backward", "decode", "forward", "prefill")  # of a step
KINDS = {has: "+".join(compress(PARTS, has)) for has in product((False, True), repeat=len(PARTS))}


def is_resident(request: RequestView) -> bool:
    """Whether it holds KV blocks: it runs, or its prefill has begun."""
    return request.blocks > 0


def not_begun(view: View) -> list[RequestView]:
    """Waiting requests that hold nothing, preempted ones first, each by arrival."""
    return [r for r in view.waiting if not is_resident(r)]


def residents(view: View) -> list[RequestView]:
    return [*view.running, *(r for r in view.waiting if is_resident(r))]


def adapters_of(requests: Iterable[RequestView]) -> set[str]:
    """Distinct adapters; base-only requests have none."""
    return {r.adapter for r in requests if r.adapter is not None}


def continue_residents(view: View, plan: Plan, budget_tokens: int | None = None, *, within_s: float = inf) -> int:
    """Decode everything that runs, then go on with the prefills that were begun; the tokens of the budget left for new requests.

    `budget_tokens=None` is the executor's own limit, and so is any budget on an executor that cannot cut a prefill: a longer one
    could never begin there. `within_s` bounds the prefills, and only where something decodes: nobody else waits for a next token.
    """
    has_budget = budget_tokens is not None and "chunk" in view.can
    budget = min(budget_tokens, view.limits.tokens) if has_budget and budget_tokens is not None else view.limits.tokens
    left = max(0, budget - len(plan.decode(view.running)))
    begun = [r for r in view.waiting if is_resident(r)]
    bound = within_s if view.running else inf
    return left - plan.prefill(begun, left, whole="chunk" not in view.can, skip=("batch_adapters",), within_s=bound)


def begin(view: View, plan: Plan, request: RequestView, left: int, *, within_s: float = inf) -> int:
    """Begin one request with at most `left` tokens. The tokens taken; `plan.why` says why not all of it."""
    bound = within_s if view.running else inf
    return plan.prefill(request, left, whole="chunk" not in view.can, within_s=bound)


def begin_in_order(view: View, plan: Plan, requests: Iterable[RequestView], left: int, *, within_s: float = inf) -> int:
    """Begin requests in the given order until one does not fit, over those whose adapter alone has no room. The tokens left."""
    bound = within_s if view.running else inf
    return left - plan.prefill(requests, left, whole="chunk" not in view.can, skip=ELSEWHERE, within_s=bound)


def repeat_decodes(view: View, plan: Plan) -> None:
    """Let the plan be repeated where all that there is decodes: it would be the same until somebody arrives or ends."""
    if not (view.waiting or view.jobs):
        plan.repeat()


def in_turn(view: View) -> list[JobView]:
    """The jobs that may train: the one furthest behind by committed tokens per weight first."""
    jobs = [job for job in view.jobs if job.phase != "paused"]
    return jobs if len(jobs) < 2 else sorted(jobs, key=lambda j: (j.committed_tokens / j.weight, j.arrival_s, j.id))


def train_in_turn(view: View, plan: Plan, *, within_s: float = inf) -> None:
    """Whatever is due of each job, as far as the predicted duration of the step allows.

    With no request anywhere the first job goes on at all events: a bound that not even one layer keeps would stop it for ever.
    """
    jobs = in_turn(view)
    for job in jobs:
        plan.train(job, within_s=within_s)
    if jobs and plan.empty and not (view.running or view.waiting):
        plan.train(jobs[0])


GUESS = 0.25  # of a target: the excess of a class of steps of which none was seen


@dataclass
class StepErrors:
    """How steps differ from their predictions: the usual ratio by kind of step, and the largest excess over that of late.

    A kind is what a step holds ("decode+forward"). `excess_s` is kept for steps that train, that prefill without, and that only decode;
    in proportion for steps longer than the target in question, and at most that target. It begins as a guess, `GUESS` of the target, which
    is forgotten as slowly as what was seen: the steps that are far too long are one in hundreds, and show late.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    excess_s: dict[str, float] = field(default_factory=dict)
    plan_s: float = 0.0
    kind: str = ""
    predicted_s: float = 0.0

    def planned(self, plan: Plan) -> None:
        """Note the step that `learn` will be told of next."""
        self.kind, self.predicted_s = kind_of(plan), plan.predicted_s

    def learn(self, step: StepView, target_s: float, memory: int) -> str:
        """Learn from the step that was planned last, forgetting excesses by half in `memory` steps; its kind."""
        self.plan_s += 0.1 * (step.plan_s - self.plan_s)
        kept = 0.5 ** (1 / memory)
        for name in self.excess_s:
            self.excess_s[name] *= kept
        if self.kind and self.predicted_s > 0 and not step.stopped_early:
            ratio = step.duration_s / self.predicted_s
            usual = self.ratios.setdefault(self.kind, ratio)
            usual_s, name = usual * self.predicted_s, _class_of(self.kind)
            excess_s = min((step.duration_s - usual_s) * min(1.0, target_s / usual_s), target_s)
            self.excess_s[name] = max(self.excess_s.get(name, GUESS * target_s), excess_s)
            # bounded, so that one outlier moves it little
            self.ratios[self.kind] = usual + 0.1 * min(max(ratio - usual, -0.2 * usual), 0.2 * usual)
        return self.kind

    def usually(self, plan: Plan, phase: str, seconds: float) -> float:
        """The predicted duration of the plan with work of this phase in it that, planning included, usually lasts so long."""
        return max(0.0, seconds - self.plan_s) / self.ratios.get(kind_of(plan, phase), 1.0)

    def surely(self, plan: Plan, phase: str, seconds: float, target_s: float, margin: float) -> float:
        """The same of a plan that is over after so long even if it exceeds that by `margin` times as much as any did of late."""
        name = "prefill" if phase == "prefill" else "train"
        return max(0.0, self.left_s(name, seconds, target_s, margin)) / self.ratios.get(kind_of(plan, phase), 1.0)

    def left_s(self, name: str, seconds: float, target_s: float, margin: float) -> float:
        """What `margin` times the excess of a class leaves of so many seconds, planning taken off."""
        return seconds - self.plan_s - margin * self.excess_s.get(name, GUESS * target_s)


def kind_of(plan: Plan, phase: str = "") -> str:
    """What a step holds, with work of this phase of a job, or a prefill, added."""
    held = plan.work.values
    forward = held[FINETUNE] or held[EVALUATE] or phase in ("forward", "evaluate")
    parts = (held[BACKWARD] or phase == "backward", held[DECODE] or phase == "decode", forward, held[PREFILL] or phase == "prefill")
    return KINDS[tuple(map(bool, parts))]


def _class_of(kind: str) -> str:
    return "train" if "ward" in kind else "prefill" if "prefill" in kind else "decode"
