"""Generators fitted to traces: what was put in comes out, the report shows what does not; fine-tune jobs as a trace."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp, kstest

from workbench import plots, traces
from workbench.config import FinetuneJob, RandomTokens
from workbench.traces.fitting import LogNormal, TraceGenerator
from workbench.traces.trace import Trace


@pytest.fixture(scope="module")
def known():
    """A generator with parameters of its own, fitted to nothing."""
    return TraceGenerator(
        phases=((600.0, 2.0), (1200.0, 0.0), (1800.0, 8.0)),
        shape=0.4,
        prompt=LogNormal(log_mean=5.0, log_sd=0.8, longest=4000),
        output=LogNormal(log_mean=4.0, log_sd=0.5, longest=500),
        correlation=0.6,
        adapters=("a", "b", "c", "d", "e"),
        exponent=1.3,
        base_share=0.2,
        source=traces.load("w3-5rps"),
    )


def test_a_fit_finds_the_parameters_that_drew_the_trace(known):
    drawn = known.sample(1800.0, seed=1)
    fitted = traces.fit(drawn, num_phases=3)
    assert fitted.shape == pytest.approx(0.4, rel=0.1)
    assert [rate for _, rate in fitted.phases] == pytest.approx([2.0, 0.0, 8.0], rel=0.15)
    assert fitted.exponent == pytest.approx(1.3, abs=0.08) and fitted.base_share == pytest.approx(0.2, abs=0.02)
    assert fitted.adapters == ("a", "b", "c", "d", "e")
    assert fitted.prompt.log_mean == pytest.approx(5.0, abs=0.05) and fitted.prompt.log_sd == pytest.approx(0.8, rel=0.05)
    assert fitted.correlation == pytest.approx(0.6, abs=0.05)
    report = fitted.report()
    assert report["ks"].max() < 0.04
    assert report["fitted_mean"].to_numpy() == pytest.approx(report["mean"].to_numpy(), rel=0.03)
    assert list(report.index) == ["arrival_s", "gap", "prompt_tokens", "output_tokens", "adapter rank"]


def test_draws_are_equal_for_equal_seeds_and_say_what_was_drawn(known):
    first, again, other = known.sample(900.0, 3), known.sample(900.0, 3), known.sample(900.0, 4)
    assert first == again and first != other
    assert first.redrawn == ("arrivals", "lengths", "adapters") and first.duration_s == 900.0
    assert "drawn from a fit to w3-5rps: 3.33/s in 3 phases, gamma gaps of shape 0.4" in first.notes
    assert first.frame["prompt_tokens"].between(1, 4000).all()
    times = first.frame["arrival_s"]
    assert times.is_monotonic_increasing and not times.between(600.0, 1200.0).any()


def test_a_draw_longer_than_the_fit_goes_round(known):
    times = known.sample(5400.0, seed=5).frame["arrival_s"].to_numpy()
    counts, _ = np.histogram(times, np.arange(0, 5401, 600))
    expected = np.array([1200.0, 0.0, 4800.0] * 3)
    assert counts[1::3].sum() == 0 and np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected / 0.4))


def test_distances_are_those_of_kolmogorov_and_smirnov(known):
    fitted = traces.fit(known.sample(1800.0, seed=1))
    gaps = np.diff(fitted._expected(fitted.source.frame["arrival_s"].to_numpy()))
    report = fitted.report()
    assert report.loc["gap", "ks"] == pytest.approx(kstest(gaps, "gamma", args=(fitted.shape, 0, 1 / fitted.shape)).statistic, abs=1e-9)
    # with many draws the fitted law is its own sample's
    z = np.random.default_rng(0).standard_normal(200_000)
    real = fitted.source.frame["prompt_tokens"].to_numpy()
    assert report.loc["prompt_tokens", "ks"] == pytest.approx(ks_2samp(real, fitted.prompt.of_normal(z)).statistic, abs=0.01)


def test_the_report_shows_what_the_family_cannot_do():
    two_lengths = pd.DataFrame({"request_id": range(200), "arrival_s": np.arange(200) / 4, "prompt_tokens": [10, 1000] * 100})
    fitted = traces.fit(Trace.from_frame(two_lengths.assign(output_tokens=7)))
    report = fitted.report()
    assert report.loc["prompt_tokens", "ks"] > 0.3
    assert fitted.shape == 1e4 and fitted.output.log_sd == pytest.approx(0.0) and report.loc["output_tokens", "ks"] == 0
    assert fitted.adapters == () and fitted.correlation == 0.0
    assert "adapter" not in fitted.sample(10.0, 0).frame.dropna(axis=1, how="all")


def test_a_real_trace_is_fitted_and_its_gaps_and_popularity_come_out_close():
    trace = traces.load("azure-conv").head(4000).assign_adapters(8, popularity=traces.zipf(1.0), seed=0)
    report = traces.fit(trace).report()
    assert report.loc[["arrival_s", "gap", "adapter rank"], "ks"].max() < 0.03


def test_arrivals_alone_are_fitted_without_lengths():
    fitted = traces.fit(traces.poisson(rate=5.0, duration_s=200.0, seed=0))
    assert fitted.prompt is None and fitted.shape == pytest.approx(1.0, abs=0.15)
    assert list(fitted.report().index) == ["arrival_s", "gap"]
    assert not fitted.sample(10.0, 0).has_lengths


def test_the_figure_shows_every_quantity_with_units_distance_and_n(known):
    fitted = traces.fit(known.sample(600.0, seed=1))
    curves, report = fitted.curves(), fitted.report()
    assert set(curves["quantity"]) == set(report.index)
    for name, rows in curves.groupby("quantity"):
        assert np.abs(rows["real"] - rows["fitted"]).max() <= report.loc[name, "ks"] + 1e-9
        assert rows["real"].is_monotonic_increasing and rows["fitted"].is_monotonic_increasing
    figure = plots.trace_fit(curves, report, caption="w3-5rps")
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels == ["arrival (s)", "gap / mean gap at that time", "prompt (tokens)", "output (tokens)", "adapter, by popularity"]
    assert figure.axes[2].get_title() == f"KS {report.loc['prompt_tokens', 'ks']:.3f}, n = {len(fitted.source):,}"
    assert figure.axes[0].get_ylabel() == "share at most x (%)"


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="a fit needs at least 20 requests, got 4"):
        traces.fit(traces.constant(rate=1.0, duration_s=4.0))
    at_once = Trace.from_frame(pd.DataFrame({"request_id": range(30), "arrival_s": 0.0}))
    with pytest.raises(ValueError, match="requests at different times"):
        traces.fit(at_once)
    with pytest.raises(ValueError, match="num_phases must lie in 1"):
        traces.fit(traces.poisson(rate=5.0, duration_s=20.0, seed=0), num_phases=0)


# jobs


def template(**more):
    return FinetuneJob(**{"adapter": "t", "data": RandomTokens(examples=4, tokens=64), "steps": 3, "seed": 7} | more)


def test_jobs_arrive_as_a_poisson_process_each_with_an_adapter_and_a_seed_of_its_own():
    jobs = traces.jobs_poisson(template(), rate_per_h=60.0, duration_s=36_000.0, seed=1)
    assert len(jobs) == pytest.approx(600, abs=75)
    times = np.array([job.arrival_s for job in jobs])
    assert np.all(np.diff(times) > 0) and times[-1] < 36_000
    assert kstest(np.diff(times), "expon", args=(0, 60.0)).pvalue > 0.01
    assert len({job.id for job in jobs}) == len({job.adapter for job in jobs}) == len({job.seed for job in jobs}) == len(jobs)
    assert jobs == traces.jobs_poisson(template(), rate_per_h=60.0, duration_s=36_000.0, seed=1)
    assert jobs != traces.jobs_poisson(template(), rate_per_h=60.0, duration_s=36_000.0, seed=2)


def test_jobs_at_recorded_times_keep_their_deadline_as_a_span():
    jobs = traces.jobs_at(template(arrival_s=10.0, deadline_s=25.0), [30.0, 5.0])
    assert [(j.adapter, j.arrival_s, j.deadline_s, j.seed) for j in jobs] == [("t-0", 5.0, 20.0, 7), ("t-1", 30.0, 45.0, 8)]
    assert traces.jobs_at(template(), []) == ()
    with pytest.raises(ValueError, match="the template must have no job_id, got 'x'"):
        traces.jobs_at(template(job_id="x"), [1.0])
    with pytest.raises(ValueError, match="arrivals must be at least 0 seconds"):
        traces.jobs_at(template(), [-1.0])


def test_a_replay_runs_jobs_that_arrive_over_time():
    from test_attribution import one, run, serve_and_train

    jobs = traces.jobs_poisson(template(publish="never"), rate_per_h=36_000.0, duration_s=0.5, seed=0)
    result = run([one()], serve_and_train, jobs=jobs, until="jobs")
    assert len(jobs) > 1 and result.jobs["outcome"].tolist() == ["finished"] * len(jobs)
    assert result.jobs["arrival_s"].tolist() == pytest.approx([job.arrival_s for job in jobs])
