"""Capacity search finds a known capacity, says how sure it is, and does not hide a curve that rises again."""

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench import search as search_module  # the function, by the package's name for it
from workbench.experiments.search import _bracket, _points, _row
from workbench.policies import FCFS
from workbench.testing import FixedCost, fixed_info

LENGTHS = pd.DataFrame({"prompt_tokens": [20], "output_tokens": [1]})
SLOS = wb.SLO(ttft_s=0.1)
# One request at a time, 4 ms a step and 40 us a prompt token: 4.8 ms a request, 208 requests a second.
CAPACITY = 1 / 0.0048
EXECUTOR = FixedCost(info=fixed_info(max_requests=1), context_s=0.0)


def trace(seed: int, load: float) -> wb.Trace:
    return wb.traces.poisson(rate=load, duration_s=1.0, seed=seed).with_lengths(LENGTHS, seed=seed)


def search(**more) -> wb.Capacity:
    options = {
        "trace": trace,
        "low": 100.0,
        "high": 500.0,
        "grid": 3,
        "executor": EXECUTOR,
        "planning": 0.0,
        "slo": SLOS,
        "progress": False,
    }
    return wb.search(FCFS(), **(options | {"seeds": range(3), "targets": (0.95,), "tolerance": 0.2} | more))


@pytest.fixture(scope="module")
def capacity(tmp_path_factory) -> wb.Capacity:
    return search(cache=tmp_path_factory.mktemp("cache"))


def test_the_package_gives_the_function():
    assert search_module is wb.search


def test_capacity_lies_near_the_servers_own_and_within_its_interval(capacity):
    row = capacity.table.loc[0.95]
    # in one second a queue needs a while to miss 0.1 s, so a little above the server's rate
    assert 0.8 * CAPACITY < row["capacity"] < 1.5 * CAPACITY
    assert row["low"] <= row["capacity"] <= row["high"] and row["status"] == "found" and row["monotone"]


def test_capacity_is_bracketed_to_within_the_tolerance_by_evaluated_points(capacity):
    points = capacity.points
    above = points.loc[points["load"] > capacity.table.loc[0.95, "capacity"]].iloc[0]
    assert above["attainment"] < 0.95 and above["load"] / capacity.table.loc[0.95, "capacity"] <= 1.2 + 1e-9
    at = points.loc[points["load"] == capacity.table.loc[0.95, "capacity"], "attainment"].item()
    assert at >= 0.95
    runs = capacity.runs.groupby("load")["attainment"].mean()
    assert points["attainment"].tolist() == pytest.approx(runs.tolist()) and (points["seeds"] == 3).all()


def test_the_sentence_says_loads_seeds_and_what_they_redraw(capacity):
    text = str(capacity)
    assert text.startswith("Largest load of FCFS(budget_tokens=None): ")
    assert "at attainment >= 0.95 (95 % interval" in text and f"{len(capacity.points)} loads evaluated, 3 seeds, redrawn: arrivals" in text


def test_a_capacity_outside_the_range_is_not_invented():
    below = search(low=500.0, high=700.0, grid=2, seeds=range(1))
    assert below.table.loc[0.95, "status"] == "below low" and np.isnan(below.table.loc[0.95, "capacity"])
    above = search(low=10.0, high=20.0, grid=2, seeds=range(1))
    assert above.table.loc[0.95, "status"] == "above high" and "the largest load tried meets it" in str(above)
    assert np.isnan(above.table.loc[0.95, "low"])  # one seed has no interval


def frames(curve: dict[float, list[float]]) -> dict[float, pd.DataFrame]:
    return {load: pd.DataFrame({"attainment": values, "saturated": False}) for load, values in curve.items()}


def test_a_curve_that_rises_again_is_flagged_and_its_first_miss_counts():
    points = _points(frames({1.0: [1.0, 0.99], 2.0: [0.8, 0.82], 3.0: [0.97, 0.99], 4.0: [0.1, 0.2]}), "attainment")
    assert points["rises"].tolist() == [False, False, True, False]
    row = _row(points, 0.95)
    assert row["capacity"] == 1.0 and not row["monotone"]
    assert _row(points, 0.05)["status"] == "above high"
    capacity = wb.Capacity(
        policy="p", metric="attainment", table=pd.DataFrame([row]).set_index("target"), points=points, seeds=(0, 1), redrawn=(), runs=points
    )
    assert "NOT MONOTONE" in str(capacity)


def test_the_interval_holds_the_loads_whose_attainment_may_be_on_either_side():
    spread = [-0.02, -0.01, 0.0, 0.0, 0.01, 0.02]
    curve = {load: [mean + s for s in spread] for load, mean in ((1.0, 0.99), (2.0, 0.955), (3.0, 0.945), (4.0, 0.8))}
    row = _row(_points(frames(curve), "attainment"), 0.95)
    assert (row["low"], row["capacity"], row["high"]) == (1.0, 2.0, 4.0)


def test_bisection_looks_between_the_first_miss_and_the_load_before():
    assert _bracket({1.0: 1.0, 2.0: 0.97, 3.0: 0.9, 4.0: 0.99}, 0.95) == (2.0, 3.0)
    assert _bracket({1.0: 0.9, 2.0: 0.8}, 0.95) is None and _bracket({1.0: 1.0}, 0.95) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"low": 5.0, "high": 5.0}, "0 < low < high"),
        ({"slo": None, "grid": 2, "high": 101.0, "seeds": [0]}, "attainment must be defined in every run"),
        ({"metric": "atainment", "grid": 2, "high": 101.0, "seeds": [0]}, "metric must be a number of the summary"),
        ({"trace": lambda seed: trace(seed, 2.0)}, "an axis must be taken by"),
    ],
)
def test_a_search_that_cannot_be_made_is_an_error(more, message):
    with pytest.raises(ValueError, match=message):
        search(**more)
