"""What serving and fine-tuning would each reach without the other: the two ends of every trade-off."""

from dataclasses import dataclass

from workbench.policies.common import train_in_turn
from workbench.policies.fcfs import FCFS
from workbench.policy import Plan, View


@dataclass(frozen=True)
class InferenceOnly(FCFS):
    """First come, first served, and no fine-tuning: the latency and attainment that fine-tuning is measured against.

    Source: the inference-only end of every co-serving comparison.
    """


@dataclass(frozen=True)
class FinetuneOnly:
    """Turn every request away and train: the fine-tune throughput that co-serving is measured against.

    Source: the fine-tune-only end of every co-serving comparison.
    """

    def __call__(self, view: View, plan: Plan) -> None:
        for request in view.waiting:
            plan.reject(request, "fine-tuning only")
        train_in_turn(view, plan)
