"""How well whole replays are predicted: the same traces, loads and policies on the engine and on a latency model fitted to its steps.

The model is a profile (`--profile`), or is fitted to steps of every kind, measured just before; it has seen none of the replays, and
policies predict with it on both sides. Errors are |simulated - measured|: points of attainment, per cent of throughput and of the
percentiles of TTFT and TPOT; their notes have both values with the sign. The targets hold for the largest error of all replays, and for
the share of pairs of policies (of one trace and load) that the model puts in the engine's order, of those that differ by more than either's
error.

Loads, lengths and policies are those of a power analysis: each of the 30 replays (336 to 720 requests) simulated with eight seeds of the
residuals. Between seeds the standard deviation is at most 1.2 points of attainment, 1.4 % of fine-tuning, 0.4 % of decoding, 3.0 % of
TTFT p50, 6.5 % of TTFT p99 (median 3.2 %), 0.7 % of TPOT p50 and 5.1 % of TPOT p99 (median 0.7 %); a model 2 % slower or faster moves
them by at most 3.4 points and 7.0, 0.5, 7.4, 11, 3.2 and 11 %. So one run's TTFT p99 is hardly known to its target's 10 %: the simulated
side is the mean over `kept.SIMULATED` seeds, the measured one that of all runs of a cell that are there. How much two of those differ is
in rows, too. The 15 replays of a trace take about 420 s: a call of ten minutes each (`--only BurstGPT`, `--only Azure`).

`model_replays.csv` beside the rows is the file that a profile ships as `replays.csv`. Measured replays can be kept (`--replays`), with the
model of their run beside them, and simulated again with it or with any profile on a machine without the device (`--from`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

from workbench import traces
from workbench.bench import correctness, finetune, machine, serving
from workbench.bench.kept import FITTED, Kept, cell_name, load_all
from workbench.bench.session import Session
from workbench.config import SLO, FinetuneJob, require
from workbench.core import Request
from workbench.latency import LatencyModel
from workbench.latency.fit import check_executor
from workbench.latency.whole_replays import REPLAYS_FILE, Prediction, ReplayErrors, error, mean_of
from workbench.model_error import METRICS
from workbench.policies import LatencyBudget, LoquetierStatic, ServeFirst, SLOSlack, TemporalSharing

SECONDS = 500.0
CALIBRATE_SHARE = 0.08  # of the workload's time
POLICIES = (
    LatencyBudget(budget_s=0.025),
    SLOSlack(),
    ServeFirst(step_s=0.02),
    TemporalSharing(every=64),
    LoquetierStatic(steps=15, max_resident=256),
)
LOADS = (14, 22, 30)  # requests per second
FEWEST = 4  # requests
LONGEST = (256, 128)  # tokens of prompt and output
ARRIVING = 0.8  # of the horizon: 24 s
DRAIN_S = 8.0  # from the last arrival to the last token, at most
SLO_OF_ALL = SLO(ttft_s=5.0, itl_s=0.045)
RANKED = ("attainment", "finetune_tokens_per_s")
WORST = "all replays"
PREDICTIONS_FILE = "model_replays.csv"
REFITTED = "refitted"  # the folder of the profile that has seen all replays


@dataclass(frozen=True)
class Cell:
    """One trace at one load; every policy runs on it."""

    trace: str
    rate: int
    requests: list[Request]

    @property
    def name(self) -> str:
        return cell_name(self.trace, self.rate)


def run(session: Session) -> bool:
    """Every cell under every policy on the engine, while time is left for a whole replay; then on the model. False if a check fails."""
    if not session.check(correctness.serving_errors(session) | correctness.gradient_errors(session)):
        return False
    engine, before = session.engine, session.engine.config
    if session.profile is not None:
        check_executor(session.profile.info, engine.info)
    try:
        with session.adapters(serving.ADAPTER_RANKS) as names:
            engine.config = replace(before, warm_up=True)
            model = session.predict_with(max(session.sizes.calibrate_s, CALIBRATE_SHARE * session.left_s))
            print(model.report, flush=True)
            if session.replays is not None:
                model.save(session.replays / FITTED)
            serving.warm_up(session, names)
            finetune.warm_up(session)
            needs_s = ARRIVING * session.sizes.horizon_s + DRAIN_S
            measured = [
                _measured(session, cell, policy)
                for cell in _cells(session, names)
                for policy in POLICIES
                if session.wants(f"{cell.name}, {type(policy).__name__}", needs_s if session.on_cuda else 0.0)
            ]
    finally:
        engine.config = before
    _judge(session, ((one, model) for one in measured))
    return True


def run_kept(session: Session, folders: Sequence[Path], *, refits: bool = False) -> None:
    """The replays that runs kept in `folders`, each simulated with its own run's model, or all with the session's profile.

    A cell that several runs measured is judged by their mean. `refits`: each with that profile refitted to the replays of the other traces
    (cross-validation over traces: no fit has seen what it is judged on); the profile refitted to all of them, with those errors, is saved
    beside the rows. No engine is built. Raises FileNotFoundError where there are none, ValueError for a refit without a profile or with
    replays of one trace.
    """
    kept = [one for one in load_all(folders) if session.wants(one.name)]
    places = sorted({(one.shape, one.replay.executor.device) for one in kept})
    require(len(places) <= 1, "kept replays must be of one model shape on one device", places, "Put them into a folder each.")
    twice = sorted(name for (name, _), times in Counter((one.name, one.date) for one in kept).items() if times > 1)
    require(not twice, "a kept replay must be there once", twice, "Leave out the folder that should not count.")
    for one in kept:
        if one.is_of_other_code:
            told = f"measured at {one.replay.provenance.commit} with other code of {type(one.policy).__name__}, judged with today's"
            print(f"# {one.name}: {told}. Check that commit out to judge it with its own, or measure it again.", flush=True)
    load = cache(LatencyModel.load)
    for one in kept:
        rule = "a kept replay must have its run's model beside it"
        require(session.profile is not None or one.fitted is not None, rule, one.name, "Or simulate all with one: --profile NAME.")
    shape, device = places[0] if places else (None, None)
    if not refits:
        _judge(session, ((one, session.profile or load(one.fitted)) for one in kept), shape=shape, device=device)
        return
    profile, names = session.profile, sorted({one.trace for one in kept})
    if profile is None:
        raise ValueError("a refit begins with the steps of a calibration, got no profile. Pass --profile NAME_OR_DIR.")
    require(len(names) > 1, "a refit is judged on a trace that it has not seen: at least two traces must be kept", names)
    unseen = {name: profile.refit([one.replay for one in kept if one.trace != name]) for name in names}
    errors = _judge(session, ((one, unseen[one.trace]) for one in kept), shape=shape, device=device)
    final = profile.refit([one.replay for one in kept]).with_replays(errors)
    print(final.report, flush=True)
    print(f"refitted to all {len(kept)} replays, with those errors: {final.save(session.into / REFITTED)}", flush=True)


def _judge(
    session: Session, measured: Iterable[tuple[Kept, LatencyModel]], *, shape: str | None = None, device: str | None = None
) -> ReplayErrors:
    """Simulate each of the replays with its model; rows, and the file that a profile ships."""
    cells: dict[str, list[tuple[Kept, LatencyModel]]] = {}
    for one, model in measured:
        cells.setdefault(one.name, []).append((one, model))
    pairs: list[Pair] = []
    predictions: list[Prediction] = []
    differences: list[Pair] = []
    for runs in cells.values():
        singles = [one.predictions(model) for one, model in runs]
        predictions += (found := mean_of(singles))
        pairs.append(Pair.of(runs[0][0], found))
        differences += [Pair.between(runs[0][0], a, b) for a, b in combinations(singles, 2)]
        _record(session, runs, pairs[-1], shape=shape, device=device)
    errors = ReplayErrors(tuple(predictions))
    if pairs:
        record_worst(session, pairs, shape=shape, device=device)
        record_differences(session, differences, shape=shape, device=device)
        file = errors.save(session.into / PREDICTIONS_FILE)
        print(f"{len(pairs)} replays in {file}; the folder of a profile ships those by its own model as {REPLAYS_FILE}", flush=True)
    return errors


def _cells(session: Session, names: Sequence[str]) -> Iterator[Cell]:
    """Two traces at three loads: lengths of Azure's conversations, on BurstGPT's arrivals and on their own."""
    shipped = {"BurstGPT": traces.load("burstgpt-day29").jitter(1.0, seed=session.seed), "Azure conversations": traces.load("azure-conv")}
    for rate in LOADS:
        for name, trace in shipped.items():
            first = trace.head(max(FEWEST, round(rate * ARRIVING * session.sizes.horizon_s))).scale(rate=rate, how="compress")
            made = session.requests(first.with_lengths("azure-conv", seed=session.seed, clip=LONGEST))
            yield Cell(name, rate, serving.with_adapters(made, names))


@dataclass(frozen=True)
class Pair:
    """What was measured and simulated of one policy, by metric."""

    cell: str
    policy: str
    measured: Mapping[str, float]
    simulated: Mapping[str, float]

    @classmethod
    def of(cls, kept: Kept, found: Sequence[Prediction]) -> "Pair":
        measured, simulated = {p.metric: p.measured for p in found}, {p.metric: p.simulated for p in found}
        return cls(kept.cell, type(kept.policy).__name__, measured, simulated)

    @classmethod
    def between(cls, kept: Kept, first: Sequence[Prediction], second: Sequence[Prediction]) -> "Pair":
        """One run on the device in the place of the measured, another one in the place of the simulated."""
        values = [{p.metric: p.measured for p in found} for found in (first, second)]
        return cls(kept.cell, type(kept.policy).__name__, *values)

    def error(self, metric: str) -> float:
        """As `whole_replays.error`."""
        return error(metric, self.measured[metric], self.simulated[metric])


def record_worst(session: Session, found: Sequence[Pair], *, shape: str | None = None, device: str | None = None) -> None:
    """The largest error of each metric, and how many pairs of policies stand in the right order.

    `shape` and `device`: as of `Session.record`.
    """
    for metric, unit in METRICS.items():
        defined = [pair for pair in found if isfinite(pair.error(metric))]
        if not defined:
            print(f"no error of {metric}: nothing was measured of it", flush=True)
            continue
        worst = max(defined, key=lambda pair: abs(pair.error(metric)))
        note = f"{worst.cell}, {worst.policy}: {worst.error(metric):+.1f} {unit}"
        session.record(WORST, f"error of {metric}", [abs(worst.error(metric))], unit, n=len(defined), note=note, shape=shape, device=device)
    for metric in RANKED:
        order = [right for a, b in combinations(found, 2) if a.cell == b.cell and (right := in_order(a, b, metric)) is not None]
        if order:
            session.record(
                WORST, f"pairs in order by {metric}", [100 * sum(order) / len(order)], "%", n=len(order), shape=shape, device=device
            )


def record_differences(session: Session, found: Sequence[Pair], *, shape: str | None = None, device: str | None = None) -> None:
    """By how much two runs of one cell on the device differ at most, metric by metric: no model can be nearer than that to a single run."""
    for metric, unit in METRICS.items():
        defined = [pair for pair in found if isfinite(pair.error(metric))]
        if defined:
            worst = max(defined, key=lambda pair: abs(pair.error(metric)))
            note = f"{worst.cell}, {worst.policy}: {worst.measured[metric]:.4g} and {worst.simulated[metric]:.4g}, both measured"
            values = [abs(worst.error(metric))]
            session.record(WORST, f"two runs' {metric}", values, unit, n=len(defined), note=note, shape=shape, device=device)


def in_order(a: Pair, b: Pair, metric: str) -> bool | None:
    """Whether the model puts two policies in the engine's order; None where they differ by no more than the larger of their errors."""
    largest = max(abs(pair.simulated[metric] - pair.measured[metric]) for pair in (a, b))
    measured = a.measured[metric] - b.measured[metric]
    return None if abs(measured) <= largest else (a.simulated[metric] - b.simulated[metric]) * measured > 0


def _measured(session: Session, cell: Cell, policy: Any) -> Kept:
    """One policy on the engine."""
    job: FinetuneJob = finetune.beside_requests(session)
    date = machine.now()
    try:
        measured = serving.run(session, cell.requests, policy, [job], slo=SLO_OF_ALL)
    finally:
        session.engine.unload_adapter(job.adapter)
    kept = Kept(trace=cell.trace, load=cell.rate, policy=policy, job=job, shape=session.shape, date=date, replay=measured)
    if session.replays is not None:
        kept.save(session.replays)
    return kept


def _record(
    session: Session, runs: Sequence[tuple[Kept, LatencyModel]], pair: Pair, *, shape: str | None = None, device: str | None = None
) -> None:
    """A row for each metric's error of one cell, measured once or several times."""
    by = " and ".join(dict.fromkeys(f"{model.info.name} of {model.provenance['date']}" for _, model in runs))
    when = " and ".join(f"{kept.date[:10]} at {kept.replay.provenance.commit}" for kept, _ in runs)
    times = "" if len(runs) == 1 else f" in the mean of {len(runs)} runs"
    times += " with other code of the policy" * any(kept.is_of_other_code for kept, _ in runs)
    for metric, unit in METRICS.items():
        if not isfinite(pair.error(metric)):
            continue  # nothing was measured of it; the predictions have it
        scale = 100 if unit == "points" else 1
        values = f"simulated {scale * pair.simulated[metric]:.4g}, measured {scale * pair.measured[metric]:.4g}"
        values += f", {pair.error(metric):+.1f} {unit}"
        note = f"{runs[0][0].policy}; {values}; measured{times} {when}, simulated by {by}"
        n = sum(len(kept.replay.trace_requests) for kept, _ in runs)
        session.record(runs[0][0].name, f"error of {metric}", [abs(pair.error(metric))], unit, n=n, note=note, shape=shape, device=device)
