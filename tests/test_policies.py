"""The shipped policies on cases where the right decision is known by hand."""

from random import Random

import pytest

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.policies import FCFS, LoquetierScalable, LoquetierStatic, PeftSequential, ServeFirst
from workbench.replay import replay
from workbench.testing import FixedCost, FixedShape, fixed_info

ALL = [FCFS(), LoquetierStatic(), LoquetierScalable(), PeftSequential(), ServeFirst()]


def one(name, arrival_s=0.0, prompt=20, output=8, adapter=None):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, adapter=adapter)


def run(policy, requests, *, jobs=0, documents=(30, 30), num=40, until=None, evaluate=False, **limits):
    evaluation = {"evaluate_every": 1, "evaluation_documents": ((16,),)} if evaluate else {}
    shapes = {f"job:t{i}": FixedShape(documents, num, 1, **evaluation) for i in range(jobs)}
    executor = FixedCost(info=fixed_info(**limits), shapes=shapes)
    tuned = [FinetuneJob(adapter=f"t{i}", data=RandomTokens(), steps=num) for i in range(jobs)]
    return replay(requests, executor=executor, policy=policy, jobs=tuned, planning=0.0, progress=False, until=until)


def kinds(result):
    """The set of work kinds of each step, as a short word: f(inetune) e(valuate) p(refill) d(ecode) b(ackward)."""
    return ["".join(sorted({k[0] for k in rows})) for _, rows in result.work.groupby("step")["kind"]]


def test_fcfs_decodes_first_then_prefills_by_arrival_in_chunks_and_never_trains():
    result = run(FCFS(), [one("x", 0.0, 300, 4), one("y", 0.0, 100, 2)], jobs=1)
    work = [tuple(row) for row in result.work[["step", "owner", "kind", "start", "tokens"]].itertuples(index=False)]
    assert work[:5] == [
        (0, "x", "prefill", 0, 256),
        (1, "x", "prefill", 256, 44),
        (1, "y", "prefill", 0, 100),
        (2, "x", "decode", 300, 1),
        (2, "y", "decode", 100, 1),
    ]
    assert result.jobs["forward_tokens"].sum() == 0


def test_fcfs_keeps_its_token_budget():
    result = run(FCFS(budget_tokens=50), [one("x", 0.0, 70, 9), one("y", 0.0, 70, 9)])
    assert result.work.groupby("step")["tokens"].sum().max() == 50
    assert result.work.query("step == 2")["tokens"].tolist() == [40, 1]


def test_serve_first_trains_only_when_nobody_waits_and_within_its_seconds():
    result = run(ServeFirst(step_s=0.010), [one(f"r{i}", 0.02 * i, 60, 10) for i in range(12)], jobs=1, max_requests=3)
    waiting = result.steps.set_index("step")["waiting"]
    training = result.work[result.work["kind"].isin(["finetune", "backward"])]
    assert len(training)
    assert (waiting[training["step"].unique()] == 0).all()
    assert result.steps.set_index("step").loc[training["step"].unique(), "predicted_s"].max() <= 0.010
    serving = result.steps[~result.steps["step"].isin(training["step"])]
    assert len(serving)


def test_loquetier_static_gives_a_fine_tune_turn_after_every_n_inference_steps():
    result = run(LoquetierStatic(steps=3), [one("x", 0.0, 20, 14)], jobs=1)
    assert kinds(result)[:13] == ["p", "d", "d", "df", "d", "d", "d", "b", "d", "d", "d", "df", "d"]


def test_loquetier_runs_a_due_evaluation_at_once_mixed_with_the_residents():
    result = run(LoquetierStatic(steps=3), [one("x", 0.0, 20, 14)], jobs=1, evaluate=True)
    assert kinds(result)[:10] == ["p", "d", "d", "df", "d", "d", "d", "b", "de", "d"]


def test_loquetier_without_residents_trains_in_every_step():
    assert kinds(run(LoquetierStatic(), [], jobs=1, num=3)) == ["f", "b"] * 3


def test_loquetier_drops_what_waited_over_six_seconds_and_nothing_that_began():
    requests = [one("x", 0.0, 20, 400), one("y", 0.1, 20, 400), one("z", 1.0, 20, 5), one("late", 4.5, 20, 5)]
    result = run(LoquetierStatic(max_resident=2), requests, max_model_len=512)
    outcomes = result.requests["outcome"].to_dict()
    slow = replay(
        requests, executor=FixedCost(step_s=0.02, info=fixed_info()), policy=LoquetierStatic(max_resident=2), planning=0.0, progress=False
    )
    assert outcomes == dict.fromkeys(("x", "y", "z", "late"), "finished")
    assert slow.requests["outcome"].to_dict() == {"x": "finished", "y": "finished", "z": "rejected", "late": "finished"}
    rejected = slow.events.query("kind == 'rejected'")
    assert rejected["note"].tolist() == ["waited over 6 s"]
    assert 7.0 < rejected["time_s"].iloc[0] < 7.05


def test_loquetier_admits_while_fewer_than_b_are_resident():
    result = run(LoquetierStatic(max_resident=3), [one(f"r{i}") for i in range(8)])
    assert result.steps["running"].max() == 3


@pytest.mark.parametrize(("residents", "steps"), [(1, 1), (4, 2), (8, 3), (16, 5)])
def test_loquetier_scalable_counts_with_the_residents(residents, steps):
    """floor((5 * residents - 1) / 16) + 1"""
    assert LoquetierScalable().num_steps(residents) == steps
    result = run(LoquetierScalable(), [one(f"r{i}", 0.0, 8, 20) for i in range(residents)], jobs=1, max_requests=16)
    turns = [k for k, kind in enumerate(kinds(result)) if "f" in kind or "b" in kind]
    assert turns[1] - turns[0] == steps + 1


@pytest.mark.parametrize("can", [frozenset(), fixed_info().can], ids=["plain executor", "mixed executor"])
def test_peft_serves_one_adapter_at_a_time_in_static_batches_and_trains_between_them(can):
    requests = [
        one("x", 0.0, adapter="a"),
        one("y", 0.0, adapter="b"),
        one("z", 0.0, output=3, adapter="a"),
        one("late", 0.01, adapter="a"),
    ]
    result = run(PeftSequential(), requests, jobs=1, can=can, until="jobs", num=5)
    work = result.work[result.work["kind"].isin(["prefill", "decode"])]
    spans = work.groupby("owner")["step"].agg(["min", "max"])
    assert spans["min"]["x"] == spans["min"]["z"] < spans["max"]["x"] < spans["min"]["y"] < spans["max"]["y"] < spans["min"]["late"]
    between = result.work.query(f"{spans['max']['x']} < step < {spans['min']['y']}")["kind"].tolist()
    assert between == ["finetune", "backward"]
    assert all(len(kind) == 1 for kind in kinds(result))
    assert result.jobs["outcome"].tolist() == ["finished"]


@pytest.mark.parametrize("policy", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "limits", [{"num_blocks": 14, "max_model_len": 200}, {"num_slots": 1, "max_batch_adapters": 1}, {"can": frozenset()}]
)
def test_every_policy_serves_everything_within_tight_limits(policy, limits):
    rng = Random(1)
    requests = [one(f"r{i}", 0.02 * i, rng.randint(1, 120), rng.randint(1, 40), rng.choice([None, "a", "b"])) for i in range(25)]
    result = run(policy, requests, jobs=1, **limits)
    assert (result.requests["outcome"] == "finished").all()
    assert result.requests["output_tokens"].tolist() == [r.output_tokens for r in requests]


@pytest.mark.parametrize("policy", ALL[1:], ids=lambda p: type(p).__name__)
def test_every_training_policy_brings_two_jobs_to_their_end(policy):
    result = run(policy, [one("x", 0.0, 20, 30)], jobs=2, num=4, evaluate=True, until="jobs")
    assert result.jobs["outcome"].tolist() == ["finished"] * 2
    assert result.jobs["committed_tokens"].tolist() == [240, 240]


def test_each_policy_names_its_parameters_in_its_repr():
    assert [repr(p) for p in ALL] == [
        "FCFS(budget_tokens=None)",
        "LoquetierStatic(steps=5, max_resident=16, max_wait_s=6.0)",
        "LoquetierScalable(steps=5, max_resident=16, max_wait_s=6.0)",
        "PeftSequential(batch_size=16)",
        "ServeFirst(step_s=0.04)",
    ]


def test_loquetier_scalable_counts_the_request_that_it_admits_now():
    # One request on an idle server: N = floor((5 - 1) / 16) + 1 = 1, so its prefill is an inference step before any fine-tune turn.
    assert kinds(run(LoquetierScalable(), [one("a")], jobs=1))[0] == "p"
