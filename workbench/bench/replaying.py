"""How fast a replay itself is: requests simulated per CPU-second on the Azure conversation trace. No model runs and no GPU is needed."""

import time
from dataclasses import dataclass, field
from typing import Any

from workbench import traces
from workbench.bench import fleet_replaying, machine
from workbench.bench.session import Session
from workbench.config import FinetuneJob
from workbench.latency import PROFILES, LatencyModel
from workbench.policies import ServeFirst
from workbench.policy import Plan, View
from workbench.replay import replay
from workbench.testing import FixedCost, fixed_info

SECONDS = 60.0
TRACE, PROFILE = "azure-conv", "h100-llama3-8b"
PROBE_REQUESTS = 100  # a first replay of so many tells how many more there is time for
LONGEST_CONTEXT = 16_384


@dataclass(frozen=True)
class Repeating:
    """A policy that asks to have its plan repeated while nothing waits."""

    policy: Any = field(default_factory=ServeFirst)

    def __call__(self, view: View, plan: Plan) -> None:
        self.policy(view, plan)
        if not view.waiting:
            plan.repeat()


def run(session: Session) -> bool:
    """Paging, four adapters and a fine-tune job, under a policy that is called at every step and under one that repeats."""
    policies = {"1 replica, a policy at every step": ServeFirst(), "1 replica, repeat()": Repeating()}
    wanted = {cell: policy for cell, policy in policies.items() if session.wants(cell)}
    for left, (cell, policy) in zip(range(len(wanted), 0, -1), wanted.items(), strict=True):
        seconds = session.left_s / (left + 1)
        probe = timed_replay(session, policy, PROBE_REQUESTS)
        found = timed_replay(session, policy, max(PROBE_REQUESTS, int(0.8 * probe.num_requests / probe.wall_s * seconds)))
        note = f"{found.executor}; the trace's first {found.num_requests} requests in {found.num_steps} steps"
        rate = found.num_requests / found.cpu_s
        session.record(cell, "requests", [rate], "per CPU-s", n=found.num_requests, device=machine.cpu_name(), note=note)
    fleet_replaying.run(session, session.left_s)
    return True


@dataclass(frozen=True)
class Timed:
    """How long one replay took: CPU seconds of the whole process, and seconds on the wall."""

    cpu_s: float
    wall_s: float
    num_requests: int
    num_steps: int
    executor: str


def simulator() -> Any:
    """The shipped latency model of an 8B shape on an H100, or fixed costs of that order where none is shipped."""
    if (PROFILES / PROFILE).exists():
        model = LatencyModel.load(PROFILE)
        return model.with_limits(max_model_len=LONGEST_CONTEXT)
    info = fixed_info(
        num_layers=32,
        max_model_len=LONGEST_CONTEXT,
        max_batch_tokens=2048,
        max_requests=256,
        num_blocks=24_000,
        num_slots=16,
        max_batch_adapters=16,
        activation_tokens=8192,
    )
    return FixedCost(
        step_s=8e-3,
        prefill_s=3e-5,
        finetune_s=3e-5,
        decode_s=3e-5,
        backward_s=1.5e-6,
        info=info,
        adapters={f"adapter-{i}": 8 for i in range(4)},
    )


def timed_replay(session: Session, policy: Any, most: int, executor: Any = None) -> Timed:
    """A replay of the trace's first `most` requests, on `simulator()` unless an executor is given."""
    trace = traces.load(TRACE).head(most).assign_adapters(4, popularity=traces.zipf(1.0), seed=session.seed)
    executor = executor or simulator()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = replay(
        trace, executor=executor, policy=policy, jobs=[FinetuneJob.example("tuned")], planning=0.0, seed=session.seed, progress=False
    )
    return Timed(time.process_time() - cpu_s, time.perf_counter() - wall_s, len(trace), len(result.steps), executor.info.name)
