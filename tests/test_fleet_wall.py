"""Fleets on the wall clock: replicas that run side by side, each in a thread of its own, under one ledger, router and policy thread."""

import os
import signal
import sys
import threading
import time

import pytest

import workbench as wb
from tests.policy_cases import one
from tests.test_replay import job, requests
from workbench.config import SLO
from workbench.fleet.routers import RoundRobin
from workbench.policies import FCFS, ServeFirst
from workbench.replay import ReplayError, replay
from workbench.results.metrics import token_gaps
from workbench.testing import FixedCost, fixed_info


class Locked(FixedCost):
    """As of an engine: who asks for its adapters during a step waits for the end of the step."""

    def __post_init__(self):
        self.lock = threading.RLock()
        super().__post_init__()

    @property
    def adapter_infos(self):
        with self.lock:
            return self.known

    @adapter_infos.setter
    def adapter_infos(self, infos):
        self.known = infos

    def step(self, batch):
        with self.lock:
            return super().step(batch)


def sleeping(num=2, **options):
    """Executors that really sleep, for long enough that the noise of a busy machine is small beside a step."""
    options = {"step_s": 0.012, "info": fixed_info(simulated=False), "sleeps": True} | options
    return [Locked(**options) for _ in range(num)]


def run(trace, executors, policy=None, **options):
    options = {"clock": "wall", "planning": "measured"} | options
    router = options.pop("router", RoundRobin())
    homes = {name: options.pop(name) for name in ("homes", "placement", "migration_s") if name in options}
    fleet = wb.Fleet(executors, router=router, **homes)
    return replay(trace, executor=fleet, policy=policy or FCFS(), progress=False, **options)


def left_behind():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("replica-")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    interval = sys.getswitchinterval()
    yield
    assert left_behind() == [] and sys.getswitchinterval() == interval


def test_two_replicas_take_half_of_the_time_that_their_steps_take_together():
    begin = time.perf_counter()
    result = run([one(f"r{i}", 0.0, prompt=20, output=10) for i in range(8)], sleeping(step_s=0.04))
    called_s, took_s = time.perf_counter() - begin, result.steps["end_s"].max()
    busy_s = result.steps.groupby("replica")["duration_s"].sum()
    assert (busy_s > 0.3).all() and result.requests["outcome"].eq("finished").all()
    assert took_s < 0.7 * busy_s.sum(), (took_s, busy_s)
    assert busy_s.max() <= took_s <= called_s, "on the wall clock"
    first, second = (part.steps for part in result.replicas)
    overlaps = (first["start_s"] < second["end_s"].max()) & (first["end_s"] > second["start_s"].min())
    assert overlaps.mean() > 0.8


def test_side_by_side_and_the_virtual_clock_agree():
    trace = [one(f"r{i}", 0.021 * i, prompt=10 * (1 + i % 3), output=2 if i % 4 < 2 else 15, adapter="ab"[i % 3 % 2]) for i in range(24)]
    options = {"slo": SLO(ttft_s=0.3, e2e_s=0.2), "jobs": [job()], "policy": ServeFirst(step_s=0.05), "placement": {job().id: 1}}
    virtual = run(trace, sleeping(step_s=0.02), clock="virtual", **options)
    wall = run(trace, sleeping(step_s=0.02), **options)
    assert wall.requests["replica"].tolist() == virtual.requests["replica"].tolist()
    assert wall.work.query("kind == 'finetune'")["replica"].unique().tolist() == [1]
    assert virtual.summary()["attainment"] == pytest.approx(0.5, abs=0.1)
    assert wall.summary()["attainment"] == pytest.approx(virtual.summary()["attainment"], abs=0.1)
    # scheduling noise of a busy two-core machine: a few milliseconds a step
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        for quantile in (0.5, 0.9):
            v, w = (r.requests[name].quantile(quantile) for r in (virtual, wall))
            assert v * 0.75 - 0.005 <= w <= v * 1.35 + 0.05, (name, quantile, v, w)
    v, w = (r.steps["end_s"].max() for r in (virtual, wall))
    assert v * 0.8 <= w <= v * 1.2 + 0.05, (v, w)
    assert token_gaps(wall.events)["itl_s"].min() > 0.01


def test_an_arrival_during_a_step_is_routed_when_it_comes_not_when_the_step_ends():
    routed = {}

    def router(request, fleet):
        routed[request.id] = (fleet[0].now_s, time.perf_counter() - begin)
        return 0 if request.id == "long" else 1

    executors = sleeping(prefill_s=0.005)
    begin = time.perf_counter()
    trace = [one("long", 0.0, prompt=100, output=1, adapter="a"), one("short", 0.1, prompt=5, output=1, adapter="a")]
    result = run(trace, executors, router=router)
    at_s, wall_s = routed["short"]
    assert at_s == pytest.approx(0.1) and 0.1 <= wall_s < 0.35
    ended = result.events.query("kind == 'finished'").set_index("owner")["time_s"]
    assert ended["short"] < 0.4 and ended["long"] > 0.5


def test_policies_routers_and_ledgers_stay_in_one_thread_and_steps_have_one_each():
    loop, steps = set(), {0: set(), 1: set()}

    def policy(view, plan):
        loop.add(threading.get_ident())
        FCFS()(view, plan)

    def router(request, fleet):
        loop.add(threading.get_ident())
        return int(request.id[1:]) % 2

    executors = [sleeping(1, step_s=0.002, fails=lambda batch, k=k: steps[k].add(threading.get_ident()))[0] for k in range(2)]
    run([one(f"r{i}", 0.0, output=3) for i in range(6)], executors, policy, router=router)
    assert loop == {threading.get_ident()}
    assert [len(found) for found in steps.values()] == [1, 1] and len(loop | steps[0] | steps[1]) == 3


def test_a_step_that_fails_in_its_thread_stops_the_other_replica_and_keeps_the_partial_replay():
    def fails(batch):
        if batch.step == 3:
            raise OSError("the device is gone")

    good, bad = *sleeping(1), *sleeping(1, fails=fails)
    with pytest.raises(ReplayError, match="replica 1: executor failed: OSError: the device is gone") as raised:
        run(requests(20), [good, bad])
    assert isinstance(raised.value.__cause__, OSError)
    assert [e.num_open for e in (good, bad)] == [0, 0]
    parts = raised.value.replay.replicas
    assert len(parts[1].steps) == 3 and len(parts[0].steps) >= 1
    num_steps = len(good.batches)
    time.sleep(0.03)
    assert len(good.batches) == num_steps, "its last step had ended when the error was raised"
    assert len(parts[0].steps) <= num_steps <= len(parts[0].steps) + 1


def test_a_policy_that_fails_while_the_other_replica_runs_a_step_names_its_replica():
    def policy(view, plan):
        if view.replica == 0 and view.now_s > 0.1:
            raise ValueError("not this step")
        FCFS()(view, plan)

    executors = sleeping()
    with pytest.raises(ReplayError, match="replica 0: policy policy failed: ValueError: not this step"):
        run(requests(20), executors, policy)
    assert [e.num_open for e in executors] == [0, 0]


def test_ctrl_c_during_steps_waits_for_them_and_keeps_the_partial_replay():
    executors = sleeping(step_s=0.05)
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.perf_counter()
    try:
        result = run([one(f"r{i}", 0.0, output=200) for i in range(4)], executors)
    finally:
        timer.cancel()
    assert time.perf_counter() - begin < 3.0
    assert result.interrupted and result.error is None and (result.by_replica["requests"] == 2).all()
    assert all(len(part.steps) >= 2 for part in result.replicas) and [e.num_open for e in executors] == [0, 0]


def test_an_adapter_migrates_on_the_wall_clock_while_steps_run():
    trace = [one("x", 0.0, output=30), one("y", 0.05, output=30, adapter="a"), one("z", 0.4, output=2, adapter="a")]
    numbers = {"x": 0, "y": 1, "z": 1}
    result = run(trace, sleeping(), router=lambda request, fleet: numbers[request.id], homes={"a": 0}, migration_s=0.1)
    migrated = result.events.query("kind == 'adapter_migrated'")
    assert migrated["replica"].tolist() == [1] and migrated["time_s"].iloc[0] == pytest.approx(0.15, abs=0.05)
    assert result.requests["outcome"].eq("finished").all()
    assert result.requests["queue_s"]["y"] == pytest.approx(0.1, abs=0.06) and result.requests["queue_s"]["z"] < 0.06


def test_a_published_version_reaches_the_other_replica_on_the_wall_clock():
    trained = job(publish="step", adapter="a")
    trace = [one(f"r{i}", 0.02 * i, output=2, adapter="a") for i in range(30)]
    result = run(trace, sleeping(step_s=0.004), ServeFirst(step_s=0.05), jobs=[trained], placement={trained.id: 0}, migration_s=0.0)
    published = result.events.query("kind == 'published'")["value"]
    assert len(published) >= 1
    assert (result.events.query("kind == 'adapter_migrated'")["replica"] == 1).all()
    served = result.work.query("kind == 'prefill' and replica == 1")["version"]
    assert served.min() == 1 and served.max() >= published.min()


def test_replicas_that_are_simulated_stay_in_the_loops_thread_beside_real_ones():
    names = []
    simulated = FixedCost(fails=lambda batch: names.append(threading.current_thread().name))
    real = sleeping(1, fails=lambda batch: names.append(threading.current_thread().name))
    result = run([one(f"r{i}", 0.0, output=4) for i in range(4)], [simulated, *real])
    assert set(names) == {threading.main_thread().name, "replica-1_0"}
    assert result.requests["outcome"].eq("finished").all()
