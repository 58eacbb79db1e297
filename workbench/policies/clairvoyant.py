"""A policy that knows the output lengths and the arrivals to come. It is no bound: `bound` is."""

from dataclasses import dataclass
from math import inf

from workbench.policies.common import begin, in_turn, is_resident, residents
from workbench.policies.slora import peak_tokens
from workbench.policy import Plan, RequestView, View


@dataclass(frozen=True)
class Clairvoyant:
    """Serve by true slack, let the hopeless wait, and train in every second that nobody needs.

    A waiting request is hopeless when its first token would be late even if it began now; the others begin by deadline, if the KV pool
    holds everybody to their true ends; the hopeless follow. Fine-tune work fits the smallest slack of who decodes, and of who is to
    begin, and ends before the next arrival where nobody is there (it stops there on an executor with safepoints).
    Source: ours, in the line of offline-optimal baselines; it needs the oracle (`lengths` of the trace and its arrivals).
    """

    needs = frozenset({"oracle"})
    step_s: float = 0.1

    def __call__(self, view: View, plan: Plan) -> None:
        assert view.oracle is not None
        bound_s = min((r.due_s - view.now_s for r in view.running), default=inf)
        plan.decode(sorted(view.running, key=lambda r: r.due_s))
        budget_s = max(bound_s, plan.predicted_s)
        order = sorted(view.waiting, key=lambda r: (not is_resident(r), self.is_hopeless(view, r), r.due_s, r.arrival_s))
        held = residents(view)
        pool = view.limits.blocks * view.block_tokens
        for request in order:
            joined = held if is_resident(request) else [*held, request]
            if len(joined) > 1 and peak_tokens([self.tokens(view, r) for r in joined]) > pool and not is_resident(request):
                continue
            begin(view, plan, request, view.limits.tokens, within_s=budget_s)
            if plan.why in ("tokens", "within_s", "unsupported"):
                break
            held = held if plan.why else joined
        self.train(view, plan, budget_s)

    def is_hopeless(self, view: View, request: RequestView) -> bool:
        return request.due_s < view.now_s + view.prefill_s(request)

    def tokens(self, view: View, request: RequestView) -> tuple[float, float]:
        """(KV tokens now, tokens still to come), the second as it will really be."""
        assert view.oracle is not None
        return request.prompt_tokens + request.generated, max(0, view.oracle.output_tokens(request) - request.generated)

    def train(self, view: View, plan: Plan, budget_s: float) -> None:
        """Fill the step up to the smallest slack, never past `step_s` when somebody is there."""
        assert view.oracle is not None
        waiting_s = min((view.slack_s(r) for r in view.waiting if r.due_s > view.now_s), default=inf)
        within_s = min(budget_s, max(waiting_s, plan.predicted_s))
        arrivals = view.oracle.arrivals()
        if plan.empty and not view.waiting:
            if "safepoint" in view.can:
                plan.stop_on_arrival()
            elif arrivals:
                within_s = max(arrivals[0][0] - view.now_s, 0.0)
        else:
            within_s = min(within_s, max(self.step_s, plan.predicted_s))
        for job in in_turn(view):
            plan.train(job, within_s=within_s)
