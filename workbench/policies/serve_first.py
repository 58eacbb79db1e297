"""Serving first, fine-tuning with what is left of a step."""

from dataclasses import dataclass

from workbench.policy import Plan, View


@dataclass(frozen=True)
class ServeFirst:
    """Serve everything that is ready; fine-tune with the tokens left over, as long as the step is predicted to last at most `step_s`.

    The token-level co-serving of FlexLLM (Miao et al.) in its plainest form: no fine-tuning while a request waits to begin.
    """

    step_s: float = 0.040

    def __call__(self, view: View, plan: Plan) -> None:
        plan.decode(view.running)
        plan.prefill(view.waiting)
        if not view.waiting:
            for job in view.jobs:
                plan.train(job, within_s=self.step_s)
