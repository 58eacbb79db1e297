"""Stall-free chunked prefill."""

from dataclasses import dataclass

from workbench.policies.common import begin_in_order, continue_residents, not_begun, repeat_decodes
from workbench.policy import Plan, View


@dataclass(frozen=True)
class ChunkedPrefill:
    """A budget of tokens for each step: all decodes, then the prefills that were begun, then new ones, cut where the budget ends.

    So no decode ever waits for a whole prompt. On an executor that cannot cut a prefill the budget is the executor's own.
    Source: Sarathi-Serve (Agrawal et al., OSDI 2024): 512 tokens under strict targets, 2,048 under relaxed ones.
    """

    budget_tokens: int = 512

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan, self.budget_tokens)
        begin_in_order(view, plan, not_begun(view), left)
        repeat_decodes(view, plan)
