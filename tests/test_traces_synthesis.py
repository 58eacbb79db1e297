"""Synthetic arrivals have the rates and burstiness that they are asked for, and popularity rules are what their names say."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import traces
from workbench.traces.popularity import Popularity


def gaps(trace):
    return np.diff(trace.frame["arrival_s"])


def test_poisson_has_its_rate_and_a_cv_of_one():
    trace = traces.poisson(rate=8, duration_s=2000, seed=0)
    assert trace.rate == pytest.approx(8, rel=0.03)
    assert gaps(trace).std() / gaps(trace).mean() == pytest.approx(1, rel=0.03)
    assert trace.redrawn == ("arrivals",)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_gamma_has_its_rate_and_its_cv(cv):
    trace = traces.gamma(rate=10, cv=cv, duration_s=4000, seed=1)
    assert trace.rate == pytest.approx(10, rel=0.08)
    assert gaps(trace).std() / gaps(trace).mean() == pytest.approx(cv, rel=0.08)


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.1, 20), cv=st.floats(0.2, 6), seed=st.integers(0, 1000))
def test_synthesis_is_seeded_sorted_and_inside_its_span(rate, cv, seed):
    first, again, other = (traces.gamma(rate=rate, cv=cv, duration_s=30, seed=s) for s in (seed, seed, seed + 1))
    assert first == again
    assert first != other or len(first) == 0
    times = first.frame["arrival_s"]
    assert times.is_monotonic_increasing
    assert ((times >= 0) & (times < 30)).all()
    assert first.duration_s == 30


def test_constant_is_evenly_spaced_from_zero():
    trace = traces.constant(rate=1, duration_s=800)
    assert (len(trace), trace.frame["arrival_s"].iloc[-1], trace.redrawn) == (800, 799.0, ())
    assert len(traces.constant(rate=0.3, duration_s=10)) == 3


def test_piecewise_follows_its_phases():
    constant = traces.piecewise(traces.E6_PHASES, arrivals="constant")
    assert len(constant) == 630
    drawn = traces.piecewise(((1000, 2), (2000, 0), (3000, 6)), seed=3)
    counts = np.histogram(drawn.frame["arrival_s"], [0, 1000, 2000, 3000])[0]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(2000, rel=0.1)
    assert counts[2] == pytest.approx(6000, rel=0.1)
    assert drawn == traces.piecewise(((1000, 2), (2000, 0), (3000, 6)), seed=3)


def test_servegen_clients_keep_their_rates_and_lengths():
    trace = traces.servegen("deepseek-r1", seed=0, clients=3, start_s=36_000, duration_s=1800).validate()
    table = pd.read_parquet(traces.io.shipped("servegen_deepseek-r1_client_windows.parquet"))
    span = table[table["t"].between(36_000, 37_200)]
    expected = span.groupby("client")["rate"].mean()
    counts = trace.frame.groupby("tenant").size()
    assert set(counts.index) == {str(c) for c in span.groupby("client")["rate"].sum().nlargest(3).index}
    # A Gamma or Weibull process of these clients wanders; ten-minute counts within a third over three windows.
    assert {c: n / 1800 for c, n in counts.items()} == pytest.approx({c: expected[int(c)] for c in counts.index}, rel=0.34)
    assert trace == traces.servegen("deepseek-r1", seed=0, clients=3, start_s=36_000, duration_s=1800)
    assert trace != traces.servegen("deepseek-r1", seed=1, clients=3, start_s=36_000, duration_s=1800)
    assert trace.redrawn == ("arrivals", "lengths")


def test_servegen_lengths_follow_the_clients_quantiles_independently():
    frame = traces.servegen("deepseek-r1", seed=0, clients=[35], start_s=43_200, duration_s=3600).frame
    table = pd.read_parquet(traces.io.shipped("servegen_deepseek-r1_length_quantiles.parquet"))
    own = table[(table["client"] == 35) & (table["t"] == 43_200)].iloc[0]
    levels = json.loads(traces.io.shipped("servegen_quantile_levels.json").read_text())
    for column, source in (("prompt_tokens", "prompt_q"), ("output_tokens", "output_q")):
        measured = [(frame[column] <= quantile).mean() for quantile in own[source]]
        assert measured == pytest.approx(levels, abs=0.025)
    assert abs(frame["prompt_tokens"].rank().corr(frame["output_tokens"].rank())) < 0.05


def test_a_servegen_window_does_not_depend_on_where_the_span_begins():
    whole = traces.servegen_arrivals("deepseek-r1", seed=0, clients=[35], start_s=36_000, duration_s=1800)
    part = traces.servegen_arrivals("deepseek-r1", seed=0, clients=[35], start_s=36_300, duration_s=1500)
    assert part.frame["arrival_s"].tolist() == pytest.approx(whole.slice(300).frame["arrival_s"].tolist())


# ---- popularity


def shares(popularity: Popularity, n=8, seed: int | None = 0):
    trace = traces.poisson(rate=100, duration_s=400, seed=9).assign_adapters(n, popularity=popularity, seed=seed)
    counts = trace.frame["adapter"].value_counts(normalize=True)
    return np.array([counts.get(f"adapter-{i}", 0.0) for i in range(n)])


def test_zipf_weights_are_one_over_rank_to_the_s():
    for s in (0.0, 1.0, 2.0):
        weights = np.arange(1, 9) ** -s
        assert shares(traces.zipf(s)) == pytest.approx(weights / weights.sum(), abs=0.01)


def test_geometric_makes_each_adapter_a_ratio_times_the_next():
    measured = shares(traces.geometric(1.5))
    assert measured[:-1] / measured[1:] == pytest.approx(1.5, rel=0.15)


def test_s_lora_power_is_uniform_at_one_and_skewed_below():
    assert shares(traces.s_lora_power()) == pytest.approx(1 / 8, abs=0.01)
    expected = np.diff((np.arange(9) / 8) ** 0.3)
    assert shares(traces.s_lora_power(0.3)) == pytest.approx(expected, abs=0.01)


def test_uniform_and_round_robin_share_evenly():
    assert shares(traces.uniform()) == pytest.approx(1 / 8, abs=0.01)
    trace = traces.constant(rate=1, duration_s=7).assign_adapters(["x", "y", "z"], popularity=traces.round_robin())
    assert trace.frame["adapter"].tolist() == ["x", "y", "z", "x", "y", "z", "x"]
    assert trace.redrawn == ()


def test_per_phase_changes_adapter_at_each_end():
    trace = traces.constant(rate=1, duration_s=6).assign_adapters(["x", "y"], popularity=traces.per_phase(2, 6))
    assert trace.frame["adapter"].tolist() == ["x", "x", "y", "y", "y", "y"]


def test_clients_become_adapters_by_how_busy_they_are():
    trace = traces.servegen_arrivals("deepseek-r1", seed=0, clients=3, start_s=36_000, duration_s=600)
    counts = trace.assign_adapters(3, popularity=traces.clients()).frame["adapter"].value_counts()
    assert counts.index.tolist() == ["adapter-0", "adapter-1", "adapter-2"]
    assert counts.tolist() == trace.frame["tenant"].value_counts().tolist()
    two = trace.assign_adapters(2, popularity=traces.clients(others="base"))
    assert two.frame["adapter"].isna().sum() == counts.iloc[2]


def test_assigning_is_seeded_and_replaces_what_was_there():
    arrivals = traces.constant(rate=1, duration_s=200)
    first = arrivals.assign_adapters(4, popularity=traces.zipf(1.0), seed=0)
    assert first == arrivals.assign_adapters(4, popularity=traces.zipf(1.0), seed=0)
    assert first != arrivals.assign_adapters(4, popularity=traces.zipf(1.0), seed=1)
    again = first.assign_adapters(["a"], popularity=traces.round_robin())
    assert again.adapters == ("a",)
    assert [n for n in again.notes if n.startswith("adapters: ")] == ["adapters: 1 by round_robin()"]


BAD = {
    "rate": (lambda: traces.poisson(rate=0, duration_s=1, seed=0), "rate must be above 0"),
    "duration": (lambda: traces.constant(rate=1, duration_s=float("inf")), "duration_s must be above 0"),
    "cv": (lambda: traces.gamma(rate=1, cv=0, duration_s=1, seed=0), "cv must lie in 0.01..100, got 0"),
    "phases": (lambda: traces.piecewise(((5, 1), (5, 2)), seed=0), "phases must have increasing ends"),
    "no seed": (lambda: traces.piecewise(((5, 1),)), 'arrivals="poisson" draws at random and needs a seed'),
    "dataset": (lambda: traces.servegen("m-small", seed=0), "dataset must be one of m-large, deepseek-r1, got 'm-small'"),
    "span": (lambda: traces.servegen("deepseek-r1", seed=0, start_s=86_000), "the span must end within the recording's 86400 s"),
    "clients": (lambda: traces.servegen("deepseek-r1", seed=0, clients=500), "clients must lie in 1.."),
    "client ids": (lambda: traces.servegen("deepseek-r1", seed=0, clients=[999]), r"clients must be active in the span, got [999]"),
    "zipf": (lambda: traces.zipf(-1), "s must lie in 0..100, got -1"),
    "geometric": (lambda: traces.geometric(0.5), "ratio must be at least 1"),
    "power": (lambda: traces.s_lora_power(0), "alpha must be above 0, got 0"),
    "phase order": (lambda: traces.per_phase(2, 1), "ends_s must be increasing times above 0, got (2, 1)"),
    "phase count": (lambda: shares(traces.per_phase(1, 500)), "per_phase needs one adapter for each of its 2 phases, got 8"),
    "phase end": (lambda: shares(traces.per_phase(1, 2), n=2), "per_phase must cover the last arrival"),
    "no clients": (lambda: shares(traces.clients()), "clients() needs the column tenant"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_synthesis_is_an_error_with_rule_and_value(case):
    call, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
