"""Sprint and rest: decode until everybody can bear one late token, then train until the first of them needs the device again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from workbench.policies.common import ELSEWHERE, StepErrors, in_turn, is_resident, repeat_decodes
from workbench.policy import JobView, Plan, RequestView, View

RECOUNT_STEPS = 8
FORWARD_RIDES = 0.85
"""What a decode step costs beside training, in the mean, as a share of what it costs alone: forward rows read the weights for both."""


@dataclass
class SLOSlack:
    """Sprints of decode steps without training, and rests of training without decodes, as long as the targets of all who are there allow.

    A token target at quantile q forgives a request one late gap in 1 / (1 - q). A sprint decodes, and nothing else, until everybody who
    runs has such a gap to spend. In the rest that follows, one gap for each, jobs train in whole pieces. It ends when somebody falls behind
    the pace of its targets (first token + i * target: nobody who reads at that pace sees it; `pace=False` leaves this out for gap
    targets), or when the first of those who arrived meanwhile is due, less `reserve` of its TTFT target and the time to prefill them all.
    That happens at the rest's end, all but the last token of each, so that their first tokens come together and no gap holds a prefill.

    Where arrivals cannot be held that long (targets of TTFT that are short beside the gaps', more residents than half of the places), it
    rolls: every step decodes, prefills what waits, and trains up to the tightest gap target; while some find no place, only as long as
    lets places become free in time. Steps last as planned only in the mean: predictions are corrected by the ratio of measured to predicted of
    their kind of step, and `margin` times the largest excess of late is kept in reserve, which forgets half of it every `memory` steps.

    Requests without a gap target have `token_s` per token, those without one for the first token `first_s`. A job without progress for
    `alive_s` gets one layer or `alive_tokens` tokens at all events. Jobs take turns by committed tokens.
    Source: ours. The pace is the token delivery timeline of Andes (arXiv 2404.16283).
    """

    token_s: float = 0.05
    first_s: float = 1.0
    reserve: float = 0.1
    pace: bool = True
    margin: float = 2.0
    memory: int = 1024
    alive_s: float = 10.0
    alive_tokens: int = 32
    errors: StepErrors = field(default_factory=StepErrors, repr=False)
    late: dict[str, int] = field(default_factory=dict, repr=False)
    resting: bool = field(default=False, repr=False)
    rest_until_s: float = field(default=inf, repr=False)
    held: bool = field(default=False, repr=False)
    rolls_until_s: float = field(default=0.0, repr=False)
    steps_left: float = field(default=0.0, repr=False)
    step_s: float = field(default=0.0, repr=False)
    decoded_s: float = field(default=0.0, repr=False)
    target_s: float = field(default=inf, repr=False)
    tightest_s: float = field(default=inf, repr=False)
    prefill_token_s: float = field(default=0.0, repr=False)
    leaving: float = field(default=0.0, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        self.learn(view)
        jobs = in_turn(view)
        holds = self.holds(view, jobs)
        if not self.resting and holds and self.can_rest(view):
            self.resting = True
            self.rest_until_s = min((self.enough_s(view, r) for r in view.running), default=inf)
        rests = self.resting
        if not (rests and self.rest(view, plan, jobs)):
            self.serve(view, plan, jobs, holds, rests)
        self.errors.planned(plan)

    # when

    def holds(self, view: View, jobs: Sequence[JobView]) -> bool:
        """Whether to sprint and rest: nobody is pressed, and it decodes in fewer steps a second than steps with training in them could."""
        if not self.held and view.now_s >= self.rolls_until_s and self.steps_left <= 0:
            gaps = max(map(self.gaps_per_late, view.running[:1]), default=1.0)
            cycle_s = min((1 - self.reserve) * self.tightest_s, gaps * self.target_s if self.pace else inf)
            step_s = self.errors.within(self.target_s, "train", self.target_s, self.margin)
            self.held = gaps * step_s < cycle_s
            self.steps_left = 0.0 if self.held else gaps
        return self.held and bool(jobs)

    def roll(self, view: View) -> None:
        self.held, self.rolls_until_s = False, view.now_s + 2 * min(self.tightest_s, 10.0)

    def can_rest(self, view: View) -> bool:
        """Whether nobody who runs misses its token target by one late gap; counted anew every few steps."""
        if self.steps_left <= 0 or view.step % RECOUNT_STEPS == 0:
            self.steps_left = max((self.steps_to_spare(r) for r in view.running), default=0.0)
        return self.steps_left <= 0

    def gaps_per_late(self, request: RequestView) -> float:
        slo = request.slo
        return 1.0 if slo is None or slo.itl_s is None else 1.0 / (1.0 - slo.itl_quantile + 1e-12)

    def steps_to_spare(self, request: RequestView) -> float:
        """How many gaps it needs until one more of them may be late."""
        slo = request.slo
        if slo is None or slo.itl_s is None:
            return 0.0
        late, gaps = self.late.get(request.id, 0), self.gaps_per_late(request)
        # more late gaps than its tokens forgive: taken for lost
        return 0.0 if late * gaps > request.generated else (late + 1) * gaps - request.generated

    def enough_s(self, view: View, request: RequestView) -> float:
        """Until when it has tokens enough, by the pace of its targets."""
        slo, first_s = request.slo, request.first_token_s
        assert first_s is not None
        gap_s = self.token_s if slo is None else slo.tpot_s or (slo.itl_s if self.pace else inf) or self.token_s
        end = inf if request.finish_by_s == inf else request.finish_by_s - view.remaining_s(request)
        return min(end, first_s + request.generated * gap_s)

    def begin_by_s(self, request: RequestView) -> float:
        """When its first token should be there; at once after a preemption."""
        if request.first_token_s is not None:
            return request.first_token_s
        return request.arrival_s + (1 - self.reserve) * self.first_target_s(request)

    def first_target_s(self, request: RequestView) -> float:
        return self.first_s if request.slo is None or request.slo.ttft_s is None else request.slo.ttft_s

    def gap_target_s(self, request: RequestView) -> float:
        return self.token_s if request.slo is None else request.slo.itl_s or request.slo.tpot_s or self.token_s

    def prefilling_s(self, view: View) -> float:
        """How long the prefills of all who wait will take, as measured lately."""
        if not view.waiting:
            return 0.0
        if not self.prefill_token_s:
            longest = max(view.waiting, key=lambda r: r.prefill_left)
            self.prefill_token_s = view.prefill_s(longest) / max(1, longest.prefill_left)
        return 1.2 * self.prefill_token_s * sum(r.prefill_left for r in view.waiting) + self.token_s

    # what

    def rest(self, view: View, plan: Plan, jobs: Sequence[JobView]) -> bool:
        """Train, and prefill at the end; False where a step of a sprint should follow at once."""
        if not (view.running or view.waiting):
            if "safepoint" in view.can:
                plan.stop_on_arrival()
            left_s = 0.2 * self.tightest_s if self.tightest_s < inf else self.first_s
        else:
            first = min(map(self.begin_by_s, view.waiting), default=inf)
            left_s = min(first, self.rest_until_s) - self.prefilling_s(view) - view.now_s
            if len(view.waiting) >= view.free.requests:
                left_s = 0.0
        for job in jobs if left_s > 0 else ():
            can_stop = plan.stops_on_arrival and job.phase == "backward"
            plan.train(job, within_s=inf if can_stop else self.errors.unbiased(plan, job.phase, left_s))
        if plan.empty and "chunk" in view.can:
            self.rest_until_s = -inf
            begin = [r for r in view.waiting if r.prefill_left > 1]
            for request in sorted(begin, key=lambda r: (not is_resident(r), self.begin_by_s(r))):
                asked = request.prefill_left - 1
                if plan.prefill(request, asked) < asked and plan.why not in ELSEWHERE:
                    break
        self.resting = not plan.empty
        return self.resting

    def serve(self, view: View, plan: Plan, jobs: Sequence[JobView], holds: bool, begins: bool) -> None:
        """One step of a sprint, or of rolling."""
        waits_s = view.now_s - self.decoded_s if view.running else 0.0
        plan.decode(view.running)
        waiting = view.waiting
        if begins and "chunk" in view.can:
            plan.prefill([r for r in waiting if is_resident(r) and r.prefill_left == 1], skip=ELSEWHERE)
        elif waiting and (begins or not (holds and self.can_wait(view))):
            if holds and not begins:
                self.roll(view)
                holds = False
            bound = max(self.errors.bound(plan, "prefill", self.target_s - waits_s, self.target_s, self.margin), 0.75 * self.target_s) if view.running and waits_s < 2 * self.target_s else inf
            order = sorted(waiting, key=lambda r: (not is_resident(r), self.begin_by_s(r)))
            plan.prefill(order, whole="chunk" not in view.can, skip=ELSEWHERE, within_s=bound)
        for job in jobs:
            if not holds or not view.running:
                step_s = min(self.target_s - waits_s, self.queue_s(view, plan)) if view.running else 0.2 * min(self.tightest_s, self.first_s)
                plan.train(job, within_s=self.errors.bound(plan, job.phase, step_s, self.target_s, self.margin))
            if view.now_s - job.last_progress_s >= self.alive_s and not plan.is_named(job.id):
                self.keep_alive(plan, job)
        self.steps_left -= 1
        repeat_decodes(view, plan)

    def can_wait(self, view: View) -> bool:
        """Whether those who wait can do so until the sprint is over, and find places and blocks then."""
        waiting = view.waiting
        if is_resident(waiting[0]):
            return False
        end_s = view.now_s + max(self.steps_left, 0.0) * self.step_s + self.prefilling_s(view)
        return min(map(self.begin_by_s, waiting)) > end_s

    def queue_s(self, view: View, plan: Plan) -> float:
        """How long steps may last so that places become free in time for those who found none, at the rate of late."""
        if plan.queue_why not in ("requests", "blocks") or not self.leaving:
            return inf
        left = [r for r in view.waiting if not is_resident(r) and not plan.is_named(r.id)]
        ends = [(1, left[0]), (len(left), left[-1])] if left else []
        return min((max(0.0, self.begin_by_s(r) - view.now_s) * self.leaving / k for k, r in ends), default=inf)

    def keep_alive(self, plan: Plan, job: JobView) -> int:
        """One layer or a few tokens of what is due; all of it on an executor that cannot cut it."""
        if job.phase == "backward":
            return plan.backward(job, 1) or plan.backward(job)
        verb = plan.evaluate if job.phase == "evaluate" else plan.finetune
        return verb(job, self.alive_tokens) or verb(job)

    # learning

    def learn(self, view: View) -> None:
        """Note targets, how the last step differed from its prediction, and whose gap was late."""
        if view.arrived:
            self.tightest_s = min(self.tightest_s, *map(self.first_target_s, view.arrived))
        if view.arrived or view.finished or self.target_s == inf:
            self.target_s = min(map(self.gap_target_s, view.running), default=inf)
        for request in view.finished:
            self.late.pop(request.id, None)
        last = view.last
        if last is None:
            return
        kind = self.errors.learn(last, min(self.target_s, self.token_s), self.memory)
        if kind == "prefill":
            seconds = last.duration_s / sum(n for _, what, n in last.work if what == "prefill")
            self.prefill_token_s += 0.2 * (seconds - self.prefill_token_s) if seconds < 2 * self.prefill_token_s else 0.0
        if "decode" in kind or not self.decoded_s:
            gap_s, self.decoded_s = view.now_s - self.decoded_s, view.now_s
            self.leaving += 0.02 * (len(view.finished) - self.leaving)
            if gap_s <= self.target_s:
                self.step_s += 0.1 * (gap_s - self.step_s)
            else:
                for request in view.running:
                    if request.generated > 1 and gap_s > self.gap_target_s(request):
                        self.late[request.id] = self.late.get(request.id, 0) + 1
        elif view.running and all(r.generated == 1 for r in view.running):
            self.decoded_s = view.now_s
