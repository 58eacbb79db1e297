"""Policies that fine-tune beside serving, on cases worked out by hand, and what holds for every shipped policy."""

import sys
from pathlib import Path
from random import Random

import pytest
from policy_cases import Desk, began, kinds, one, run

from workbench import policies
from workbench.check import check_policy, standard_workloads
from workbench.config import SLO
from workbench.policies import (
    CATALOGUE,
    FCFS,
    Clairvoyant,
    FinetuneOnly,
    InferenceOnly,
    LatencyBudget,
    LoquetierScalable,
    LoquetierStatic,
    PeftSequential,
    ServeFirst,
    TemporalSharing,
    TokenCoserving,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import policy_table

EVERY = [policy() for chosen in CATALOGUE.values() for policy in chosen]
TURNS_AWAY = (FinetuneOnly,)
CHECKED_ELSEWHERE = (FCFS, LoquetierStatic, LoquetierScalable, PeftSequential, ServeFirst)  # in test_check.py, on every workload
SERVING, TRAINING = ("tight memory", "more adapters than slots"), ("steady with jobs", "jobs alone")

# tokens beside serving: a step is 4 ms, a decode 0.2 ms, a fine-tune token 50 us, a layer of 60 backward tokens 1.2 ms


def test_token_coserving_trains_as_many_tokens_as_the_token_target_allows():
    desk = Desk(TokenCoserving(tpot_s=0.010))
    desk.arrive(one("x", 0.0, 20, 60))
    desk.step()
    job = desk.job(documents=(200, 200))
    # (10 - 4 - 0.2 ms - 21 tokens of context) / 50 us = 115.99
    assert [(s.id, n) for s, n in desk.decide().finetunes] == [(job.id, 115)]
    while job.phase == "forward":
        desk.step()
    # a layer of 400 tokens is 8 ms: none fits
    assert desk.decide().backwards == []


@pytest.mark.parametrize(("tpot_s", "layers"), [(0.0050, 0), (0.0055, 1), (0.0080, 3), (0.0100, 4)])
def test_token_coserving_cuts_the_backward_by_layers(tpot_s, layers):
    desk = Desk(TokenCoserving(tpot_s=0.05))
    desk.arrive(one("x", 0.0, 20, 60))
    desk.step()
    job = desk.job()
    desk.step()
    assert job.phase == "backward"
    desk.policy = TokenCoserving(tpot_s=tpot_s)
    assert sum(n for _, n in desk.decide().backwards) == layers


def test_token_coserving_trains_while_somebody_waits_and_serve_first_does_not():
    for policy, trains in ((TokenCoserving(tpot_s=0.05), True), (ServeFirst(step_s=0.05), False)):
        desk = Desk(policy, max_requests=1)
        desk.arrive(one("x"), one("y"))
        desk.step()
        desk.job()
        assert bool(desk.decide().finetunes) is trains


def test_jobs_take_turns_by_committed_tokens_and_weight():
    result = run(TokenCoserving(tpot_s=0.008), [one("x", 0.0, 20, 200)], jobs=3, num=30)
    committed = result.jobs["committed_tokens"]
    assert committed.max() - committed.min() <= 60
    assert committed.min() > 0


# turns


def test_temporal_sharing_gives_a_whole_step_alone_after_every_few_inference_steps():
    result = run(TemporalSharing(every=4), [one("x", 0.0, 20, 30)], jobs=1)
    assert kinds(result)[:13] == ["p", "d", "d", "d", "f", "b", "d", "d", "d", "d", "f", "b", "d"]


def test_temporal_sharing_counts_an_evaluation_to_the_step_before_it():
    result = run(TemporalSharing(every=3), [one("x", 0.0, 20, 30)], jobs=1, evaluate=True)
    assert kinds(result)[:12] == ["p", "d", "d", "f", "b", "e", "d", "d", "d", "f", "b", "e"]


def test_temporal_sharing_trains_at_once_without_requests():
    assert kinds(run(TemporalSharing(), [], jobs=1, num=3)) == ["f", "b"] * 3


# a budget


def test_latency_budget_bounds_prefills_and_training_alike():
    desk = Desk(LatencyBudget(budget_s=0.010))
    desk.arrive(one("x", 0.0, 20, 60))
    desk.step()
    desk.arrive(one("y", 0.01, 200))
    job = desk.job()
    plan = desk.decide()
    # 5.8 ms / 40 us a token = 144 tokens of prefill, and nothing left to train with
    assert (plan.work["prefill_tokens"], plan.finetunes) == (144, [])
    desk.step()
    plan = desk.decide()
    # 56 more tokens, 2.24 ms; 3.55 ms for 71 fine-tune tokens, of which the job has 60
    assert (plan.work["prefill_tokens"], [(s.id, n) for s, n in plan.finetunes]) == (56, [(job.id, 60)])


def test_latency_budget_stops_at_a_safepoint_when_somebody_arrives():
    costs = {"backward_s": 5e-3}
    requests = [one("x", 0.02, 20, 2)]
    stopped = run(LatencyBudget(), requests, jobs=1, costs=costs)
    whole = run(LatencyBudget(safepoints=False, budget_s=9.0), requests, jobs=1, costs=costs)
    assert stopped.steps["stopped_early"].any()
    assert stopped.requests["ttft_s"]["x"] < 0.35 < whole.requests["ttft_s"]["x"]  # one layer of 0.3 s against four


def test_latency_budget_is_tuned_to_the_largest_that_meets_the_targets():
    asked = []

    def meets(policy):
        asked.append(policy.budget_s)
        return policy.budget_s <= 0.0451

    found = LatencyBudget(chunk_tokens=64).tuned(meets, low_s=0.01, high_s=0.1, rounds=8)
    assert 0.0451 - 0.09 / 2**8 <= found.budget_s <= 0.0451
    assert (found.chunk_tokens, len(asked)) == (64, 10)
    with pytest.raises(ValueError, match=r"low_s must meet the targets, got 0.05"):
        LatencyBudget().tuned(meets, low_s=0.05)


def test_a_tuned_budget_meets_the_token_target_that_a_larger_one_misses():
    requests = [one(f"r{i}", 0.05 * i, 60, 40) for i in range(12)]
    slo = SLO(ttft_s=1.0, itl_s=0.012)

    def attained(policy):
        return run(policy, requests, jobs=1, slo=slo).summary()["attainment"]

    found = LatencyBudget().tuned(lambda p: attained(p) == 1.0, low_s=0.006, high_s=0.1)
    assert 0.010 < found.budget_s <= 0.0125
    assert attained(LatencyBudget(budget_s=0.03)) < 1.0


# alone


def test_the_two_ends_serve_without_training_and_train_without_serving():
    requests = [one(f"r{i}", 0.02 * i, 60, 10) for i in range(12)]
    serving = run(InferenceOnly(), requests, jobs=1)
    training = run(FinetuneOnly(), requests, jobs=1)
    assert set(serving.work["kind"]) == {"prefill", "decode"}
    assert set(training.work["kind"]) == {"finetune", "backward"}
    assert training.requests["outcome"].unique().tolist() == ["rejected"]
    beside = run(TokenCoserving(tpot_s=0.008), requests, jobs=1).summary()
    assert 0 < beside["finetune_tokens_per_s"] < training.summary()["finetune_tokens_per_s"]
    assert serving.summary()["tpot_p50_s"] < beside["tpot_p50_s"]


# the clairvoyant


def test_the_clairvoyant_lets_the_hopeless_wait():
    desk = Desk(Clairvoyant(), slo=SLO(ttft_s=0.25), costs={"prefill_s": 1e-3})
    desk.arrive(one("lost", 0.0, 200), one("x", 0.04, 150))
    # at 0.1 the first would be there at 0.304 > 0.25, the second at 0.254 < 0.29
    assert began(desk.decide(0.1)) == ["x", "lost"]


def test_the_clairvoyant_holds_memory_for_true_lengths():
    desk = Desk(Clairvoyant(), num_blocks=4, max_model_len=64)
    # both may ask for 44 tokens, and really take 10: 60 of 64 tokens at the peak
    desk.arrive(*(one(n, 0.0, 20, 10) for n in "xy"), one("z", 0.0, 20, 10))
    assert desk.step() == ["x", "y"]


def test_the_clairvoyant_trains_up_to_the_next_arrival_and_the_token_target():
    desk = Desk(Clairvoyant(), arrivals=[(0.008, "next")], can=frozenset({"chunk", "mixed", "cut_backward"}))
    desk.job(documents=(200,))
    assert [n for _, n in desk.decide(0.0).finetunes] == [80]  # (8 - 4 ms) / 50 us
    busy = Desk(Clairvoyant(), slo=SLO(itl_s=0.010))
    busy.arrive(one("x", 0.0, 20, 60))
    busy.step()
    busy.job(documents=(200,))
    assert [n for _, n in busy.decide().finetunes] == [115]


# what holds for all of them


@pytest.mark.parametrize("policy", [p for p in EVERY if type(p) not in CHECKED_ELSEWHERE], ids=lambda p: type(p).__name__)
def test_every_shipped_policy_keeps_the_rules(policy):
    """On the workloads that say most about it, to save time: `wb.check_policy(policy)` has no finding on the others either."""
    chosen = TRAINING if any(number > 13 and type(policy) in of for number, of in CATALOGUE.items()) else SERVING
    report = check_policy(policy, workloads=[w for w in standard_workloads() if w.name in chosen])
    assert report.ok, report


@pytest.mark.parametrize("policy", EVERY, ids=lambda p: type(p).__name__)
def test_every_policy_serves_everything_within_tight_limits_and_with_targets(policy):
    rng = Random(1)
    lengths = [(rng.randint(1, 120), rng.randint(1, 40), rng.choice([None, "a", "b"])) for _ in range(16)]
    requests = [one(f"r{i}", 0.02 * i, *shape) for i, shape in enumerate(lengths)]
    for limits in ({"num_blocks": 14, "max_model_len": 200}, {"num_slots": 1, "max_batch_adapters": 1}, {"can": frozenset()}):
        result = run(policy, requests, jobs=1, limits=limits, slo=SLO(ttft_s=5.0, itl_s=0.045))
        served = result.requests[result.requests["outcome"] == "finished"]
        assert len(served) == (0 if isinstance(policy, TURNS_AWAY) else len(requests))


def test_the_table_of_policies_is_made_from_their_docstrings():
    assert policy_table.TABLE.read_text(encoding="utf-8") == policy_table.table(), "docs/policies.md is old. Run `make format`."
    assert set(policies.__all__) - {"CATALOGUE", "WeightedEviction", "LRU", "LFU", "CostAware"} == {type(p).__name__ for p in EVERY}


def test_a_policy_without_a_source_is_refused_by_the_table():
    with pytest.raises(ValueError, match="Unnamed has none"):
        policy_table.row(0, type("Unnamed", (), {"__doc__": "It does something."}))
