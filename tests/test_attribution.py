"""Where the time of a request goes: cases worked out by hand, and sums over random policies."""

from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench import plots
from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.policies import FCFS, LoquetierStatic, PeftSequential, ServeFirst
from workbench.replay import load_replay, replay
from workbench.results.attribution import CAUSE_COLUMNS, CAUSES, by_policy
from workbench.results.step_parts import PARTS, step_parts
from workbench.testing import FixedCost, FixedShape, fixed_info

# 4 ms a step, 40 us a prefill token, 0.2 ms a decode row, 50 us a fine-tune token, 20 us a backward token and layer, 2 ms a load
STEP, PREFILL, DECODE, FINETUNE, BACKWARD, LOAD = 0.004, 4e-5, 2e-4, 5e-5, 2e-5, 0.002


def one(name="x", arrival_s=0.0, prompt=100, output=1, **more):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, **more)


def job(tokens=64, steps=1):
    return FinetuneJob(adapter="t", data=RandomTokens(examples=4, tokens=tokens), steps=steps, batch_size=1, publish="never")


def run(trace, policy=None, executor=None, **options):
    options.setdefault("planning", 0.0)
    return replay(trace, executor=executor or FixedCost(context_s=0.0), policy=policy or FCFS(), progress=False, **options)


def causes(result, name, of="ttft"):
    """The causes that took time, in seconds; whatever else, they sum to what was measured."""
    frame = result.attribution(of)
    measured = result.requests.loc[name, f"{of}_s"]
    assert frame.loc[name, "total_s"] == pytest.approx(measured, abs=1e-12)
    row = frame.loc[name, list(CAUSE_COLUMNS)]
    return {cause: pytest.approx(row[f"{cause}_s"], abs=1e-9) for cause in CAUSES if abs(row[f"{cause}_s"]) > 1e-12}


def test_a_request_alone_owes_everything_to_itself():
    result = run([one(prompt=100, output=3)])
    assert causes(result, "x") == {"own": STEP + 100 * PREFILL}
    assert causes(result, "x", "e2e") == {"own": 3 * STEP + 100 * PREFILL + 2 * DECODE}


def test_prefills_of_one_step_are_behind_one_another_and_its_fixed_cost_is_each_ones_own():
    result = run([one("x", prompt=100), one("y", prompt=50)])
    assert causes(result, "x") == {"own": STEP + 100 * PREFILL, "behind_prefill": 50 * PREFILL}
    assert causes(result, "y") == {"own": STEP + 50 * PREFILL, "behind_prefill": 100 * PREFILL}


def test_decodes_run_as_one_and_are_held_up_by_a_prefill_beside_them():
    result = run([one("x", prompt=10, output=2), one("y", arrival_s=0.001, prompt=100)])
    first = STEP + 10 * PREFILL
    assert causes(result, "x", "e2e") == {"own": first + STEP + DECODE, "behind_prefill": 100 * PREFILL}
    # y came in the middle of x's prefill, and its own began beside x's decode
    assert causes(result, "y") == {"behind_prefill": first - 0.001, "behind_decode": DECODE, "own": STEP + 100 * PREFILL}


def serve_and_train(view, plan):
    plan.decode(view.running)
    plan.prefill(view.waiting)
    for j in view.jobs:
        plan.train(j)


POLICIES = {"FCFS": FCFS(), "both": serve_and_train}


def test_fine_tuning_beside_a_decode_is_divided_into_forward_and_backward():
    result = run([one("x", prompt=10, output=3)], serve_and_train, jobs=[job(64)])
    own = 3 * STEP + 10 * PREFILL + 2 * DECODE
    # forward beside the prefill, backward (4 layers) beside the first decode, the second decode alone
    assert causes(result, "x", "e2e") == {"own": own, "behind_finetune": 64 * FINETUNE, "behind_backward": 4 * 64 * BACKWARD}
    assert causes(result, "x") == {"own": STEP + 10 * PREFILL, "behind_finetune": 64 * FINETUNE}


def test_a_request_that_the_policy_does_not_try_waits_behind_training_and_for_admission_behind_the_rest():
    def train_first(view, plan):
        plan.decode(view.running)
        for j in view.jobs:
            plan.train(j)
        if plan.empty or not view.jobs:
            plan.prefill(view.waiting)

    result = run([one("x", prompt=100)], train_first, jobs=[job(64)])
    forward, backward = STEP + 64 * FINETUNE, STEP + 4 * 64 * BACKWARD
    assert causes(result, "x") == {"behind_finetune": forward, "behind_backward": backward, "own": STEP + 100 * PREFILL}

    def one_by_one(view, plan):
        plan.decode(view.running)
        if plan.empty:
            plan.prefill(view.waiting[0])

    result = run([one("x", prompt=10, output=3), one("y", prompt=10)], one_by_one)
    assert causes(result, "y") == {"admission": 3 * STEP + 10 * PREFILL + 2 * DECODE, "own": STEP + 10 * PREFILL}


def test_the_resident_limit_is_waiting_for_admission():
    executor = FixedCost(context_s=0.0, info=fixed_info(max_requests=1))
    result = run([one("x", prompt=10, output=2), one("y", prompt=10)], executor=executor)
    assert causes(result, "y") == {"admission": 2 * STEP + 10 * PREFILL + DECODE, "own": STEP + 10 * PREFILL}


def test_a_full_batch_is_time_behind_the_work_in_it():
    executor = FixedCost(context_s=0.0, info=fixed_info(max_batch_tokens=100))
    result = run([one("x", prompt=100), one("y", prompt=40), one("z", prompt=60)], executor=executor)
    before = STEP + 100 * PREFILL
    assert causes(result, "y") == {"behind_prefill": before + 60 * PREFILL, "own": STEP + 40 * PREFILL}
    assert causes(result, "z") == {"behind_prefill": before + 40 * PREFILL, "own": STEP + 60 * PREFILL}


def test_a_request_behind_the_one_that_lacks_blocks_waits_for_blocks_too():
    executor = FixedCost(context_s=0.0, info=fixed_info(num_blocks=8, max_model_len=128))
    result = run([one("x", prompt=100, output=2), one("y", prompt=60), one("z", prompt=10)], executor=executor)
    waited = 2 * STEP + 100 * PREFILL + DECODE
    assert causes(result, "y") == {"kv_blocks": waited, "own": STEP + 60 * PREFILL, "behind_prefill": 10 * PREFILL}
    assert causes(result, "z") == {"kv_blocks": waited, "own": STEP + 10 * PREFILL, "behind_prefill": 60 * PREFILL}


def test_a_policy_that_skips_the_one_without_a_slot_charges_the_slot_to_it_alone():
    def skip_slots(view, plan):
        plan.decode(view.running)
        plan.prefill(view.waiting, skip=("slots",))

    executor = FixedCost(context_s=0.0, info=fixed_info(num_slots=1, max_batch_adapters=1))
    trace = [one("x", prompt=10, output=2, adapter="a"), one("y", arrival_s=0.001, prompt=20, adapter="b"), one("z", 0.001, prompt=30)]
    result = run(trace, skip_slots, executor)
    first = STEP + 10 * PREFILL + LOAD
    assert causes(result, "x") == {"own": STEP + 10 * PREFILL, "adapter": LOAD}
    assert causes(result, "z")["own"] == STEP + 30 * PREFILL
    # what was left of the first step when y came belongs to that step's work; all of the second step to the slot that x held
    load_share = LOAD / (LOAD + 10 * PREFILL)
    left = first - 0.001
    second = STEP + 30 * PREFILL + DECODE
    expected = {"behind_prefill": left * (1 - load_share), "adapter": left * load_share + second + LOAD, "own": STEP + 20 * PREFILL}
    assert causes(result, "y") == expected


def test_a_preemption_costs_the_wait_and_the_recomputation():
    def preempt_once(view, plan):
        x = next((r for r in view.running if r.id == "x"), None)
        if x is not None and x.generated == 2 and x.preemptions == 0:
            plan.preempt(x)
            plan.decode([r for r in view.running if r.id != "x"])
            return
        plan.decode(view.running)
        plan.prefill(view.waiting)

    result = run([one("x", prompt=10, output=4), one("y", prompt=10, output=9)], preempt_once)
    own = 3 * STEP + 10 * PREFILL + 2 * DECODE + DECODE * 2
    again = STEP + DECODE + (STEP + 12 * PREFILL + DECODE)
    assert causes(result, "x", "e2e") == {"own": own, "behind_prefill": 10 * PREFILL, "preempted": again}


def test_what_holds_a_preempted_request_up_later_still_counts_as_the_preemption():
    def give_its_place_away(view, plan):
        x = next((r for r in view.running if r.id == "x" and r.preemptions == 0 and r.generated == 2), None)
        if x is not None:
            plan.preempt(x)
        plan.decode([r for r in view.running if r is not x])
        plan.prefill([r for r in view.waiting if r.id != "z" or x is not None or view.now_s > 0.02])

    executor = FixedCost(context_s=0.0, info=fixed_info(max_requests=1))
    result = run([one("x", prompt=10, output=4), one("z", prompt=10, output=5)], give_its_place_away, executor)
    assert "refused" in result.events.query("owner == 'x'")["kind"].tolist()
    z_s = 5 * STEP + 10 * PREFILL + 4 * DECODE
    own = 3 * STEP + 10 * PREFILL + 2 * DECODE
    assert causes(result, "x", "e2e") == {"own": own, "preempted": z_s + STEP + 12 * PREFILL}


def test_repeated_plans_and_plans_from_an_old_view_keep_the_reasons_of_the_first():
    def repeat(skip):
        def policy(view, plan):
            plan.decode(view.running)
            plan.prefill(view.waiting, skip=skip)
            plan.repeat()

        return policy

    executor = FixedCost(context_s=0.0, info=fixed_info(num_blocks=8, max_model_len=128))
    trace = [one("x", prompt=100, output=6), one("y", prompt=60), one("z", prompt=50)]
    waited = 6 * STEP + 100 * PREFILL + 5 * DECODE
    # both refused by themselves; y refused and z behind it
    for policy, overlap in ((repeat(("blocks",)), False), (repeat(()), False), (serve_and_train, True)):
        result = run(trace, policy, executor, overlap=overlap)
        for name in ("y", "z"):
            assert causes(result, name)["kv_blocks"] == waited


def test_a_backward_that_stopped_early_counts_what_it_did():
    def stop(view, plan):
        serve_and_train(view, plan)
        plan.stop_on_arrival()

    # the second step, x's decode beside the backward, ends in its third layer of four
    forward = STEP + 10 * PREFILL + 64 * FINETUNE
    middle = forward + STEP + DECODE + 2.5 * 64 * BACKWARD
    result = run([one("x", prompt=10, output=2), one("y", middle, prompt=10)], stop, jobs=[job(64)])
    assert result.steps["stopped_early"].tolist()[1]
    own = 2 * STEP + 10 * PREFILL + DECODE
    assert causes(result, "x", "e2e") == {"own": own, "behind_finetune": 64 * FINETUNE, "behind_backward": 3 * 64 * BACKWARD}


def test_a_decode_left_out_for_lack_of_a_block_waits_for_blocks():
    def never_preempt(view, plan):
        plan.decode(view.running, when_full="skip")
        plan.prefill(view.waiting)

    executor = FixedCost(context_s=0.0, info=fixed_info(num_blocks=2, max_model_len=32))
    result = run([one("x", prompt=14, output=3), one("y", prompt=16, output=2)], never_preempt, executor)
    # y's first decode needs a second block: none is free until x has ended, two decodes later
    own = 2 * STEP + 16 * PREFILL + DECODE
    assert causes(result, "y", "e2e") == {"own": own, "behind_prefill": 14 * PREFILL, "kv_blocks": 2 * (STEP + DECODE)}


def test_planning_and_idling_are_their_own_causes():
    def sleepy(view, plan):
        if view.now_s < 0.5:
            plan.wait(0.5)
        else:
            plan.decode(view.running)
            plan.prefill(view.waiting)

    result = run([one("x", prompt=100)], sleepy, planning=0.003)
    assert causes(result, "x") == {"idle": 0.5, "planning": 0.003, "own": STEP + 100 * PREFILL}


def test_a_rejected_request_is_followed_to_its_rejection_and_an_unfinished_one_to_the_end():
    def picky(view, plan):
        plan.decode(view.running)
        for r in view.waiting:
            if r.id == "no" and view.now_s > 0.005:
                plan.reject(r, "unloved")
            elif r.id == "yes":
                plan.prefill(r)

    trace = [one("yes", prompt=10, output=9), one("no", prompt=10), one("late", 0.001, prompt=10)]
    result = run(trace, picky, until=0.02)
    frame = result.attribution("e2e")
    rejected = result.events.query("kind == 'rejected'")["time_s"].iloc[0]
    assert frame["until"].to_dict() == {"yes": "unfinished", "no": "rejected", "late": "unfinished"}
    assert frame.loc["no", "total_s"] == pytest.approx(rejected)
    assert frame.loc["late", "total_s"] == pytest.approx(result.steps["end_s"].iloc[-1] - 0.001)
    assert not frame["met"].any()


def test_a_saved_replay_gives_the_same_attribution_without_a_predictor(tmp_path):
    result = run([one(f"r{i}", 0.004 * i, 50, 6, adapter="ab"[i % 2]) for i in range(12)], serve_and_train, jobs=[job(64, steps=3)])
    loaded = load_replay(result.save(tmp_path / "replay"))
    assert loaded.predictor is None
    for of in ("ttft", "e2e"):
        pd.testing.assert_frame_equal(result.attribution(of), loaded.attribution(of), check_exact=True)


def test_a_replay_without_the_needed_rows_and_an_unknown_end_are_refused():
    result = run([one()])
    with pytest.raises(ValueError, match="of must be 'ttft' or 'e2e', got 'tpot'"):
        result.attribution("tpot")  # pyright: ignore[reportArgumentType]
    result.steps = result.steps.drop(columns="queue_why")
    with pytest.raises(ValueError, match=r"needs steps with the columns queue_why.*got \['queue_why'\]. Replay it again"):
        result.attribution()


def test_an_empty_replay_has_an_empty_attribution():
    result = run([], serve_and_train, jobs=[job()])
    assert result.attribution().empty and list(result.attribution().columns[:12]) == list(CAUSE_COLUMNS)


def test_means_by_policy_count_the_window_and_on_request_only_the_missed():
    trace = [one("x", prompt=100), one("y", prompt=100), one("z", 1.5, prompt=100)]
    result = run(trace, slo=SLO(ttft_s=0.009), measure=(0.0, 0.5))
    everyone = by_policy({("FCFS", 0): result})
    missed = by_policy({("FCFS", 0): result}, missed=True)
    assert everyone["requests"].tolist() == [2] and missed["requests"].tolist() == [2]
    assert everyone["behind_prefill_s"].tolist() == pytest.approx([100 * PREFILL])
    assert by_policy({("FCFS", 0): run(trace, slo=SLO(ttft_s=1.0))}, missed=True)["own_s"].isna().all()


def test_the_figure_stacks_to_the_mean_and_says_n_seeds_executor_and_that_it_is_simulated():
    trace = [one(f"r{i}", 0.004 * i, 50, 6, adapter="ab"[i % 2]) for i in range(12)]
    replays = {(label, seed): run(trace, policy, jobs=[job(64, steps=3)]) for label, policy in POLICIES.items() for seed in (0, 1)}
    frame = by_policy(replays)
    ax = plots.attribution(frame, source=replays["FCFS", 0], caption="by hand")
    heights = {x: sum(b.get_height() for b in ax.patches if b.get_x() == pytest.approx(x - 0.3)) for x in range(2)}
    means = [replays[label, 0].requests["ttft_s"].mean() for label in POLICIES]
    assert list(heights.values()) == pytest.approx(means)
    assert ax.get_ylabel() == "mean TTFT per request (s)"
    assert [t.get_text() for t in ax.get_xticklabels()] == list(POLICIES)
    text = " ".join(a.get_text() for a in ax.texts).replace("\n", " ")
    assert "n = 12 requests a run, 2 seeds; simulated by FixedCost" in text and text.endswith("by hand")
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert "its own compute" in names and "behind backward" in names and "preempted" not in names
    assert set(plots.CAUSE_STYLES) == set(CAUSES)


# the division of a step


class Dear:
    """A predictor under which tokens get dearer the more there are: without either kind a step would be much shorter."""

    def predict(self, work):
        return 1e-6 * sum(work.values[:4]) ** 2


def features(**amounts):
    from workbench.features import INDEX, NAMES

    values = [0.0] * len(NAMES)
    for name, amount in amounts.items():
        values[INDEX[name]] = amount
    return values


def test_parts_never_sum_to_more_than_the_duration_and_scale_with_it():
    mixed = features(prefill_tokens=100.0, decode_tokens=100.0, requests=101.0, samples=101.0)
    parts = dict(zip(PARTS, step_parts(mixed, 0.02, Dear(), 4), strict=True))
    assert parts["prefill"] == parts["decode"] == pytest.approx(0.01)
    exact = dict(zip(PARTS, step_parts(mixed, 2 * (STEP + 100 * PREFILL + 100 * DECODE), FixedCost(context_s=0.0), 4), strict=True))
    assert exact["prefill"] == pytest.approx(2 * 100 * PREFILL) and exact["decode"] == pytest.approx(2 * 100 * DECODE)


def test_without_a_predictor_a_step_is_divided_by_tokens_and_a_backward_counts_as_two_forwards():
    mixed = features(prefill_tokens=50.0, decode_tokens=10.0, backward_token_layers=60.0, backward_layers=2.0, loads=1.0)
    parts = step_parts(mixed, 0.9, None, 4)
    assert dict(zip(PARTS, parts, strict=True)) == pytest.approx(
        {"finetune": 0.0, "evaluate": 0.0, "prefill": 0.5, "decode": 0.1, "backward": 0.3, "load": 0.0}
    )
    assert sum(step_parts(features(loads=2.0), 0.5, None, 4)) == 0.5


# sums, whatever the policy


class AnythingGoes:
    """Does anything that is allowed: any verb on any part of the queues, waits, rejects, preempts, evicts, does nothing."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, view, plan):
        rng = view.rng
        if rng.random() < 0.1:
            plan.wait(view.now_s + rng.choice([0.001, 0.02]))
            return
        some = [r for r in view.running if rng.random() < 0.9]
        plan.decode(some, when_full=rng.choice(["preempt", "skip"]))
        waiting = list(view.waiting)
        if rng.random() < 0.5:
            rng.shuffle(waiting)
        if rng.random() < 0.8:
            plan.prefill(waiting, rng.choice([None, 7, 64]), whole=rng.random() < 0.2, skip=rng.choice([(), ("slots", "blocks", "tokens")]))
        for r in (*view.waiting, *view.running):
            if r.id not in plan.named and r.id not in plan.preempted:
                if rng.random() < 0.02:
                    plan.preempt(r)
                elif rng.random() < 0.002:
                    plan.reject(r, "bad luck")
        for j in view.jobs:
            if rng.random() < 0.5:
                plan.train(j)
        if rng.random() < 0.3:
            plan.stop_on_arrival()
        if plan.empty and view.running:
            plan.decode([r for r in view.running if r.id not in plan.preempted and r.id not in plan.rejected])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from(["random", "fcfs", "static", "peft", "serve"]), st.booleans())
def test_causes_sum_to_the_measured_time_and_none_is_negative(seed, which, overlap):
    rng = Random(seed)
    now, trace = 0.0, []
    for i in range(rng.randint(5, 25)):
        now += rng.expovariate(rng.choice([20.0, 200.0]))
        adapter = rng.choice([None, "a", "b", "c", "d"])
        trace.append(one(f"r{i}", now, rng.randint(1, 90), rng.randint(1, 12), adapter=adapter))
    policy = {"random": AnythingGoes(seed), "fcfs": FCFS(), "static": LoquetierStatic(), "peft": PeftSequential(), "serve": ServeFirst()}[
        which
    ]
    info = fixed_info(num_blocks=16, max_requests=rng.choice([2, 8]), num_slots=2, max_batch_adapters=2, max_model_len=160)
    shapes = {"job:t": FixedShape((24, 8), 30, 2, 2, ((16,),))}
    executor = FixedCost(info=info, shapes=shapes)
    planning = rng.choice([0.0, 0.0007])
    result = run(trace, policy, executor, jobs=[job()], planning=planning, overlap=overlap, seed=seed, until=now + 0.5)
    steps = result.steps
    assert np.all(steps[[f"{p}_s" for p in PARTS]].sum(axis=1) <= steps["duration_s"] + 1e-12)
    for of in ("ttft", "e2e"):
        frame, measured = result.attribution(of), result.requests[f"{of}_s"]
        known = measured.notna()
        np.testing.assert_allclose(frame["total_s"][known], measured[known], atol=1e-10)
        assert (frame[list(CAUSE_COLUMNS)].to_numpy() >= -1e-12).all()
        followed = frame["until"].isin(["first token", "last token"])
        assert (followed == known).all()
