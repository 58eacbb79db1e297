"""What steps run within: the lock that makes the engine's device the current one, and deterministic algorithms of several engines."""

import threading
from contextlib import contextmanager
from functools import partial
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import workbench as wb
from tests.runtime.references import SMALL, job, make_adapter, make_base
from workbench.runtime.guards import DeviceLock, deterministic_algorithms
from workbench.runtime.recording import Recorder


class FakeDevices:
    """Stands for `torch.cuda.device` where there is no CUDA: every thread has a current device, 0 at first."""

    def __init__(self):
        self.here = threading.local()

    @property
    def current(self):
        return getattr(self.here, "index", 0)

    def __call__(self, index):
        devices = self

        class Inside:
            def __enter__(self):
                self.before, devices.here.index = devices.current, index

            def __exit__(self, *error):
                devices.here.index = self.before

        return Inside()


@pytest.fixture
def devices(monkeypatch):
    fake = FakeDevices()
    monkeypatch.setattr(torch.cuda, "device", fake)
    return fake


def test_within_an_engines_lock_its_device_is_the_current_one_in_whatever_thread(devices):
    first, second = (DeviceLock(torch.device("cuda", index)) for index in (0, 1))
    seen = []

    def nested():
        with second:
            seen.append(devices.current)
            with first, second:
                seen.append(devices.current)
            seen.append(devices.current)
        seen.append(devices.current)

    nested()
    thread = threading.Thread(target=nested)
    thread.start()
    thread.join()
    assert seen == 2 * [1, 1, 1, 0]


def test_an_engines_lock_is_released_and_the_device_restored_when_something_fails_within(devices):
    lock = DeviceLock(torch.device("cuda", 1))
    with pytest.raises(KeyError), lock, lock:
        raise KeyError
    assert devices.current == 0
    taken = []
    thread = threading.Thread(target=lambda: taken.append(lock._lock.acquire(timeout=1)))
    thread.start()
    thread.join()
    assert taken == [True]


def test_a_lock_on_the_cpu_asks_for_no_device(devices):
    with DeviceLock(torch.device("cpu")):
        assert not hasattr(devices.here, "index")


class Outside(TorchDispatchMode):
    """The operators that run while this thread does not hold the lock."""

    def __init__(self, lock):
        super().__init__()
        self.lock, self.num_inside, self.found = lock, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.lock._lock._is_owned():
            self.num_inside += 1
        else:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def test_whatever_an_engine_computes_it_computes_under_its_lock(tmp_path):
    base = make_base(tmp_path / "base", "smollm2")
    adapters = {"a": make_adapter(tmp_path / "a", base, rank=3)}
    engine = wb.Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    requests = [wb.Request(request_id=f"r{i}", arrival_s=0.0, prompt_tokens=9, output_tokens=3, adapter="a") for i in range(3)]
    with Outside(engine.lock) as outside:
        engine.calibrate(max_steps=24, seconds=0.1, progress=False)
        serves = wb.policies.ServeFirst(step_s=100.0)  # however slow the steps are that are looked into
        wb.replay(requests, executor=engine, policy=serves, jobs=[job("mine", steps=1, accumulation=1)], until="jobs")
        engine.jobs["mine"].publish()
        engine.jobs["mine"].checkpoint(tmp_path / "checkpoint")
        engine.add_random_adapters([4])
        engine.save_adapter("mine", tmp_path / "mine")
        engine.generate([[5, 6, 7]], max_tokens=2)
        engine.nll([[5, 6, 7]], adapter="a")
        engine.unload_adapter("mine")
    assert outside.found == set() and outside.num_inside > 1000


def test_each_device_records_on_a_stream_of_its_own_and_one_recording_is_made_at_a_time(monkeypatch):
    used, num_open, most = [], 0, 0

    @contextmanager
    def graph(graph, *, pool, stream, capture_error_mode):
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        used.append((stream, capture_error_mode))
        yield
        num_open -= 1

    monkeypatch.setattr(Recorder, "_streams", {})
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: "pool"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    recorders = [Recorder(torch.device("cuda", index)) for index in (0, 1, 1)]
    threads = [threading.Thread(target=recorder.record, args=(partial(sleep, 0.02),)) for recorder in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    streams = ["stream of cuda:0", "stream of cuda:1", "stream of cuda:1"]
    assert sorted(used) == [(stream, "thread_local") for stream in streams] and most == 1


def test_deterministic_algorithms_last_until_the_last_engine_is_done():
    entered, may_leave, seen = threading.Event(), threading.Event(), []

    def beside():
        with deterministic_algorithms(True):
            entered.set()
            may_leave.wait(5)
        seen.append(torch.are_deterministic_algorithms_enabled())

    assert not torch.are_deterministic_algorithms_enabled()
    thread = threading.Thread(target=beside)
    with deterministic_algorithms(True):
        thread.start()
        entered.wait(5)
    seen.append(torch.are_deterministic_algorithms_enabled())
    may_leave.set()
    thread.join()
    assert seen == [True, False]
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
