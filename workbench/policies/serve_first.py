"""Serving first, fine-tuning with what is left of a step."""

from dataclasses import dataclass

from workbench.policies.common import repeat_decodes
from workbench.policy import Plan, View


@dataclass(frozen=True)
class ServeFirst:
    """Serve everything that is ready; fine-tune with the tokens left over, as long as the step is predicted to last at most `step_s`.

    No fine-tuning while a request waits to begin.
    Source: ours, the plainest form of the token-level co-serving of FlexLLM (Miao et al., arXiv 2402.18789).
    """

    step_s: float = 0.040

    def __call__(self, view: View, plan: Plan) -> None:
        plan.decode(view.running)
        plan.prefill(view.waiting)
        if not view.waiting:
            for job in view.jobs:
                plan.train(job, within_s=self.step_s)
        repeat_decodes(view, plan)
