"""Perturbed latency models: what was changed changes by as much, what was not stays, and a sweep takes them as an axis."""

import numpy as np
import pytest

import workbench as wb
from tests.test_latency import INFO, decode_batch, synthetic
from workbench.core import Batch, Segment
from workbench.features import of_batch
from workbench.latency import LatencyModel
from workbench.policies import FCFS

PREFILL = Batch(step=0, segments=(Segment("prefill", "r", "a", 1, 0, 100, samples=True),))
DECODE = decode_batch(rows=10)


@pytest.fixture(scope="module")
def model():
    return LatencyModel.fit(synthetic(noise=0.05), info=INFO)


def seconds(model, batch):
    return model.predict(of_batch(batch))


def test_one_terms_cost_is_scaled_and_the_others_stay(model):
    other = model.perturb(scale={"prefill_tokens": 2.0})
    assert seconds(other, DECODE) == pytest.approx(seconds(model, DECODE))
    fitted = model.costs.table()["prefill_tokens"] / 1e6
    assert seconds(other, PREFILL) - seconds(model, PREFILL) == pytest.approx(100 * fitted)


def test_a_shift_adds_seconds_to_the_steps_of_its_kind_alone(model):
    other = model.perturb(shift_s={"decode": 0.002})
    assert seconds(other, DECODE) - seconds(model, DECODE) == pytest.approx(0.002)
    assert seconds(other, PREFILL) == pytest.approx(seconds(model, PREFILL))
    every = model.perturb(shift_s={"step": 0.001})
    for batch in (DECODE, PREFILL):
        assert seconds(every, batch) - seconds(model, batch) == pytest.approx(0.001)


def test_a_bias_scales_all_and_perturbations_add_up(model):
    assert seconds(model.perturb(0.1), PREFILL) == pytest.approx(1.1 * seconds(model, PREFILL))
    both = model.perturb(0.1, shift_s={"prefill": 0.01})
    assert seconds(both, PREFILL) == pytest.approx(1.1 * (seconds(model, PREFILL) + 0.01))
    twice = model.perturb(0.1).perturb(-0.5)
    assert seconds(twice, DECODE) == pytest.approx(0.55 * seconds(model, DECODE)) and len(twice.provenance["perturbed"]) == 2


def durations(model, batch, num=800, seed=0):
    model.begin([], seed=seed)
    found = np.array([model.step(batch).duration_s for _ in range(num)])
    model.end()
    return found


def test_residuals_stay_as_they_were_and_noise_comes_on_top(model):
    before, scaled = durations(model, DECODE), durations(model.perturb(0.2, scale={"decode_tokens": 3.0}), DECODE)
    assert np.std(scaled) / np.mean(scaled) == pytest.approx(np.std(before) / np.mean(before), rel=1e-6)
    noisy = durations(model.perturb(noise=0.2), DECODE)
    spread = np.hypot(np.std(before) / np.mean(before), 0.2)
    # 800 draws: the standard error of a standard deviation is 2.5 %
    assert np.std(noisy) / np.mean(noisy) == pytest.approx(spread, rel=0.1) and np.mean(noisy) == pytest.approx(np.mean(before), rel=0.03)
    assert (durations(model.perturb(noise=0.2), DECODE) == noisy).all() and (
        durations(model.perturb(noise=0.2), DECODE, seed=1) != noisy
    ).any()


def test_noise_changes_no_prediction_and_hidden_changes_only_what_happens(model):
    assert seconds(model.perturb(noise=0.2), DECODE) == seconds(model, DECODE)
    hidden = model.perturb(0.5, hidden=True)
    assert hidden.predictor.predict(of_batch(DECODE)) == pytest.approx(seconds(model, DECODE))
    assert np.mean(durations(hidden, DECODE)) == pytest.approx(1.5 * np.mean(durations(model, DECODE)))
    both = hidden.perturb(0.1)
    assert both.predictor.predict(of_batch(DECODE)) == pytest.approx(1.1 * seconds(model, DECODE)), "the second one is seen"
    assert seconds(both, DECODE) == pytest.approx(1.65 * seconds(model, DECODE))
    trace = wb.traces.poisson(rate=5, duration_s=4, seed=0).with_lengths("azure-conv", seed=0, clip=(60, 8))
    result = wb.replay(trace, executor=hidden, policy=FCFS(), planning=0.0)
    assert result.steps["duration_s"].sum() == pytest.approx(1.5 * result.steps["predicted_s"].sum(), rel=0.1)


def test_perturbed_models_differ_in_identity_and_survive_saving(model, tmp_path):
    variants = [
        model,
        model.perturb(0.1),
        model.perturb(noise=0.1),
        model.perturb(0.1, hidden=True),
        model.perturb(scale={"samples": 2.0, "step": 2}),
    ]
    assert len({v.identity() for v in variants}) == len(variants) and len({v.info.name for v in variants}) == len(variants)
    for i, variant in enumerate(variants):
        again = LatencyModel.load(variant.save(tmp_path / str(i)))
        assert again.identity() == variant.identity()
        assert (durations(again, DECODE, 20) == durations(variant, DECODE, 20)).all()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"scale": {"prefil_tokens": 2.0}}, "Did you mean 'prefill_tokens'"),
        ({"scale": {"step": -1.0}}, "must be at least 0"),
        ({"shift_s": {"decodes": 1.0}}, "Did you mean 'decode'"),
        ({"shift_s": {"step": -9.0}}, "after the shift"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"bias": -1.0}, "bias must be above -1"),
    ],
)
def test_a_perturbation_that_cannot_be_is_refused(model, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.perturb(**changes)


def test_perturbed_executors_are_an_axis_of_a_sweep(model):
    found = wb.sweep(
        [FCFS()],
        trace=lambda seed: wb.traces.poisson(rate=5, duration_s=4, seed=seed).with_lengths("azure-conv", seed=seed, clip=(60, 8)),
        executor=model,
        planning=0.0,
        seeds=range(2),
        axes={"executor": {"as fitted": model, "slow decodes": model.perturb(shift_s={"decode": 0.01}), "+10 %": model.perturb(0.1)}},
        n_jobs=1,
        progress=False,
    )
    gaps = found.frame.groupby("executor")["itl_p50_s"].mean()
    assert found.frame["error"].isna().all() and len(found.frame) == 6
    assert gaps["as fitted"] < gaps["+10 %"] < gaps["slow decodes"]
