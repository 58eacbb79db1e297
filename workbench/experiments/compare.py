"""`compare`: the same traces under several policies, run so that the difference is the policy's.

Every policy sees the same trace of a seed (a paired comparison), in a fresh copy of itself. On a real executor the order of policies
turns round with every seed (A B B A ...), so that a drift of the machine does not favour one of them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from workbench.config import SLO, FinetuneJob, require
from workbench.experiments.comparison import Comparison
from workbench.policy import policy_label

__all__ = ["Comparison", "compare", "run_order", "window_of"]


def compare(
    policies: Sequence[Callable[..., None]],
    *,
    trace: Any,
    executor: Any,
    jobs: Sequence[FinetuneJob] = (),
    slo: SLO | Mapping[str, SLO] | None = None,
    seeds: Iterable[int] = range(1),
    planning: str | float = "measured",
    measure: tuple[float, float] | None = None,
    lengths: Any = "max",
    until: Any = None,
    evict: Any = None,
    interleave: bool | None = None,
    progress: bool = True,
) -> Comparison:
    """Replay the trace under every policy and seed; `trace` is a Trace, or a function seed -> Trace that redraws it.

    `measure` is the window in which tokens count, the same for all policies: (0, the trace's last arrival) unless given, so that a
    policy gains nothing by a longer drain. `planning`, `lengths`, `until`, `evict` are `replay`'s. `interleave` turns the order of policies
    round with every seed; None: on real executors. Policies keep their order and are deep-copied for each run. Ctrl-C ends the
    comparison with the runs done so far.
    Raises ValueError for no policy, no seed, or two policies with one label.
    """
    labels, seeds = tuple(policy_label(p) for p in policies), tuple(seeds)
    require(len(labels) > 0, "policies must name at least one policy", policies)
    require(len(seeds) > 0, "seeds must hold at least one seed", seeds)
    require(len(set(labels)) == len(labels), "policies must differ in their repr", list(labels), "Change a field, or the class's name.")
    simulated = executor.info.simulated
    order = run_order(labels, seeds, interleave=not simulated if interleave is None else interleave)
    of_label = dict(zip(labels, policies, strict=True))
    traces = {seed: trace(seed) if callable(trace) else trace for seed in seeds}
    options = {"executor": executor, "jobs": jobs, "slo": slo, "planning": planning, "lengths": lengths, "until": until, "evict": evict}
    replays = _run_all(order, of_label, traces, measure, options, progress)
    first = traces[seeds[0]]
    redrawn = tuple(getattr(first, "redrawn", ())) if callable(trace) else ()
    return Comparison(
        labels=labels,
        seeds=seeds,
        replays=replays,
        trace_name=getattr(first, "name", "trace"),
        redrawn=(*redrawn, *(getattr(executor, "redrawn", ()) if simulated else ("the machine's own noise",))),
        notes=tuple(getattr(first, "notes", ())),
        order=tuple(key for key in order if key in replays),
    )


def run_order(labels: Sequence[str], seeds: Sequence[int], *, interleave: bool) -> tuple[tuple[str, int], ...]:
    """(label, seed) in the order of running: A B, or with `interleave` A B for the first seed, B A for the second, and so on."""
    turn = [labels if not (interleave and i % 2) else labels[::-1] for i in range(len(seeds))]
    return tuple((label, seed) for seed, order in zip(seeds, turn, strict=True) for label in order)


def _run_all(
    order: Sequence[tuple[str, int]],
    policies: Mapping[str, Any],
    traces: Mapping[int, Any],
    measure: tuple[float, float] | None,
    options: Mapping[str, Any],
    progress: bool,
) -> dict[tuple[str, int], Any]:
    from tqdm.auto import tqdm

    from workbench.replay import replay

    replays: dict[tuple[str, int], Any] = {}
    with tqdm(order, disable=not progress, desc="replays", leave=False) as bar:
        for label, seed in bar:
            bar.set_postfix_str(f"{label}, seed {seed}"[:60])
            policy, trace = copy.deepcopy(policies[label]), traces[seed]
            bar_of_its_own = None if progress else False
            result = replay(trace, policy=policy, seed=seed, measure=measure or window_of(trace), progress=bar_of_its_own, **options)
            replays[label, seed] = result
            if result.interrupted:
                break
    return replays


def window_of(trace: Any) -> tuple[float, float] | None:
    """(0, last arrival) of a trace; None, the whole replay, for one whose requests all arrive at once."""
    last = float(trace.frame["arrival_s"].max()) if len(trace) else 0.0
    return (0.0, last) if last > 0 else None
