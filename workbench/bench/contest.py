"""Policy 21 against policies 14 to 18 and 20 as tuned as they can be, at shares of the serving capacity.

`tune` finds that capacity and each policy's best parameters at each load on a latency model, without a GPU, on draws of Poisson arrivals
with the lengths of W3's requests (`python -m workbench.bench tune --profile NAME`, which writes `tuned_policies.json`). `run` replays
other draws on the engine: policy 21, the best of the tuned ones at that load, that one again and policy 21 again (A B B A), on two draws;
and once temporal sharing (18). Policy 21 has its defaults everywhere. A static split (19) needs several devices and is left out.

One output in ten is longer than LONGEST and is cut: otherwise half of the device's time goes to the last few requests of each replay.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import policies, traces
from workbench.bench import correctness, machine, serving
from workbench.bench.finetune import beside_requests, record_rates
from workbench.bench.finetune import tune as tune_alone
from workbench.bench.kept import FITTED, Kept
from workbench.bench.rows import OURS
from workbench.bench.session import Session
from workbench.config import SLO, FinetuneJob, RandomTokens, require
from workbench.experiments.search import search
from workbench.experiments.sweep import sweep
from workbench.latency import Stalls
from workbench.policies import (
    InferenceOnly,
    LatencyBudget,
    LoquetierScalable,
    LoquetierStatic,
    PeftSequential,
    SLOSlack,
    TemporalSharing,
    TokenCoserving,
)
from workbench.policy import policy_label
from workbench.traces import Trace

SECONDS = 1800.0  # 13 replays and what comes before them
FILE = "tuned_policies.json"
SHARES = (0.5, 0.7, 0.9)
BESIDE_TEMPORAL = 0.7
ATTAINED = 0.99
GOAL = SLO(ttft_s=5.0, itl_s=0.045)
TUNED_ON, HELD_OUT = (0, 1), (122, 123)  # seeds of the draws
LENGTHS, LONGEST = "w3-20rps", (1024, 384)  # tokens of prompt and output, at most
# a request lasts up to 8 s: before that, work is put off rather than done; and policy 21 has cycles of up to 6 s
WARM_S = 10.0
HORIZON_S = 100.0  # so that cycles, whole windows of the job, and serving that was put off until the end weigh little
DRAIN_S = 17.0  # the longest output at the pace of the gap target
TUNE_S = 90.0  # so long that a queue that grows shows: in 40 s, waiting requests hid an eighth of the serving
LOWEST, HIGHEST = 10.0, 80.0  # requests per second
PLANNING_S = 0.0002  # what a step's planning is taken to cost while tuning
BUDGETS = (0.012, 0.016, 0.02, 0.024, 0.028, 0.031, 0.034, 0.037, 0.04)
GRID: tuple[Any, ...] = (
    PeftSequential(),
    *(LoquetierStatic(steps=steps, max_resident=256) for steps in (5, 500)),
    LoquetierScalable(max_resident=256),
    *(TokenCoserving(tpot_s=s, chunk_tokens=512) for s in BUDGETS),
    *(TemporalSharing(every=every) for every in (64, 512, 4096)),
    *(LatencyBudget(budget_s=s, chunk_tokens=chunk) for s in BUDGETS for chunk in (None, 512)),
)


def arrivals(load: float, seed: int, seconds: float = HORIZON_S) -> Trace:
    """Poisson arrivals of `load` requests per second, lengths as in W3 and W6."""
    return traces.poisson(rate=load, duration_s=seconds, seed=seed).with_lengths(LENGTHS, seed=seed, clip=LONGEST)


def measured_window(seconds: float) -> tuple[float, float]:
    """What counts of so many seconds."""
    return min(WARM_S, seconds / 4), seconds


def adapted_arrivals(load: float, seed: int, seconds: float) -> Trace:
    """The same, with the adapters in turn."""
    return arrivals(load, seed, seconds).assign_adapters(len(serving.ADAPTER_RANKS), popularity=traces.round_robin())


def tuned_job() -> FinetuneJob:
    """The job beside them: 2 x 1024 random tokens a micro-batch, four to an optimiser step, rank 8."""
    data = RandomTokens(examples=16, tokens=1024)
    shape: dict[str, Any] = {"batch_size": 2, "accumulation": 4, "rank": 8, "max_tokens": 1024}
    return FinetuneJob.example("tuned", data=data, publish="never", epochs=100, **shape)


def simulated_options(model: Any, slo: SLO) -> dict[str, Any]:
    """How a policy is tried on a latency model, on all cores."""
    return {"slo": slo, "planning": PLANNING_S, "progress": False, "executor": model, "n_jobs": -1}


def stalls_of(model: Any) -> str:
    """What delays the steps of a latency model, and where that was measured."""
    return f"{model.stalls}; {model.stalls.source}" if model.stalls else "no stalls"


def as_tuned(model: Any, folder: Path) -> Any:
    """The model with the stalls with which the policies were tuned."""
    delays = json.loads(tuned_file(folder).read_text(encoding="utf-8"))["delays"]
    return model.with_stalls(None if delays is None else Stalls(delays["per_s"], tuple(delays["seconds"]), delays["source"]))


def completed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a sweep, all of which got through. Raises ValueError where one did not."""
    failed = [str(error) for error in runs["error"].dropna()]
    require(not failed, "every policy must get through its replays", failed[:1])
    return runs


def tune(
    model: Any, file: Path, *, shares: Sequence[float] = SHARES, grid: Sequence[Any] = GRID, seconds: float = TUNE_S, slo: SLO = GOAL
) -> Path:
    """Find the serving capacity, replay each policy with each of its parameters at each share of it, and write that to `file`.

    Runs side by side on all cores. `seconds` is the horizon of those replays. Raises ValueError where no load misses the targets.
    """
    options: dict[str, Any] = simulated_options(model, slo) | {"seeds": TUNED_ON}

    def requests(*, load: float, seed: int) -> Trace:
        return adapted_arrivals(load, seed, seconds)

    serves = InferenceOnly(512)
    found = search(serves, trace=requests, low=LOWEST, high=HIGHEST, targets=(ATTAINED,), tolerance=0.05, **options)
    capacity = float(found.table["capacity"].iloc[0])
    print(found, flush=True)
    require(
        capacity == capacity, f"a capacity must be found between {LOWEST:g} and {HIGHEST:g} req/s", str(found), "Make the trace longer."
    )
    rows: list[dict[str, Any]] = []
    for share in shares:
        axes = {"load": [share * capacity]}
        runs = completed(sweep(grid, trace=requests, jobs=[tuned_job()], axes=axes, measure=measured_window(seconds), **options).frame)
        means = runs.groupby("policy")[["attainment", "finetune_tokens_per_s"]].mean()
        grows = runs.groupby("policy")["saturated"].any()
        for policy in grid:
            attainment, tokens = means.loc[policy_label(policy)]
            saturated = bool(grows[policy_label(policy)])
            rows.append(
                {
                    "share": share,
                    "policy": type(policy).__name__,
                    "parameters": {f.name: getattr(policy, f.name) for f in fields(policy) if f.init and f.repr},
                    "attainment": float(attainment),
                    "finetune_tokens_per_s": float(tokens),
                    "saturated": saturated,
                }
            )
            print(f"{share:.0%} {policy}: {attainment:.4f}, {tokens:.0f} tokens/s{', the queue grows' * saturated}", flush=True)
    record = {
        "model": model.info.name,
        "device": model.info.device,
        "stalls": stalls_of(model),
        "delays": asdict(model.stalls) if model.stalls else None,
        "slo": {"ttft_s": slo.ttft_s, "itl_s": slo.itl_s, "itl_quantile": slo.itl_quantile},
        "capacity": capacity,
        "capacity_of": f"{serves}, attainment >= {ATTAINED:.0%}",
        "trace": f"Poisson with the lengths of {LENGTHS} up to {LONGEST}, {seconds:g} s at each load, seeds {TUNED_ON}",
        "rows": rows,
        "commit": machine.commit_of_code(),
        "date": machine.now(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return file


def tuned_file(folder: Path) -> Path:
    """What `tune` wrote there. Raises FileNotFoundError where nobody tuned."""
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} must say what was tuned. Run: python -m workbench.bench tune --profile NAME --into {folder}")
    return file


def best(record: Mapping[str, Any], share: float, *, only: str | None = None) -> Any:
    """The tuned policy that trains most of those that attain the targets at this share while no queue grows; if none does, of those that
    train the one that attains most.
    """
    rows = [row for row in record["rows"] if row["share"] == share and only in (None, row["policy"])]

    def merit(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        attains, tokens = row["attainment"] >= ATTAINED and not row["saturated"], row["finetune_tokens_per_s"]
        return attains, tokens > 0, tokens if attains else row["attainment"]

    row = max(rows, key=merit)
    return getattr(policies, row["policy"])(**row["parameters"])


def run(session: Session) -> bool:
    """Every share that can end in the time left. False if a check fails; raises FileNotFoundError where nobody tuned."""
    record = json.loads(tuned_file(session.into).read_text(encoding="utf-8"))
    if not session.check(correctness.serving_errors(session) | correctness.gradient_errors(session)):
        return False
    with session.adapters(serving.ADAPTER_RANKS) as names:
        model = session.predict_with(session.sizes.calibrate_s)
        if session.replays is not None:
            model.save(session.replays / FITTED)
        session.engine.allocate_arena()
        serving.warm_up(session, names)
        alone = tune_alone(session, session.engine, [beside_requests(session)])
        record_rates(session, "fine-tuning alone", alone)
        for share in SHARES:
            cell = f"{share:.0%} of capacity"
            replays = 5 if share == BESIDE_TEMPORAL else 4
            if session.wants(cell, replays * (HORIZON_S + DRAIN_S) if session.on_cuda else 0.0):
                _contest(session, cell, record, share, names, max(alone))
    return True


def _contest(session: Session, cell: str, record: Mapping[str, Any], share: float, names: Sequence[str], alone: float) -> None:
    load = share * record["capacity"]
    policies_of = {"ours": SLOSlack(), "rival": best(record, share), "temporal": best(record, share, only=TemporalSharing.__name__)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in policies_of}

    def measure(name: str, seed: int) -> None:
        runs[name].append(_measured(session, cell, policies_of[name], load, seed, names))

    def mean(name: str, metric: str) -> float:
        return sum(float(one[metric]) for one in runs[name]) / len(runs[name])

    def over(name: str, against: str) -> None:
        tokens = mean(name, "finetune_tokens_per_s")
        attained = ", ".join(f"{n} {mean(n, 'attainment'):.2%}" for n in ("ours", name))
        note = f"{load:.3g} req/s; attainment: {attained}; {policies_of[name]}"
        if tokens:
            session.record(cell, f"over {against}", [mean("ours", "finetune_tokens_per_s") / tokens], "x", note=note)

    first, second = HELD_OUT
    for name, seed in (("ours", first), ("rival", first), ("rival", second), ("ours", second)):
        measure(name, seed)
    note = f"{load:.3g} req/s"
    session.record(cell, "attainment", [100 * mean("ours", "attainment")], "%", note=note)
    over("rival", "the best tuned")
    kept = 100 * mean("ours", "finetune_tokens_per_s") / alone
    session.record(cell, "fine-tuning kept", [kept], "%", note=f"of {alone:.0f} tokens/s alone; {note}")
    session.record(cell, "p99 of the requests' p99 gaps", [1e3 * mean("ours", "request_itl_p99_s")], "ms", note=note)
    if share == BESIDE_TEMPORAL:
        measure("temporal", first)
        over("temporal", "temporal sharing")


def _measured(session: Session, cell: str, policy: Any, load: float, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """The summary of one replay on the engine, and its rows."""
    horizon_s = HORIZON_S if session.on_cuda else session.sizes.horizon_s
    made = arrivals(load, seed, horizon_s)
    job = beside_requests(session)
    measure = measured_window(horizon_s)
    try:
        requests = serving.with_adapters(session.requests(made), names)
        date, stolen_s = machine.now(), machine.stolen_s()
        measured = serving.run(session, requests, policy, [job], slo=GOAL, measure=measure)
        stolen_s = machine.stolen_s() - stolen_s
    finally:
        session.engine.unload_adapter(job.adapter)
    if session.replays is not None:
        trace = f"Poisson, draw {seed}"
        Kept(trace=trace, load=load, policy=policy, job=job, shape=session.shape, date=date, replay=measured).save(session.replays)
    summary: dict[str, Any] = measured.summary()
    note = f"{policy}; draw {seed}; TTFT p50 {1e3 * summary['ttft_p50_s']:.0f} ms, p99 {1e3 * summary['ttft_p99_s']:.0f} ms"
    note += f"; the host took {stolen_s:.1f} CPU-s away"
    note += "; the queue grows" * bool(summary["saturated"])
    system = f"{OURS}, {type(policy).__name__}"
    session.record(cell, "attainment", [100 * summary["attainment"]], "%", n=int(summary["requests"]), system=system, note=note)
    session.record(cell, "fine-tune", [summary["finetune_tokens_per_s"]], "tokens/s", system=system, note=note)
    session.record(cell, "TPOT p50", [1e3 * summary["tpot_p50_s"]], "ms", system=system, note=note)
    return summary
