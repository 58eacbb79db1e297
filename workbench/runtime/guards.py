"""What a step runs within: the engine's lock and device, interrupts that wait, deterministic algorithms, the device's own clock."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch


class DeviceLock:
    """An engine's lock, reentrant; within it the engine's device is the current one.

    torch's own operators go where their tensors are. Triton's launches, recordings and events go to the current device, which every thread
    has for itself (device 0 at first). Whatever of an engine launches something holds its lock: this is the one place that sees to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.RLock()
        self._index = device.index if device.type == "cuda" else None
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            if self._index is not None:
                inside = torch.cuda.device(self._index)
                inside.__enter__()
                self._entered.append(inside)
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._index is not None:
                self._entered.pop().__exit__(*error)
        finally:
            self._lock.release()


@contextmanager
def uninterrupted(late: list[bool]) -> Iterator[None]:
    """Ctrl-C waits for the end of this block: it is noted in `late`. Python delivers signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: late.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Deterministic:
    """Who wants torch's deterministic algorithms now: the switch is the process's, and engines may run beside one another."""

    lock: ClassVar = threading.Lock()
    num_wanting: ClassVar[int] = 0
    before: ClassVar[tuple[bool, bool]] = (False, False)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms within this block, where wanted; an operator that has none warns.

    Other threads have them too until the last such block ends.
    """
    if not wanted:
        yield
        return
    with _Deterministic.lock:
        if not _Deterministic.num_wanting:
            _Deterministic.before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(True, warn_only=True)
        _Deterministic.num_wanting += 1
    try:
        yield
    finally:
        with _Deterministic.lock:
            _Deterministic.num_wanting -= 1
            if not _Deterministic.num_wanting:
                before, warns = _Deterministic.before
                torch.use_deterministic_algorithms(before, warn_only=warns)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in the device's time to measure from with `elapsed_s`; None on the CPU, where all time is host time."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_s(begin: torch.cuda.Event | None) -> float:
    """Device time since `begin` in seconds, with its device synchronised; 0 without one."""
    if begin is None:
        return 0.0
    end = torch.cuda.Event(enable_timing=True)
    end.record(torch.cuda.current_stream(begin.device))
    end.synchronize()
    return begin.elapsed_time(end) / 1000.0
