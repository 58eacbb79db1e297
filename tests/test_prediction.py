"""Errors of whole replays: the same policies on an engine and on its model, and what may not be put beside each other."""

from dataclasses import replace

import pytest

from tests.fake_replays import INFO, fake_replay, trace_of
from workbench.experiments.compare import Comparison
from workbench.latency.whole_replays import replay_errors


def comparison(gap_s: float, *, simulated: bool, seeds=(0, 1)) -> Comparison:
    info = replace(INFO, simulated=simulated)
    replays = {("A", seed): fake_replay(trace_of(seed), policy="A", seed=seed, executor=info, gap_s=gap_s) for seed in seeds}
    for run in replays.values():
        run.measure = (0.0, 12.0)
    return Comparison(labels=("A",), seeds=seeds, replays=replays, trace_name="poisson", redrawn=("arrivals",))


def test_errors_have_the_sign_of_the_prediction_and_the_unit_of_the_metric():
    measured, simulated = comparison(0.04, simulated=False), comparison(0.05, simulated=True)
    frame = replay_errors(measured, simulated).loc["A"]
    tpot = [one.runs["tpot_p50_s"].mean() for one in (measured, simulated)]
    assert frame.loc["tpot_p50_s", ["measured", "simulated"]].tolist() == tpot
    assert frame.loc["tpot_p50_s", "error"] == f"{(tpot[1] / tpot[0] - 1) * 100:+.0f} %" and tpot[1] > tpot[0]
    attainment = frame.loc["attainment", ["measured", "simulated"]]
    assert frame.loc["attainment", "error"] == f"{(attainment['simulated'] - attainment['measured']) * 100:+.1f} points"


def test_a_rate_that_was_nothing_has_no_relative_error():
    measured, simulated = comparison(0.04, simulated=False), comparison(0.04, simulated=True)
    for one in (measured, simulated):
        one.runs["finetune_tokens_per_s"] = 0.0
    assert replay_errors(measured, simulated).loc[("A", "finetune_tokens_per_s"), "error"] == "undefined"


def test_only_like_is_compared_with_like():
    measured, simulated = comparison(0.04, simulated=False), comparison(0.04, simulated=True)
    with pytest.raises(ValueError, match="measured must come from an engine"):
        replay_errors(simulated, simulated)
    with pytest.raises(ValueError, match="simulated must come from a latency model"):
        replay_errors(measured, measured)
    with pytest.raises(ValueError, match="the same policies, seeds, requests and windows"):
        replay_errors(measured, comparison(0.04, simulated=True, seeds=(0,)))
