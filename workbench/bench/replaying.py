"""How fast a replay itself is: requests simulated per CPU-second on the Azure conversation trace. No model runs and no GPU is needed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench import traces
from workbench.bench import fleet_replaying, machine
from workbench.bench.session import Session
from workbench.config import FinetuneJob
from workbench.latency import LatencyModel
from workbench.policies import ServeFirst
from workbench.policy import Plan, View
from workbench.replay import replay

SECONDS = 90.0
TRACE, PROFILE = "azure-conv", "h100-llama3-8b"
PROBE_REQUESTS = 200  # a first replay of so many tells how many more there is time for
LONGEST_CONTEXT = 16_384


@dataclass(frozen=True)
class Repeating:
    """A policy that asks to have its plan repeated while nothing waits, or never to have it repeated."""

    repeats: bool = True
    policy: Any = field(default_factory=ServeFirst)

    def __call__(self, view: View, plan: Plan) -> None:
        self.policy(view, plan)
        plan.repeat(None if self.repeats and not view.waiting else 0)


def run(session: Session) -> bool:
    """Paging and four adapters, with a fine-tune job under a policy that is called at every step and one that repeats, and without."""
    cells: Mapping[str, tuple[bool, bool]] = {
        "1 replica, a policy at every step": (False, True),
        "1 replica, repeat()": (True, True),
        "1 replica, repeat(), no fine-tuning": (True, False),
    }
    wanted = {cell: options for cell, options in cells.items() if session.wants(cell)}
    example = FinetuneJob.example("tuned")
    executor = LatencyModel.load(PROFILE).with_limits(max_model_len=LONGEST_CONTEXT)
    timed_replay(session, executor, Repeating(), [example], 1)  # prepares the job's data
    for left, (cell, (repeats, trains)) in zip(range(len(wanted), 0, -1), wanted.items(), strict=True):
        seconds, job = session.left_s / (left + 1), [example] if trains else []
        probe = timed_replay(session, executor, Repeating(repeats), job, PROBE_REQUESTS)
        most = max(PROBE_REQUESTS, int(0.8 * probe.num_requests / probe.wall_s * seconds))
        found = timed_replay(session, executor, Repeating(repeats), job, most)
        note = f"{executor.info.name}; the trace's first {found.num_requests} requests in {found.num_steps} steps"
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


def timed_replay(session: Session, executor: Any, policy: Any, jobs: list[FinetuneJob], most: int) -> Timed:
    """A replay of the trace's first `most` requests, its checks included; its frames are made when somebody looks at them."""
    trace = traces.load(TRACE).head(most).assign_adapters(4, popularity=traces.zipf(1.0), seed=session.seed)
    assert trace.requests  # read before the clock runs
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = replay(trace, executor=executor, policy=policy, jobs=jobs, planning=0.0, seed=session.seed, progress=False)
    return Timed(time.process_time() - cpu_s, time.perf_counter() - wall_s, len(trace), result.num_steps)
