"""What a step runs within: interrupts that wait, deterministic algorithms, the device's own clock."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms within this block, where wanted; an operator that has none warns."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in the device's time to measure from with `elapsed_s`; None on the CPU, where all time is host time."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_s(begin: torch.cuda.Event | None) -> float:
    """Device time since `begin` in seconds, with the device synchronised; 0 without one."""
    if begin is None:
        return 0.0
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000.0
