"""What a minute on the engine cannot show: policy 21 and the tuned ones for minutes, on a latency model, with and without stalls.

A policy may put serving off for as long as a first token may take, and a contest of a minute ends before that shows. Here a queue that
grows misses its targets. `python -m workbench.bench long --profile NAME` writes `contest_long.csv` beside what `tune` wrote.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.bench import contest, machine
from workbench.config import SLO
from workbench.experiments.sweep import sweep
from workbench.policies import SLOSlack
from workbench.policy import policy_label
from workbench.results.bound import upper_bound
from workbench.traces import Trace

FILE = "contest_long.csv"
SECONDS = 200.0
FRESH = (700, 701)  # seeds of draws on which nothing was chosen
NEARLY = 0.02  # short of the attainment that is asked for
METRICS = ("attainment", "finetune_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "saturated")


def tempting(record: dict[str, Any], share: float) -> Any:
    """The policy that trains most of those that nearly attain the targets at this share of the capacity."""
    rows = [row for row in record["rows"] if row["attainment"] >= contest.ATTAINED - NEARLY]
    return contest.best({"rows": [row | {"attainment": 1.0, "saturated": False} for row in rows]}, share)


def run(model: Any, folder: Path, *, shares: Sequence[float] = contest.SHARES, seconds: float = SECONDS, slo: SLO = contest.GOAL) -> Path:
    """Replay them at each share for `seconds`, measured from `contest.WARM_S` on, on `model` and on the same without stalls.

    Raises FileNotFoundError where nobody tuned.
    """
    record = json.loads(contest.tuned_file(folder).read_text(encoding="utf-8"))

    def requests(*, load: float, seed: int) -> Trace:
        return contest.adapted_arrivals(load, seed, seconds)

    models = (model.with_stalls(None), *((model,) if model.stalls else ()))
    frames: list[pd.DataFrame] = []
    for share in shares:
        tried = {policy_label(p): p for p in (SLOSlack(), contest.best(record, share), tempting(record, share))}
        bounds = {seed: _bound(model, requests(load=share * record["capacity"], seed=seed), seconds, slo) for seed in FRESH}
        for executor in models:
            options: dict[str, Any] = contest.simulated_options(executor, slo)
            options |= {
                "seeds": FRESH,
                "measure": contest.measured_window(seconds),
                "axes": {"load": [share * record["capacity"]]},
            }
            runs = contest.completed(sweep([*tried.values()], trace=requests, jobs=[contest.tuned_job()], **options).frame)
            frames.append(runs[["policy", "load", "seed", *METRICS]].assign(share=share, stalls=contest.stalls_of(executor)))
            frames[-1]["bound_tokens_per_s"] = runs["seed"].map(bounds)
            print(
                f"\n{share:.0%}, {executor.stalls or 'no stalls'}:\n{runs.groupby('policy')[[*METRICS]].mean().to_string()}\n"
                f"No schedule keeps up more than {', '.join(f'{b:.0f}' for b in bounds.values())} tokens/s on these draws.",
                flush=True,
            )
    found = pd.concat(frames).assign(seconds=seconds, model=model.info.name, commit=machine.commit_of_code(), date=machine.now())
    file = folder / FILE
    found[["share", *(name for name in found if name != "share")]].to_csv(file, index=False)
    return file


def _bound(model: Any, trace: Trace, seconds: float, slo: SLO) -> float:
    """Fine-tune tokens/s that no schedule keeps up beside the attainment that is asked for."""
    job, measure = contest.tuned_job(), contest.measured_window(seconds)
    bound = upper_bound(trace, executor=model, slo=slo, jobs=[job], measure=measure, points=4)
    return bound.sustained_at(min(contest.ATTAINED, bound.attainment))
