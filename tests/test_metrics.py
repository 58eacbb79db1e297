"""The definitions, against three requests worked out by hand, and the edges where a definition could cheat."""

from math import inf, isnan
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.core import Event, Request
from workbench.features import NAMES
from workbench.results import metrics
from workbench.results.saturation import saturation

SLOS = SLO(ttft_s=1.0, itl_s=0.5, itl_quantile=1.0)


def frame(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame([Event(*row) for row in rows], columns=["time_s", "step", "kind", "owner", "adapter", "value", "note"])


def request(name: str, arrival_s: float, prompt: int, adapter: str | None = "a", **more) -> Request:
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=None, adapter=adapter, **more)


# By hand. r1 arrives at 0, is scheduled at 0.5, has tokens at 1.0, 1.2, 2.0: queue 0.5, ttft 1.0, tpot (2 - 1) / 2 = 0.5,
# gaps 0.2 and 0.8, e2e 2.0. r2 arrives at 1, scheduled at 1.0, tokens at 1.5, 1.75: ttft 0.5, tpot 0.25, one gap, e2e 0.75.
# r3 arrives at 2 and is rejected at 8.5.
REQUESTS = [request("r1", 0.0, 10), request("r2", 1.0, 20, "b"), request("r3", 2.0, 30, None)]
EVENTS = frame(
    [
        (0.0, 0, "arrived", "r1", "a"),
        (0.5, 0, "scheduled", "r1", "a"),
        (0.5, 0, "prefill", "r1", "a", 10.0),
        (1.0, 0, "token", "r1", "a", 1.0),
        (1.0, 0, "arrived", "r2", "b"),
        (1.0, 1, "scheduled", "r2", "b"),
        (1.0, 1, "prefill", "r2", "b", 20.0),
        (1.2, 1, "token", "r1", "a", 2.0),
        (1.5, 2, "token", "r2", "b", 1.0),
        (1.5, 2, "preempted", "r1", "a"),
        (1.75, 3, "token", "r2", "b", 2.0),
        (1.75, 3, "finished", "r2", "b"),
        (2.0, 4, "token", "r1", "a", 3.0),
        (2.0, 4, "finished", "r1", "a"),
        (2.0, 4, "arrived", "r3", None),
        (3.0, 5, "committed", "job:t", "t", 64.0),
        (3.0, 5, "forward", "job:t", "t", 64.0),
        (8.5, 6, "rejected", "r3", None, None, "waited"),
        (10.0, 7, "committed", "job:t", "t", 36.0),
    ]
)
STEPS = pd.DataFrame(
    {"step": [0, 1], "start_s": [0.0, 1.0], "end_s": [1.0, 4.0], "plan_s": [0.1, 0.1], "free_blocks": [8, 2]}
    | {name: [0.0, 0.0] for name in NAMES}
)


def replay(events: pd.DataFrame = EVENTS, requests=REQUESTS, slo=SLOS, measure=None, steps=STEPS) -> SimpleNamespace:
    return SimpleNamespace(
        events=events,
        steps=steps,
        requests=metrics.request_frame(requests, events, slo),
        slo=slo,
        measure=measure,
        executor=SimpleNamespace(num_blocks=10),
        interrupted=False,
    )


def test_three_requests_equal_the_values_worked_out_by_hand():
    table = metrics.request_frame(REQUESTS, EVENTS, SLOS)
    assert list(table.index) == ["r1", "r2", "r3"]
    np.testing.assert_allclose(table["queue_s"], [0.5, 0.0, np.nan])
    np.testing.assert_allclose(table["ttft_s"], [1.0, 0.5, np.nan])
    np.testing.assert_allclose(table["tpot_s"], [0.5, 0.25, np.nan])
    np.testing.assert_allclose(table["itl_max_s"], [0.8, 0.25, np.nan])
    np.testing.assert_allclose(table["e2e_s"], [2.0, 0.75, np.nan])
    assert list(table["output_tokens"]) == [3, 2, 0]
    assert list(table["preemptions"]) == [1, 0, 0]
    assert list(table["outcome"]) == ["finished", "finished", "rejected"]
    assert list(table["met_ttft"]) == [True, True, False]
    assert list(table["met_itl"]) == [False, True, False]
    assert list(table["met"]) == [False, True, False]


def test_summary_of_three_requests_equals_the_values_worked_out_by_hand():
    row = metrics.summary(replay())
    assert row["requests"] == 3 and row["rejected"] == 1 and row["preemptions"] == 1
    assert row["attainment"] == pytest.approx(1 / 3)
    assert row["attainment_ttft"] == pytest.approx(2 / 3)
    assert row["attainment_itl"] == pytest.approx(1 / 3)
    assert isnan(row["attainment_tpot"]) and isnan(row["attainment_e2e"])
    assert row["attainment_admission_wait"] == pytest.approx(2 / 3)
    assert row["goodput_per_s"] == pytest.approx(1 / 10)
    assert row["decode_tokens_per_s"] == pytest.approx(5 / 10)
    assert row["prefill_tokens_per_s"] == pytest.approx(30 / 10)
    assert row["finetune_tokens_per_s"] == pytest.approx(100 / 10)
    assert row["ttft_n"] == 2 and row["ttft_p50_s"] == 0.5 and row["ttft_p99_s"] == 1.0
    assert row["itl_n"] == 3 and row["itl_p50_s"] == pytest.approx(0.25)
    # Step 0 holds 2 of 10 blocks for 1 s, step 1 holds 8 for 3 s.
    assert row["kv_occupancy_max"] == pytest.approx(0.8) and row["kv_occupancy_mean"] == pytest.approx((0.2 + 3 * 0.8) / 4)
    # Output tokens 3, 2, 0 over adapters a, b and base.
    assert row["jain_throughput"] == pytest.approx(25 / (3 * 13))
    # Units / e2e: (10 + 6) / 2 = 8, (20 + 4) / 0.75 = 32, and 0.
    assert row["jain_slowdown"] == pytest.approx(1600 / (3 * (64 + 1024)))


def test_fine_tune_tokens_count_only_inside_the_measure_window():
    row = metrics.summary(replay(), measure=(0.0, 5.0))
    assert row["finetune_tokens_per_s"] == pytest.approx(64 / 5)
    # Requests that arrived inside are followed to their end outside of it.
    assert row["requests"] == 3 and row["rejected"] == 1
    assert metrics.summary(replay(), measure=(0.5, 5.0))["requests"] == 2


def test_attainment_counts_rejected_aborted_and_unfinished_requests_as_missed():
    rows = [(0.0, 0, "arrived", name) for name in "abcd"]
    rows += [(0.1, 0, "token", name, None, 1.0) for name in "abc"] + [(0.1, 0, "finished", "a"), (0.2, 0, "aborted", "b")]
    row = metrics.summary(replay(frame([*rows, (0.3, 1, "rejected", "d")]), [request(n, 0.0, 4) for n in "abcd"]))
    assert row["attainment"] == row["attainment_ttft"] == 0.25
    assert (row["finished"], row["aborted"], row["unfinished"], row["rejected"]) == (1, 1, 1, 1)


def test_mean_tpot_within_target_does_not_hide_a_stall_from_the_gap_target():
    times = [0.1, *(0.1 + 0.01 * i for i in range(1, 50)), 0.8]
    rows = (
        [(0.0, 0, "arrived", "r")] + [(t, 0, "token", "r", None, float(i + 1)) for i, t in enumerate(times)] + [(0.8, 0, "finished", "r")]
    )
    table = metrics.request_frame([request("r", 0.0, 4)], frame(rows), SLO(tpot_s=0.045, itl_s=0.045))
    assert table["met_tpot"].item() and not table["met_itl"].item() and not table["met"].item()
    # ... while nine tenths of its gaps are within the target.
    loose = metrics.request_frame([request("r", 0.0, 4)], frame(rows), SLO(itl_s=0.045, itl_quantile=0.9))
    assert loose["met_itl"].item() and loose["itl_slo_s"].item() == pytest.approx(0.01)


def test_gap_quantile_bounds_exactly_the_stated_share_of_gaps():
    gaps = [0.01] * 99 + [1.0]
    times = np.concatenate([[1.0], 1.0 + np.cumsum(gaps)])
    rows = (
        [(0.0, 0, "arrived", "r")] + [(t, 0, "token", "r", None, float(i + 1)) for i, t in enumerate(times)] + [(9.0, 0, "finished", "r")]
    )
    assert metrics.request_frame([request("r", 0.0, 4)], frame(rows), SLO(itl_s=0.02))["met_itl"].item()
    assert not metrics.request_frame([request("r", 0.0, 4)], frame(rows), SLO(itl_s=0.02, itl_quantile=0.995))["met_itl"].item()


def test_one_token_has_no_tpot_and_misses_no_target_on_it():
    rows = [(0.0, 0, "arrived", "r"), (0.1, 0, "token", "r", None, 1.0), (0.1, 0, "finished", "r")]
    table = metrics.request_frame([request("r", 0.0, 4)], frame(rows), SLO(tpot_s=0.01, itl_s=0.01))
    assert isnan(table["tpot_s"].item()) and table["met"].item()


def test_pace_forgives_a_stall_that_earlier_tokens_made_up_for():
    rows = [(0.0, 0, "arrived", "r"), (0.1, 0, "finished", "r")]
    fast_then_stall = rows + [(t, 0, "token", "r", None, float(i)) for i, t in enumerate([1.0, 1.01, 1.02, 1.14], 1)]
    stall_then_fast = rows + [(t, 0, "token", "r", None, float(i)) for i, t in enumerate([1.0, 1.12, 1.13, 1.14], 1)]
    slo = SLO(itl_s=0.05)
    assert metrics.request_frame([request("r", 0.0, 4)], frame(fast_then_stall), slo)["met_pace"].item()
    assert not metrics.request_frame([request("r", 0.0, 4)], frame(stall_then_fast), slo)["met_pace"].item()


def test_targets_go_by_request_class_and_an_unnamed_class_is_an_error():
    rows = (
        [(0.0, 0, "arrived", n) for n in "ab"] + [(0.5, 0, "token", n, None, 1.0) for n in "ab"] + [(0.5, 0, "finished", n) for n in "ab"]
    )
    requests = [request("a", 0.0, 4, slo_class="chat"), request("b", 0.0, 4, slo_class="batch")]
    table = metrics.request_frame(requests, frame(rows), {"chat": SLO(ttft_s=0.1), "batch": SLO(ttft_s=10.0)})
    assert list(table["met"]) == [False, True]
    assert list(metrics.request_frame(requests, frame(rows), {"chat": SLO(ttft_s=0.1), "": SLO()})["met"]) == [False, True]
    with pytest.raises(ValueError, match="class 'batch'.*Known: 'chat'"):
        metrics.request_frame(requests, frame(rows), {"chat": SLO(ttft_s=0.1)})


def test_frames_recompute_from_their_own_rows_under_another_slo():
    once = metrics.request_frame(REQUESTS, EVENTS, SLOS)
    again = metrics.request_frame(once, EVENTS, SLO(ttft_s=0.1))
    assert not again["met"].any() and list(again["ttft_s"].dropna()) == [1.0, 0.5]
    pd.testing.assert_frame_equal(metrics.request_frame(once.reset_index(), EVENTS, SLOS), once)


def test_requests_that_never_arrived_have_no_row():
    assert "r9" not in metrics.request_frame([*REQUESTS, request("r9", 99.0, 5)], EVENTS, SLOS).index


def test_session_requests_count_from_the_time_they_really_arrived():
    assert metrics.request_frame([request("r2", 0.0, 20)], EVENTS, SLOS)["ttft_s"].item() == 0.5


@pytest.mark.parametrize(
    ("known", "due"),
    [
        ({}, 11.0),
        ({"first_token_s": 12.0, "last_token_s": 12.0, "generated": 1}, 12.05),
        ({"first_token_s": 12.0, "last_token_s": 12.04, "generated": 2}, 12.08),
        ({"first_token_s": 12.0, "last_token_s": 29.99, "generated": 1000}, 30.0),
    ],
)
def test_next_token_is_due_by_the_tightest_of_the_requests_own_targets(known, due):
    slo = SLO(ttft_s=1.0, itl_s=0.05, tpot_s=0.04 if known.get("generated") == 2 else None, e2e_s=20.0)
    assert metrics.due_s(slo, arrival_s=10.0, **known) == pytest.approx(due)
    assert metrics.due_s(None, arrival_s=10.0, **known) == inf
    assert metrics.due_s(SLO(), arrival_s=10.0, **known) == inf


def test_gaps_are_between_consecutive_tokens_of_one_request():
    gaps = metrics.token_gaps(EVENTS)
    assert [(r, t, round(g, 9)) for r, t, g in zip(gaps["request_id"], gaps["token"], gaps["itl_s"])] == [
        ("r1", 2, 0.2),
        ("r1", 3, 0.8),
        ("r2", 2, 0.25),
    ]


def test_job_rows_tell_committed_tokens_from_forwarded_ones_and_keep_jobs_that_never_ran():
    rows = [
        (1.0, 0, "job_arrived", "job:t", "t"),
        (2.0, 0, "forward", "job:t", "t", 32.0),
        (3.0, 1, "forward", "job:t", "t", 32.0),
        (3.0, 1, "loss", "job:t", "t", 2.0),
        (4.0, 2, "committed", "job:t", "t", 32.0),
        (4.0, 2, "optimizer_step", "job:t", "t", 1.0),
        (5.0, 3, "loss", "job:t", "t", 1.5),
        (5.0, 3, "published", "job:t", "t", 2.0),
        (5.0, 3, "job_stopped", "job:t", "t"),
    ]
    jobs = [FinetuneJob(adapter=name, data=RandomTokens(), steps=1) for name in "tu"]
    table = metrics.job_frame(jobs, frame(rows))
    row = table.loc["job:t"]
    assert (row["committed_tokens"], row["forward_tokens"], row["optimizer_steps"], row["version"]) == (32, 64, 1, 2)
    assert (row["first_loss"], row["last_loss"], row["outcome"], row["started_s"], row["ended_s"]) == (2.0, 1.5, "stopped", 2.0, 5.0)
    assert table.loc["job:u", "outcome"] == "unfinished" and table.loc["job:u", "committed_tokens"] == 0


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_quantile_interval_covers_the_true_quantile_in_at_least_95_percent_of_samples(quantile):
    rng = np.random.default_rng(3)
    hits = [low <= quantile <= high for _, low, high in (metrics.quantile_interval(rng.random(2000), quantile) for _ in range(400))]
    assert 0.92 <= np.mean(hits) <= 0.995


def test_quantile_interval_has_no_upper_end_where_the_sample_is_too_small():
    value, low, high = metrics.quantile_interval(np.arange(50.0), 0.99)
    assert value == 49.0 and low <= 49.0 and isnan(high)
    assert all(isnan(v) for v in metrics.quantile_interval([], 0.5))


def test_saturated_is_flagged_when_arrivals_outrun_departures_and_not_in_steady_state():
    arrivals = [(float(t), 0, "arrived", f"r{t}") for t in range(200)]
    steady = frame(arrivals + [(t + 20.0, 0, "finished", f"r{t}") for t in range(200)])
    slow = frame(arrivals + [(2.0 * t, 0, "finished", f"r{t}") for t in range(200)])
    assert not saturation(steady, 0.0, 200.0)["saturated"]
    assert saturation(slow, 0.0, 200.0)["saturated"]


def test_jain_is_one_for_equal_shares_and_one_over_n_for_a_monopoly():
    assert metrics.jain([3, 3, 3, 3]) == 1.0
    assert metrics.jain([8, 0, 0, 0]) == 0.25
    assert isnan(metrics.jain([]))


def test_an_empty_replay_has_a_summary_without_numbers():
    row = metrics.summary(replay(EVENTS.iloc[:0], REQUESTS, SLOS, steps=STEPS.iloc[:0]))
    assert row["requests"] == 0 and isnan(row["attainment"]) and isnan(row["ttft_p99_s"]) and not row["saturated"]


def test_a_reversed_measure_window_is_an_error():
    with pytest.raises(ValueError, match="start_s < end_s.*got \\(5.0, 1.0\\)"):
        metrics.summary(replay(), measure=(5.0, 1.0))


def test_a_repeated_request_id_is_an_error():
    with pytest.raises(ValueError, match="unique, got 'r1' twice"):
        metrics.request_frame([REQUESTS[0], REQUESTS[0]], EVENTS, SLOS)
