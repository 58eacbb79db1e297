"""First come, first served, inference only."""

from dataclasses import dataclass

from workbench.policies.common import repeat_decodes
from workbench.policy import Plan, View


@dataclass(frozen=True)
class FCFS:
    """Decode everything that runs, then prefill in chunks by arrival until the token budget is used. Never fine-tunes.

    All decodes, then prefills already begun, then new ones, up to the first that does not fit. `budget_tokens=None` is the executor's
    own limit.
    Source: the stall-free batching of Sarathi-Serve (Agrawal et al., OSDI 2024), without its budget.
    """

    budget_tokens: int | None = None

    def __call__(self, view: View, plan: Plan) -> None:
        decoded = plan.decode(view.running)
        left = None if self.budget_tokens is None else max(0, self.budget_tokens - len(decoded))
        plan.prefill(view.waiting, left, whole="chunk" not in view.can)
        repeat_decodes(view, plan)
