"""Policies that serve many adapters, each on cases where the right decision is worked out by hand."""

import pytest
from policy_cases import Desk, began, one, run

from workbench.config import SLO
from workbench.loop.plan import Plan
from workbench.policies import (
    EDF,
    AdapterCycling,
    AffinityCluster,
    ChunkedPrefill,
    CreditMerge,
    Drain,
    EarlyAbort,
    FairCounters,
    FCFSSkip,
    LeastSlack,
    MemoryLookahead,
    MultiLevelQueue,
    RankAware,
    SoftAdmission,
    WeightedEviction,
)
from workbench.policies.slora import peak_tokens

# S-LoRA


def test_the_peak_of_memory_counts_those_who_are_still_there():
    # longest remaining first: 5 * 1 + 10 = 15 when alone to the end, 3 * 2 + 30 = 36 when the second ends
    assert peak_tokens([(20, 3), (10, 5)]) == 36
    assert peak_tokens([(10, 100), (20, 3)]) == 110


def test_memory_lookahead_stops_at_the_first_request_that_would_not_fit_to_its_end():
    # a pool of 64 tokens. x and y: max(10 + 20, 10 * 2 + 40) = 60 fits; z: 10 * 3 + 60 = 90 does not; w would (60), but comes after z
    queue = [one(n, 0.0, 20, 10) for n in "xyz"] + [one("w", 0.0, 1, 1)]
    desk = Desk(MemoryLookahead(), num_blocks=4, max_model_len=64)
    desk.arrive(*queue)
    assert desk.step() == ["x", "y"]
    assert desk.step() == []


def test_memory_lookahead_takes_what_adapters_hold_off_the_pool():
    # two adapters of 3 tokens leave 58 < 60; one adapter leaves 61
    for adapters, expected in ((("a", "b"), ["x"]), (("a", "a"), ["x", "y"])):
        desk = Desk(MemoryLookahead(adapter_tokens=3), num_blocks=4, max_model_len=64)
        desk.arrive(*(one(n, 0.0, 20, 10, adapter) for n, adapter in zip("xy", adapters, strict=True)))
        assert desk.step() == expected


def test_memory_lookahead_never_preempts_where_chunked_prefill_does():
    requests = [one(f"r{i}", 0.01 * i, 20, 60) for i in range(12)]
    limits = {"num_blocks": 192, "block_tokens": 1, "max_model_len": 100}
    assert run(ChunkedPrefill(), requests, limits=limits).requests["preemptions"].sum() > 0
    result = run(MemoryLookahead(), requests, limits=limits)
    assert result.requests["preemptions"].sum() == 0
    assert (result.requests["outcome"] == "finished").all()


def test_affinity_fills_the_batch_with_its_own_adapters_before_others():
    queue = [one("a1", 0.0, adapter="a"), one("b1", 0.0, adapter="b"), one("a2", 0.0, adapter="a"), one("c1", 0.0, adapter="c")]
    for num, expected in ((1, ["a1", "a2", "b1"]), (2, ["a1", "b1", "a2"]), (4, ["a1", "b1", "a2"])):
        desk = Desk(AffinityCluster(num_adapters=num), max_requests=3)
        desk.arrive(*queue)
        assert desk.step() == expected


def test_early_abort_rejects_what_cannot_begin_in_time():
    desk = Desk(EarlyAbort(), max_requests=1)
    desk.arrive(one("x", 0.0), one("late", 0.0), one("fresh", 0.2))
    assert desk.step(0.3) == ["fresh"]
    # 5.4 + 0.5 < 6 <= 5.5 + 0.5
    assert desk.decide(5.49).rejected == {}
    assert set(desk.decide(5.5).rejected) == {"x", "late"}


def test_early_abort_keeps_to_the_requests_own_target():
    desk = Desk(EarlyAbort(), max_requests=1, slo=SLO(ttft_s=2.0))
    desk.arrive(one("x", 0.0), one("y", 0.0))
    assert set(desk.decide(1.6).rejected) == {"x", "y"}


def test_early_abort_serves_the_newest_first_only_under_overload():
    desk = Desk(EarlyAbort(), max_requests=1)
    desk.arrive(*(one(f"r{i}", 0.01 * i, output=1) for i in range(4)))
    # arriving 0.7 * 4 + 0.3 * 1 = 3.1 >= 1; one begins, so 1 stays; then nothing arrives: 0.3 * 3.1 = 0.93 < 1
    assert desk.step(0.05) == ["r3"]
    assert desk.policy.arriving == pytest.approx(3.1)
    assert desk.step() == ["r0"]
    assert desk.policy.arriving == pytest.approx(0.93)


# more adapters than a batch holds


def popular_and_one_cold(num=70):
    """A request for `a` every 10 ms for longer than 80 ms each, and a single one for `b` at the start."""
    return [one("cold", 0.005, 20, 8, "b")] + [one(f"r{i}", 0.01 * i, 20, 20, "a") for i in range(num)]


def overtaken(result, name="cold"):
    """How many requests that came later ended before `name` began."""
    begun = result.events.query("kind == 'scheduled'").set_index("owner")["time_s"]
    ended = result.events.query("kind == 'finished'").set_index("owner")["time_s"]
    return int((ended < begun[name]).sum())


def test_fcfs_skip_goes_past_the_request_whose_adapter_is_one_too_many():
    desk = Desk(FCFSSkip(max_loras=1))
    desk.arrive(one("a1", adapter="a"), one("b1", adapter="b"), one("base"), one("a2", adapter="a"))
    assert desk.step() == ["a1", "base", "a2"]


def test_fcfs_skip_starves_a_cold_adapter_and_draining_ends_that():
    requests = popular_and_one_cold()
    assert overtaken(run(FCFSSkip(max_loras=1), requests)) > 50
    drained = run(Drain(max_wait_s=0.1, max_adapters=1), requests)
    assert overtaken(drained) < 20
    assert (drained.requests["outcome"] == "finished").all()


def test_drain_marks_the_adapter_with_the_fewest_tokens_left_for_the_longest_starved():
    desk = Desk(Drain(max_wait_s=1.0), num_slots=2, max_batch_adapters=2)
    desk.arrive(one("a1", adapter="a", output=30), one("b1", adapter="b", output=6))
    assert desk.step() == ["a1", "b1"]
    later = [one("d1", 0.5, adapter="d"), one("c1", 0.4, adapter="c"), one("b2", 0.6, adapter="b", output=7)]
    desk.arrive(*later, one("b3", 0.7, adapter="b", output=6), one("a2", 0.8, adapter="a", output=60))
    # at 1.45 only c has waited over 1 s; b has 5 tokens left, a 29: b drains, and admits at most 1.2 * 5 = 6 tokens
    assert desk.step(1.45) == ["b3", "a2"]
    assert desk.policy.draining == {"b": "c"}
    # d starves next, and a is the only one left to drain
    desk.decide(1.6)
    assert desk.policy.draining == {"b": "c", "a": "d"}


def test_a_drained_adapter_is_cleared_and_its_slot_goes_to_the_starved_one():
    desk = Desk(Drain(max_wait_s=1.0), num_slots=1, max_batch_adapters=1)
    desk.arrive(one("a1", adapter="a", output=2), one("b1", adapter="b"), one("a2", adapter="a"))
    assert desk.step() == ["a1", "a2"]
    desk.step(2.0)
    while "a2" in desk.ledger.requests:
        assert desk.policy.draining == {"a": "b"}
        assert desk.step() == []
    assert desk.step() == ["b1"]
    assert desk.policy.draining == {}


def test_cycling_serves_the_active_adapter_until_its_time_is_over():
    desk = Desk(AdapterCycling(max_active=1, cycle_s=2.0), max_requests=1)
    desk.arrive(*(one(n, 0.1 * i, output=1, adapter=n[0]) for i, n in enumerate(("a1", "b1", "a2", "a3"))))
    assert desk.step(1.0) == ["a1"]
    assert desk.step(1.5) == ["a2"]
    # active since 1.0: at 3.1 it is over, nothing of it is resident, and b is pending
    assert desk.step(3.1) == ["b1"]
    # b has no more requests and a is pending: it goes at once
    assert desk.step(3.2) == ["a3"]


def test_cycling_keeps_an_idle_adapter_active_while_nobody_else_is_pending():
    desk = Desk(AdapterCycling(max_active=2))
    desk.arrive(one("a1", output=1, adapter="a"))
    desk.step()
    desk.arrive(one("b1", 0.02, output=1, adapter="b"))
    assert desk.step(0.02) == ["b1"]
    assert set(desk.policy.active) == {"b"}  # a made room, as b was pending
    desk.step(9.0)
    assert set(desk.policy.active) == {"b"}


def test_cycling_prefers_the_oldest_head_within_its_time():
    desk = Desk(AdapterCycling(max_active=2, cycle_s=1.0))
    desk.arrive(one("a1", 0.0, output=9, adapter="a"), one("a2", 0.1, adapter="a"))
    assert desk.step(0.2) == ["a1", "a2"]
    desk.arrive(one("a3", 0.3, adapter="a"), one("b1", 0.4, adapter="b"))
    # a is active since 0.2 and past its time at 1.3, b only since now: b's younger head goes first
    assert desk.step(1.3) == ["b1", "a3"]
    assert desk.policy.active == {"a": 0.2, "b": 1.3}


# fairness


def test_fair_counters_admit_from_whoever_was_served_least():
    desk = Desk(FairCounters(), max_requests=3)
    desk.arrive(*(one(n, 0.0, prompt, adapter=n[0]) for n, prompt in (("a1", 30), ("a2", 10), ("b1", 10), ("b2", 10), ("b3", 5))))
    # a: 30 after a1; b: 10, 20 after b1 and b2
    assert desk.step() == ["a1", "b1", "b2"]
    assert desk.policy.counters == {"a": 30.0, "b": 20.0}
    desk.step()
    # one decode of a, two of b, 2 each
    assert desk.policy.counters == {"a": 32.0, "b": 24.0}


def test_fair_counters_lift_a_newcomer_to_the_least_of_those_who_wait():
    desk = Desk(FairCounters(), max_requests=2)
    desk.arrive(*(one(n, 0.0, 40, adapter=n[0]) for n in ("a1", "a2", "a3")))
    assert desk.step() == ["a1", "a2"]
    desk.arrive(one("b1", 0.01, adapter="b"))
    desk.step()
    # a had 80 when b came (its decodes of the same step are charged after)
    assert desk.policy.counters == {"a": 84.0, "b": 80.0}


def test_fair_counters_by_tenant_follow_the_weights():
    desk = Desk(FairCounters(by="tenant", weights={"gold": 3.0}), max_requests=4)
    desk.arrive(*(one(f"{t}{i}", 0.0, 30, tenant=t) for t in ("gold", "tin") for i in range(4)))
    # gold pays 10 a request, tin 30: gold0 10, tin0 30, gold1 20, gold2 30
    assert desk.step() == ["gold0", "tin0", "gold1", "gold2"]


def test_fair_counters_give_equal_service_to_unequal_demand():
    greedy = [one(f"g{i}", 0.0, 20, 20, "a") for i in range(60)]
    modest = [one(f"m{i}", 0.05 * i, 20, 20, "b") for i in range(10)]
    waits = {
        type(p).__name__: run(p, greedy + modest, limits={"max_requests": 4}).requests.query("adapter == 'b'")["queue_s"].mean()
        for p in (FairCounters(), ChunkedPrefill())
    }
    assert waits["FairCounters"] < 0.2 * waits["ChunkedPrefill"]


# merging


@pytest.fixture
def can_merge(monkeypatch):
    """An executor that merges: the adapters that plans asked for, in order."""
    asked = []

    def merge(self, adapter):
        asked.append(adapter)
        return True

    monkeypatch.setattr(Plan, "merge", merge)
    return asked


def test_credit_merge_is_first_come_first_served_where_nothing_can_be_merged():
    desk = Desk(CreditMerge())
    desk.arrive(*(one(n, 0.0, adapter=n[0]) for n in ("a1", "b1", "a2", "a3", "a4")))
    assert desk.step() == ["a1", "b1", "a2", "a3", "a4"]
    assert desk.policy.merged is None


def test_credit_merge_merges_what_fills_the_batch_and_pays_whom_it_overtakes(can_merge):
    desk = Desk(CreditMerge(max_credit=3))
    desk.arrive(*(one(n, 0.1 * i, output=30, adapter=n[0]) for i, n in enumerate(("a1", "b1", "a2", "a3", "a4"))))
    # four of five are a's: 0.8. a2, a3 and a4 are younger than b1
    assert desk.step(1.0) == ["a1", "a2", "a3", "a4"]
    assert (can_merge, desk.policy.merged, desk.policy.credit) == (["a"], "a", {"b1": 3})
    # three credits end it, and the displaced begin
    assert desk.step() == ["b1"]
    assert (can_merge, desk.policy.merged) == (["a", None], None)


def test_credit_merge_unmerges_when_the_share_falls_and_moves_towards_the_faster_mode(can_merge):
    desk = Desk(CreditMerge(switch_s=0.0))
    desk.arrive(one("b1", 0.0, 20, 1, "b"), one("c1", 0.0, 20, 1, "c"))
    assert desk.step(duration_s=1.0) == ["b1", "c1"]  # 40 tokens in 1 s, unmerged
    desk.arrive(*(one(f"a{i}", 1.0, 20, 1, "a") for i in range(4)))
    assert len(desk.step(duration_s=0.5)) == 4  # 80 tokens in 0.5 s, merged
    desk.arrive(one("b2", 1.5, 20, 1, "b"), one("c2", 1.5, 20, 1, "c"))
    assert desk.step() == ["b2", "c2"]
    assert desk.policy.speeds == {False: pytest.approx(40.0), True: pytest.approx(160.0)}
    assert (desk.policy.merge_at, desk.policy.unmerge_at) == (pytest.approx(0.75), pytest.approx(0.45))


# levels


def test_multilevel_lets_small_requests_begin_before_large_ones_that_came_first():
    desk = Desk(MultiLevelQueue(levels=2), max_requests=4)
    desk.arrive(*(one(f"large{i}", 0.0, 50, 60) for i in range(3)), *(one(f"small{i}", 0.1, 8, 4) for i in range(3)))
    # tokens: 36 small, 330 large. of 1,024: small may hold 101, all three; then large begins, three to a quota of 923
    assert desk.step(0.2) == ["small0", "small1", "small2", "large0"]
    assert desk.policy.shares == [pytest.approx(36 / 366), pytest.approx(330 / 366)]


def test_multilevel_keeps_each_level_to_its_quota_before_it_lends():
    # of a pool of 256, small may hold 256 * 96 / 228 = 107, large 148: all six of 16 fit, and both of 66
    desk = Desk(MultiLevelQueue(levels=2), num_blocks=16, max_model_len=128, max_requests=8)
    desk.arrive(*(one(f"small{i}", 0.0, 8, 8) for i in range(6)), *(one(f"large{i}", 0.1, 33, 33) for i in range(2)))
    assert desk.step(0.2) == [*(f"small{i}" for i in range(6)), "large0", "large1"]
    tight = Desk(MultiLevelQueue(levels=2), num_blocks=16, max_model_len=128, max_requests=8)
    tight.policy.shares, tight.policy.bounds = [0.13, 0.87], [0.6]
    tight.arrive(*(one(f"small{i}", 0.0, 8, 8) for i in range(6)), *(one(f"large{i}", 0.1, 33, 33) for i in range(2)))
    tight.ledger.planned()  # no arrival to learn from: the quotas stay as they are
    tight.policy.largest = (33.0, 33.0, 1.0)
    # small may hold 33: two of 16; then both large; then the rest of the small ones on loan
    assert tight.step(0.2) == ["small0", "small1", "large0", "large1", "small2", "small3", "small4", "small5"]


def test_multilevel_bypasses_a_head_without_a_slot():
    desk = Desk(MultiLevelQueue(levels=1), num_slots=1, max_batch_adapters=1)
    desk.arrive(one("a1", adapter="a", output=30))
    assert desk.step() == ["a1"]
    desk.arrive(one("b1", 0.02, adapter="b"), one("a2", 0.03, adapter="a"))
    assert desk.step(0.04) == ["a2"]


def test_weighted_eviction_weighs_use_recency_and_size():
    desk = Desk(MultiLevelQueue(), num_slots=3, max_batch_adapters=4)
    desk.arrive(*(one(n, 0.0, 20, 1, n[0]) for n in ("a1", "a2", "a3", "a4", "b1", "b2", "e1")))
    assert len(desk.step(1.0)) == 7
    # uses 4, 2, 1; bytes 8 : 8 : 32; equally recent: a 0.45 + 0.1 + 0.1125 = 0.6625, b 0.4375, e 0.1125 + 0.1 + 0.45 = 0.6625
    loaded = [desk.view.adapters[n] for n in "abe"]
    assert WeightedEviction()(desk.view.adapters["c"], loaded, desk.view) == ["b"]
    assert WeightedEviction(frequency=1.0, recency=0.0, size=0.0)(desk.view.adapters["c"], loaded, desk.view) == ["e"]
    desk.arrive(one("c1", 2.0, adapter="c"))
    plan = desk.decide(2.0)
    assert began(plan) == ["c1"]
    assert plan.evicted == {("b", 1)}


# ranks


@pytest.mark.parametrize(("kernel", "rank_s"), [("padded", 0.001), ("unpadded", 0.001)])
def test_rank_aware_leaves_out_a_rank_that_costs_more_than_its_wait(kernel, rank_s):
    """Ranks 8 and 64. Padded: both cost 2 * 64 ms, 2 * 0.078 s too much; unpadded: 72 ms, 2 * 0.022 s. Alone, 8 ms is within 50 ms."""
    desk = Desk(RankAware(kernel=kernel, rank_s=rank_s))
    desk.arrive(one("y", 0.0, adapter="f"), one("x", 0.0, adapter="a"))
    assert began(desk.decide(0.0)) == ["x"]
    # left out after 7 s: 7.008 - 6 s too late, more than what both cost
    assert began(desk.decide(7.0)) == ["y", "x"]


def test_rank_aware_counts_padding_only_where_kernels_pad():
    """Ranks 8, 8, 8, 64 at 0.2 ms. Padded 4 * 64 * 0.2 = 51 ms is over 50 ms; the sum, 88 * 0.2 = 18 ms, is not."""
    for kernel, expected in (("padded", ["x", "y", "z"]), ("unpadded", ["x", "w", "y", "z"])):
        desk = Desk(RankAware(kernel=kernel, rank_s=2e-4))
        desk.arrive(*(one(n, 0.0, adapter=a) for n, a in (("x", "a"), ("w", "f"), ("y", "a"), ("z", "b"))))
        assert began(desk.decide()) == expected


# deadlines

SLOW_PREFILL = {"prefill_s": 1e-3}  # 1 ms a token on 4 ms a step


def test_edf_goes_by_deadline_and_least_slack_counts_the_work_that_is_left():
    slo = {"": SLO(ttft_s=1.0), "relaxed": SLO(ttft_s=1.1), "none": SLO()}
    queue = [one("none", 0.0, slo_class="none"), one("long", 0.0, 200, slo_class="relaxed"), one("short", 0.0, 10)]
    for policy, expected in ((EDF(), ["short", "long", "none"]), (LeastSlack(), ["long", "short", "none"])):
        desk = Desk(policy, slo=slo, costs=SLOW_PREFILL)
        desk.arrive(*queue)
        # slack: 1.1 - 0.204 = 0.896 for the long one, 1.0 - 0.014 = 0.986 for the short one
        assert began(desk.decide()) == expected


def test_edf_counts_a_requests_own_end():
    desk = Desk(EDF(), slo=SLO(ttft_s=1.0))
    desk.arrive(one("x"), one("y", deadline_s=0.5))
    assert began(desk.decide()) == ["y", "x"]
    assert desk.view.slack_s(desk.of("y")) == pytest.approx(0.5 - desk.view.remaining_s(desk.of("y")))


def test_edf_goes_on_with_what_was_begun_behind_an_urgent_request_without_memory():
    slo = {"": SLO(ttft_s=9.0), "urgent": SLO(ttft_s=0.5)}
    desk = Desk(EDF(), slo=slo, num_blocks=20, max_batch_tokens=100, max_model_len=320)
    desk.arrive(one("big", 0.0, 300, 4))
    assert desk.step() == ["big"]
    desk.arrive(one("urgent", 0.01, 60, 4, slo_class="urgent"))
    assert desk.step() == ["big"]


def test_soft_admission_promises_most_and_serves_them_first():
    # each alone: 204, 104 and 104 ms. In 250 ms the two short ones end, or the long one: two beat one
    desk = Desk(SoftAdmission(), slo=SLO(ttft_s=0.25), costs=SLOW_PREFILL)
    desk.arrive(one("long", 0.0, 200), one("x", 0.0, 100), one("y", 0.0, 100))
    assert began(desk.decide()) == ["x", "y", "long"]
    assert desk.policy.promised == {"x", "y"}
    # a promise is kept: a newcomer that would break it goes to the rest
    desk.arrive(one("new", 0.001, 30))
    desk.decide(0.02)
    assert desk.policy.promised == {"x", "y"}


def test_soft_admission_keeps_prefills_within_the_token_target_beside_decodes():
    desk = Desk(SoftAdmission(), slo=SLO(ttft_s=9.0, itl_s=0.05), costs=SLOW_PREFILL)
    desk.arrive(one("x", 0.0, 10, 30))
    desk.step()
    desk.arrive(one("y", 0.01, 200))
    plan = desk.decide()
    assert plan.predicted_s <= 0.05
    assert plan.work["prefill_tokens"] == 45  # 4 ms + 0.2 ms + 45 ms, and no 46th


def test_chunked_prefill_takes_decodes_then_begun_then_new_ones_to_its_budget():
    desk = Desk(ChunkedPrefill(budget_tokens=50))
    desk.arrive(one("x", 0.0, 70, 9), one("y", 0.0, 70, 9))
    assert [(s.id, n) for s, n, _ in desk.decide().prefills] == [("x", 50)]
    desk.step()
    assert [(s.id, n) for s, n, _ in desk.decide().prefills] == [("x", 20), ("y", 30)]
    desk.step()
    plan = desk.decide()
    assert ([s.id for s in plan.decodes], [(s.id, n) for s, n, _ in plan.prefills]) == (["x"], [("y", 40)])
