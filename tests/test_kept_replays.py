"""Measured replays that are kept and judged later: what comes back, by which model, in the mean of which runs."""

import json
import shutil

import pandas as pd
import pytest

import workbench as wb
from workbench.bench import __main__ as cli
from workbench.bench import modelling, rows
from workbench.bench.kept import Kept, load_all
from workbench.latency.whole_replays import ReplayErrors
from workbench.testing import FixedCost, fixed_info


def test_every_policy_of_the_bench_comes_back_from_a_kept_replay(tmp_path):
    request = wb.Request(request_id="r", arrival_s=0.0, prompt_tokens=4, output_tokens=2)
    for policy in modelling.POLICIES:
        job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=8), batch_size=1)
        measured = wb.replay([request], executor=FixedCost(), policy=policy, jobs=[job], progress=False)
        one = Kept(trace="t", load=2, policy=policy, job=job, shape="tiny", date="2026-01-01", replay=measured)
        again = Kept.load_from(one.save(tmp_path))
        assert (again.policy, again.job, again.name) == (policy, job, one.name)
    assert len(load_all([tmp_path])) == len(modelling.POLICIES)
    with pytest.raises(FileNotFoundError, match="got none. Keep some"):
        load_all([tmp_path, tmp_path / "nowhere"])


def test_a_kept_replay_whose_policy_was_written_otherwise_is_judged_with_a_word_of_it(tmp_path, capsys):
    request = wb.Request(request_id="r", arrival_s=0.0, prompt_tokens=4, output_tokens=3)
    job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=8), batch_size=1, epochs=3)
    policy, engine = wb.policies.ServeFirst(), FixedCost(info=fixed_info(simulated=False, name="Engine(fixed)"))
    measured = wb.replay([request], executor=engine, policy=policy, jobs=[job], until="jobs", planning=0.0, progress=False)
    wb.LatencyModel.fit(measured).save(tmp_path / "model")
    place = Kept(trace="t", load=2, policy=policy, job=job, shape="tiny", date="2026-01-01", replay=measured).save(tmp_path / "kept")

    def notes(name: str) -> set[bool]:
        into = tmp_path / name
        assert cli.main(["model", "--profile", str(tmp_path / "model"), "--into", str(into), "--from", str(tmp_path / "kept")]) == 0
        rows = pd.read_csv(into / "model.csv")
        return {"with other code of the policy" in note for note in rows[rows["cell"].str.startswith("t,")]["note"]}

    assert notes("same") == {False} and "other code" not in capsys.readouterr().out
    file = place / "kept.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["policy"]["source"] = "0" * 16
    file.write_text(json.dumps(record), encoding="utf-8")
    assert notes("other") == {True} and "with other code of ServeFirst, judged with today's" in capsys.readouterr().out
    del record["policy"]["source"]  # kept before anybody noted it
    file.write_text(json.dumps(record), encoding="utf-8")
    assert notes("unknown") == {False}


def test_replays_of_two_calls_are_judged_together_each_by_the_model_of_its_own_call(tmp_path, capsys):
    request = wb.Request(request_id="r", arrival_s=0.0, prompt_tokens=4, output_tokens=3)
    job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=8), batch_size=1, epochs=3)
    policy, engine = wb.policies.ServeFirst(), FixedCost(info=fixed_info(simulated=False, name="Engine(fixed)"))
    measured = wb.replay([request], executor=engine, policy=policy, jobs=[job], progress=False)
    fitted = wb.LatencyModel.fit(
        wb.replay([request], executor=engine, policy=policy, jobs=[job], until="jobs", planning=0.0, progress=False)
    )
    for call, factor in (("one", 0.0), ("two", 1.0)):
        one = Kept(trace=call, load=2, policy=policy, job=job, shape="tiny", date="2026-01-01", replay=measured)
        one.save(tmp_path / "calls" / call)
        fitted.perturb(factor).save(tmp_path / "calls" / call / "model")

    def judged(*options: str) -> dict[str, float]:
        assert cli.main(["model", "--into", str(tmp_path / "rows"), "--from", *options]) == 0
        found = ReplayErrors.read(tmp_path / "rows" / modelling.PREDICTIONS_FILE).predictions
        return {p.trace: p.error for p in found if p.metric == "tpot_p50_s"}

    parts = [str(tmp_path / "calls" / call) for call in ("one", "two")]
    own = judged(*parts)
    assert own["two"] > own["one"] + 50, "the second call's model is twice as slow"
    assert judged(str(tmp_path / "calls")) == own
    same = judged(*parts, "--profile", str(tmp_path / "calls" / "one" / "model"))
    assert same["one"] == same["two"] == own["one"]
    shutil.rmtree(tmp_path / "calls" / "two" / "model")
    with pytest.raises(ValueError, match="must have its run's model beside it"):
        judged(*parts)
    with pytest.raises(ValueError, match="must be there once"):
        judged(parts[0], parts[0])
    capsys.readouterr()


def test_a_cell_that_several_runs_measured_is_judged_by_their_mean_and_says_how_much_they_differ(tmp_path, capsys):
    requests = [wb.Request(request_id=f"r{i}", arrival_s=0.0, prompt_tokens=4, output_tokens=3) for i in range(2)]
    job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=8), batch_size=1, epochs=3)
    policy, slo = wb.policies.ServeFirst(), wb.SLO(ttft_s=1.0)
    info = fixed_info(simulated=False, name="Engine(fixed)")

    def measured(executor: FixedCost, **options) -> wb.Replay:
        return wb.replay(requests, executor=executor, policy=policy, jobs=[job], slo=slo, planning=0.0, progress=False, **options)

    quick, slow = FixedCost(info=info), FixedCost(step_s=0.03, info=info)
    wb.LatencyModel.fit(measured(quick, until="jobs")).save(tmp_path / "model")
    kept = {"quick": measured(quick), "slow": measured(slow)}
    for name, one in kept.items():
        run = Kept(trace="t", load=2, policy=policy, job=job, shape="tiny", date=f"2026-01-01T00:00:00Z {name}", replay=one)
        run.save(tmp_path / "kept" / name)

    def judged(*names: str) -> dict[str, float]:
        folders = [str(tmp_path / "kept" / name) for name in names]
        arguments = ["model", "--profile", str(tmp_path / "model"), "--into", str(tmp_path / "-".join(names)), "--from", *folders]
        assert cli.main(arguments) == 0
        predictions = ReplayErrors.read(tmp_path / "-".join(names) / modelling.PREDICTIONS_FILE).predictions
        assert len(predictions) == len(modelling.METRICS), "one row for each metric"
        return {p.metric: p.measured for p in predictions}

    first, second, both = judged("quick"), judged("slow"), judged("quick", "slow")
    assert second["ttft_p50_s"] > 1.5 * first["ttft_p50_s"]
    assert all(both[metric] == pytest.approx((first[metric] + second[metric]) / 2) for metric in modelling.METRICS)
    written = rows.read(tmp_path / "quick-slow").set_index("metric")
    assert written.loc["two runs' ttft_p50_s", "p50"] == pytest.approx(100 * (second["ttft_p50_s"] / first["ttft_p50_s"] - 1))
    assert "in the mean of 2 runs" in written.loc["error of ttft_p50_s", "note"].iloc[0]
    assert not any("two runs'" in metric for metric in rows.read(tmp_path / "quick")["metric"]), "one run differs from nothing"
    capsys.readouterr()


def test_policies_are_ranked_only_where_they_differ_by_more_than_the_model_errs():
    def pair(measured, simulated):
        return modelling.Pair("cell", "policy", {"attainment": measured}, {"attainment": simulated})

    assert modelling.in_order(pair(0.900, 0.920), pair(0.800, 0.790), "attainment") is True
    assert modelling.in_order(pair(0.900, 0.800), pair(0.799, 0.850), "attainment") is False
    assert modelling.in_order(pair(0.900, 0.920), pair(0.890, 0.950), "attainment") is None
    assert pair(0.90, 0.92).error("attainment") == pytest.approx(2.0)
