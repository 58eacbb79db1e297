"""Fine-tuning beside serving: by tokens (FlexLLM), by turns (temporal sharing), by a latency budget (HyGen, ConServe)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

from workbench.policies.common import begin_in_order, continue_residents, in_turn, not_begun, repeat_decodes, train_in_turn
from workbench.policy import Plan, View


@dataclass(frozen=True)
class TokenCoserving:
    """Inference first, in chunks; then as many fine-tune tokens, or backward layers, as keep the step within the token target.

    `tpot_s` bounds the predicted duration of the whole step, `chunk_tokens` its decodes and prefills together (None: the executor's
    own limit).
    Source: FlexLLM (Miao et al., arXiv 2402.18789), token-level co-serving; the rule for the number of tokens is recalled.
    """

    tpot_s: float = 0.05
    chunk_tokens: int | None = None

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan, self.chunk_tokens)
        begin_in_order(view, plan, not_begun(view), left)
        train_in_turn(view, plan, within_s=self.tpot_s)
        repeat_decodes(view, plan)


@dataclass
class TemporalSharing:
    """One whole fine-tune step, forward to backward, alone on the device after every `every` inference steps; at once when nobody is there.

    An evaluation that is due belongs to the fine-tune step before it.
    Source: the temporal-sharing baseline of FlexLLM (Miao et al., arXiv 2402.18789): 64, 128, 256 or 512.
    """

    every: int = 64
    count: int = field(default=0, repr=False)
    tuning: tuple[str, int] | None = field(default=None, repr=False)
    next_step: int = field(default=0, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        # those that were repeated without asking count as well
        self.count += max(0, view.step - self.next_step)
        self.next_step = view.step + 1
        jobs = in_turn(view)
        evaluating = [j for j in jobs if j.phase == "evaluate"]
        begun = evaluating or [j for j in jobs if (j.id, j.committed_tokens) == self.tuning]
        if not begun and jobs and (self.count >= self.every or not (view.running or view.waiting)):
            begun = jobs[:1]
        if begun:
            self.count, self.tuning = 0, None if evaluating else (begun[0].id, begun[0].committed_tokens)
            plan.train(begun[0])
            if not plan.empty:
                return
        self.tuning = None
        left = continue_residents(view, plan)
        begin_in_order(view, plan, not_begun(view), left)
        self.count += 1
        if not view.waiting:
            plan.repeat(max(0, self.every - self.count) if jobs else None)


@dataclass(frozen=True)
class LatencyBudget:
    """Online work first, then fine-tune work until the predicted step reaches `budget_s`, or tokens, KV blocks or arena are used up.

    Prefills beside decodes keep the budget as well. Two phases: `tuned` finds the largest budget with which a replay still meets
    the targets; then it is served with. With `safepoints`, on an executor that has them, work without anybody waiting takes whole
    micro-batches and stops at the next layer when a request arrives.
    Source: HyGen (arXiv 2501.14808), ConServe (arXiv 2410.01228) for the safepoints. The default budget is ours: tune it.
    """

    budget_s: float = 0.04
    chunk_tokens: int | None = None
    safepoints: bool = True

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan, self.chunk_tokens, within_s=self.budget_s)
        begin_in_order(view, plan, not_begun(view), left, within_s=self.budget_s)
        is_idle = plan.empty and self.safepoints and "safepoint" in view.can
        if is_idle:
            plan.stop_on_arrival()
        train_in_turn(view, plan, within_s=inf if is_idle else self.budget_s)
        repeat_decodes(view, plan)

    def tuned(
        self, meets: Callable[["LatencyBudget"], bool], *, low_s: float = 0.01, high_s: float = 0.2, rounds: int = 6
    ) -> "LatencyBudget":
        """The policy with the largest budget found for which `meets(policy)` holds, by bisection between `low_s` and `high_s`.

        `meets` runs a replay of a tuning slice and says whether its targets were met; more budget is taken to be harder.
        Raises ValueError when even `low_s` does not meet them.
        """
        if not meets(replace(self, budget_s=low_s)):
            raise ValueError(f"a budget of at least low_s must meet the targets, got {low_s}. Lower it, the load, or the targets.")
        if meets(replace(self, budget_s=high_s)):
            return replace(self, budget_s=high_s)
        for _ in range(rounds):
            middle = (low_s + high_s) / 2
            low_s, high_s = (middle, high_s) if meets(replace(self, budget_s=middle)) else (low_s, middle)
        return replace(self, budget_s=low_s)
