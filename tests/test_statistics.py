"""Intervals cover what they say, differences are paired, and nothing is claimed from one seed."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import workbench as wb
from workbench.experiments.differences import over_blocks
from workbench.experiments.statistics import (
    block_length,
    expanded_percentile,
    holm,
    interval_block_length,
    mean_interval,
    seed_difference,
    stationary_blocks,
)
from workbench.experiments.time_blocks import METRICS, binned
from workbench.testing import FixedCost

REPETITIONS = 200
SLOS = wb.SLO(ttft_s=0.012, tpot_s=0.005, itl_s=0.006, e2e_s=0.05)


def is_nominal(num_covered: int, repetitions: int = REPETITIONS, coverage: float = 0.95) -> bool:
    """Whether a count is one that 99.9 % of correct intervals would give."""
    low, high = stats.binom.interval(0.999, repetitions, coverage)
    return low <= num_covered <= high


@pytest.mark.parametrize("n", [3, 6, 20])
def test_95_percent_intervals_over_seeds_cover_the_mean_in_95_percent_of_repetitions(n):
    rng = np.random.default_rng(n)
    found = [mean_interval(rng.normal(0.3, 1.0, n), resamples=299, seed=i) for i in range(REPETITIONS)]
    assert is_nominal(sum(i.low <= 0.3 <= i.high for i in found))


def test_a_plain_percentile_bootstrap_of_few_seeds_would_not_cover():
    """The trap that `mean_interval` avoids: five seeds, redrawn as they are, give an interval that is too short."""
    rng = np.random.default_rng(5)
    samples = rng.normal(0.3, 1.0, (REPETITIONS, 5))
    means = samples[:, rng.integers(0, 5, (499, 5))].mean(axis=2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert not is_nominal(int(((low <= 0.3) & (0.3 <= high)).sum()))


def correlated(rng: np.random.Generator, num: int = 240, memory: float = 0.5) -> np.ndarray:
    noise, out = rng.normal(size=num + 50), np.zeros(num + 50)
    for k in range(1, num + 50):
        out[k] = memory * out[k - 1] + noise[k]
    return out[50:] + 1.0


def test_95_percent_block_intervals_cover_the_mean_of_a_correlated_series_and_redrawing_single_values_does_not():
    covered = {"blocks": 0, "single": 0}
    for i in range(REPETITIONS):
        rng = np.random.default_rng([i, 1])
        x = correlated(rng)
        for name, length in (("blocks", interval_block_length(x)), ("single", 1.0)):
            means = x[stationary_blocks(len(x), length, 299, rng)].mean(axis=1)
            found = expanded_percentile(float(x.mean()), means, max(2, round(len(x) / length)), 0.95, "")
            covered[name] += found.low <= 1.0 <= found.high
    assert is_nominal(covered["blocks"])
    assert not is_nominal(covered["single"])


def test_block_length_grows_with_the_memory_of_a_series():
    lengths = [np.mean([block_length(correlated(np.random.default_rng(i), 400, m)) for i in range(20)]) for m in (0.0, 0.5, 0.8)]
    assert lengths[0] < 2.5 < lengths[1] < lengths[2]


def test_stationary_blocks_are_runs_of_neighbours_of_the_mean_length_that_draw_every_element_alike():
    drawn = stationary_blocks(50, 5.0, 4000, np.random.default_rng(0))
    is_next = (np.diff(drawn, axis=1) % 50) == 1
    assert is_next.mean() == pytest.approx(0.8 + 0.2 / 50, abs=0.01)
    counts = np.bincount(drawn.ravel(), minlength=50)
    assert counts.min() > 0.9 * counts.mean()


def test_p_value_is_below_a_level_exactly_when_the_interval_of_that_level_leaves_out_zero():
    rng = np.random.default_rng(2)
    for i in range(12):
        x = rng.normal(0.5, 1.0, 12)
        p = mean_interval(x, resamples=1999, seed=i).p_value
        for confidence in (0.8, 0.9, 0.95):
            found = mean_interval(x, confidence=confidence, resamples=1999, seed=i)
            if abs(p - (1 - confidence)) > 0.02:
                assert (p < 1 - confidence) == (found.low > 0 or found.high < 0)


def test_holm_adjusts_as_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert np.isnan(holm([0.01, float("nan")])[1]) and holm([0.01, float("nan")])[0] == 0.01


def test_holm_keeps_the_family_wise_error_and_unadjusted_values_do_not():
    rng = np.random.default_rng(0)
    p = rng.random((2000, 5))
    assert np.mean([min(holm(row)) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(p.min(axis=1) < 0.05) > 0.2


def test_pairing_over_seeds_removes_what_the_seeds_share():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(0, 10, 12), rng.normal(0, 0.1, 12)
    a, b = dict(enumerate(shared + 0.5 + noise)), dict(enumerate(shared))
    found, n, note = seed_difference(a, b)
    assert n == 12 and note == "" and 0.3 < found.low < 0.5 < found.high < 0.7


# comparisons


def patient(view, plan) -> None:
    plan.decode(view.running)
    plan.prefill(view.waiting)


def hasty(view, plan) -> None:
    """Every second request waits for an idle moment."""
    plan.decode(view.running)
    plan.prefill([r for r in view.waiting if not view.running or int(r.id.rpartition("-")[2] or 0) % 2 == 0])


def third(view, plan) -> None:
    plan.decode(view.running)
    if not view.running:
        plan.prefill(view.waiting)


def trace(seed: int) -> wb.Trace:
    lengths = pd.DataFrame({"prompt_tokens": [8, 24, 48, 48], "output_tokens": [5, 2, 5, 1]})
    return wb.traces.poisson(rate=70.0, duration_s=2.0, seed=seed).with_lengths(lengths, seed=seed)


@cache
def comparison(num: int, *, redraws: bool = True, policies=(patient, hasty, third)) -> wb.Comparison:
    job = wb.FinetuneJob(adapter="t", data=wb.RandomTokens(examples=8, tokens=32), epochs=100)
    fixed = trace if redraws else trace(0)
    return wb.compare(
        list(policies), trace=fixed, executor=FixedCost(), jobs=[job], slo=SLOS, seeds=range(num), planning=0.0, progress=False
    )


def test_one_seed_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"needs at least 2 seeds that both policies ran, got \[0\]. Run more seeds"):
        comparison(1).difference("patient", "hasty")


def test_seeds_that_redraw_nothing_are_refused():
    with pytest.raises(ValueError, match="seeds must redraw something"):
        comparison(2, redraws=False, policies=(patient, third)).difference("patient", "third")


def test_a_difference_is_a_sentence_with_interval_n_and_what_was_redrawn():
    found = comparison(3).difference(patient, "third", metric="ttft_p50_s")
    runs = comparison(3).runs.set_index(["policy", "seed"])["ttft_p50_s"]
    assert found.estimate == pytest.approx((runs["patient"] - runs["third"]).mean())
    assert found.low < found.estimate < found.high < 0 and found.n == 3
    text = str(found)
    assert text.startswith("ttft_p50_s: patient less third is -")
    for part in ("95% interval", "n = 3 seeds, paired", "redrawn: arrivals, lengths", "Student's t"):
        assert part in text, text


def test_one_primary_comparison_keeps_its_p_value_and_the_rest_are_adjusted():
    frame = comparison(3).differences(
        ("patient", "third"), metric="ttft_p50_s", rest=[("hasty", "third"), ("patient", "hasty", "e2e_p50_s")]
    )
    assert frame["primary"].tolist() == [True, False, False]
    assert frame["p_adjusted"].iloc[0] == frame["p_value"].iloc[0]
    assert frame["p_adjusted"].iloc[1:].tolist() == pytest.approx(holm(frame["p_value"].iloc[1:]))
    assert len(comparison(3).differences(("patient", "third"))) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"a": "patient", "b": "hastyy"}, "Did you mean 'hasty'"),
        ({"a": "patient", "b": "patient"}, "two policies, both are"),
        ({"a": "patient", "b": "hasty", "metric": "atainment"}, "Did you mean 'attainment"),
        ({"a": "patient", "b": "hasty", "metric": "jain_slowdown", "over": "blocks"}, "must be one that time adds up to"),
        ({"a": "patient", "b": "hasty", "over": "requests"}, "over must be 'seeds' or 'blocks'"),
        ({"a": "patient", "b": "hasty", "block_s": 1.0}, "block_s needs over='blocks'"),
        ({"a": "patient", "b": "hasty", "block_s": 100.0, "over": "blocks"}, "block_s must lie between"),
    ],
)
def test_a_difference_that_makes_no_sense_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        comparison(3).difference(**call)


@pytest.mark.parametrize("metric", METRICS)
def test_on_all_bins_a_metric_over_time_blocks_is_the_summarys(metric):
    replay = comparison(3).replays["hasty", 1]
    found = binned([replay], metric, 60).evaluate(np.ones((1, 60)))[0]
    expected = replay.summary()[metric]
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_drawing_a_bin_twice_counts_its_rows_twice():
    replay = comparison(3).replays["hasty", 1]
    counts = np.zeros((1, 10))
    counts[0, 3] = 2.0
    start, end = replay.measure
    low, high = start + 3 * (end - start) / 10, start + 4 * (end - start) / 10
    rows = replay.requests[replay.requests["arrival_s"].between(low, high, inclusive="left")]
    assert binned([replay], "attainment", 10).evaluate(counts)[0] == pytest.approx(rows["met"].mean())
    assert binned([replay], "ttft_p50_s", 10).evaluate(counts)[0] == pytest.approx(
        rows["ttft_s"].quantile(0.5, interpolation="lower"), rel=0.2
    )


def test_one_seed_is_enough_over_blocks_of_time():
    found = comparison(1).difference("patient", "third", metric="ttft_p50_s", over="blocks", resamples=499)
    assert found.low < found.estimate < found.high < 0
    assert "blocks of" in str(found) and "redrawn: blocks of time" in str(found)


def test_equal_runs_of_several_seeds_do_not_narrow_a_block_interval():
    one, many = (comparison(n, redraws=False, policies=(patient, third)) for n in (1, 2))
    options = {"metric": "ttft_p50_s", "over": "blocks", "resamples": 499}
    first, second = (c.difference("patient", "third", **options) for c in (one, many))
    assert (second.low, second.high) == (first.low, first.high)
    assert "The 2 seeds redraw nothing, so one of them counts" in str(second)


def test_few_effective_blocks_are_said_aloud():
    found = comparison(1).difference("patient", "third", over="blocks", block_s=0.2, resamples=499)
    assert found.n < 20 and "the interval may be too short" in found.note


def test_policies_measured_on_different_windows_have_no_block_difference():
    first, second = comparison(1).replays["patient", 0], comparison(3).replays["third", 1]
    with pytest.raises(ValueError, match="same windows"):
        over_blocks([first], [second], "patient", "third", "attainment", None, 0.95, 99)


def test_a_p99_of_few_requests_is_greyed_in_the_table():
    html = comparison(1)._repr_html_()
    assert "#999999" in html and "Greyed: a p99 of fewer than 1,000 requests" in html
