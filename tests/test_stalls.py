"""Delays that come by busy time: measured in replays, drawn in simulated ones, the same however the steps are made."""

import numpy as np
import pandas as pd
import pytest

from workbench import traces
from workbench.config import SLO, FinetuneJob
from workbench.latency import LatencyModel, Stalls
from workbench.policies import FCFS, LatencyBudget
from workbench.replay import replay

H100 = LatencyModel.load("h100-llama3-8b").with_stalls(None)
OFTEN = Stalls(per_s=20.0, seconds=(0.004, 0.011, 0.030))


def run(model, policy=FCFS(), jobs=(), seed=0, duration_s=4.0):
    trace = traces.poisson(rate=6, duration_s=duration_s, seed=1).with_lengths("w3-20rps", seed=1, clip=(256, 200))
    return replay(
        trace, executor=model, policy=policy, jobs=list(jobs), slo=SLO(ttft_s=1.0, itl_s=0.045), planning=0.0, seed=seed, progress=False
    )


def asked(policy):
    """The policy, but asked at every step."""
    return lambda view, plan: (policy(view, plan), plan.repeat(0))


def test_stalls_are_as_many_a_busy_second_as_was_said_and_of_the_lengths_that_were_said():
    stream = Stalls(per_s=2.0, seconds=(0.005, 0.020)).stream(seed=3)
    extra = np.array([stream(0.010) for _ in range(200_000)])
    assert extra.sum() == pytest.approx(2.0 * 2000 * 0.0125, rel=0.05)
    assert set(np.round(extra[(extra > 0) & (extra < 0.021)], 6)) == {0.005, 0.010, 0.020}


def test_a_preview_gives_what_the_steps_would_in_any_pieces():
    durations = np.random.default_rng(0).uniform(0.005, 0.05, 400)
    whole = OFTEN.stream(1)
    expected = [whole(d) for d in durations]
    pieces, got, at = OFTEN.stream(1), [], 0
    for made in (1, 7, 50, 120):
        seen = pieces.preview(durations[at : at + 30]) or [0.0] * 30
        seen += pieces.preview(durations[at + 30 : at + 150], 30) or [0.0] * 120
        assert seen == pytest.approx(expected[at : at + 150])
        pieces.skip(made)
        got, at = got + seen[:made], at + made
        assert pieces.preview([1e-9]) == []  # nothing stalls within a nanosecond
    got += [pieces(d) for d in durations[at:]]
    assert got == pytest.approx(expected)
    assert sum(expected) > 0.5


def test_decodes_made_at_one_go_stall_as_those_made_one_by_one():
    model = H100.with_stalls(OFTEN)
    once, each = run(model), run(model, asked(FCFS()))
    assert once.steps["duration_s"].to_numpy() == pytest.approx(each.steps["duration_s"].to_numpy())
    pd.testing.assert_frame_equal(once.requests, each.requests, check_exact=False)


def test_a_model_with_stalls_lasts_longer_by_them_and_policies_do_not_foresee_them():
    job = FinetuneJob.example(max_tokens=1024)
    plain, stalled = (run(model, LatencyBudget(0.03), [job]) for model in (H100, H100.with_stalls(OFTEN)))
    over_s = stalled.steps["duration_s"] - stalled.steps["predicted_s"]
    assert over_s.sum() - (plain.steps["duration_s"] - plain.steps["predicted_s"]).sum() > 0.5
    assert plain.summary()["attainment"] > stalled.summary()["attainment"]


def test_stalls_are_found_in_the_replays_that_had_them():
    job = FinetuneJob.example(max_tokens=1024)
    told = Stalls(per_s=3.0, seconds=(0.012, 0.025))
    replays = [run(H100.with_stalls(told), LatencyBudget(0.03), [job], seed=seed, duration_s=20.0) for seed in range(2)]
    own = Stalls.of([run(H100, LatencyBudget(0.03), [job], duration_s=20.0)])
    found = Stalls.of(replays, source="here")
    assert found.per_s - own.per_s == pytest.approx(3.0, rel=0.25)
    assert np.median([s for s in found.seconds if s > 0.008]) == pytest.approx(0.0185, abs=0.008)
    assert found.source == "here"


def steps_of(kinds, over_s):
    """Steps of 20 ms as predicted, but for what each lasts longer; `kinds`: which of them prefill beside decodes."""
    over_s, prefills = np.asarray(over_s), np.asarray(kinds, float)
    zero = dict.fromkeys(("finetune_tokens", "evaluate_tokens", "backward_layers", "optimizer_steps"), 0.0)
    frame = pd.DataFrame({"predicted_s": np.full(len(over_s), 0.02), "stopped_early": False, "decode_tokens": 8.0, **zero})
    steps = frame.assign(duration_s=0.02 + over_s, prefill_tokens=100 * prefills)
    return type("Measured", (), {"policy": "FCFS", "steps": steps})()


def test_a_kind_of_step_that_is_predicted_wrongly_does_not_stall():
    kinds = np.arange(300) % 10 == 0
    assert Stalls.of([steps_of(kinds, 0.006 * kinds)]).per_s == 0, "each of them lasts 6 ms longer: that is no delay"
    delayed = np.where(np.arange(300) == 155, 0.006, 0.0)
    assert Stalls.of([steps_of(kinds, 0.006 * kinds + delayed)]).seconds == pytest.approx((0.006,))


def test_what_long_steps_differ_by_is_noise_and_the_same_delay_of_a_short_one_a_stall():
    over_s = np.where(np.arange(300) == 155, 0.005, 0.0)
    short = steps_of(np.zeros(300), over_s)
    long = steps_of(np.zeros(300), over_s)
    long.steps[["predicted_s", "duration_s"]] += 0.06
    assert len(Stalls.of([short]).seconds) == 1 and Stalls.of([long]).per_s == 0


def test_a_model_keeps_its_stalls_when_it_is_changed_and_saved(tmp_path):
    model = H100.with_stalls(OFTEN)
    assert LatencyModel.load(model.perturb(0.1).save(tmp_path)).stalls == OFTEN
    assert model.with_stalls(None).stalls is None
    assert len({H100.identity(), model.identity(), H100.with_stalls(Stalls(1.0, (0.01,))).identity()}) == 3
    assert "20.00 stalls a busy second, median 11.0 ms, longest 30 ms" in repr(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_s": -1.0}, "per_s must be at least 0"),
        ({"seconds": ()}, "lengths to draw from"),
        ({"seconds": (0.01, 0.0)}, "more than 0 seconds, got 0.0"),
    ],
)
def test_stalls_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Stalls(**{"per_s": 1.0, "seconds": (0.01,)} | change)


def test_replays_without_predictions_show_no_stalls():
    class Blind:
        policy, steps = "FCFS", pd.DataFrame({"duration_s": [0.1], "predicted_s": [np.nan], "stopped_early": [False]})

    with pytest.raises(ValueError, match="Replay with a latency model"):
        Stalls.of([Blind()])
