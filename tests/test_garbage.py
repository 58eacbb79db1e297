"""Garbage is collected between steps: never inside one, and never forgotten."""

import gc
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest

import workbench as wb
from tests.test_replay import requests
from workbench.loop import garbage
from workbench.loop.garbage import Garbage
from workbench.policies import FCFS
from workbench.runtime.driver import Driver
from workbench.testing import FixedCost


class Circle:
    def __init__(self):
        self.itself = self


@contextmanager
def collections():
    """The generations collected meanwhile, in order."""
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


class Work:
    """Many objects in every step, of which some are circles."""

    def __init__(self):
        self.kept, self.circles, self.during, self.most = [], [], [], 0

    def __call__(self, batch=None):
        with collections() as found:
            self.kept.append([[] for _ in range(3000)])
            circle = Circle()
            self.circles.append(weakref.ref(circle))
            del circle
        self.during += found
        self.most = max(self.most, sum(circle() is not None for circle in self.circles))


@pytest.fixture(params=[1, 2], ids=["one executor", "a fleet"])
def replayed(request, monkeypatch):
    monkeypatch.setattr(garbage, "SELDOM", 4000)
    work, planning = Work(), []

    def policy(view, plan):
        with collections() as found:
            planning.append([[] for _ in range(500)])
            FCFS()(view, plan)
            plan.repeat(0)
        work.during += found

    executor = FixedCost(fails=work)
    over = executor if request.param == 1 else wb.Fleet(executor, 2)
    with collections() as found:
        wb.replay(requests(num=40), executor=over, policy=policy, planning=0.0, progress=False)
    return work, found


def test_no_collection_falls_into_a_step_or_into_a_policy(replayed):
    work, found = replayed
    assert work.during == []
    assert len(found) > 20, "they fall between"


def test_circles_of_earlier_steps_are_gone_while_the_replay_goes_on(replayed):
    work, _ = replayed
    assert len(work.circles) > 40
    assert work.most < 10


def test_without_it_collections_fall_into_steps():
    """What the first test watches does happen elsewhere."""
    work = Work()
    for _ in range(5):
        work()
    assert work.during


def make(num):
    return [[] for _ in range(num)]


def test_generations_take_their_turn_and_the_oldest_ever_more_seldom(monkeypatch):
    monkeypatch.setattr(garbage, "SELDOM", 100)
    before, kept = gc.get_threshold(), []
    gc.set_threshold(700, 3, 2)
    try:
        gc.collect()
        with collections() as found, Garbage() as held:
            for _ in range(300):
                kept.append(make(150))
                held.collect()
    finally:
        gc.set_threshold(*before)
    assert len(found) == 300
    assert {0, 1, 2} == set(found)
    oldest = [k for k, generation in enumerate(found) if generation == 2]
    gaps = [b - a for a, b in pairwise(oldest)]
    assert len(gaps) >= 2
    assert all(b > 1.5 * a for a, b in pairwise(gaps))


def test_nothing_is_collected_before_it_is_due():
    gc.collect()
    with collections() as found, Garbage() as held:
        kept = make(garbage.OFTEN + 500)
        held.collect()
        assert found == []
    gc.collect()
    with collections() as found, Garbage(often=True) as held:
        kept += make(garbage.OFTEN + 500)
        held.collect()
        assert found == [0]


def test_python_collects_again_afterwards_unless_it_did_not_before():
    with Garbage():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), Garbage():
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with collections() as found, Garbage(often=True) as held:
            kept = make(30_000)
            held.collect()
        assert kept
        assert not found
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_steps_driven_by_hand_have_no_collection_in_them_either():
    work = Work()
    with Driver(FixedCost(fails=work)) as driver:
        for _ in range(20):
            driver.step()
    assert work.during == []
    assert work.most < 10
    assert gc.isenabled()
