"""check_policy finds what it says it finds, and nothing on the shipped policies."""

import random
from dataclasses import dataclass

import pytest

from workbench import policies
from workbench.check import check_policy, standard_workloads


def serve(view, plan):
    plan.decode(view.running)
    plan.prefill(view.waiting)


@pytest.mark.parametrize(
    "policy",
    [policies.FCFS(), policies.LoquetierStatic(), policies.LoquetierScalable(), policies.PeftSequential(), policies.ServeFirst()],
    ids=lambda p: type(p).__name__,
)
def test_the_shipped_policies_have_no_finding(policy):
    report = check_policy(policy)
    assert report.ok, report
    assert report.notes == (("it never fine-tunes",) if isinstance(policy, policies.FCFS) else ())


def raises(view, plan):
    serve(view, plan)
    if view.step == 9:
        raise KeyError("lost")


def names_twice(view, plan):
    serve(view, plan)
    if view.running:
        plan.decode(view.running[:1])


def asks_for_too_much(view, plan):
    serve(view, plan)
    for job in view.jobs:
        plan.finetune(job, 5000)
        plan.train(job) if job.phase == "backward" and job.id not in plan.named else None


def tampers(view, plan):
    plan._tokens = plan._blocks = 10**9
    serve(view, plan)


def forgets_adapter_b(view, plan):
    plan.decode(view.running)
    plan.prefill(r for r in view.waiting if r.adapter != "b")


def newest_first(view, plan):
    plan.decode(view.running)
    plan.prefill(sorted(view.waiting, key=lambda r: -r.arrival_s), skip=("requests", "blocks"))


def trains_the_first_job_only(view, plan):
    serve(view, plan)
    if view.jobs and not view.waiting:
        plan.train(view.jobs[0], within_s=0.02)


def does_nothing(view, plan):
    pass


def tosses_a_coin(view, plan):
    plan.decode(view.running)
    if random.random() < 0.5 or not view.running:
        plan.prefill(view.waiting)


COUNT = [0]


def counts_in_a_module_global(view, plan):
    COUNT[0] += 1
    plan.decode(view.running)
    if COUNT[0] % 7 or not view.running:
        plan.prefill(view.waiting)


def counter_in_a_closure():
    calls = 0

    def counts_in_a_closure(view, plan):
        nonlocal calls
        calls += 1
        plan.decode(view.running)
        if calls % 5 or not view.running:
            plan.prefill(view.waiting)

    return counts_in_a_closure


@dataclass
class CountsInAField:
    calls: int = 0

    def __call__(self, view, plan):
        self.calls += 1
        plan.decode(view.running)
        if self.calls % 5 or not view.running:
            plan.prefill(view.waiting)


@pytest.mark.parametrize(
    ("policy", "kind", "workload"),
    [
        (raises, "raises", "burst"),
        (names_twice, "named twice", "burst"),
        (asks_for_too_much, "exceeds budgets", "steady with jobs"),
        (tampers, "exceeds budgets", "burst"),
        (forgets_adapter_b, "starves a request", "burst"),
        (newest_first, "starves a request", "overload"),
        (trains_the_first_job_only, "starves a job", "steady with jobs"),
        (does_nothing, "plans nothing", "burst"),
        (tosses_a_coin, "hidden state", "burst"),
        (counts_in_a_module_global, "hidden state", "steady with jobs"),
        (counter_in_a_closure(), "hidden state", "steady with jobs"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_each_broken_rule_is_found_and_named(policy, kind, workload):
    report = check_policy(policy, workloads=[w for w in standard_workloads() if w.name == workload])
    assert kind in report.kinds, report
    assert f"  - {kind} ({workload}" in repr(report)


def test_declared_state_is_allowed_and_a_random_draw_from_the_view_too():
    def draws(view, plan):
        plan.decode(view.running)
        if view.rng.random() < 0.5 or not view.running:
            plan.prefill(view.waiting)

    policy, steady = CountsInAField(), [w for w in standard_workloads() if w.name == "steady with jobs"]
    assert check_policy(policy, workloads=steady).ok
    assert policy.calls == 0
    assert check_policy(draws, workloads=steady).ok


def test_a_single_workload_can_be_chosen():
    report = check_policy(serve, workloads=standard_workloads()[:1])
    assert repr(report) == "serve: no finding on 1 workloads (burst)"
