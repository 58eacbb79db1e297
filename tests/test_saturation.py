"""The `saturated` flag on queues whose stability is known: M/M/1 below and above its capacity, and a burst that drains."""

import numpy as np
import pandas as pd
import pytest

from workbench.results.saturation import TREND_BLOCKS, _mean_number, saturation

COLUMNS = ["time_s", "step", "kind", "owner", "adapter", "value", "note"]


def events_of(arrivals: np.ndarray, ends: np.ndarray) -> pd.DataFrame:
    rows = [(t, 0, "arrived", f"r{i}", None, np.nan, "") for i, t in enumerate(arrivals)]
    rows += [(t, 0, "finished", f"r{i}", None, np.nan, "") for i, t in enumerate(ends)]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("time_s", kind="stable", ignore_index=True)


def queue(arrivals: np.ndarray, services: np.ndarray) -> pd.DataFrame:
    """One server, first come first served."""
    ends, free = np.zeros(len(arrivals)), 0.0
    for i, (arrival, service) in enumerate(zip(arrivals, services, strict=True)):
        free = ends[i] = max(free, arrival) + service
    return events_of(arrivals, ends)


def poisson_queue(load: float, seed: int, num: int = 500) -> tuple[pd.DataFrame, float]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0, num))
    return queue(arrivals, rng.exponential(load, num)), float(arrivals[-1])


def flagged(load: float, repetitions: int = 16, num: int = 500) -> float:
    runs = [poisson_queue(load, seed, num) for seed in range(repetitions)]
    return float(np.mean([saturation(events, 0.0, end)["saturated"] for events, end in runs]))


def test_an_overloaded_queue_is_flagged_and_a_stable_one_is_not():
    assert flagged(1.5) == 1.0
    assert flagged(1.25) >= 0.9
    assert flagged(0.7) == 0.0
    assert flagged(0.85) <= 0.1


def test_a_queue_that_grows_by_a_twentieth_of_its_arrivals_is_flagged_in_a_long_window():
    assert flagged(1.06, num=8000) >= 0.9
    assert flagged(0.9, 40, num=8000) <= 0.05


@pytest.mark.parametrize("seconds", [30.0, 60.0, 120.0])
def test_a_server_that_fills_to_its_level_at_the_start_is_not_saturated(seconds):
    # 50 requests a second which stay for 5 s each: 250 are there from then on
    def fills(seed):
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(0.02, int(60 * seconds)))
        return saturation(events_of(arrivals, arrivals + 5.0), 0.0, seconds)["saturated"]

    assert np.mean([fills(seed) for seed in range(30)]) <= 0.1


def test_a_steady_rise_within_the_noise_of_the_arrivals_is_not_saturation():
    arrivals = np.arange(0.0, 400.0, 1.0)
    found = saturation(events_of(arrivals, arrivals + 1.0 + 9.0 * arrivals / 400.0), 0.0, 400.0)
    assert found["queue_growth_p"] < 1e-6 and not found["saturated"]


def test_growth_is_the_excess_of_arrivals_over_departures_per_second():
    arrivals = np.arange(200.0)
    found = saturation(events_of(arrivals, 2.0 * arrivals), 0.0, 199.0)
    assert found["queue_growth_per_s"] == pytest.approx(0.5, rel=0.02)
    assert found["queue_growth_p"] < 1e-6
    assert found["unfinished_at_end_share"] == pytest.approx(0.5, abs=0.01)


def test_a_burst_in_the_middle_that_drains_is_not_saturation():
    arrivals = np.sort(np.concatenate([np.arange(0.0, 200.0, 2.0), np.linspace(80.0, 90.0, 40)]))
    found = saturation(queue(arrivals, np.full(len(arrivals), 0.8)), 0.0, 200.0)
    assert not found["saturated"] and found["unfinished_at_end_share"] < 0.02


def test_a_burst_that_the_end_of_the_window_cuts_is_no_trend():
    arrivals = np.concatenate([np.arange(0.0, 195.0, 1.0), np.linspace(196.0, 200.0, 60)])
    found = saturation(events_of(arrivals, np.where(arrivals < 195, arrivals + 0.5, arrivals + 30.0)), 0.0, 200.0)
    assert not found["saturated"] and found["unfinished_at_end_share"] > 0.1


def test_filling_up_to_a_constant_level_at_the_start_is_not_saturation():
    arrivals = np.arange(0.0, 200.0, 1.0)
    assert not saturation(events_of(arrivals, arrivals + 15.0), 0.0, 200.0)["saturated"]


def test_the_window_decides_what_is_looked_at():
    """A queue that grows only from 100 s on."""
    arrivals = np.arange(0.0, 200.0, 1.0)
    ends = np.where(arrivals < 100, arrivals + 0.5, 100 + 3 * (arrivals - 100) + 0.5)
    events = events_of(arrivals, ends)
    assert not saturation(events, 0.0, 100.0)["saturated"]
    assert saturation(events, 100.0, 200.0)["saturated"]


def test_mean_number_over_stretches_is_worked_out_by_hand():
    times, change = np.array([0.0, 5.0, 10.0]), np.array([1, 1, -2])
    centres, means = _mean_number(times, change, 0.0, 20.0)
    assert len(centres) == TREND_BLOCKS and centres[0] == 0.5
    assert means.tolist() == pytest.approx([1.0] * 5 + [2.0] * 5 + [0.0] * 10)


def test_without_arrivals_there_is_nothing_to_say():
    found = saturation(events_of(np.array([1.0]), np.array([2.0])), 5.0, 9.0)
    assert not found["saturated"] and np.isnan(found["queue_growth_per_s"])
