"""The latency model of an executor that pads: costs by bucket come back, delays do not move them, and a prediction is one of its bucket."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_latency import INFO, synthetic

from workbench.features import INDEX, NAMES, Work
from workbench.latency.costs import CostModel
from workbench.latency.fit import fit_costs
from workbench.latency.model import MODEL_FILE, LatencyModel
from workbench.latency.terms import CLASSES, Padding, design, table_terms, term_names

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from refit_profile import refit

PADDED = replace(
    INFO,
    token_buckets=(16, 32, 64, 128, 256, 512),
    sequence_buckets=(8, 64),
    decode_buckets=(1, 4, 16, 64),
    backward_buckets=(64, 128, 256),
)
PADDING = Padding.of(PADDED)
LAYERS = 8
# Milliseconds by bucket; neither straight nor rising: 128 tokens take longer than 256, 64 decodes no longer than 16.
TABLES = {
    "serving forward": (8.0, 8.5, 9.0, 15.0, 12.0, 20.0),
    "training forward": (9.0, 9.2, 10.0, 17.0, 13.0, 24.0),
    "decode": (6.0, 7.0, 8.5, 8.4),
    "backward layer": (1.0, 2.5, 2.2),
}
TRUTH = dict.fromkeys(term_names(PADDING), 0.0) | {
    "decode_context": 0.05e-6,
    "prefill_pairs": 2e-9,
    "adapters": 50e-6,
    "optimizer_steps": 4e-3,
    "backward_starts": 1e-3,
    "finetune_tokens": 3e-6,
    "padded requests": 5e-6,
}
for _table, _costs in TABLES.items():
    TRUTH |= dict(zip(table_terms(_table, PADDING), (c / 1e3 for c in _costs), strict=True))
MODEL = CostModel.of_terms(TRUTH, PADDING)


def work(rng: np.random.Generator, kind: str, tokens: int, layers: int = 0, each: int = 0) -> np.ndarray:
    """One step of so many packed tokens, decodes beside the work of its kind, as features."""
    v = np.zeros(len(NAMES))
    decodes = tokens if kind == "decode" else int(rng.integers(0, max(1, min(tokens, 60) - 2) + 1))
    rest = tokens - decodes
    prefill = {"decode": 0, "serve": rest, "finetune": 0, "both": rest // 2}[kind]
    numbers = {
        "decode_tokens": decodes,
        "prefill_tokens": prefill,
        "finetune_tokens": rest - prefill,
        "finetune_pairs": (rest - prefill) ** 2 / 2,
        "prefill_pairs": prefill**2 / 2,
        "decode_context": decodes * int(rng.integers(10, 400)),
        "requests": decodes + (prefill > 0),
        "samples": decodes + (prefill > 0),
        "adapters": int(rng.integers(0, 5)),
        "backward_layers": layers,
        "backward_token_layers": layers * each,
        "backward_pair_layers": layers * each**2 / 2,
        "backward_starts": layers > 0 and rng.random() < 0.4,
        "optimizer_steps": layers > 0 and rng.random() < 0.3,
    }
    for name, number in numbers.items():
        v[INDEX[name]] = number
    return v


def sweep(repeats: int, seed: int = 0) -> np.ndarray:
    """Every bucket of every table so many times, at sizes up to it, in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(repeats):
        for kind, buckets in (("decode", PADDING.decode), *((k, PADDING.forward) for k in ("serve", "finetune", "both"))):
            rows += [
                work(rng, kind, int(rng.integers(low + 1, high + 1))) for low, high in zip((2, *buckets), buckets, strict=False) if high > 2
            ]
        rows.append(work(rng, "decode", 1))
        for low, high in zip((16, *PADDING.backward), PADDING.backward, strict=False):
            for kind, tokens in (("decode", 0), ("decode", int(rng.integers(1, 60))), ("serve", 40)):
                rows.append(work(rng, kind, tokens, int(rng.integers(1, LAYERS + 1)), int(rng.integers(low + 1, high + 1))))
    return rng.permutation(np.array(rows))


def measured(values: np.ndarray, noise: float = 0.0, delayed: float = 0.0, seed: int = 1) -> np.ndarray:
    """What TRUTH takes, with relative noise, and a share of steps that take three times as long."""
    rng = np.random.default_rng(seed)
    return MODEL.predict_all(values) * (1 + rng.normal(0, noise, len(values))) * np.where(rng.random(len(values)) < delayed, 3.0, 1.0)


def frame(values: np.ndarray, duration_s: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(values, columns=list(NAMES)).assign(duration_s=duration_s)


def model(repeats: int = 6, **options) -> LatencyModel:
    values = sweep(repeats)
    return LatencyModel.fit(frame(values, measured(values, **options)), info=PADDED)


def error(costs: CostModel, values: np.ndarray) -> np.ndarray:
    return np.abs(costs.predict_all(values) / MODEL.predict_all(values) - 1)


FRESH = sweep(20, seed=9)


def test_a_table_of_costs_by_bucket_comes_back_from_three_steps_of_each():
    values = sweep(3)
    found = error(fit_costs(values, measured(values, noise=0.01), PADDING), FRESH)
    assert found.mean() < 0.015 and np.quantile(found, 0.95) < 0.04
    # a smooth curve cannot say what 128 tokens take
    smooth = np.abs(fit_costs(values, measured(values, noise=0.01)).predict_all(FRESH) / MODEL.predict_all(FRESH) - 1)
    assert smooth.mean() > 4 * found.mean()


def test_steps_delayed_threefold_do_not_move_the_costs():
    values = sweep(6)
    clean = fit_costs(values, measured(values, noise=0.01), PADDING)
    delayed = fit_costs(values, measured(values, noise=0.01, delayed=0.03), PADDING)
    assert error(delayed, FRESH).mean() < error(clean, FRESH).mean() + 0.005
    moved = delayed.predict_all(FRESH) / clean.predict_all(FRESH) - 1
    assert abs(moved.mean()) < 0.005  # 3 % of steps at three times the time are 6 % of all the time


def test_delays_that_the_fit_did_not_follow_are_drawn_in_their_class_alone():
    values = sweep(40)
    duration = measured(values, noise=0.01)
    trains = (values[:, INDEX["finetune_tokens"]] > 0) & (values[:, INDEX["backward_layers"]] == 0)
    duration[np.flatnonzero(trains)[::20]] *= 3.0
    delayed = LatencyModel.fit(frame(values, duration), info=PADDED)
    stream = delayed._noise.stream(0)
    drawn = {name: np.array([stream(kind) for _ in range(6000)]) for kind, name in enumerate(CLASSES)}
    assert (drawn["finetune"] > 2).mean() == pytest.approx(0.05, abs=0.015)
    assert all(drawn[name].max() < 1.2 for name in CLASSES if name != "finetune")
    assert delayed.error(delayed.steps).bias < -0.01, "an error says that the sum of all steps is longer than predicted"


def test_one_prediction_many_and_runs_of_decodes_are_equal_bit_for_bit():
    fitted = model(noise=0.05).costs
    one_by_one = [fitted.predict(Work(row)) for row in FRESH.tolist()]
    np.testing.assert_array_equal(one_by_one, fitted.predict_all(FRESH))
    np.testing.assert_allclose(one_by_one, design(FRESH, PADDING) @ fitted.costs, rtol=1e-12)
    np.testing.assert_allclose(fitted.parts(FRESH).sum(axis=1), one_by_one, rtol=1e-12)
    decodes = work(np.random.default_rng(0), "decode", 23)
    later = [Work(decodes + k * 23 * (np.arange(len(NAMES)) == INDEX["decode_context"])) for k in range(50)]
    for num in (20, 50):  # a list, and an array
        assert list(fitted.predict_decodes(Work(decodes), num)) == [fitted.predict(w) for w in later[:num]]


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["decode_tokens", "prefill_tokens", "finetune_tokens"]))
@settings(max_examples=200, deadline=None)
def test_sizes_of_one_bucket_cost_the_same_but_for_what_grows_with_them(first, second, kind):
    buckets = PADDING.decode if kind == "decode_tokens" else PADDING.forward
    bare = CostModel.of_terms(TRUTH | {"finetune_tokens": 0.0}, PADDING)
    seconds = [bare.predict(Work([float(n) if name == kind else 0.0 for name in NAMES])) for n in (first, second)]
    if any(low < first <= high and low < second <= high for low, high in zip((0, *buckets), buckets, strict=False)):
        assert seconds[0] == seconds[1]
    longer = bare.predict(Work([float(first) if name in (kind, "decode_context") else 0.0 for name in NAMES]))
    assert longer > seconds[0], "the context is not padded"


def test_more_context_and_more_layers_never_take_less():
    fitted = model(noise=0.1, delayed=0.05).costs
    rng = np.random.default_rng(3)
    for _ in range(50):
        each = int(rng.integers(1, 300))
        steps = [work(np.random.default_rng(0), "decode", 5, layers, each) for layers in range(1, LAYERS + 1)]
        for step in steps:
            step[INDEX["optimizer_steps"]] = step[INDEX["backward_starts"]] = 0
        seconds = fitted.predict_all(np.array(steps))
        assert (np.diff(seconds) >= 0).all()
        assert (np.diff(fitted.predict_decodes(Work(steps[0]), 20)) >= 0).all()
    assert min(fitted.costs) >= 0


def test_a_bucket_without_steps_lies_between_its_neighbours():
    values = sweep(6)
    tokens = values[:, [INDEX[n] for n in ("finetune_tokens", "prefill_tokens", "decode_tokens")]].sum(axis=1)
    seen = ~((tokens > 32) & (tokens <= 64))
    fitted = fit_costs(values[seen], measured(values[seen], noise=0.005), PADDING).by_term()
    low, middle, high = (fitted[f"serving forward of {n} tokens"] for n in (32, 64, 128))
    assert low < middle < high
    assert middle == pytest.approx(TRUTH["serving forward of 64 tokens"], rel=0.3)


def test_beyond_the_largest_bucket_the_curve_goes_on():
    fitted = model(noise=0.01)
    inside, beyond = (fitted.predict(Work([float(n) if name == "prefill_tokens" else 0.0 for name in NAMES])) for n in (512, 5120))
    assert beyond > 2 * inside


def test_what_an_executor_pads_to_is_part_of_the_models_identity_and_no_limit_to_play_with():
    values = sweep(3)
    steps = frame(values, measured(values))
    models = [LatencyModel.fit(steps, info=info) for info in (PADDED, INFO, replace(PADDED, decode_buckets=(64,)))]
    assert len({m.identity() for m in models}) == 3
    assert models[0].with_limits(max_requests=4).costs == models[0].costs
    with pytest.raises(ValueError, match="token_buckets must be as they were when the steps were measured"):
        models[0].with_limits(token_buckets=(512,))
    with pytest.raises(ValueError, match="decode_buckets must ascend from at least 1, got \\(4, 2\\)"):
        replace(INFO, decode_buckets=(4, 2))


def test_padded_models_are_saved_and_perturbed_as_others_are(tmp_path):
    fitted = model(noise=0.02)
    again = LatencyModel.load(fitted.perturb(0.1, hidden=True).save(tmp_path))
    assert again.identity() == fitted.perturb(0.1, hidden=True).identity() and again.info.token_buckets == PADDED.token_buckets
    rng = np.random.default_rng(0)
    decode, behind = work(rng, "decode", 7), work(rng, "decode", 0, 4, 100)

    def seconds(m, step):
        return m.predict(Work(step))

    slower = fitted.perturb(scale={"backward layer": 1.5})
    assert seconds(slower, decode) == seconds(fitted, decode)
    layers = 4 * fitted.costs.by_term()["backward layer of 128 tokens"]
    assert seconds(slower, behind) - seconds(fitted, behind) == pytest.approx(0.5 * layers)
    shifted = fitted.perturb(shift_s={"decode": 0.002})
    mixed = work(rng, "serve", 60)
    assert mixed[INDEX["decode_tokens"]] > 0
    for step, extra in ((decode, 0.002), (mixed, 0.002), (behind, 0.0)):
        assert seconds(shifted, step) - seconds(fitted, step) == pytest.approx(extra)


def test_shares_of_padded_work_are_one_row_a_table():
    fitted = model()
    shares = fitted.costs.shares(fitted.steps)
    assert set(TABLES) <= set(shares.index) and not any(" of " in name for name in shares.index)
    np.testing.assert_allclose(shares.sum(), 1.0)


def test_a_model_of_an_older_format_says_how_to_fit_it_again_and_can_be(tmp_path):
    steps = synthetic(noise=0.02)
    LatencyModel.fit(steps, info=INFO, adapters=["a"], commit="abc").save(tmp_path)
    record = json.loads((tmp_path / MODEL_FILE).read_text())
    record["format"] = 1
    for name in ("token_buckets", "sequence_buckets", "decode_buckets", "backward_buckets"):
        del record["info"][name]
    (tmp_path / MODEL_FILE).write_text(json.dumps(record))
    layers = steps["backward_layers"].to_numpy(int)
    pd.read_parquet(tmp_path / "steps.parquet").drop(columns="backward_starts").to_parquet(tmp_path / "steps.parquet")
    with pytest.raises(ValueError, match="format must be 2, got 1.*scripts/refit_profile.py"):
        LatencyModel.load(tmp_path)
    again = refit(tmp_path)
    assert (
        again.provenance["commit"] == "abc" and again.provenance["date"] == record["provenance"]["date"] and "refitted" in again.provenance
    )
    assert again.info.token_buckets[-1] == INFO.max_batch_tokens, "the device is no CPU: its graphs were padded"
    below = np.cumsum(layers) - layers
    assert (again.steps["backward_starts"].to_numpy() == ((layers > 0) & (below % INFO.num_layers == 0))).all()
    assert LatencyModel.load(again.save(tmp_path)).identity() == again.identity()
