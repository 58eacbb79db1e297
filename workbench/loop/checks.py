"""What a replay refuses before anything runs, and what it warns about."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.config import SLO, FinetuneJob, did_you_mean, require
from workbench.core import Executor, Request


def checked_requests(trace: Any) -> tuple[Request, ...]:
    """The trace's requests. Raises TypeError for anything else, ValueError for a name twice, a bad time or a parent that is not there."""
    requests = tuple(getattr(trace, "requests", trace))
    for request in requests:
        if not isinstance(request, Request):
            raise TypeError(f"a trace must hold Request values, got {type(request).__name__}. Use Trace.from_frame, or a list of Request.")
        if not (math.isfinite(request.arrival_s) and request.arrival_s >= 0 and request.think_s >= 0):
            raise ValueError(
                f"arrival_s and think_s must be at least 0 seconds and finite, request {request.request_id!r} has {request.arrival_s}"
            )
    names = {r.request_id for r in requests}
    if len(names) < len(requests):
        seen: set[str] = set()
        twice = next(r.request_id for r in requests if r.request_id in seen or seen.add(r.request_id))
        raise ValueError(f"request ids must be unique, got {twice!r} twice")
    parents = {r.request_id: r.parent_id for r in requests if r.parent_id is not None}
    for name, parent in parents.items():
        if parent not in names:
            raise ValueError(f"parent_id must name a request of the trace, {name!r} has {parent!r}. {did_you_mean(parent, list(names))}")
        ancestors = {name}
        while parent is not None:
            if parent in ancestors:
                raise ValueError(f"a session must begin with a request without parent_id, got a circle through {name!r}")
            ancestors.add(parent)
            parent = parents.get(parent)
    return requests


def check_options(
    policy: Any, jobs: Sequence[FinetuneJob], clock: str, planning: Any, overlap: bool, measure: Any, executor: Executor
) -> None:
    if inspect.isclass(policy) or not callable(policy):
        name = getattr(policy, "__name__", repr(policy))
        raise TypeError(f"policy must be callable as policy(view, plan), got {name}. Pass an instance, such as {name}().")
    require(clock in ("virtual", "wall"), "clock must be 'virtual' or 'wall'", clock)
    if isinstance(planning, str):
        require(planning in ("measured", "recorded"), "planning must be 'measured', 'recorded' or seconds", planning)
        if planning == "recorded" and not hasattr(executor, "planning_s"):
            raise ValueError(
                f"planning='recorded' needs an executor that recorded planning times, got {executor.info.name!r}. "
                "Use Recorded(replay), or seconds."
            )
    else:
        require(planning >= 0, "planning must be at least 0 seconds, 'measured' or 'recorded'", planning)
    require(not (overlap and clock == "wall"), "overlap=True needs clock='virtual'", clock)
    require(measure is None or 0 <= measure[0] < measure[1], "measure must be (start_s, end_s) with 0 <= start_s < end_s", measure)
    ids = [job.id for job in jobs]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    require(twice is None, "job ids must be unique", twice, "Give one of them a job_id.")


def check_slo(slo: SLO | Mapping[str, SLO] | None, requests: Sequence[Request]) -> None:
    if isinstance(slo, Mapping):
        from workbench.results.metrics import slo_of

        for slo_class in {r.slo_class for r in requests}:
            slo_of(slo, slo_class)


def check_duration(duration_s: float) -> None:
    if not 0 <= duration_s < math.inf:
        raise RuntimeError(f"an executor must report a finite duration of at least 0 s, got {duration_s}")


def warn_of_ties(requests: Sequence[Request]) -> None:
    """Whole-second clocks tie arrivals that were apart, which moves tails of TTFT by a factor."""
    times = [r.arrival_s for r in requests]
    num_tied = len(times) - len(set(times))
    if num_tied and len(set(times)) > 1 and all(t == int(t) for t in times):
        warnings.warn(
            f"all arrivals fall on whole seconds and {num_tied} of {len(times)} tie, which distorts waiting times: "
            "spread them with trace.jitter(1.0, seed=0)",
            UserWarning,
            stacklevel=4,
        )


def warn_of_refusals(refusals: Mapping[str, str], num_requests: int) -> None:
    """Requests that the executor can never run count as missed; their number and the first reason are said aloud."""
    if refusals:
        first = next(iter(refusals.values()))
        warnings.warn(
            f"{len(refusals)} of {num_requests} requests were rejected on arrival and count as missed. The first: {first}", stacklevel=4
        )
