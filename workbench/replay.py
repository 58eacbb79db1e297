"""`replay`: a trace and fine-tune jobs on an executor, or a fleet of them, under a policy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from workbench.config import SLO, FinetuneJob
from workbench.core import Executor, Request
from workbench.fleet import Fleet
from workbench.fleet.run import FleetRun
from workbench.loop.options import Options
from workbench.policy import Evict, Policy, policy_label
from workbench.results.replay import Replay, load_replay
from workbench.serving_loop import ReplayError, ServingLoop

__all__ = ["Replay", "ReplayError", "load_replay", "replay"]


def replay(
    trace: Any,
    *,
    executor: Executor | Fleet,
    policy: Policy,
    jobs: Sequence[FinetuneJob] = (),
    slo: SLO | Mapping[str, SLO] | None = None,
    seed: int = 0,
    clock: Literal["virtual", "wall"] = "virtual",
    planning: Literal["measured", "recorded"] | float = "measured",
    lengths: Literal["oracle", "max", "history"] | Callable[[Request], float] = "max",
    measure: tuple[float, float] | None = None,
    progress: bool | None = None,
    overlap: bool = False,
    until: Literal["requests", "jobs"] | float | None = None,
    evict: Evict | Mapping[str, Evict] | None = None,
    events: str | Path | None = None,
) -> Replay:
    """Serve `trace` (a Trace, or a sequence of Request) beside `jobs` on `executor` under `policy`.

    `planning` is what a decision costs: the measured time of the policy (on `Recorded`: the one measured then), "recorded" to insist
    on that, or fixed seconds. `lengths` gives `RequestView.expected_output` (a name, or a predictor: `workbench.lengths`).
    `overlap=True` plans each step from the view before the previous one, while that runs; only what planning takes longer than the step
    then counts. `until`: "requests" ends once every request has ended (the default; jobs stop there), "jobs" once all jobs have ended too
    (the default without requests), a number at that second. Within `measure=(start_s, end_s)` tokens and requests count for `summary()`;
    None is the whole replay. `evict` chooses the adapter that makes room for another in a device slot or in host memory: a rule for
    both, or {"gpu": rule, "host": rule} (`workbench.loop.tiers`); None: the least recently used.
    `events`: a folder into which the rows are written as parquet files while the replay runs, so that a long one needs little memory; the
    result then reads its frames from there, and keeps neither `results` nor what `Recorded` needs.
    `progress=None` shows a bar when the replay is long. Ctrl-C ends it and gives what there is, `interrupted`. On a `Fleet` every replica
    runs a copy of the policy of its own, and the result is a `FleetReplay`.
    Raises ValueError or TypeError for bad input before anything runs, ReplayError (with the partial result) when policy or executor
    fail, or when the rows of the result contradict one another (`conservation`: time, work, tokens, requests, Little's law).
    """
    if hasattr(policy, "routed") and not isinstance(executor, Fleet):
        raise ValueError(f"{policy_label(policy)} needs several replicas, got one executor. Pass executor=wb.Fleet(executor, replicas=2).")
    options = Options(
        jobs=tuple(jobs),
        slo=slo,
        seed=seed,
        clock=clock,
        planning=planning,
        lengths=lengths,
        measure=measure,
        overlap=overlap,
        until=until,
        evict=evict,
        events=events,
    )
    if isinstance(executor, Fleet):
        return FleetRun(trace, executor, policy, options).run(progress)
    return ServingLoop(trace, executor, policy, options).run(progress)
