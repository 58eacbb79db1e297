"""Fine-tune exactly as much as the tightest target allows, and no less than keeps the jobs alive."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from workbench.policies.common import begin_in_order, continue_residents, in_turn, is_resident, not_begun
from workbench.policy import JobView, Plan, RequestView, View


def is_lost(view: View, request: RequestView) -> bool:
    """Whether its first token was, or will be, later than its target: no schedule can make it attain its SLO any more."""
    if request.slo is None or request.slo.ttft_s is None:
        return False
    first_s = view.now_s if request.first_token_s is None else request.first_token_s
    return first_s > request.arrival_s + request.slo.ttft_s


@dataclass
class SLOSlack:
    """Each step lasts as long as the smallest slack allows: serving first, then fine-tune tokens or backward layers up to that.

    A running request allows until its next token is due (`token_s` without a target). One that waits for a place needs as many steps
    as the residents need to free it, and allows the time until its first token is due, less its prefill, divided by those. Requests
    that are lost allow `lost_s`, so that they do not cost training what they can no longer gain. Of all that, the longest planning of the
    last `window` steps is taken off, and `margin` times the largest share by which one of them took longer than predicted: a request of a
    hundred tokens or less is lost by a single late one, so that a quantile of the errors would lose many.
    While nothing decodes, a step lasts at most `idle_share` of the tightest TTFT target seen, for the sake of who may arrive; a backward
    with nobody there takes all its layers and stops at an arrival, on an executor with safepoints. A job without progress for `alive_s`
    gets one layer or `alive_tokens` tokens whatever the slack. Jobs take turns by committed tokens.
    Source: ours.
    """

    token_s: float = 0.05
    lost_s: float = 0.1
    idle_share: float = 0.2
    alive_s: float = 2.0
    alive_tokens: int = 32
    margin: float = 1.25
    window: int = 512
    errors: list[tuple[float, float]] = field(default_factory=list, repr=False)
    tightest_s: float = field(default=inf, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        self.learn(view)
        slack_s = min((self.token_slack_s(view, r) for r in view.running), default=inf)
        # a step that is late already still has to prefill something, or nobody would ever begin
        serving_s = self.planned_s(max(slack_s, min((self.target_s(r) for r in view.running), default=inf)))
        left = continue_residents(view, plan, within_s=serving_s)
        waiting = sorted(not_begun(view), key=lambda r: (is_lost(view, r), r.due_s, r.arrival_s))
        begin_in_order(view, plan, waiting, left, within_s=serving_s)
        if plan.empty and not view.waiting and "safepoint" in view.can:
            plan.stop_on_arrival()
        begun = {s.id for s, _, _ in plan.prefills}
        slack_s = min(slack_s, self.queue_slack_s(view, [r for r in waiting if r.id not in begun]))
        if not view.running:
            # whoever may arrive, or begins now, waits for this step only
            slack_s = min(slack_s, self.idle_share * self.tightest_s)
        for job in in_turn(view):
            can_stop = plan.stops_on_arrival and job.phase == "backward"
            taken = plan.train(job, within_s=inf if can_stop else self.planned_s(slack_s))
            if not taken and (plan.empty or view.now_s - job.last_progress_s >= self.alive_s):
                self.keep_alive(plan, job)

    def learn(self, view: View) -> None:
        """Note the tightest TTFT target, and how the last step differed from its prediction."""
        self.tightest_s = min([self.tightest_s, *(r.slo.ttft_s for r in view.arrived if r.slo is not None and r.slo.ttft_s is not None)])
        last = view.last
        if last is not None and not last.stopped_early and last.predicted_s > 0:
            self.errors = [*self.errors, (last.duration_s / last.predicted_s, last.plan_s)][-self.window :]

    def planned_s(self, seconds: float) -> float:
        """The predicted duration that a step may have to end, most likely, within `seconds` from now, planning included."""
        if not self.errors:
            return max(0.0, seconds)
        stretch, planning_s = (max(column) for column in zip(*self.errors))
        return max(0.0, seconds - planning_s) / (1.0 + self.margin * max(0.0, stretch - 1.0))

    def target_s(self, request: RequestView) -> float:
        slo = request.slo
        return self.token_s if slo is None else slo.itl_s or slo.tpot_s or self.token_s

    def token_slack_s(self, view: View, request: RequestView) -> float:
        if is_lost(view, request):
            return max(self.lost_s, self.target_s(request))
        return self.token_s if request.due_s == inf else request.due_s - view.now_s

    def queue_slack_s(self, view: View, waiting: Iterable[RequestView]) -> float:
        """How long steps may last so that the residents free a place in time for each who waits for one."""
        steps = sorted(r.expected_left for r in view.running)
        bound = inf
        for k, request in enumerate(r for r in waiting if not is_resident(r) and r.due_s < inf and not is_lost(view, r)):
            if steps:
                needed = steps[k % len(steps)] + steps[-1] * (k // len(steps))
                bound = min(bound, view.slack_s(request) / needed)
        return bound

    def keep_alive(self, plan: Plan, job: JobView) -> int:
        """One layer or a few tokens of what is due; all of it on an executor that cannot cut it."""
        if job.phase == "backward":
            return plan.backward(job, 1) or plan.backward(job)
        verb = plan.evaluate if job.phase == "evaluate" else plan.finetune
        return verb(job, self.alive_tokens) or verb(job)
