"""Fleets: replicas in one replay that lose nothing, adapters that travel, jobs that are placed, and what a fleet's replay holds."""

import copy
import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from tests.policy_cases import one
from tests.test_replay import job, requests
from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.fleet.routers import AdapterAffinity, LeastLoaded, PowerOfTwo, RankAware, RoundRobin
from workbench.policies import FCFS, FairCounters, FCFSSkip, LoquetierStatic, ServeFirst
from workbench.replay import ReplayError, load_replay, replay
from workbench.results.conservation import ConservationError, check_conservation
from workbench.testing import FixedCost, FixedShape, fixed_info

ROUTERS = [RoundRobin(), LeastLoaded(), PowerOfTwo(), AdapterAffinity(), RankAware()]
FRAMES = ("events", "steps", "work")


def run(trace, fleet, policy=None, **options):
    options.setdefault("planning", 0.0)
    return replay(trace, executor=fleet, policy=policy or FCFS(), progress=False, **options)


def fleet(num=2, router=None, **more):
    return wb.Fleet(FixedCost(), num, router=router or RoundRobin(), **more)


def made_trace():
    return wb.traces.poisson(rate=30.0, duration_s=1.0, seed=0).with_lengths("w3-5rps", seed=0, clip=(100, 20))


def sessions(num, turns):
    names = [[f"s{i}-{k}" for k in range(turns)] for i in range(num)]
    return [
        one(name, 0.01 * i, prompt=30, output=3, think_s=0.05, parent_id=names[i][k - 1] if k else None)
        for i in range(num)
        for k, name in enumerate(names[i])
    ]


# one replica is no fleet


@pytest.mark.parametrize(
    ("policy", "overlap"),
    [(ServeFirst(), False), (LoquetierStatic(steps=2), True), (FairCounters(), False)],
    ids=lambda p: type(p).__name__,
)
def test_a_fleet_of_one_gives_the_frames_of_the_executor_alone(policy, overlap):
    options = {"jobs": [job("t"), job("u", arrival_s=0.7)], "slo": SLO(ttft_s=1.0), "seed": 3, "overlap": overlap}
    for trace in (requests(25), sessions(4, 3)):
        alone, of_one = (run(trace, e, policy, **options) for e in (FixedCost(), wb.Fleet(FixedCost(), 1)))
        for name in FRAMES:
            found = getattr(of_one, name)
            assert (found.pop("replica") == 0).all()
            pd.testing.assert_frame_equal(getattr(alone, name), found, check_exact=True)
        row = of_one.summary()
        assert {name: row[name] for name in alone.summary()} == pytest.approx(alone.summary(), nan_ok=True)


def test_a_model_alone_and_a_fleet_of_one_draw_the_same_residuals_and_replicas_draw_their_own(small_model):
    trace = [one(f"r{i}", 0.0, prompt=40, output=6) for i in range(2)]
    alone = run(trace[:1], small_model, seed=5)
    of_two = run(trace, wb.Fleet(small_model, 2, router=RoundRobin()), seed=5)
    first, second = (part.steps["duration_s"].tolist() for part in of_two.replicas)
    assert first == alone.steps["duration_s"].tolist()
    assert len(second) == len(first) and second != first
    again = run(trace, wb.Fleet(small_model, 2, router=RoundRobin()), seed=5)
    pd.testing.assert_frame_equal(of_two.events, again.events, check_exact=True)


@pytest.fixture(scope="module")
def small_model():
    """A latency model fitted to a replay on fixed costs, every second step a tenth longer."""
    measured = replay(requests(60), executor=FixedCost(info=fixed_info(simulated=False)), policy=ServeFirst(), jobs=[job()], planning=0.0)
    steps = measured.steps.assign(duration_s=measured.steps["duration_s"] * (1 + 0.1 * (measured.steps["step"] % 2)))
    return wb.LatencyModel.fit(steps, info=measured.executor)


# several


def test_two_replicas_serve_side_by_side_what_one_serves_in_turn():
    """Two prompts of 100 tokens at once: 4 ms + 100 * 40 us each, at the same time; on one replica in one step of 4 ms + 200 * 40 us."""
    trace = [one("x", 0.0, prompt=100, output=1), one("y", 0.0, prompt=100, output=1)]
    ends = [run(trace, e).events.query("kind == 'finished'")["time_s"].tolist() for e in (FixedCost(), fleet(2))]
    assert ends == [pytest.approx([0.012, 0.012]), pytest.approx([0.008, 0.008])]


def test_every_replica_has_a_policy_of_its_own():
    """Six steps on each: a counter that they shared would count to twelve."""

    class Counting:
        calls = 0

        def __call__(self, view, plan):
            self.calls += 1
            seen.setdefault(view.replica, []).append(self.calls)
            plan.decode(view.running)
            plan.prefill(view.waiting)

    seen: dict[int, list[int]] = {}
    run([one(f"r{i}", 0.0, output=6) for i in range(4)], fleet(2), Counting())
    assert seen == {0: [1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 5, 6]}


def test_what_router_and_replica_hold_does_not_leak_into_the_next_replay():
    class Once:
        num = 0

        def route(self, request, fleet):
            self.num += 1
            return 0 if self.num == 1 else 1

    made = fleet(2, Once())
    trace = [one(f"r{i}", 0.1 * i) for i in range(3)]
    for _ in range(2):
        assert run(trace, made).requests["replica"].tolist() == [0, 1, 1]


@settings(max_examples=10, deadline=None)
@given(
    num=st.integers(2, 4),
    router=st.sampled_from(ROUTERS),
    policy=st.sampled_from([FCFS(), ServeFirst(), LoquetierStatic(steps=2)]),
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([5.0, 60.0, 1000.0]),
    blocks=st.sampled_from([10, 64]),
    homes=st.booleans(),
)
def test_no_request_is_lost_or_served_twice(num, router, policy, seed, rate, blocks, homes):
    trace = [*requests(25, rate=rate, seed=seed), *sessions(2, 3)]
    executor = FixedCost(info=fixed_info(num_blocks=blocks))
    where = {"homes": {"a": 0, "b": (0, 1)}, "migration_s": 0.03} if homes else {}
    made = wb.Fleet(executor, num, router=router, **where)
    result = run(trace, made, policy, jobs=[job("t"), job("u")], until="jobs" if policy != FCFS() else "requests", seed=seed)
    check_conservation(result)
    assert Counter(result.events.query("kind == 'arrived'")["owner"]) == Counter(r.request_id for r in trace)
    ends = result.events[result.events["kind"].isin(["finished", "rejected", "aborted"])]
    assert Counter(ends["owner"]) == Counter(r.request_id for r in trace)
    assert (result.events.groupby("owner")["replica"].nunique()[[r.request_id for r in trace]] == 1).all()
    tokens = result.events.query("kind == 'token'").groupby("owner").size()
    assert all(tokens[r.request_id] == r.output_tokens for r in trace if result.requests.loc[r.request_id, "outcome"] == "finished")


def test_a_session_goes_on_where_the_router_says_and_thinks_in_between():
    result = run(sessions(1, 4), fleet(2))
    assert result.requests["replica"].tolist() == [0, 1, 0, 1]
    frame = result.requests
    ended = (frame["arrival_s"] + frame["e2e_s"]).to_numpy()
    assert frame["arrival_s"].to_numpy()[1:] == pytest.approx(ended[:-1] + 0.05)


def test_more_replicas_wait_less():
    trace = requests(60, rate=200.0)
    waits = [run(trace, fleet(num, LeastLoaded())).requests["queue_s"].mean() for num in (1, 2, 4)]
    assert waits[0] > waits[1] > waits[2]


def test_executors_that_differ_are_replicas_of_one_fleet():
    slow = FixedCost(step_s=0.04, info=fixed_info(name="slow", num_blocks=32))
    result = run([one("x"), one("y")], wb.Fleet([FixedCost(), slow], router=RoundRobin()))
    assert result.requests["ttft_s"].to_dict() == pytest.approx({"x": 0.004 + 20 * 4e-5, "y": 0.04 + 20 * 4e-5})
    assert result.executor.name == "2 x FixedCost, slow"
    assert [part.executor.num_blocks for part in result.replicas] == [64, 32]


# jobs


def test_jobs_go_where_placement_says_else_where_fewest_are():
    jobs = [job(name) for name in ("t", "u", "v")]
    result = run([], fleet(3, placement={"job:u": 0}), ServeFirst(), jobs=jobs)
    of = result.events.query("kind == 'job_arrived'").set_index("owner")["replica"].to_dict()
    assert of == {"job:t": 0, "job:u": 0, "job:v": 1}
    assert result.jobs["outcome"].eq("finished").all() and result.by_replica["finetune_tokens"].tolist() == [768, 384, 0]


def test_a_job_that_fits_no_replica_and_one_that_is_named_for_nobody_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="a micro-batch must fit activation_tokens=100"):
        run([], wb.Fleet(FixedCost(info=fixed_info(activation_tokens=100)), 2), ServeFirst(), jobs=[job()])
    with pytest.raises(ValueError, match=r"placement must name jobs of this replay, got 'job:tt'. Did you mean 'job:t'?"):
        run([], fleet(2, placement={"job:tt": 1}), ServeFirst(), jobs=[job()])


def test_a_static_split_serves_on_some_replicas_and_trains_on_the_rest():
    result = run(requests(40, rate=40.0), fleet(3), wb.StaticSplit(training=1), jobs=[job("t"), job("u")])
    assert set(result.requests["replica"]) == {0, 1}
    kinds = result.work.groupby("replica")["kind"].agg(set).to_dict()
    assert kinds == {0: {"prefill", "decode"}, 1: {"prefill", "decode"}, 2: {"finetune", "backward"}}


def test_a_static_split_needs_replicas_for_both():
    with pytest.raises(ValueError, match=r"StaticSplit\(.*\) needs several replicas, got one executor. Pass executor=wb.Fleet"):
        run(requests(3), FixedCost(), wb.StaticSplit())
    with pytest.raises(ValueError, match="at least one of 2 replicas must serve"):
        run(requests(3), fleet(2), wb.StaticSplit(training=2))


def test_a_static_split_stands_beside_coserving_in_one_comparison():
    policies = [wb.StaticSplit(training=1), ServeFirst()]
    found = wb.compare(policies, trace=made_trace(), executor=fleet(2), jobs=[job()], slo=SLO(ttft_s=1.0), planning=0.0, progress=False)
    assert found.table()["requests"].tolist() == [len(made_trace())] * 2
    assert found.runs["replicas"].tolist() == [2, 2] and "2 x FixedCost" in found.caption
    by_policy = found.requests.groupby("policy")["replica"].nunique()
    assert by_policy.to_dict() == {repr(policies[0]): 1, repr(policies[1]): 2}


# adapters that travel


def prefills(result, owner):
    return result.events.query("kind == 'prefill' and owner == @owner")["time_s"].tolist()


def test_a_request_waits_until_its_adapter_has_come_and_others_do_not():
    trace = [one("away", 0.0, adapter="a"), one("here", 0.0, adapter="b"), one("later", 1.1, adapter="a")]
    result = run(trace, fleet(2, lambda request, fleet: 1, homes={"a": 0}, migration_s=0.5), FCFSSkip())
    queue = result.requests["queue_s"]
    assert queue.to_dict() == {"away": pytest.approx(0.5), "here": 0.0, "later": 0.0}
    moved = result.events.query("kind == 'adapter_migrated'")
    assert moved[["time_s", "owner", "value", "note", "replica"]].values.tolist() == [[0.5, "a", 8 * 4096, "version 1 from replica 0", 1]]
    assert result.attribution().loc["away", "total_s"] == pytest.approx(result.requests.loc["away", "ttft_s"])
    assert result.summary()["adapter_migrations"] == 1


def test_a_migration_lasts_as_long_as_a_load_is_predicted_unless_it_is_declared():
    trace = [one("x", 0.0, adapter="f")]
    for migration_s, expected in ((None, 0.002), (0.25, 0.25), (lambda info: info.rank * 0.01, 0.64)):
        result = run(trace, fleet(2, lambda request, fleet: 1, homes={"f": 0}, migration_s=migration_s))
        assert result.requests["queue_s"].tolist() == pytest.approx([expected])


def test_a_router_moves_an_adapter_ahead_of_its_requests():
    class Ahead:
        def route(self, request, fleet):
            states.append([view.adapters["a"].state for view in fleet])
            return 1 if request.adapter == "a" else 0

        def moves(self, fleet):
            return [("adapter", "a", 1)]

    states: list[list[str]] = []
    trace = [one("x", 0.0), one("w", 0.05), one("y", 0.2, adapter="a"), one("z", 0.5, adapter="a")]
    result = run(trace, fleet(2, Ahead(), homes={"a": 0}, migration_s=0.1))
    assert result.requests.loc["y", "queue_s"] == 0.0
    assert states == [["host", "elsewhere"], ["host", "loading"], ["host", "host"], ["host", "gpu"]]


def test_a_copy_under_way_does_not_prolong_the_replay():
    class Ahead:
        def route(self, request, fleet):
            return 0

        def moves(self, fleet):
            return [("adapter", "a", 1)]

    result = run([one("x", 0.0)], fleet(2, Ahead(), homes={"a": 0}, migration_s=1e6), ServeFirst(), jobs=[job()], until="jobs")
    assert result.events["time_s"].max() < 10 and result.jobs["outcome"].tolist() == ["finished"]


def test_a_policy_meets_an_adapter_under_way_as_loading():
    def policy(view, plan):
        if view.replica == 1:
            adapter = view.adapters["a"]
            seen.append((view.now_s, adapter.state, adapter.ready_s, plan.load("a"), plan.why))
        FCFS()(view, plan)

    seen: list[tuple] = []
    run([one("x", 0.0, adapter="a")], fleet(2, lambda request, fleet: 1, homes={"a": 0}, migration_s=0.5), policy)
    assert seen[0] == (0.0, "loading", pytest.approx(0.502), False, "adapter_loading")
    assert seen[1][:4] == (0.5, "host", pytest.approx(0.502), True)


def test_a_published_version_is_served_elsewhere_once_it_has_travelled():
    """The split trains on replica 1; requests on replica 0 take version 2 from the moment that it has been carried there."""
    shape = FixedShape((30, 30), 1)
    trained = FinetuneJob(adapter="a", data=RandomTokens(), steps=1, publish="step")
    trace = [one(f"r{i}", 0.05 * i, adapter="a", output=1) for i in range(12)]
    result = run(trace, wb.Fleet(FixedCost(shapes={"job:a": shape}), 2, migration_s=0.2), wb.StaticSplit(), jobs=[trained])
    published = result.events.query("kind == 'published'")["time_s"].item()
    versions = result.work.query("kind == 'prefill'").merge(result.steps[["step", "start_s"]], on="step")
    assert (versions["version"] == (versions["start_s"] >= published + 0.2) + 1).all()
    assert set(versions["version"]) == {1, 2}


# what it leaves


@pytest.fixture(scope="module")
def busy():
    trace = requests(50, rate=60.0)
    return run(trace, wb.Fleet(FixedCost(), 3, router=LeastLoaded()), ServeFirst(), jobs=[job("t")], slo=SLO(ttft_s=0.5, itl_s=0.05))


def test_a_saved_fleet_is_read_back_whole(busy, tmp_path):
    again = load_replay(busy.save(tmp_path / "fleet"))
    for name in (*FRAMES, "requests", "jobs", "by_replica"):
        pd.testing.assert_frame_equal(getattr(busy, name), getattr(again, name), check_exact=True)
    assert again.trace_requests == busy.trace_requests and again.settings == busy.settings and again.executor == busy.executor
    assert again.summary() == pytest.approx(busy.summary(), nan_ok=True)
    check_conservation(again)


def test_a_recorded_fleet_gives_the_same_frames(busy):
    recorded = wb.Fleet([wb.Recorded(part) for part in busy.replicas], router=LeastLoaded())
    again = run(busy.trace_requests, recorded, ServeFirst(), jobs=[job("t")], slo=SLO(ttft_s=0.5, itl_s=0.05))
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(busy, name), getattr(again, name), check_exact=True)
    with pytest.raises(ValueError, match=r"a recording must be of one executor, got .* Pass executor=Fleet\(\[Recorded\(part\)"):
        wb.Recorded(busy)


def test_steps_are_numbered_through_and_rows_of_work_and_events_go_with_them(busy):
    assert busy.steps["step"].tolist() == list(range(len(busy.steps))) and busy.steps["start_s"].is_monotonic_increasing
    joined = busy.work.merge(busy.steps[["step", "replica"]], on="step", suffixes=("", "_of_step"))
    assert len(joined) == len(busy.work) and (joined["replica"] == joined["replica_of_step"]).all()
    tokens = busy.events.query("kind == 'token'").merge(busy.steps[["step", "replica", "end_s"]], on="step", suffixes=("", "_of_step"))
    assert (tokens["replica"] == tokens["replica_of_step"]).all() and (tokens["time_s"] == tokens["end_s"]).all()
    assert len(busy.results) == len(busy.steps)
    assert [r.duration_s for r in busy.results] == busy.steps["duration_s"].tolist()


def test_a_summary_says_how_evenly_replicas_were_used(busy):
    row, frame = busy.summary(), busy.by_replica
    assert row["replicas"] == 3 and row["steps"] == frame["steps"].sum()
    assert row["busy_share"] == pytest.approx(frame["busy_share"].mean()) and row["busy_share"] <= 1
    assert row["imbalance_busy"] == pytest.approx(frame["busy_share"].max() / frame["busy_share"].mean())
    assert frame["requests"].sum() == 50 and frame["decode_tokens"].sum() == sum(r.output_tokens for r in busy.trace_requests)
    idle = run([one(f"r{i}", 0.1 * i) for i in range(4)], fleet(2, lambda request, fleet: 0))
    assert idle.summary()["imbalance_busy"] == 2.0 and idle.by_replica.loc[1, "busy_share"] == 0.0
    assert idle.summary()["jain_replicas"] == 0.5


def test_the_attribution_of_a_fleet_sums_to_the_measured_times(busy):
    for of, column in (("ttft", "ttft_s"), ("e2e", "e2e_s")):
        frame = busy.attribution(of)
        assert frame.index.equals(busy.requests.index)
        assert frame["total_s"].to_numpy() == pytest.approx(busy.requests[column].to_numpy())


def test_the_chrome_trace_of_a_fleet_has_processes_for_each_replica(busy, tmp_path):
    events = json.loads(busy.save_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len(names) == 12 and names[9] == "replica 2: steps"
    steps = [e for e in events if e["ph"] == "X" and e["name"].startswith("step ")]
    assert Counter(e["pid"] for e in steps) == {1 + 4 * k: len(part.steps) for k, part in enumerate(busy.replicas)}


def test_a_sweep_keeps_fleets_and_their_replays_by_content(tmp_path):
    def sweep():
        return wb.sweep(
            [FCFS()],
            trace=made_trace(),
            executor=lambda replicas: wb.Fleet(FixedCost(), replicas, router=LeastLoaded()),
            axes={"replicas": [1, 2]},
            planning=0.0,
            cache=tmp_path,
            replays=True,
            progress=False,
        )

    first, second = sweep(), sweep()
    assert not first.frame["cached"].any() and second.frame["cached"].all()
    kept = second.replay(second.frame["run"].iloc[1])
    assert len(kept.replicas) == 2 and len(kept.requests) == len(made_trace())


# what cannot be


def test_a_request_on_two_replicas_is_found(busy):
    part = busy.replicas[0]
    broken = replace_parts(busy, [part, part, busy.replicas[2]])
    with pytest.raises(ConservationError, match="requests must be given to one replica each, got 'r"):
        check_conservation(broken)


def test_a_step_that_begins_before_the_last_one_of_its_replica_ended_is_found(busy):
    part = load_like(busy.replicas[1])
    part.steps.loc[3, "start_s"] -= 0.001
    with pytest.raises(ConservationError, match="replica 1: a step must not begin before the last one ends"):
        check_conservation(replace_parts(busy, [busy.replicas[0], part, busy.replicas[2]]))


def replace_parts(result, parts):
    options = {"jobs": result.finetune_jobs, "executor": result.executor}
    return type(result)(parts, requests=result.trace_requests, router=result.settings["router"], **options)


def load_like(part):
    made = copy.copy(part)
    made.steps = part.steps.copy()
    return made


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (lambda request, fleet: 2, r"route\('r0'\) must lie in 0..1, got 2"),
        (lambda request, fleet: None, r"route\('r0'\) must lie in 0..1, got None"),
        (lambda request, fleet: fleet[0].nothing, "AttributeError"),
        (lambda request, fleet: setattr(fleet[0], "now_s", 1.0), "views are read-only"),
    ],
)
def test_a_router_that_fails_ends_the_replay_with_what_there_is(route, words):
    with pytest.raises(ReplayError, match=f"router .* failed: .*{words}") as caught:
        run(requests(3), fleet(2, route))
    assert len(caught.value.replay.requests) == 0


def test_a_policy_that_plans_nothing_for_ever_on_one_replica_is_found():
    def lazy(view, plan):
        if view.replica == 0:
            FCFS()(view, plan)

    for trace in ([one("x"), one("y")], sessions(2, 2)):
        with pytest.raises(ReplayError, match="replica 1: policy planned nothing: .* planned no work in 100 calls"):
            run(trace, fleet(2), lazy)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.Fleet(FixedCost()), "replicas must be at least 1, got None. Pass replicas=2, say."),
        (lambda: wb.Fleet(FixedCost(), 0), "replicas must be at least 1, got 0"),
        (lambda: wb.Fleet([FixedCost(), FixedCost()], 3), "replicas must be left out, or the number of executors, got 3"),
        (lambda: wb.Fleet([]), "a fleet must have at least 1 executor"),
        (lambda: wb.Fleet(FixedCost(), 2, placement={"job:t": 2}), r"the replica of 'job:t' must lie in 0..1, got 2"),
        (lambda: wb.Fleet(FixedCost(), 2, homes={"a": (0, 5)}), r"the replica of 'a' must lie in 0..1, got 5"),
        (lambda: wb.Fleet(FixedCost(), 2, migration_s=-1.0), "migration_s must be at least 0 seconds, got -1.0"),
        (lambda: wb.Fleet([FixedCost(), FixedCost(info=fixed_info(num_layers=5))]), "replicas must run one model"),
        (lambda: run(requests(3), fleet(2, homes={"aa": 0})), r"homes must name adapters of the executor or the trace, got 'aa'"),
        (lambda: run([one("x", adapter="zz")], fleet(2)), "unknown adapter 'zz'"),
        (lambda: wb.upper_bound(requests(3), executor=fleet(2), slo=None), "a bound is of one executor, got '2 x FixedCost'"),
    ],
)
def test_bad_fleets_are_refused_with_the_rule_and_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_an_executor_that_cannot_be_several_is_refused_with_what_to_do():
    recorded = wb.Recorded(run([one("x")], FixedCost()))
    with pytest.raises(ValueError, match=r"several replicas need an executor with replicas\(num\), got Recorded. Pass a list"):
        run([one("x")], wb.Fleet(recorded, 2))


def test_ctrl_c_ends_all_replicas_and_gives_what_there_is():
    def policy(view, plan):
        if view.now_s > 0.5:
            raise KeyboardInterrupt
        FCFS()(view, plan)

    executors = [FixedCost(), FixedCost()]
    result = run(requests(60), wb.Fleet(executors, router=RoundRobin()), policy)
    assert result.interrupted and 0 < len(result.requests) < 60
    assert [e.num_open for e in executors] == [0, 0]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__)
def test_a_fleet_that_makes_runs_of_steps_at_one_go_gives_the_frames_of_one_that_does_not(small_model, router):
    def stepwise(view, plan):
        FCFS()(view, plan)
        plan.repeat(0)

    where = {"homes": {"a": 0, "b": (0, 1)}, "migration_s": 0.03}
    trace = requests(40, rate=30.0)
    first, second = (run(trace, wb.Fleet(small_model, 3, router=router, **where), policy) for policy in (FCFS(), stepwise))
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)
