"""Batches whose adapters' ranks fit together."""

from dataclasses import dataclass
from typing import Literal

from workbench.policies.common import begin_in_order, continue_residents, not_begun, repeat_decodes, residents
from workbench.policy import Plan, RequestView, View


@dataclass(frozen=True)
class RankAware:
    """Begin those requests, among all ranks up to some bound, whose batch has the least predicted excess over the targets.

    A batch's cost is the executor's own prediction for one decode of everybody in it, plus `rank_s` seconds times requests * largest
    rank with padded kernels, or times the sum of the ranks with unpadded ones. The excess of a choice is, over all in the batch, what
    that exceeds their token target (`itl_s`, else `tpot_s`, else `token_s`), and over all left out, what their wait plus that
    cost exceeds their `ttft_s` (else `first_s`). Ties go to more requests; those left out build up excess until they are let in.
    Source: CaraServe (arXiv 2401.11240), also published as Toppings; here the choice of a batch, not of a replica. The coefficient
    is fitted per device there; 1e-6 s is a placeholder of ours.
    """

    kernel: Literal["padded", "unpadded"] = "unpadded"
    rank_s: float = 1e-6
    token_s: float = 0.05
    first_s: float = 6.0

    def __call__(self, view: View, plan: Plan) -> None:
        waiting, batch = not_begun(view), residents(view)
        probe = plan.copy()
        probe.decode(view.running)
        bounds = sorted({self.rank(view, r) for r in waiting}, reverse=True)
        bounds += [-1] if batch else []
        chosen: list[RequestView] = []
        if bounds:
            best = min(bounds, key=lambda bound: self.excess_s(view, probe.predicted_s, batch, waiting, bound))
            chosen = [r for r in waiting if self.rank(view, r) <= best]
        left = continue_residents(view, plan)
        begin_in_order(view, plan, chosen, left)
        repeat_decodes(view, plan)

    def rank(self, view: View, request: RequestView) -> int:
        """Its adapter's rank; 0 for the base model, and for an adapter that was unloaded while the request runs."""
        adapter = None if request.adapter is None else view.adapters.get(request.adapter)
        return 0 if adapter is None else adapter.rank

    def excess_s(self, view: View, base_s: float, batch: list[RequestView], waiting: list[RequestView], bound: int) -> float:
        """Seconds beyond all targets if the waiting requests of rank up to `bound` join."""
        joined = [*batch, *(r for r in waiting if self.rank(view, r) <= bound)]
        ranks = [self.rank(view, r) for r in joined]
        cost_s = base_s + self.rank_s * (len(ranks) * max(ranks, default=0) if self.kernel == "padded" else sum(ranks))
        excess = 0.0
        for r in joined:
            target = self.token_s if r.slo is None else r.slo.itl_s or r.slo.tpot_s or self.token_s
            excess += max(0.0, cost_s - target)
        for r in waiting:
            if self.rank(view, r) > bound:
                target = self.first_s if r.slo is None or r.slo.ttft_s is None else r.slo.ttft_s
                excess += max(0.0, view.now_s - r.arrival_s + cost_s - target)
        return excess
