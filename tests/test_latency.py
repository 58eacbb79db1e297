"""The latency model: known costs come back, errors are told truly, and stepping is seeded."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import AdapterInfo, Backward, Batch, Executor, ExecutorInfo, Request, Segment
from workbench.features import INDEX, NAMES, Work, of_batch
from workbench.latency import LatencyModel
from workbench.latency import model as latency
from workbench.latency.fit import fit_costs
from workbench.latency.residuals import class_of
from workbench.latency.terms import classes_of, design, term_names

INFO = ExecutorInfo(
    name="Engine(tiny)",
    device="test device",
    num_layers=8,
    max_model_len=256,
    max_batch_tokens=512,
    max_requests=16,
    num_blocks=64,
    block_tokens=16,
    num_slots=4,
    max_batch_adapters=4,
    activation_tokens=1024,
)
# Seconds per unit: a step costs 5 ms, and so on.
COSTS = {
    "step": 5e-3,
    "finetune_tokens": 40e-6,
    "prefill_tokens": 20e-6,
    "decode_tokens": 30e-6,
    "decode_context": 0.05e-6,
    "adapters": 200e-6,
    "backward_token_layers": 9e-6,
    "optimizer_steps": 4e-3,
    "tokens above 128": 25e-6,
}


def synthetic(num_steps: int = 600, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Steps whose durations follow COSTS, in runs of decode, prefill and training steps, with correlated relative noise."""
    rng = np.random.default_rng(seed)
    values = np.zeros((num_steps, len(NAMES)))
    kind = rng.integers(0, 3, num_steps)
    decode = rng.integers(1, 60, num_steps)

    def put(name: str, numbers: np.ndarray) -> None:
        values[:, INDEX[name]] = numbers

    put("decode_tokens", decode)
    put("requests", decode + (kind == 1))
    put("samples", decode)
    put("decode_context", decode * rng.integers(20, 400, num_steps))
    put("adapters", rng.integers(0, 5, num_steps))
    put("prefill_tokens", np.where(kind == 1, rng.integers(1, 400, num_steps), 0))
    put("finetune_tokens", np.where(kind == 2, rng.integers(1, 300, num_steps), 0))
    layers = np.where(rng.random(num_steps) < 0.3, rng.integers(1, 9, num_steps), 0)
    put("backward_layers", layers)
    put("backward_token_layers", layers * rng.integers(16, 300, num_steps))
    put("optimizer_steps", (layers > 0) & (rng.random(num_steps) < 0.5))
    costs = np.array([COSTS.get(name, 0.0) for name in term_names()])
    error = np.repeat(rng.normal(0, noise, num_steps // 4 + 1), 4)[:num_steps].clip(-0.9)
    return pd.DataFrame(values, columns=list(NAMES)).assign(duration_s=design(values) @ costs * (1 + error))


def decode_batch(step: int = 0, rows: int = 4) -> Batch:
    return Batch(step=step, segments=tuple(Segment("decode", f"r{i}", "a", 1, 20, 1, samples=True) for i in range(rows)))


def backward_batch(stop_after_s: float | None = None, **more) -> Batch:
    backward = Backward("job:t", "t", 0, 0, (64, 64), 8, 8, True)
    return Batch(step=0, segments=decode_batch().segments, backwards=(backward,), stop_after_s=stop_after_s, **more)


def job(**more) -> FinetuneJob:
    return FinetuneJob(adapter="t", data=RandomTokens(examples=4, tokens=64), **({"steps": 1} | more))


@pytest.fixture(scope="module")
def exact() -> LatencyModel:
    return LatencyModel.fit(synthetic(), info=INFO)


@pytest.fixture(scope="module")
def noisy() -> LatencyModel:
    return LatencyModel.fit(synthetic(noise=0.1), info=INFO)


def test_known_costs_come_back_from_exact_steps(exact):
    costs = dict(zip(term_names(), exact.costs.costs, strict=True))
    # `samples` equals `decode_tokens` and `has decode_tokens` the constant in every step: only their sums are determined.
    costs["decode_tokens"] += costs["samples"] + costs["requests"]
    costs["step"] += costs["has decode_tokens"]
    for name, cost in COSTS.items():
        assert costs[name] == pytest.approx(cost, rel=0.02), name
    assert exact.report.mape < 1e-6 and exact.report.held_out


def test_noisy_steps_are_predicted_without_bias_on_fresh_ones(noisy):
    fresh = noisy.error(synthetic(2000, noise=0.1, seed=1))
    assert abs(fresh.bias) < 0.02
    assert 0.06 < fresh.mape < 0.10  # mean |N(0, 0.1)| = 0.08
    assert noisy.report.mape == pytest.approx(fresh.mape, abs=0.02)


def test_report_tells_a_bias_with_its_sign():
    model = LatencyModel.fit(synthetic(), info=INFO)
    faster = synthetic(seed=5)
    faster["duration_s"] *= 0.8
    assert model.error(faster).bias == pytest.approx(0.25, abs=1e-3)
    slower = synthetic(seed=5)
    slower["duration_s"] *= 1.25
    assert model.error(slower).bias == pytest.approx(-0.2, abs=1e-3)


def test_held_out_steps_are_not_fitted_to():
    steps = synthetic()
    held = latency.held_out_mask(len(steps))
    steps.loc[held, "duration_s"] *= 2.0
    assert LatencyModel.fit(steps, info=INFO).report.bias == pytest.approx(-0.5, abs=1e-3)


def test_steps_that_stopped_early_are_not_fitted_to():
    steps = synthetic().assign(stopped_early=False)
    steps.loc[::7, "stopped_early"] = True
    steps.loc[::7, "duration_s"] *= 0.05
    assert LatencyModel.fit(steps, info=INFO).report.mape < 1e-6


def test_share_outside_the_fitted_range_counts_steps_beyond_what_was_seen(exact):
    steps = synthetic(100, seed=2)
    assert exact.outside_share(steps) <= 0.02
    steps.loc[:24, "prefill_tokens"] = 5000
    assert exact.outside_share(steps) == pytest.approx(0.25, abs=0.02)


def test_costs_are_never_negative_whatever_the_noise():
    assert min(LatencyModel.fit(synthetic(120, noise=0.5, seed=7), info=INFO).costs.costs) >= 0


def test_predict_equals_the_vectorised_design(noisy):
    steps = synthetic(200, seed=4)
    one_by_one = [noisy.predict(Work(row)) for row in steps[list(NAMES)].to_numpy()]
    np.testing.assert_array_equal(one_by_one, noisy.costs.predict_all(steps[list(NAMES)].to_numpy()))
    np.testing.assert_allclose(one_by_one, design(steps[list(NAMES)].to_numpy()) @ noisy.costs.costs, rtol=1e-12)


def test_relative_error_counts_so_short_steps_are_not_sacrificed_to_long_ones():
    # A long step that no non-negative model fits must not cost the short ones their accuracy, as absolute errors would.
    steps = synthetic(noise=0.2)
    model = fit_costs(steps[list(NAMES)].to_numpy(), steps["duration_s"].to_numpy())
    truth = synthetic()
    short = truth["duration_s"] < truth["duration_s"].quantile(0.25)
    predicted = model.predict_all(truth[list(NAMES)].to_numpy())
    assert (np.abs(predicted / truth["duration_s"] - 1))[short].mean() < 0.05


def test_a_step_is_predicted_in_microseconds(exact):
    work = of_batch(decode_batch(rows=8))
    start = time.perf_counter()
    for _ in range(2000):
        exact.predict(work)
    assert (time.perf_counter() - start) / 2000 < 50e-6  # about 2 us alone; the machine may be busy


def durations(model: LatencyModel, seed: int, num: int = 200) -> list[float]:
    model.begin([], seed=seed)
    values = [model.step(decode_batch(i)).duration_s for i in range(num)]
    model.end()
    return values


def test_equal_seeds_give_equal_durations_and_others_do_not(noisy):
    assert durations(noisy, 3) == durations(noisy, 3)
    assert durations(noisy, 3) != durations(noisy, 4)


def test_stepping_has_the_recorded_spread_around_the_mean_that_predict_gives(noisy):
    values = np.array(durations(noisy, 0, 6000)) / noisy.predict(of_batch(decode_batch()))
    assert values.mean() == pytest.approx(1.0, abs=0.02)
    assert values.std() == pytest.approx(0.1, rel=0.25)
    # Correlated as recorded: runs of four.
    assert np.corrcoef(values[1:], values[:-1])[0, 1] > 0.5


def test_a_model_is_an_executor(exact):
    assert isinstance(exact, Executor) and exact.predictor is exact and exact.info.simulated


def test_save_and_load_give_the_same_predictions_steps_and_report(noisy, tmp_path):
    loaded = LatencyModel.load(noisy.save(tmp_path / "m"))
    assert loaded.costs == noisy.costs and loaded.report == noisy.report and loaded.info == noisy.info
    assert durations(loaded, 1, 50) == durations(noisy, 1, 50)
    assert {"device", "versions", "commit", "date", "steps"} <= set(loaded.provenance)


def test_an_unknown_profile_is_an_error_that_says_what_there_is(noisy, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "PROFILES", tmp_path)
    noisy.save(tmp_path / "h100-llama3-8b")
    assert LatencyModel.load("h100-llama3-8b").costs == noisy.costs
    with pytest.raises(FileNotFoundError, match="'h100-llama-8b'. Did you mean 'h100-llama3-8b'"):
        LatencyModel.load("h100-llama-8b")


@pytest.mark.parametrize(
    ("steps", "info", "message"),
    [
        (synthetic(1), INFO, "at least 2 steps, got 1"),
        (synthetic(50), None, "Pass info=engine.info"),
        (synthetic(50).drop(columns="samples"), INFO, "without 'samples'"),
        (synthetic(50).assign(duration_s=0.0), INFO, "must be above 0"),
        (synthetic(50), replace(INFO, simulated=True), "measured by an engine"),
    ],
)
def test_a_fit_without_what_it_needs_is_an_error(steps, info, message):
    with pytest.raises(ValueError, match=message):
        LatencyModel.fit(steps, info=info)


def test_a_backward_stops_at_the_first_layer_after_an_arrival(exact):
    exact.begin([job()], seed=0)
    whole = exact.step(backward_batch())
    assert whole.layers_done == {"job:t": 8} and not whole.stopped_early
    late = exact.step(backward_batch(stop_after_s=10.0))
    assert late.layers_done == {"job:t": 8} and not late.stopped_early
    cut = exact.step(backward_batch(stop_after_s=0.009))
    layers = cut.layers_done["job:t"]
    assert cut.stopped_early and 0 < layers < 8
    per_layer = COSTS["backward_token_layers"] * 128
    assert 0.009 <= cut.duration_s < 0.009 + per_layer * 1.01
    # An arrival inside the forward: no layer runs.
    early = exact.step(backward_batch(stop_after_s=0.001))
    assert early.layers_done == {"job:t": 0} and early.duration_s < cut.duration_s
    exact.end()


@pytest.mark.parametrize(("publish", "expected"), [("end", {"t": 1}), ("step", {"t": 1}), ("never", {})])
def test_a_jobs_last_window_publishes_as_an_engine_would(exact, publish, expected):
    exact.begin([job(publish=publish)], seed=0)
    assert exact.step(backward_batch()).published == expected
    assert ("t" in exact.adapter_infos) == bool(expected)
    exact.begin([job(publish=publish, steps=2)], seed=0)
    assert exact.step(backward_batch()).published == (expected if publish == "step" else {})
    exact.end()


def test_a_stopped_backward_publishes_nothing(exact):
    exact.begin([job(publish="step")], seed=0)
    assert exact.step(backward_batch(stop_after_s=0.006)).published == {}
    exact.end()


def request(**more) -> Request:
    return Request(**({"request_id": "r", "arrival_s": 0.0, "prompt_tokens": 10, "output_tokens": 5, "adapter": "a"} | more))


def test_admissible_resolves_defaults_and_registers_adapters_unless_they_were_declared(exact):
    exact.begin([], seed=0)
    assert exact.admissible(request()).max_tokens == 246
    assert exact.adapter_infos["a"].rank == latency.DEFAULT_RANK
    declared = LatencyModel.fit(synthetic(), info=INFO, adapters={"topics": AdapterInfo(name="topics", version=3, rank=16, bytes=100)})
    with pytest.raises(ValueError, match="r: unknown adapter 'topic'. Did you mean 'topics'"):
        declared.admissible(request(adapter="topic"))
    assert declared.admissible(request(adapter=None)).adapter is None
    exact.end()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt_tokens": 0}, "at least 1 token, got 0"),
        ({"prompt_tokens": 256}, "shorter than the context of 256 tokens, got 256"),
        ({"prompt_tokens": 200, "output_tokens": 50}, "KV pool of 8 blocks of 16 tokens, got 16. Raise num_blocks"),
    ],
)
def test_a_request_that_could_never_run_is_an_error(exact, more, message):
    with pytest.raises(ValueError, match=message):
        exact.with_limits(num_blocks=8).admissible(request(**more))


def test_stepping_without_begin_is_an_error(exact):
    with pytest.raises(RuntimeError, match="needs begin"):
        exact.step(decode_batch())


def test_classes_of_steps_follow_their_heaviest_kind():
    values = np.zeros((5, len(NAMES)))
    values[0, INDEX["backward_layers"]] = values[:2, INDEX["finetune_tokens"]] = values[2, INDEX["evaluate_tokens"]] = 1
    values[:4, INDEX["prefill_tokens"]] = values[:, INDEX["decode_tokens"]] = 1
    assert list(classes_of(values)) == [0, 1, 1, 2, 3] == [class_of(Work(row)) for row in values.tolist()]


def test_the_held_out_steps_are_the_ones_that_the_report_judges(noisy):
    held = noisy.held_out
    error = held["predicted_s"] - held["duration_s"]
    assert len(held) == noisy.report.steps and len(held) < len(noisy.steps) / 4
    assert (error.abs() / held["duration_s"]).mean() == pytest.approx(noisy.report.mape)
    assert error.sum() / held["duration_s"].sum() == pytest.approx(noisy.report.bias)
    table = noisy.report.table()
    assert table.loc["all", "mape"] == noisy.report.mape
    assert table["steps"].drop("all").sum() == len(held)


def test_shares_of_a_class_of_steps_sum_to_one_and_follow_the_costs(exact):
    steps = exact.steps
    shares = exact.costs.shares(steps)
    assert list(shares.columns) == ["backward", "finetune", "prefill", "decode"]
    np.testing.assert_allclose(shares.sum(), 1.0)
    values = steps[list(NAMES)].to_numpy(float)
    decode = classes_of(values) == 3
    by_hand = (
        steps.loc[decode, "decode_context"].sum() * exact.costs.table()["decode_context"] / 1e6 / steps.loc[decode, "predicted_s"].sum()
    )
    assert shares.loc["decode_context", "decode"] == pytest.approx(by_hand)
