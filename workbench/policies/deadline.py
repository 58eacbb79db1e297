"""By deadline: earliest first, least slack first, and admission by what can still be met."""

from dataclasses import dataclass, field
from math import inf

from workbench.policies.common import begin, begin_in_order, continue_residents, is_resident, not_begun
from workbench.policy import Plan, RequestView, View


@dataclass(frozen=True)
class EDF:
    """Earliest deadline first: prefills in the order of when their next token, or their end, is due; requests without targets last.

    Running requests always decode, the most urgent ones first should they not all fit.
    Source: Liu and Layland (JACM 1973), for requests with targets.
    """

    def __call__(self, view: View, plan: Plan) -> None:
        plan.decode(sorted(view.running, key=lambda r: self.urgency(view, r)))
        order = sorted(view.waiting, key=lambda r: (self.urgency(view, r), not is_resident(r), r.arrival_s))
        is_full = False
        for request in order:
            # what was begun holds blocks, so it goes on even behind a more urgent one that lacks them
            if is_full and not is_resident(request):
                continue
            begin(view, plan, request, view.limits.tokens)
            is_full = is_full or plan.why in ("blocks", "requests")
            if plan.why in ("tokens", "unsupported"):
                break

    def urgency(self, view: View, request: RequestView) -> float:
        """What the order goes by, the smallest first."""
        return min(request.due_s, request.finish_by_s)


@dataclass(frozen=True)
class LeastSlack(EDF):
    """Least slack first: by the deadline less now and less the predicted time of what remains, as `view.slack_s` has it.

    Source: least laxity first (Mok, 1983), with the fitted latency model for the remaining time.
    """

    def urgency(self, view: View, request: RequestView) -> float:
        return view.slack_s(request)


@dataclass
class SoftAdmission:
    """Promise the first token on time to as many requests as can have it, and serve the others with what is left.

    Among the `window` oldest waiting requests with a TTFT target, dynamic programming over their deadlines finds the largest set whose
    prefills, one after another, all end in time; each takes its predicted seconds divided by the share of a step that decodes leave
    within the tightest token target. A promise is kept while its deadline lasts; its prefills go first, by deadline. A step's prefills
    end within that token target.
    Source: SLOs-Serve (arXiv 2504.08784); there the program also allocates decode speculation, which has no counterpart here.
    """

    window: int = 32
    promised: set[str] = field(default_factory=set, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        waiting = not_begun(view)
        step_s = min((r.slo.itl_s or r.slo.tpot_s or inf for r in view.running if r.slo is not None), default=inf)
        left = continue_residents(view, plan, within_s=step_s)
        share = 1.0 if plan.empty or step_s == inf else max(0.05, 1 - plan.predicted_s / step_s)
        alive = [r for r in waiting if r.due_s < inf and view.slack_s(r) >= 0]
        self.promised &= {r.id for r in alive}
        kept = [r for r in alive if r.id in self.promised]
        new = [r for r in alive if r.id not in self.promised][: self.window]
        self.promised |= {r.id for r in self.choose(view, kept, new, share)}
        first = sorted((r for r in waiting if r.id in self.promised), key=lambda r: r.due_s)
        rest = [r for r in waiting if r.id not in self.promised]
        begin_in_order(view, plan, [*first, *rest], left, within_s=step_s)

    def choose(self, view: View, kept: list[RequestView], new: list[RequestView], share: float) -> list[RequestView]:
        """The largest subset of `new` that meets its deadlines together with all of `kept`.

        `best[k]`: (seconds used, requests taken) of the cheapest schedule by deadline that holds everything kept so far and k new ones.
        """
        best: list[tuple[float, list[RequestView]]] = [(0.0, [])]
        for r in sorted([*kept, *new], key=lambda r: r.due_s):
            seconds, room = view.prefill_s(r) / share, r.due_s - view.now_s
            if r in kept:
                moved = [(used + seconds, taken) for used, taken in best]
                best = [option for option in moved if option[0] <= room] or moved[:1]
                continue
            grown = [(used + seconds, [*taken, r]) for used, taken in best]
            for k, option in enumerate(grown, start=1):
                if option[0] > room:
                    continue
                if k == len(best):
                    best.append(option)
                elif option[0] < best[k][0]:
                    best[k] = option
        return best[-1][1]
