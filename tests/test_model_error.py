"""How wrong a latency model is stands beside everything that it simulates: judged by whole replays, kept with the model, never lost."""

import dataclasses
import re

import pandas as pd
import pytest

import workbench as wb
from tests.test_latency import INFO, synthetic
from workbench.latency.whole_replays import Prediction, ReplayErrors, mean_of
from workbench.model_error import METRICS, ModelError, with_error
from workbench.recorded import Recorded
from workbench.testing import FixedCost, fixed_info
from workbench.widgets import explorer

GPU = INFO.device
SLO = wb.SLO(ttft_s=0.2, itl_s=0.05)


def predicted(metric: str, measured: float, simulated: float, **changes) -> Prediction:
    row = Prediction("azure-conv", 6.0, "FCFS()", metric, measured, simulated, "0123456", "2026-11-22T10:00:00+00:00", GPU)
    return dataclasses.replace(row, **changes)


ERRORS = ReplayErrors(
    (
        *(predicted("attainment", 0.9, x) for x in (0.921, 0.871)),
        *(predicted("finetune_tokens_per_s", x, 110.0) for x in (100.0, 0.0)),
    )
)
SAID = f"model error on attainment: at most 2.9 points, mean -0.4 (2 replays on {GPU}, 2026-11-22)"


@pytest.fixture(scope="module")
def plain() -> wb.LatencyModel:
    return wb.LatencyModel.fit(synthetic(noise=0.05), info=INFO)


@pytest.fixture(scope="module")
def model(plain) -> wb.LatencyModel:
    return plain.with_replays(ERRORS)


def trace(seed: int = 0, load: float = 20.0) -> wb.Trace:
    return wb.traces.poisson(rate=load, duration_s=1.0, seed=seed).with_lengths("azure-conv", seed=seed, clip=(64, 8))


def serve(view, plan) -> None:
    plan.decode(view.running)
    plan.prefill(view.waiting)


SETTING = {"slo": SLO, "planning": 0.0, "progress": False}


@pytest.fixture(scope="module")
def compared(model) -> wb.Comparison:
    return wb.compare([serve, wb.policies.FCFS()], trace=trace, executor=model, seeds=range(2), **SETTING)


@pytest.fixture(scope="module")
def swept(model) -> wb.Sweep:
    axes = {"executor": {"as fitted": model, "+3 %": model.perturb(0.03)}}
    return wb.sweep([serve], trace=trace, executor=model, axes=axes, seeds=range(2), **SETTING)


# ---- the value


def test_an_error_is_in_points_of_attainment_and_in_per_cent_of_what_was_measured_of_all_else():
    assert predicted("attainment", 0.9, 0.87).error == pytest.approx(-3.0)
    assert predicted("ttft_p99_s", 0.2, 0.25).error == pytest.approx(25.0)
    with pytest.raises(ValueError, match="metrics must be among attainment"):
        ReplayErrors((predicted("ttft_p42_s", 1.0, 1.0),))


def test_the_worst_error_has_no_sign_the_mean_keeps_it_and_both_are_said_with_n_device_and_date():
    found = ERRORS.on("attainment")
    assert found.worst == pytest.approx(2.9) and found.mean == pytest.approx(-0.4)
    assert str(found) == SAID
    later = ReplayErrors((*ERRORS.predictions, predicted("attainment", 0.9, 0.9, date="2026-11-25T10:00:00+00:00")))
    assert str(later.on("attainment")).endswith(f"(3 replays on {GPU}, 2026-11-22 to 2026-11-25)")


def test_replays_in_which_an_error_is_undefined_are_counted_and_not_hidden():
    found = ERRORS.on("finetune_tokens_per_s")
    assert (found.replays, found.tried) == (1, 2) and found.amount == "at most 10.0 %, mean +10.0 in 1 of them"


def test_what_was_not_measured_says_so_and_gives_the_error_of_single_steps(plain):
    said = str(plain.info.model_error.on("ttft_p99_s"))
    assert said == f"model error on ttft_p99_s: not measured; per-step {100 * plain.report.mape:.1f} %"
    assert "whole replays: not measured" in repr(plain)


def test_replay_errors_come_back_from_their_file_as_they_were(tmp_path):
    odd = predicted("tpot_p50_s", 1 / 3, 0.1 + 0.2, load=float("inf"), commit="1234567", policy='P(a=(1, 2), b="x")')
    errors = ReplayErrors((*ERRORS.predictions, odd))
    assert ReplayErrors.read(errors.save(tmp_path / "deep" / "replays.csv")) == errors
    (tmp_path / "other.csv").write_text("trace,load\na,1\n")
    with pytest.raises(ValueError, match="must have the columns trace, load"):
        ReplayErrors.read(tmp_path / "other.csv")


# ---- with a model


def engine(**costs) -> FixedCost:
    return FixedCost(info=fixed_info(simulated=False, device=GPU, name="Engine(fixed)"), **costs)


@pytest.fixture(scope="module")
def pair():
    """An engine's comparison, that of a model fitted to other replays of it but 10 % too slow, and the model."""
    fitted = wb.LatencyModel.fit(wb.replay(trace(9), executor=engine(), policy=serve, planning=0.0, progress=False))
    slow = fitted.perturb(0.1)
    both = [wb.compare([serve], trace=trace(1), executor=e, seeds=range(2), **SETTING) for e in (engine(), slow)]
    return both[0], both[1], slow


def test_errors_of_replays_are_those_of_their_summaries(pair):
    measured, simulated, slow = pair
    judged = slow.with_replays(measured, simulated, date="2026-11-22T10:00:00+00:00")
    row = (
        judged.replays.frame.set_index(["load", "metric"])
        .loc[:, ["measured", "simulated", "error"]]
        .xs("tpot_p50_s", level="metric")
        .iloc[0]
    )
    values = [c.replays["serve", 0].summary()["tpot_p50_s"] for c in (measured, simulated)]
    assert row.tolist() == [*values, pytest.approx(100 * (values[1] / values[0] - 1))] and 5 < row["error"] < 15
    assert judged.replays.on("tpot_p50_s").replays == 2 and set(judged.replays.table().index) == set(METRICS)
    assert judged.info.model_error.changed == () and "perturbed" in judged.provenance, "it was judged as it is now"


def test_only_replays_of_the_same_things_on_the_models_device_are_put_beside_each_other(pair, model):
    measured, simulated, slow = pair
    one, other = (c.replays["serve", 0] for c in (measured, simulated))
    with pytest.raises(ValueError, match="measured must come from an engine"):
        slow.with_replays(other, other)
    with pytest.raises(ValueError, match="simulated must come from a latency model"):
        slow.with_replays(one, one)
    with pytest.raises(ValueError, match="measured replays need simulated ones"):
        slow.with_replays(one)
    for changes in ({"trace": trace(2)}, {"seed": 5}, {"slo": wb.SLO(ttft_s=1.0)}, {"policy": wb.policies.FCFS()}, {"measure": (0.0, 0.5)}):
        options = {"trace": trace(1), "executor": slow, "policy": serve, "slo": SLO, "seed": 0, "measure": one.measure} | changes
        wrong = wb.replay(options.pop("trace"), planning=0.0, progress=False, **options)
        with pytest.raises(ValueError, match="both must be replays of the same requests"):
            slow.with_replays(one, wrong)
    elsewhere = ReplayErrors((predicted("attainment", 1.0, 1.0, device="another GPU"),))
    with pytest.raises(ValueError, match="measured on the model's device"):
        model.with_replays(elsewhere)


def test_a_profile_keeps_its_replays_and_one_without_them_leaves_no_old_file(model, plain, tmp_path):
    loaded = wb.LatencyModel.load(model.save(tmp_path / "p"))
    assert loaded.replays == ERRORS and loaded.info == model.info
    assert "model_error" not in (tmp_path / "p" / "model.json").read_text(), "replays.csv alone says it: a new one needs no other change"
    ReplayErrors((predicted("attainment", 1.0, 1.0, device="another GPU"),)).save(tmp_path / "p" / "replays.csv")
    with pytest.raises(ValueError, match="measured on the model's device"):
        wb.LatencyModel.load(tmp_path / "p")
    assert wb.LatencyModel.load(plain.save(tmp_path / "p")).replays is None


def test_a_changed_model_says_what_was_changed_since_it_was_judged(model, tmp_path):
    adapters = {"a": wb.AdapterSpec(8, 1000, "host")}
    changed = model.with_limits(max_requests=2).with_adapters(adapters).perturb(0.1).perturb(0.1)
    again = wb.LatencyModel.load(changed.save(tmp_path / "p"))
    for one in (changed, again):
        assert str(one.info.model_error.on("attainment")) == f"{SAID}; changed since then: limits, adapters, costs (perturbed)"
    assert model.with_limits(max_requests=INFO.max_requests).info.model_error.changed == (), "the limits that it has are no change"
    assert again.with_replays(ERRORS).info.model_error.changed == ()


def test_judging_a_model_keeps_the_results_that_a_cache_has_of_it(plain, model):
    assert plain.identity() == model.identity() != model.perturb(0.1).identity()


# ---- beside results


def test_a_simulated_replay_says_its_models_error_and_a_measured_one_has_none(compared, pair):
    simulated, measured = compared.replays["serve", 0], pair[0].replays["serve", 0]
    assert repr(simulated).endswith(f"simulated by {simulated.executor.name} fitted on {GPU}; {SAID}")
    assert str(simulated.model_error("attainment")) == SAID
    table = simulated.headline()
    assert table.loc["attainment"].tolist() == [simulated.summary()["attainment"], "at most 2.9 points, mean -0.4"]
    assert table.loc["ttft_p50_s", "model error"] == "not measured"
    assert measured.model_error("attainment") is None and "error" not in repr(measured)
    assert set(measured.headline()["model error"]) == {"measured"}


def test_a_loaded_replay_and_a_fleets_still_know_the_error(compared, model, tmp_path):
    run = compared.replays["serve", 0]
    assert repr(wb.load_replay(run.save(tmp_path / "one"))) == repr(run)
    fleet = wb.replay(trace(), executor=wb.Fleet(model, 2), policy=serve, **SETTING)
    assert str(fleet.model_error()) == f"{SAID}; changed since then: 2 replicas"
    assert wb.load_replay(fleet.save(tmp_path / "fleet")).executor.model_error == fleet.executor.model_error


def test_recorded_steps_have_the_error_of_what_was_recorded(compared, pair):
    assert Recorded(compared.replays["serve", 0]).info.model_error == compared.replays["serve", 0].executor.model_error
    assert str(Recorded(pair[0].replays["serve", 0]).info.model_error.on("attainment")).endswith("not measured; per-step 0.0 %")


def test_a_comparison_says_it_in_repr_page_caption_and_difference(compared, pair):
    assert SAID in repr(compared) and "error" not in repr(pair[0])
    for text in (compared._repr_html_(), compared.caption):
        assert "on attainment: at most 2.9 points" in text and re.search(r"on decode_tokens_per_s[^:]*: not measured", text)
    assert "model error" not in pair[0].caption + pair[0]._repr_html_()
    difference = compared.difference(serve, wb.policies.FCFS(), metric="ttft_p50_s")
    assert "model error on ttft_p50_s: not measured" in str(difference)


def test_a_sweep_says_it_of_each_of_its_models(swept):
    for text in (repr(swept), swept.model_error(), swept._repr_html_()):
        assert "on attainment: at most 2.9 points" in text and text.count("costs (perturbed)") == 1
    assert "as fitted" not in swept.model_error() and "model error on itl_p99_s: not measured" in swept.model_error("itl_p99_s")


def test_a_capacity_says_the_error_of_its_metric(model):
    found = wb.search(serve, trace=trace, low=5, high=10, executor=model, slo=SLO, planning=0.0, seeds=range(2), grid=2, progress=False)
    assert SAID in str(found)
    assert SAID in shown(wb.plots.capacity([found]).figure)


def shown(figure) -> str:
    """All text of a figure, on one line."""
    import matplotlib as mpl

    figure.canvas.draw()
    return re.sub(r"\s+", " ", " ".join(t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_visible()))


def test_figures_of_simulated_rows_say_the_error_of_what_they_draw_once(compared, swept):
    runs = compared.runs
    assert shown(wb.plots.attainment(runs).figure).count(SAID) == 1
    assert "model error on ttft_p99_s: not measured" in shown(wb.plots.by_load(runs, "ttft_p99_s", x="seed").figure)
    for figure in (compared.plot(), wb.plots.overview(runs), wb.plots.attainment(runs, caption=compared.caption).figure):
        assert shown(figure).count("model error on attainment") == 1
    text = shown(wb.plots.tradeoff(swept.where(executor="+3 %")).figure)
    assert text.count("model error on attainment") == 2, "a sweep's rows remember all of its models"


def test_rows_remember_the_error_through_filters_concatenation_and_parquet(compared, tmp_path):
    rows = compared.runs.query("seed == 0").sort_values("ttft_p50_s").assign(load=1.0)
    rows.to_parquet(tmp_path / "rows.parquet")
    for kept in (rows, pd.concat([rows, rows]), pd.read_parquet(tmp_path / "rows.parquet")):
        assert with_error("", kept, "attainment") == SAID
    assert with_error("mine", pd.DataFrame({"attainment": [1.0]}), "attainment") == "mine"


def test_measured_rows_say_no_error(pair):
    assert with_error("", pair[0].runs, "attainment") == "" and "error" not in shown(pair[0].plot())


def test_the_explorer_shows_the_error_below_each_number(model):
    found = explorer([serve], trace=lambda rate: trace(0, rate), executor=model, slo=SLO, rates=(5, 10))
    foot = found._text.value.partition("<tfoot>")[2]
    assert "<td>at most 2.9 points, mean -0.4</td>" in foot and "<td>not measured</td>" in foot and f"2 replays on {GPU}" in foot


def test_an_executor_that_nobody_judged_is_not_measured():
    run = wb.replay(trace(), executor=FixedCost(), policy=serve, **SETTING)
    assert repr(run).endswith("model error on attainment: not measured") and ModelError().on("attainment").is_measured is False


def test_runs_of_one_replay_become_their_mean_and_runs_of_different_ones_are_refused():
    first, second = predicted("ttft_p99_s", 0.04, 0.05), predicted("ttft_p99_s", 0.06, 0.07, commit="89abcde")
    [found] = mean_of([[first], [second]])
    assert (found.measured, found.simulated) == pytest.approx((0.05, 0.06)) and found.commit == "0123456, 89abcde"
    for other in ({"policy": "FCFS(other)"}, {"load": 7.0}, {"device": "another"}, {"trace": "another"}, {"metric": "ttft_p50_s"}):
        with pytest.raises(ValueError, match="runs of one replay must be of the same trace, load, policy"):
            mean_of([[first], [dataclasses.replace(second, **other)]])
