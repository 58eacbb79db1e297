"""The serving loop: clocks, arrivals, sessions, planning time, ends, errors, saving, playing again."""

import math
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from random import Random

import pandas as pd
import pytest

from workbench.config import SLO, FinetuneJob, RandomTokens, UnknownAdapterError
from workbench.core import AdapterInfo, Request
from workbench.policies import FCFS, LoquetierStatic, PeftSequential, ServeFirst
from workbench.recorded import Recorded
from workbench.replay import ReplayError, load_replay, replay
from workbench.testing import FixedCost, FixedShape, fixed_info

POLICIES = [FCFS(), ServeFirst(), LoquetierStatic(), PeftSequential()]


def requests(num=40, rate=8.0, seed=0, adapters=(None, "a", "b", "c"), prompt=100, output=30):
    rng, now, out = Random(seed), 0.0, []
    for i in range(num):
        now += rng.expovariate(rate)
        lengths = rng.randint(1, prompt), rng.randint(1, output)
        out.append(
            Request(request_id=f"r{i}", arrival_s=now, prompt_tokens=lengths[0], output_tokens=lengths[1], adapter=rng.choice(adapters))
        )
    return out


def one(name="x", arrival_s=0.0, prompt=20, output=3, **more):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, **more)


def job(adapter="t", **more):
    return FinetuneJob(**{"adapter": adapter, "data": RandomTokens(examples=4, tokens=64), "steps": 3, "batch_size": 2} | more)


def asked(policy=FCFS()):
    """The policy, but asked at every step."""
    return lambda view, plan: (policy(view, plan), plan.repeat(0))


def run(trace, policy=None, executor=None, **options):
    options.setdefault("planning", 0.0)
    return replay(trace, executor=executor or FixedCost(), policy=policy or FCFS(), progress=False, **options)


def times(result, kind, owner=None):
    events = result.events
    chosen = (events["kind"] == kind) & (True if owner is None else events["owner"] == owner)
    return events.loc[chosen, "time_s"].tolist()


# one loop, one truth


def test_three_requests_worked_out_by_hand():
    """4 ms a step, 40 us a prefill token, 0.2 ms a decode row, 2 ms a load, no context cost."""
    trace = [one("x", 0.0, 100, 3), one("y", 0.005, 50, 2, adapter="a"), one("z", 1.0, 25, 1)]
    result = run(trace, executor=FixedCost(context_s=0.0))
    end_1 = 0.004 + 100 * 4e-5
    end_2 = end_1 + 0.004 + 50 * 4e-5 + 2e-4 + 0.002
    end_3 = end_2 + 0.004 + 2 * 2e-4
    assert times(result, "token", "x") == pytest.approx([end_1, end_2, end_3])
    assert times(result, "token", "y") == pytest.approx([end_2, end_3])
    assert times(result, "token", "z") == pytest.approx([1.0 + 0.004 + 25 * 4e-5])
    assert times(result, "scheduled") == pytest.approx([0.0, end_1, 1.0])
    assert times(result, "adapter_loaded") == pytest.approx([end_1])
    assert len(result.steps) == 4
    frame = result.requests
    assert frame["queue_s"].tolist() == pytest.approx([0.0, end_1 - 0.005, 0.0])
    assert (frame["outcome"] == "finished").all()


@pytest.mark.filterwarnings("ignore:1 of 41 requests were rejected on arrival")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_same_trace_seed_and_policy_give_identical_frames_and_recorded_gives_them_again(policy, tmp_path):
    trace = [*requests(), one("nobody", 0.3, prompt=10**7)]
    options = {"policy": policy, "jobs": [job()], "slo": SLO(ttft_s=1.0)}
    executors = [FixedCost(token=lambda owner, i: (len(owner) * 7 + i) % 50) for _ in range(2)]
    first, second = (run(trace, executor=e, **options) for e in executors)
    recorded = run(trace, executor=Recorded(first), **options)
    folder = first.save(tmp_path / "replay")
    loaded = load_replay(folder)
    again = run(trace, executor=Recorded(loaded, predictor=executors[0]), **options)
    for other in (second, recorded, again, loaded):
        for name in ("events", "steps", "work", "requests", "jobs"):
            pd.testing.assert_frame_equal(getattr(first, name), getattr(other, name), check_exact=True)
        assert other.outputs == first.outputs
    assert loaded.summary().keys() == first.summary().keys()
    assert loaded.provenance == first.provenance
    assert loaded.trace_requests == first.trace_requests
    assert loaded.slo == first.slo
    assert first.requests.loc["nobody", "outcome"] == "rejected"
    assert first.events.query("kind == 'rejected'")["note"].iloc[0].startswith("nobody: prompt_tokens and output_tokens must fit")


def test_a_name_that_no_adapter_has_is_raised_before_anything_runs_and_the_executor_ends():
    executor = FixedCost()
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'zz'. Known: 'a', 'b'"):
        run([*requests(), one("nobody", 0.3, adapter="zz")], executor=executor)
    assert len(run(requests(), executor=executor).requests) == 40


def test_requests_that_can_never_run_count_as_missed_and_are_said_aloud():
    with pytest.warns(UserWarning, match=r"2 of 3 requests were rejected on arrival and count as missed. The first: long-0: "):
        result = run([one("long-0", prompt=10**7), one("fine"), one("long-1", prompt=10**7)])
    assert result.requests["outcome"].to_dict() == {"long-0": "rejected", "fine": "finished", "long-1": "rejected"}


def test_recorded_gives_back_measured_planning_times_and_names_the_first_difference():
    trace, slow = requests(12), asked(lambda view, plan: (time.sleep(0.001), FCFS()(view, plan)))
    first = run(trace, slow, planning="measured")
    again = run(trace, asked(), Recorded(first), planning="measured")
    pd.testing.assert_frame_equal(first.events, again.events, check_exact=True)
    assert (again.steps["plan_s"] >= 0.001).all()
    with pytest.raises(ReplayError, match=r"step 0 differs from the recording: recorded prefill of 'r0' .* planned prefill of 'r0'"):
        run(trace, FCFS(budget_tokens=3), Recorded(first))
    with pytest.raises(ReplayError, match="a request must be part of the recording, got 'more'"):
        run([*trace, one("more", 9.0)], asked(), Recorded(first), planning="recorded")
    short = run(trace, asked(), until=float(first.steps["end_s"].iloc[-1]) / 2)
    with pytest.raises(ReplayError, match=f"the recording ends after {len(short.steps)} steps"):
        run(trace, asked(), Recorded(short))


def test_work_is_conserved_under_every_policy():
    for policy in POLICIES:
        trace = requests(30)
        result = run(trace, policy, jobs=[job()], until="jobs" if policy != FCFS() else None)
        work = result.work.groupby("kind")["tokens"].sum()
        frame, jobs = result.requests, result.jobs
        assert frame["output_tokens"].tolist() == [r.output_tokens for r in trace]
        assert work["prefill"] == sum(r.prompt_tokens for r in trace)
        assert work["decode"] == frame["output_tokens"].sum() - len(trace)
        assert [result.steps[k].sum() for k in ("prefill_tokens", "decode_tokens")] == [work["prefill"], work["decode"]]
        if policy != FCFS():
            assert jobs["committed_tokens"].tolist() == [3 * 128] == [work["finetune"]]
            assert jobs["outcome"].tolist() == ["finished"]
            assert jobs["optimizer_steps"].tolist() == [3]
        assert len(result.steps) == len(result.results)


@pytest.mark.parametrize("policy", [FCFS(), ServeFirst()], ids=lambda p: type(p).__name__)
def test_littles_law_holds(policy):
    """Mean number in the system = arrival rate x mean time in it, from the events and from the requests apart."""
    result = run(requests(80, rate=15.0), policy, jobs=[job()])
    events = result.events[result.events["kind"].isin(["arrived", "finished"])]
    change = events["kind"].map({"arrived": 1, "finished": -1}).to_numpy()
    at = events["time_s"].to_numpy()
    area = (change.cumsum()[:-1] * (at[1:] - at[:-1])).sum()
    assert area == pytest.approx(result.requests["e2e_s"].sum(), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_more_load_does_not_shorten_the_mean_wait(seed):
    base = requests(60, rate=10.0, seed=seed)
    waits = []
    for factor in (0.5, 1.0, 2.0, 4.0):
        trace = [replace(r, arrival_s=r.arrival_s / factor) for r in base]
        waits.append(run(trace).requests["ttft_s"].mean())
    assert waits == sorted(waits)


def test_step_rows_add_up_and_time_never_goes_back():
    result = run(requests(30), asked(ServeFirst()), jobs=[job()], planning=0.003)
    steps = result.steps
    assert (steps["plan_s"] == 0.003).all()
    assert steps["end_s"].to_numpy() == pytest.approx((steps["start_s"] + steps["plan_s"] + steps["duration_s"]).to_numpy())
    assert (steps["start_s"].to_numpy()[1:] >= steps["end_s"].to_numpy()[:-1] - 1e-12).all()
    assert result.events["time_s"].is_monotonic_increasing
    assert steps["predicted_s"].to_numpy() == pytest.approx(steps["duration_s"].to_numpy())


# clocks


def test_idle_time_costs_nothing_on_the_virtual_clock():
    begin = time.perf_counter()
    result = run([one("x"), one("y", 3600.0)])
    assert time.perf_counter() - begin < 2.0
    assert times(result, "scheduled", "y") == [3600.0]


def test_wall_clock_and_virtual_clock_agree_with_an_executor_that_sleeps():
    trace = requests(16, rate=20.0, seed=3, prompt=60, output=8)
    virtual = run(trace, ServeFirst(), jobs=[job()])
    wall = run(trace, ServeFirst(), FixedCost(sleeps=True), jobs=[job()], clock="wall", planning="measured")
    assert wall.requests["outcome"].tolist() == virtual.requests["outcome"].tolist()
    for name in ("ttft_s", "e2e_s"):
        for quantile in (0.5, 0.9):
            v, w = (r.requests[name].quantile(quantile) for r in (virtual, wall))
            # scheduling noise of a busy two-core machine: a few milliseconds a step
            assert v - 0.002 <= w <= v * 1.35 + 0.05, (name, quantile, v, w)


def test_a_predicted_step_takes_its_time_on_the_wall_clock():
    begin = time.perf_counter()
    result = run([one("x", 0.05, 20, 3)], clock="wall")
    assert time.perf_counter() - begin >= result.steps["end_s"].iloc[-1] - 0.005
    assert result.steps["start_s"].iloc[0] >= 0.05


# planning and lengths


def test_planning_time_delays_the_clock_and_overlap_hides_it_behind_the_step():
    trace = [one("x", 0.0, 20, 30)]
    free, dear, hidden = (
        run(trace, asked(), planning=p, overlap=o).steps["end_s"].iloc[-1] for p, o in ((0.0, False), (0.003, False), (0.003, True))
    )
    assert dear == pytest.approx(free + 30 * 0.003)
    assert free < hidden < free + 5 * 0.003


def test_overlap_plans_from_a_view_one_step_old():
    """A request that arrives during step k is known to the plan of step k + 2 first; without overlap to that of k + 1."""
    trace = [one("x", 0.0, 20, 30), one("y", 0.030, 20, 3)]
    at_once, late = (times(run(trace, overlap=o), "scheduled", "y")[0] for o in (False, True))
    assert 0.030 < at_once < late
    assert late - at_once == pytest.approx(0.0042, rel=0.01)


def test_policies_finish_all_work_with_overlap_and_with_repeat():
    def repeats(view, plan):
        FCFS()(view, plan)
        plan.repeat()

    trace = requests(30)
    plain = run(trace)
    for result in (run(trace, overlap=True), run(trace, repeats)):
        assert (result.requests["outcome"] == "finished").all()
        assert result.requests["output_tokens"].tolist() == plain.requests["output_tokens"].tolist()


def test_repeat_runs_the_same_plan_until_something_happens_without_asking():
    calls = []

    def repeats(view, plan):
        calls.append(view.step)
        plan.decode(view.running)
        plan.prefill(view.waiting)
        plan.repeat()

    trace = [one("x", 0.0, 16, 40), one("y", 0.1, 16, 10)]
    result = run(trace, repeats)
    assert len(calls) < len(result.steps) / 3
    pd.testing.assert_frame_equal(result.events, run(trace).events)


def test_expected_output_follows_the_chosen_source():
    seen = {}

    def looks(view, plan):
        FCFS()(view, plan)
        seen.update({r.id: r.expected_output for r in view.waiting})

    trace = [one("x", 0.0, output=6, max_tokens=50, adapter="a"), one("y", 1.0, output=4, max_tokens=50, adapter="a")]

    def by_prompt(request):
        assert request.output_tokens is None
        return request.prompt_tokens / 2

    for lengths, expected in (("max", (50, 50)), ("oracle", (6, 4)), ("history", (50, 6)), (by_prompt, (10, 10))):
        run(trace, looks, lengths=lengths)
        assert (seen["x"], seen["y"]) == expected, lengths


# arrivals and ends


def test_a_session_goes_on_think_time_after_its_turn_ended():
    trace = [one("x"), one("y", parent_id="x", think_s=2.0), one("z", parent_id="y", think_s=0.5)]
    result = run(trace)
    assert times(result, "arrived", "y")[0] == pytest.approx(times(result, "finished", "x")[0] + 2.0)
    assert times(result, "arrived", "z")[0] == pytest.approx(times(result, "finished", "y")[0] + 0.5)
    assert "closed loop" in repr(result)
    assert "open loop" in repr(run([one()]))


def test_generation_ends_at_the_trace_length_at_max_tokens_or_at_end_of_sequence():
    trace = [
        one("trace", output=5),
        one("cap", output=9, max_tokens=4),
        one("text", output=None, max_tokens=50),
        one("long", output=None, max_tokens=7),
    ]
    executor = FixedCost(info=fixed_info(eos_token_ids=frozenset({99})), token=lambda owner, i: 99 if i == 2 and owner != "long" else i)
    result = run(trace, executor=executor)
    assert result.requests["output_tokens"].to_dict() == {"trace": 5, "cap": 4, "text": 3, "long": 7}
    assert result.outputs["text"] == (0, 1, 99)
    assert result.outputs["trace"] == (0, 1, 99, 3, 4)


def test_the_replay_ends_with_its_requests_or_jobs_or_at_a_time():
    trace = [one("x")]
    assert run(trace, ServeFirst(), jobs=[job()]).jobs["outcome"].tolist() == ["unfinished"]
    assert run(trace, ServeFirst(), jobs=[job()], until="jobs").jobs["outcome"].tolist() == ["finished"]
    assert run([], ServeFirst(), jobs=[job()]).jobs["committed_tokens"].tolist() == [384]
    result = run([one(f"r{i}", i * 1.0) for i in range(10)], until=4.5)
    assert len(result.requests) == 5
    assert result.steps["start_s"].max() < 4.5


def test_a_job_that_arrives_later_starts_later():
    result = run([], ServeFirst(), jobs=[job("t"), job("u", arrival_s=5.0)])
    assert times(result, "job_arrived") == [0.0, 5.0]
    assert min(times(result, "forward", "job:u")) >= 5.0


def test_commands_pause_resume_stop_and_publish_between_steps():
    executor = FixedCost()

    def commands(view, plan):
        ServeFirst(step_s=1.0)(view, plan)
        command = {4: ("pause", "t"), 8: ("resume", "job:t"), 14: ("stop", "t")}.get(view.step)
        if command:
            executor.commands.append(command)

    result = run([one("x", 0.0, 20, 30)], commands, executor, jobs=[job(epochs=900, steps=None, publish="step")])
    kinds = result.events.set_index("kind")["step"]
    assert [kinds[k] for k in ("job_paused", "job_resumed", "job_stopped")] == [5, 9, 15]
    training = set(result.work.query("owner == 'job:t'")["step"])
    assert training & set(range(5))
    assert not training & {*range(5, 9), *range(15, 99)}
    assert result.jobs["outcome"].tolist() == ["stopped"]
    assert "published" in kinds
    again = run([one("x", 0.0, 20, 30)], ServeFirst(step_s=1.0), Recorded(result), jobs=[job(epochs=900, steps=None, publish="step")])
    pd.testing.assert_frame_equal(result.events, again.events)


def test_an_adapter_replaced_during_the_replay_is_used_by_later_requests_only():
    executor = FixedCost()

    def replaces(view, plan):
        asked()(view, plan)
        if view.step == 3:
            executor.adapter_infos["a"] = AdapterInfo(name="a", version=2, rank=8, bytes=10)

    result = run([one("x", 0.0, 20, 30, adapter="a"), one("y", 0.1, 20, 3, adapter="a")], replaces, executor)
    assert result.work.groupby("owner")["version"].unique().map(list).to_dict() == {"x": [1], "y": [2]}


def test_stop_on_arrival_ends_the_backward_at_the_next_layer():
    def backs_off(view, plan):
        ServeFirst(step_s=9.0)(view, plan)
        plan.stop_on_arrival()

    trace = [one("x", 0.030, 20, 1)]
    shape = {"job:t": FixedShape((250,), 2)}
    polite, rude = (run(trace, p, FixedCost(shapes=shape), jobs=[job()]) for p in (backs_off, ServeFirst(step_s=9.0)))
    assert polite.steps["stopped_early"].any()
    assert not rude.steps["stopped_early"].any()
    assert times(polite, "scheduled", "x")[0] < times(rude, "scheduled", "x")[0]
    assert polite.work.query("kind == 'backward'")["tokens"].iloc[0] < 4


def test_stop_after_ends_the_backward_at_the_first_layer_after_so_long():
    def bounded(view, plan):
        ServeFirst(step_s=9.0)(view, plan)
        plan.stop_after(0.012)

    shape = {"job:t": FixedShape((250,), 2)}
    result = run([one("x", 5.0, 20, 1)], bounded, FixedCost(shapes=shape), jobs=[job()])
    backwards = result.steps[result.steps["backward_layers"] > 0]
    # 4 ms and then 5 ms a layer: 14 ms is the first end of a layer after 12 ms
    assert backwards["duration_s"].iloc[0] == pytest.approx(0.014)
    assert backwards["stopped_early"].iloc[0]
    assert result.work.query("kind == 'backward'")["tokens"].tolist() == [2, 2, 2, 2], "what was left is done in later steps"


@pytest.mark.parametrize("options", [{"overlap": True}, {}], ids=["overlap", "repeat"])
def test_a_plan_that_is_made_again_stops_as_it_did_before(options):
    def bounded(view, plan):
        plan.decode(view.running)
        plan.prefill(view.waiting)
        for state in view.jobs:
            plan.train(state, within_s=0.030)
        plan.stop_after(0.012)
        if not options:
            plan.repeat()

    executor = FixedCost(shapes={"job:t": FixedShape((250,), 2)})
    run([one("x", 0.0, 20, 8)], bounded, executor, jobs=[job()], **options)
    assert {batch.stop_after_s for batch in executor.batches} == {0.012}
    assert sum(bool(batch.backwards) for batch in executor.batches) > 1


def test_stop_after_and_stop_on_arrival_stop_at_whichever_comes_first():
    def both(seconds):
        def policy(view, plan):
            ServeFirst(step_s=9.0)(view, plan)
            plan.stop_on_arrival()
            plan.stop_after(seconds)

        batches = FixedCost(shapes={"job:t": FixedShape((250,), 2)})
        run([one("x", 0.030, 20, 1)], policy, batches, jobs=[job()])
        return batches.batches[0].stop_after_s

    assert both(9.0) == pytest.approx(0.030)
    assert both(0.010) == 0.010
    with pytest.raises(ReplayError, match="PlanError: stop_after needs more than 0 seconds, got 0"):
        both(0)


def test_a_policy_is_copied_for_each_replay_and_may_be_a_function():
    @dataclass
    class Counts:
        calls: int = 0

        def __call__(self, view, plan):
            self.calls += 1
            FCFS()(view, plan)

    policy = Counts()
    assert run([one()], policy).policy == "test_a_policy_is_copied_for_each_replay_and_may_be_a_function.<locals>.Counts(calls=0)"
    assert policy.calls == 0

    def mine(view, plan):
        FCFS()(view, plan)

    assert run([one()], mine).policy == "mine"


def test_only_a_policy_that_declares_it_gets_the_oracle():
    seen = []

    @dataclass
    class Asks:
        needs: frozenset = frozenset({"oracle"})

        def __call__(self, view, plan):
            seen.append((view.oracle.arrivals(), [view.oracle.output_tokens(r) for r in view.waiting]))
            FCFS()(view, plan)

    run([one("x"), one("y", 5.0)], Asks())
    assert seen[0] == (((5.0, "y"),), [3])
    run([one()], lambda view, plan: (seen.append(view.oracle), FCFS()(view, plan)))
    assert seen[-1] is None


def test_a_wait_is_empty_on_purpose_until_its_time_or_the_next_event():
    def waits(view, plan):
        if view.now_s < 1.0:
            plan.wait(1.0)
        else:
            FCFS()(view, plan)

    assert times(run([one("x")], waits), "scheduled") == [1.0]
    assert times(run([one("x"), one("y", 0.5)], waits), "scheduled") == [1.0, 1.0]


# what goes wrong


@pytest.mark.parametrize(
    ("trace", "options", "error", "message"),
    [
        ([1, 2], {}, TypeError, "must hold Request values, got int"),
        ([one("x"), one("x")], {}, ValueError, "request ids must be unique, got 'x' twice"),
        ([one("x", math.nan)], {}, ValueError, "arrival_s and think_s must be at least 0"),
        ([one("x", -1.0)], {}, ValueError, "arrival_s and think_s must be at least 0"),
        ([one("x"), one("y", parent_id="z")], {}, ValueError, "parent_id must name a request of the trace, 'y' has 'z'"),
        ([one("x", parent_id="y"), one("y", parent_id="x")], {}, ValueError, "a circle"),
        ([one()], {"policy": FCFS}, TypeError, r"Pass an instance, such as FCFS\(\)"),
        ([one()], {"policy": 3}, TypeError, "policy must be callable"),
        ([one()], {"clock": "sundial"}, ValueError, "clock must be 'virtual' or 'wall', got 'sundial'"),
        ([one()], {"planning": "free"}, ValueError, "planning must be"),
        ([one()], {"planning": "recorded"}, ValueError, "needs an executor that recorded planning times"),
        ([one()], {"planning": -1.0}, ValueError, "planning must be at least 0"),
        ([one()], {"lengths": "guess"}, ValueError, "lengths must be 'oracle', 'max', 'history' or a callable"),
        ([one()], {"measure": (5.0, 1.0)}, ValueError, "measure must be"),
        ([one()], {"until": "dawn"}, ValueError, "until must be"),
        ([one()], {"overlap": True, "clock": "wall"}, ValueError, "overlap=True needs clock='virtual'"),
        ([one()], {"slo": {"gold": SLO(ttft_s=1.0)}}, ValueError, "slo must name every request class"),
        ([one()], {"jobs": [job(), job()]}, ValueError, "job ids must be unique, got 'job:t'"),
        ([one()], {"jobs": [job(data=RandomTokens(tokens=900))]}, ValueError, "activation_tokens=512.*1800 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(trace, options, error, message):
    executor = FixedCost()
    with pytest.raises(error, match=message):
        run(trace, executor=executor, **options)
    assert executor.num_open == 0
    assert not executor.batches


def fails_at_step_5(view, plan):
    FCFS()(view, plan)
    if view.step == 5:
        raise ZeroDivisionError("policy bug")


def names_a_finished_request(view, plan, kept=[]):  # noqa: B006
    kept.extend(view.running)
    FCFS()(view, plan)
    if view.step == 6:
        plan.decode(kept[:1])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (fails_at_step_5, "policy fails_at_step_5 failed: ZeroDivisionError: policy bug"),
        (names_a_finished_request, "PlanError: only a running request can decode"),
        (lambda view, plan: None, "planned no work in 100 calls while 6 requests and 0 jobs could go on"),
    ],
)
def test_a_failing_policy_gives_a_replay_error_with_the_partial_replay(policy, message):
    executor = FixedCost(info=fixed_info(max_requests=2))
    with pytest.raises(ReplayError, match=message) as caught:
        run([one(f"r{i}", i * 1e-3) for i in range(6)], policy, executor)
    partial = caught.value.replay
    assert partial.error
    assert len(partial.events)
    assert executor.num_open == 0
    assert partial.requests["outcome"].isin(["finished", "unfinished"]).all()


def test_an_executor_without_a_duration_is_an_error():
    with pytest.raises(ReplayError, match="finite duration of at least 0 s, got nan"):
        run([one()], executor=FixedCost(step_s=math.nan))


def test_ctrl_c_in_the_middle_gives_the_partial_replay(tmp_path):
    def interrupts(batch):
        if batch.step == 6:
            raise KeyboardInterrupt

    executor = FixedCost(fails=interrupts)
    result = run(requests(20), executor=executor)
    assert result.interrupted
    assert result.error is None
    assert len(result.steps) == 6
    assert executor.num_open == 0
    assert load_replay(result.save(tmp_path)).interrupted


def test_ctrl_c_while_idle_on_the_wall_clock_gives_the_partial_replay():
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.perf_counter()
    try:
        result = run([one("x"), one("y", 30.0)], clock="wall")
    finally:
        timer.cancel()
    assert time.perf_counter() - begin < 10.0
    assert result.interrupted
    assert result.requests["outcome"].tolist() == ["finished"]


def test_whole_second_arrivals_that_tie_are_warned_about():
    with pytest.warns(UserWarning, match=r"all arrivals fall on whole seconds and 2 of 4 tie.*trace\.jitter\(1\.0"):
        run([one("w", 1.0), one("x", 1.0), one("y", 2.0), one("z", 2.0)])


def test_in_use_is_zero_after_every_replay_and_the_counts_in_steps_are_plain():
    per_adapter = defaultdict(int)
    result = run(requests(40, rate=60.0), ServeFirst(), FixedCost(info=fixed_info(num_blocks=20, max_model_len=200)), jobs=[job()])
    assert (result.events["kind"] == "preempted").any()
    assert result.steps["free_blocks"].between(0, 20).all()
    assert result.steps["running"].max() <= 8
    for adapter in result.work["adapter"]:
        per_adapter[adapter] += 1
    assert len(per_adapter) >= 4


def test_a_long_replay_shows_a_bar_only_if_asked(capsys):
    replay([one()], executor=FixedCost(), policy=FCFS(), planning=0.0, progress=False)
    assert capsys.readouterr().err == ""
    replay([one()], executor=FixedCost(), policy=FCFS(), planning=0.0, progress=True)
    assert "FCFS" in capsys.readouterr().err


def test_an_arrival_while_an_empty_plan_was_made_is_served_at_once():
    trace = [one("first", 0.0, output=1), one("during", 0.0), one("late", 70.0)]
    ends = run([one("first", 0.0, output=1)], planning=0.010, jobs=[job()], until="requests").events["time_s"].max()
    # FCFS never trains, so with a job there it goes on planning nothing after `first`; `during` comes in the middle of that.
    trace[1] = one("during", ends + 0.004)
    result = run(trace, planning=0.010, jobs=[job()])
    assert result.requests.loc["during", "ttft_s"] < 1.0


def test_a_policy_that_held_a_job_can_let_it_go_on_when_nobody_is_there():
    def only_when_idle(view, plan):
        plan.decode(view.running)
        plan.prefill(view.waiting)
        for j in view.jobs:
            plan.hold(j, bool(view.running or view.waiting))
            if not (view.running or view.waiting):
                plan.train(j)

    result = run([one("a", 0.0), one("b", 50.0)], only_when_idle, jobs=[job()])
    committed = result.events[result.events["kind"] == "committed"]["time_s"]
    assert len(committed) and (committed < 50.0).all()
    assert run([one("a")], only_when_idle, jobs=[job()], until="jobs").jobs["outcome"].tolist() == ["finished"]


def test_a_policy_may_leave_a_job_alone_until_a_time():
    result = run([one("a", 0.0)], FCFS(), jobs=[job()], until=60.0)
    assert result.requests.loc["a", "outcome"] == "finished" and result.jobs["committed_tokens"].sum() == 0


def test_the_adapter_used_last_is_evicted_last():
    executor = FixedCost(info=fixed_info(num_slots=2))
    long, short, third = one("l", 0.0, output=60, adapter="a"), one("s", 0.001, output=1, adapter="b"), one("t", 1000.0, adapter="c")
    result = run([long, short, third, one("again", 1001.0, adapter="a")], executor=executor)
    assert result.events[result.events["kind"] == "adapter_evicted"]["owner"].tolist() == ["b"]
