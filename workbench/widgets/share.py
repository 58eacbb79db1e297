"""A policy around a policy that bounds how much of the time goes to fine-tuning: the slider that every policy can have."""

from dataclasses import dataclass
from typing import Any

from workbench.policy import Plan, policy_label

TRAINING = ("finetune", "evaluate", "backward")


class _NoJobs:
    """A view whose jobs are out of sight; everything else is the view's own."""

    __slots__ = ("_view",)
    jobs: tuple[Any, ...] = ()

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


@dataclass(repr=False)
class LimitedTraining:
    """`policy`, which sees its jobs only while steps that train have taken at most `share` of the time so far.

    At `share` 1 it is `policy` itself; at 0 nothing trains. It keeps the inner policy's label, so that its colour stays the same.
    Of steps that the inner policy repeats unasked (`plan.repeat`) only the last counts.
    """

    policy: Any
    share: float = 1.0
    trained_s: float = 0.0
    last_start_s: float | None = None

    def __repr__(self) -> str:
        return policy_label(self.policy)

    def __call__(self, view: Any, plan: Plan) -> None:
        last = view.last
        # After an empty plan the last step is still the one before it: count each step once.
        if last is not None and last.start_s != self.last_start_s:
            self.last_start_s = last.start_s
            if any(kind in TRAINING for _, kind, _ in last.work):
                self.trained_s += last.duration_s + last.plan_s
        if self.share >= 1 or (0 < self.share and self.trained_s <= self.share * view.now_s):
            self.policy(view, plan)
            return
        self.policy(_NoJobs(view), plan)
        if self.share > 0 and plan.empty and view.jobs and not view.running and not view.waiting:
            # Nothing to serve: training goes on once enough time has passed (a microsecond more, against rounding).
            plan.wait(self.trained_s / self.share + 1e-6)
