"""The explorer shows the numbers of the replays at its sliders' settings, quickly, and on a page that is not live too."""

import re
import time

import pytest

import workbench as wb
from tests.test_latency import INFO, synthetic
from workbench.widgets import LimitedTraining, explorer


def serve_first(view, plan) -> None:
    plan.decode(view.running)
    plan.prefill(view.waiting)
    if not view.waiting:
        for job in view.jobs:
            plan.train(job)


def trace(rate: float) -> wb.Trace:
    arrivals = wb.traces.poisson(rate=rate, duration_s=100 / rate, seed=1)
    return arrivals.with_lengths("azure-conv", seed=1, clip=(64, 12)).assign_adapters(3, popularity=wb.uniform(), seed=1)


@pytest.fixture(scope="module")
def model() -> wb.LatencyModel:
    return wb.LatencyModel.fit(synthetic(noise=0.05), info=INFO)


@pytest.fixture(scope="module")
def shown(model):
    job = wb.FinetuneJob(adapter="t", data=wb.RandomTokens(examples=8, tokens=64), epochs=1000)
    policies = [wb.policies.LoquetierStatic(), serve_first]
    return explorer(policies, trace=trace, executor=model, jobs=[job], slo=wb.SLO(ttft_s=0.1, itl_s=0.05), rates=(5, 20, 60))


def attainments(text: str) -> dict[str, tuple[float, float]]:
    """policy -> (value, arrival rate) of the cells that a browser sees."""
    cells = re.findall(r'class="loquetier-attainment" data-policy="([^"]*)" data-rate="([^"]*)".*?data-value="([^"]*)"', text)
    return {policy: (float(value), float(rate)) for policy, rate, value in cells}


def test_attainment_shown_equals_the_summary_recomputed_at_the_sliders_values(shown):
    seen = set()
    for rate, itl_ms in ((5.0, 50.0), (60.0, 50.0), (60.0, 20.0)):
        shown.rate.value, shown.itl.value = rate, itl_ms
        fresh = shown.replays(rate, 100.0, itl_ms, 1.0)
        expected = {label: (fresh.replays[label, 0].summary()["attainment"], rate) for label in fresh.labels}
        assert attainments(shown._text.value) == expected
        seen.add(shown._text.value)
    assert len(seen) == 3


def test_a_tighter_target_never_raises_attainment(shown):
    shown.rate.value = 20.0
    values = []
    for itl_ms in (10.0, 30.0, 100.0):
        shown.itl.value = itl_ms
        values.append(attainments(shown._text.value)["serve_first"][0])
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_less_fine_tune_share_trains_less_and_none_trains_nothing(shown):
    shown.rate.value, shown.itl.value = 5.0, 50.0
    speeds = [shown.replays(5.0, 100.0, 50.0, share).table()["finetune_tokens_per_s"]["serve_first"] for share in (0.0, 0.2, 1.0)]
    assert speeds[0] == 0 < speeds[1] < speeds[2]


def test_limited_training_takes_at_most_its_share_of_the_time(shown, model):
    job = shown.jobs[0]
    result = wb.replay(trace(5.0), executor=model, policy=LimitedTraining(serve_first, 0.3), jobs=[job], planning=0.0)
    steps = result.steps
    training = (steps["finetune_tokens"] > 0) | (steps["backward_layers"] > 0)
    share = steps["duration_s"][training].sum() / steps["end_s"].max()
    assert 0.2 < share <= 0.3 + steps["duration_s"].max() / steps["end_s"].max()
    assert repr(LimitedTraining(serve_first)) == "serve_first"


def test_a_redraw_takes_under_a_second_on_a_free_machine(shown):
    start = time.process_time()
    shown.rate.value = 60.0 if shown.rate.value != 60.0 else 20.0
    shown.itl.value = 45.0
    assert (time.process_time() - start) / 2 < 1.0


def test_going_back_shows_the_cached_result(shown):
    shown.rate.value = 5.0
    first = shown.comparison
    shown.rate.value = 20.0
    shown.rate.value = 5.0
    assert shown.comparison is first


def test_a_page_that_is_not_live_has_the_table_and_the_figure(shown):
    data = shown.snapshot().data
    assert "loquetier-attainment" in data
    assert "data:image/png;base64,iVBOR" in data


def test_sliders_need_a_latency_model(shown):
    from dataclasses import replace

    from workbench.testing import FixedCost, fixed_info

    real = FixedCost(info=replace(fixed_info(), simulated=False))
    with pytest.raises(ValueError, match="needs a latency model"):
        explorer([serve_first], trace=trace, executor=real)
