"""How well whole replays are predicted: the same traces, loads and policies on the engine and on a latency model fitted to its steps.

The model is fitted to steps of a random mix, measured just before; it has seen none of the replays. Errors are |simulated - measured|:
points of attainment, per cent of fine-tune throughput and of the percentiles of TTFT and TPOT; their notes have both values with the sign.
The targets hold for the largest error of all replays, and for the share of pairs of policies (of one trace and load) that the model puts
in the engine's order, of those that differ by more than either's error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from workbench import traces
from workbench.bench import correctness, serving
from workbench.bench.finetune import tuning_job
from workbench.bench.session import Session
from workbench.config import SLO, FinetuneJob
from workbench.core import Request
from workbench.policies import LatencyBudget, LoquetierStatic, ServeFirst, SLOSlack, TemporalSharing
from workbench.replay import replay

SECONDS = 500.0
CALIBRATE_SHARE = 0.08  # of the workload's time
POLICIES = (
    LatencyBudget(budget_s=0.025),
    SLOSlack(),
    ServeFirst(step_s=0.03),
    TemporalSharing(every=64),
    LoquetierStatic(max_resident=256),
)
LOADS = (2, 6, 12)  # requests per second
FEWEST = 4  # requests
LONGEST = (1024, 256)  # tokens of prompt and output
SLO_OF_ALL = SLO(ttft_s=5.0, itl_s=0.045)
METRICS: Mapping[str, str] = {
    "attainment": "points",
    "finetune_tokens_per_s": "%",
    "ttft_p50_s": "%",
    "ttft_p99_s": "%",
    "tpot_p50_s": "%",
    "tpot_p99_s": "%",
}
RANKED = ("attainment", "finetune_tokens_per_s")
WORST = "all replays"


@dataclass(frozen=True)
class Cell:
    """One trace at one load; every policy runs on it."""

    trace: str
    rate: int
    requests: list[Request]

    @property
    def name(self) -> str:
        return f"{self.trace}, {self.rate} req/s"


def run(session: Session) -> bool:
    """Every cell under every policy, on the engine and then on the model, while time is left. False if a check fails."""
    if not session.check(correctness.serving_errors(session) | correctness.gradient_errors(session)):
        return False
    engine, before = session.engine, session.engine.config
    try:
        with session.adapters(serving.ADAPTER_RANKS) as names:
            engine.config = replace(before, warm_up=True)
            model = engine.calibrate(seconds=max(session.sizes.calibrate_s, CALIBRATE_SHARE * session.left_s))
            print(model.report, flush=True)
            found = [
                _compare(session, model, cell, policy)
                for cell in _cells(session, names)
                for policy in POLICIES
                if session.wants(f"{cell.name}, {type(policy).__name__}")
            ]
            if found:
                record_worst(session, found)
    finally:
        engine.config = before
    return True


def _cells(session: Session, names: Sequence[str]) -> Iterator[Cell]:
    """Two traces at three loads, of a third of the horizon: lengths of Azure's conversations, on BurstGPT's arrivals and on their own."""
    shipped = {"BurstGPT": traces.load("burstgpt-day29").jitter(1.0, seed=session.seed), "Azure conversations": traces.load("azure-conv")}
    for rate in LOADS:
        for name, trace in shipped.items():
            first = trace.head(max(FEWEST, round(rate * session.sizes.horizon_s / 3))).scale(rate=rate, how="compress")
            made = session.requests(first.with_lengths("azure-conv", seed=session.seed, clip=LONGEST))
            yield Cell(name, rate, serving.with_adapters(made, names))


@dataclass(frozen=True)
class Pair:
    """What was measured and simulated of one policy, by metric, attainment in points."""

    cell: str
    policy: str
    measured: Mapping[str, float]
    simulated: Mapping[str, float]

    def error(self, metric: str) -> float:
        """Simulated less measured: in points, or in per cent of what was measured."""
        a, b = self.simulated[metric], self.measured[metric]
        return a - b if METRICS[metric] == "points" else 100 * (a / b - 1) if b else float("nan")


def record_worst(session: Session, found: Sequence[Pair]) -> None:
    """The largest error of each metric, and how many pairs of policies stand in the right order."""
    for metric, unit in METRICS.items():
        worst = max(found, key=lambda pair: abs(pair.error(metric)))
        note = f"{worst.cell}, {worst.policy}: {worst.error(metric):+.1f} {unit}"
        session.record(WORST, f"error of {metric}", [abs(worst.error(metric))], unit, n=len(found), note=note)
    for metric in RANKED:
        order = [right for a, b in combinations(found, 2) if a.cell == b.cell and (right := in_order(a, b, metric)) is not None]
        if order:
            session.record(WORST, f"pairs in order by {metric}", [100 * sum(order) / len(order)], "%", n=len(order))


def in_order(a: Pair, b: Pair, metric: str) -> bool | None:
    """Whether the model puts two policies in the engine's order; None where they differ by no more than the larger of their errors."""
    error = max(abs(pair.simulated[metric] - pair.measured[metric]) for pair in (a, b))
    measured = a.measured[metric] - b.measured[metric]
    return None if abs(measured) <= error else (a.simulated[metric] - b.simulated[metric]) * measured > 0


def _compare(session: Session, model: Any, cell: Cell, policy: Any) -> Pair:
    """Both replays of one policy (`model`: the engine's LatencyModel), and a row for each metric's error."""
    job: FinetuneJob = tuning_job(session, "tuned", 2)
    try:
        measured = serving.run(session, cell.requests, policy, [job], slo=SLO_OF_ALL)
    finally:
        session.engine.unload_adapter(job.adapter)
    planning = float(measured.steps["plan_s"].mean())
    simulated = replay(
        cell.requests, executor=model, policy=policy, jobs=[job], slo=SLO_OF_ALL, seed=session.seed, planning=planning, progress=False
    )
    pair = Pair(cell.name, type(policy).__name__, _values(measured), _values(simulated))
    for metric, unit in METRICS.items():
        note = f"{policy}; simulated {pair.simulated[metric]:.4g}, measured {pair.measured[metric]:.4g}, {pair.error(metric):+.1f} {unit}"
        session.record(
            f"{pair.cell}, {pair.policy}", f"error of {metric}", [abs(pair.error(metric))], unit, n=len(cell.requests), note=note
        )
    return pair


def _values(result: Any) -> dict[str, float]:
    summary = result.summary()
    return {metric: float(summary[metric]) * (100 if unit == "points" else 1) for metric, unit in METRICS.items()}
