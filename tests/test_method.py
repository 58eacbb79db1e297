"""docs/method.md names tests that exist, and the traps that need a whole experiment to be seen."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.features import NAMES
from workbench.policies import FCFS
from workbench.testing import FixedCost, fixed_info

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = pd.DataFrame({"prompt_tokens": [20, 40], "output_tokens": [4, 8]})
SLOS = wb.SLO(ttft_s=0.1)


def trace(seed: int, load: float = 30.0) -> wb.Trace:
    return wb.traces.poisson(rate=load, duration_s=2.0, seed=seed).with_lengths(LENGTHS, seed=seed)


def test_every_test_that_the_table_of_traps_names_exists():
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_trap_has_a_remedy_and_something_that_shows_it():
    rows = [line for line in (ROOT / "docs" / "method.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if not row.startswith(("| trap", "| ---"))]
    assert len(cells) == 30 and all(len(row) == 3 and all(row) for row in cells)


@dataclass(frozen=True)
class Chunked:
    """Serves in chunks of `chunk` tokens: too small a chunk is a bad setting."""

    chunk: int = 2

    def __call__(self, view, plan) -> None:
        plan.decode(view.running)
        plan.prefill(view.waiting[:1], self.chunk)


def test_tuning_says_its_budget_and_is_judged_on_another_slice():
    """The untuned policy looks much worse than the same one tuned: a baseline at a bad setting makes anything look good."""
    options = {"trace": trace, "executor": FixedCost(), "slo": SLOS, "planning": 0.0, "progress": False}
    training = wb.sweep([Chunked()], parameters={"chunk": [2, 16, 64]}, seeds=[100], **options)
    best = training.best("attainment", by="policy_name")
    assert best.loc["Chunked", "tried"] == 3 and best.loc["Chunked", "policy"] != "Chunked(chunk=2)"
    judged = wb.sweep([Chunked(), Chunked(64)], seeds=[0], **options).frame.set_index("policy")["attainment"]
    assert judged["Chunked(chunk=64)"] > judged["Chunked(chunk=2)"] + 0.2


def test_a_resident_limit_decides_attainment_whatever_the_policy():
    found = wb.sweep(
        [FCFS()],
        trace=trace(0, 60.0),
        executor=lambda residents: FixedCost(info=fixed_info(max_requests=residents)),
        axes={"residents": [1, 16]},
        slo=SLOS,
        planning=0.0,
        progress=False,
    )
    attained = found.frame.set_index("residents")["attainment"]
    assert attained[1] < 0.3 < 0.9 < attained[16]


def test_a_replay_drains_so_the_last_requests_are_not_marked_missed():
    drawn, options = trace(0, 40.0), {"executor": FixedCost(), "policy": FCFS(), "slo": SLOS, "planning": 0.0, "progress": False}
    last = float(drawn.frame["arrival_s"].max())
    whole = wb.replay(drawn, measure=(0.0, last), **options).summary()
    cut = wb.replay(drawn, measure=(0.0, last), until=last, **options).summary()
    assert whole["unfinished"] == 0 < cut["unfinished"] and cut["attainment"] < whole["attainment"]
    assert whole["unfinished_at_end_share"] > 0 and not whole["saturated"]


def test_a_small_bias_of_the_model_near_capacity_moves_the_tail_and_perturb_shows_it():
    """Steps of 4 ms and one request at a time: at 95 % load, 3 % more per step is a tail several times as long."""
    rng = np.random.default_rng(0)
    steps = pd.DataFrame(rng.integers(0, 3, (200, len(NAMES))).astype(float), columns=list(NAMES))
    steps["duration_s"] = 0.0041
    info = fixed_info(simulated=False, max_requests=1)
    model = wb.LatencyModel.fit(steps, info=info, commit="x")
    one = pd.DataFrame({"prompt_tokens": [20], "output_tokens": [1]})
    drawn = wb.traces.poisson(rate=225.0, duration_s=6.0, seed=3).with_lengths(one, seed=0)
    biased = {f"{bias:+.0%}": model.perturb(bias) for bias in (-0.05, 0.0, 0.05)}
    found = wb.sweep([FCFS()], trace=drawn, executor=model, axes={"executor": biased}, slo=SLOS, planning=0.0, progress=False)
    tail = found.frame.set_index("executor")["ttft_p99_s"]
    assert tail["-5%"] * 1.1 < tail["+0%"] and tail["+0%"] * 1.25 < tail["+5%"]  # far more than the 5 % of the bias


@pytest.mark.parametrize("bias", [-1.0, float("nan")])
def test_a_bias_that_leaves_no_time_is_an_error(bias):
    model = wb.LatencyModel.fit(
        pd.DataFrame(np.ones((100, len(NAMES))), columns=list(NAMES)).assign(duration_s=0.01), info=fixed_info(simulated=False), commit="x"
    )
    with pytest.raises(ValueError, match="bias must be above -1"):
        model.perturb(bias)
