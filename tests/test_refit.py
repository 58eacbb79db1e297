"""A latency model fitted anew to steps of measured replays beside its calibration's, and judged on traces that no fit has seen."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_latency import INFO, synthetic

import workbench as wb
from workbench.bench import __main__ as cli
from workbench.bench import contest, long_contest, modelling
from workbench.bench import kept as bench_kept
from workbench.bench.kept import Kept
from workbench.latency import LatencyModel, Stalls
from workbench.latency.fit import spread_out
from workbench.latency.whole_replays import Prediction, ReplayErrors
from workbench.testing import FixedCost, fixed_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import refit_profile

STALLS = Stalls(per_s=0.5, seconds=(0.01,))


def measured(num_steps=2000, seed=5, info=INFO, policy="FCFS()"):
    """A replay's steps on the engine whose calibration `synthetic` is; there, prefills last a tenth longer."""
    steps = synthetic(num_steps, noise=0.02, seed=seed)
    steps["duration_s"] *= 1.0 + 0.1 * (steps["prefill_tokens"] > 0)
    return SimpleNamespace(
        steps=steps.assign(stopped_early=False), executor=info, policy=policy, provenance=SimpleNamespace(commit="c0ffee")
    )


@pytest.fixture(scope="module")
def calibrated():
    return LatencyModel.fit(synthetic(300, noise=0.02), info=INFO, adapters=["a"], vocab_size=99).with_stalls(STALLS)


def test_what_lasts_longer_under_load_is_predicted_after_a_refit_and_not_before(calibrated):
    fresh = measured(seed=9).steps
    refitted = calibrated.refit([measured(seed=5), measured(seed=6)], most=1000)
    before, after = (model.error(fresh).by_class["prefill"] for model in (calibrated, refitted))
    assert before[1] < -0.06 and abs(after[1]) < 0.02
    assert after[2] < 0.6 * before[2]


def test_a_refit_keeps_limits_adapters_and_stalls_and_says_what_it_has_seen(calibrated, tmp_path):
    once = calibrated.refit([measured(), measured(seed=6)], most=100)
    twice = LatencyModel.load(once.refit([measured(policy="Mine()")], most=50).save(tmp_path))
    assert len(twice.steps) == 300 + 2 * 100 + 50
    assert twice.provenance["refitted_to"] == {"FCFS() at c0ffee": 2, "Mine() at c0ffee": 1}
    assert twice.provenance["steps"] == 550 and twice.provenance["executor"] == INFO.name
    assert (twice.stalls, twice.info.name, set(twice.adapter_infos), twice.vocab_size) == (STALLS, calibrated.info.name, {"a"}, 99)
    assert replace(twice.info, model_error=None) == replace(calibrated.info, model_error=None)


def test_a_refit_takes_steps_from_all_of_a_replays_time_and_none_that_stopped_early():
    steps = measured(1000).steps
    steps.loc[[0, 999], "stopped_early"] = True
    found = spread_out(steps, 10)
    assert list(found.index) == [1, *(round(1 + k * 997 / 9) for k in range(1, 9)), 998]
    assert len(spread_out(steps, 5000)) == 998


def test_a_change_that_leaves_the_costs_as_they_are_predicts_no_step_again(calibrated, monkeypatch):
    slower = calibrated.perturb(0.1)
    monkeypatch.setattr(type(calibrated.costs), "predict_all", lambda *_: pytest.fail("predicted again"))
    assert calibrated.with_limits(max_requests=3).info.max_requests == 3 and slower.with_stalls(None).costs == slower.costs


def test_errors_over_whole_replays_are_not_said_of_another_fit(calibrated):
    one = Prediction("t", 2.0, "FCFS()", "attainment", 0.9, 0.8, "c0ffee", "2026-01-01", INFO.device)
    judged = calibrated.with_replays(ReplayErrors((one,)))
    assert judged.replays is not None and judged.refit([measured()]).replays is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simulated": True}, "must be measured by an engine, not simulated"),
        ({"device": "another"}, "must be of the device of the replays, another"),
        ({"num_layers": 9}, "of a model of 9 layers"),
        ({"token_buckets": (64, 512)}, r"token_buckets must be \(64, 512\)"),
    ],
)
def test_replays_of_another_machine_are_refused(calibrated, change, message):
    with pytest.raises(ValueError, match=message):
        calibrated.refit([measured(info=replace(INFO, **change))])


def test_a_perturbed_model_and_no_replay_are_refused(calibrated):
    with pytest.raises(ValueError, match="must be as fitted to be fitted anew"):
        calibrated.perturb(0.1).refit([measured()])
    with pytest.raises(ValueError, match="at least one measured replay"):
        calibrated.refit([])


def test_each_trace_is_judged_by_a_fit_to_the_other_ones(tmp_path, capsys, monkeypatch):
    job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=8), batch_size=1, epochs=3)
    engine = FixedCost(info=fixed_info(simulated=False, name="Engine(fixed)"))
    request = wb.Request(request_id="r", arrival_s=0.0, prompt_tokens=4, output_tokens=3)

    def kept(trace, policy):
        one = wb.replay([request], executor=engine, policy=policy, jobs=[job], progress=False)
        Kept(trace=trace, load=2, policy=policy, job=job, shape="tiny", date="2026-01-01", replay=one).save(tmp_path / "kept" / trace)

    for trace, policies in {"one": [wb.policies.ServeFirst(), wb.policies.LatencyBudget()], "two": [wb.policies.ServeFirst()]}.items():
        for policy in policies:
            kept(trace, policy)
    whole = wb.replay([request], executor=engine, policy=wb.policies.ServeFirst(), jobs=[job], until="jobs", progress=False)
    LatencyModel.fit(whole).save(tmp_path / "profile")
    seen, refit = [], LatencyModel.refit

    def spy(model, replays, **more):
        seen.append(len(replays))
        return refit(model, replays, **more)

    monkeypatch.setattr(LatencyModel, "refit", spy)
    options = ["--profile", str(tmp_path / "profile"), "--refit", "--into", str(tmp_path / "rows")]
    assert cli.main(["model", "--from", str(tmp_path / "kept"), *options]) == 0
    assert seen == [1, 2, 3], "trace one by the one replay of two, trace two by the two of one, and all for the model that is saved"
    final = LatencyModel.load(tmp_path / "rows" / modelling.REFITTED)
    written = ReplayErrors.read(tmp_path / "rows" / modelling.PREDICTIONS_FILE)
    assert final.replays is not None and final.replays.frame.equals(written.frame)
    assert len(written.predictions) == 3 * len(modelling.METRICS)
    assert sum(final.provenance["refitted_to"].values()) == 3
    with pytest.raises(ValueError, match="at least two traces must be kept"):
        cli.main(["model", "--from", str(tmp_path / "kept" / "one"), *options])
    with pytest.raises(SystemExit):
        cli.main(["model", "--from", str(tmp_path / "kept"), "--refit"])
    assert "give both" in capsys.readouterr().err


def delayed_twice():
    """A kept replay of which two steps lasted 20 ms longer."""
    slow = measured(400)
    slow.steps = slow.steps.assign(predicted_s=slow.steps["duration_s"])
    slow.steps.loc[[50, 250], "duration_s"] += 0.02
    return SimpleNamespace(replay=slow, cell="a trace, 2 req/s", date="2026-01-01T00:00:00Z")


def test_rivals_are_tuned_for_the_delays_of_kept_replays_and_the_file_says_whose(tmp_path, monkeypatch, capsys):
    LatencyModel.fit(synthetic(300), info=INFO).with_stalls(STALLS).save(tmp_path / "model")
    tuned = []
    monkeypatch.setattr(bench_kept, "load_all", lambda folders: [delayed_twice()] if folders == [Path("x"), Path("y")] else [])
    monkeypatch.setattr(contest, "tune", lambda model, file: tuned.append((model, file)))
    command = ["tune", "--profile", str(tmp_path / "model"), "--into", str(tmp_path)]
    assert cli.main(command) == cli.main([*command, "--stalls", "x", "y"]) == 0
    (plain, file), (delayed, _) = tuned
    assert plain.stalls == STALLS and file == tmp_path / contest.FILE
    assert delayed.stalls.seconds == pytest.approx((0.02, 0.02), rel=0.05)
    assert delayed.stalls.source == f"1 replays (a trace, 2 req/s) on {INFO.device}, 2026-01-01, commit c0ffee"
    capsys.readouterr()


def test_the_long_contest_has_the_delays_of_the_tuning_unless_others_are_named(tmp_path, monkeypatch, capsys):
    LatencyModel.fit(synthetic(300), info=INFO).with_stalls(STALLS).save(tmp_path / "model")
    tuned_with = Stalls(0.5, (0.01, 0.02), "ten replays")
    (tmp_path / contest.FILE).write_text(json.dumps({"delays": asdict(tuned_with)}))
    replayed = []
    monkeypatch.setattr(bench_kept, "load_all", lambda _: [delayed_twice()])
    monkeypatch.setattr(long_contest, "run", lambda model, folder: replayed.append((model.stalls, folder)))
    command = ["long", "--profile", str(tmp_path / "model"), "--into", str(tmp_path)]
    assert cli.main(command) == cli.main([*command, "--stalls", "x"]) == 0
    assert replayed[0] == (tuned_with, tmp_path) and replayed[1][0].seconds == pytest.approx((0.02, 0.02), rel=0.05)
    capsys.readouterr()


def test_what_the_script_adds_is_the_steps_and_the_stalls_of_kept_replays(tmp_path, monkeypatch, capsys):
    LatencyModel.fit(synthetic(300), info=INFO).with_stalls(STALLS).save(tmp_path / "model")
    assert refit_profile.refit(tmp_path / "model").stalls == STALLS, "fitted to its own steps again it stalls as before"
    kept = delayed_twice()
    monkeypatch.setattr(refit_profile, "load_all", lambda _: [kept])
    monkeypatch.setattr("sys.argv", ["refit_profile", str(tmp_path / "model"), "--replays", "x", "--into", str(tmp_path / "out")])
    refit_profile.main()
    found = LatencyModel.load(tmp_path / "out")
    assert found.stalls is not None and found.stalls.seconds == pytest.approx((0.02, 0.02), rel=0.05)
    assert found.stalls.source == f"1 replays (a trace, 2 req/s) on {INFO.device}, 2026-01-01, commit c0ffee"
    assert found.provenance["steps"] == 600
    capsys.readouterr()
