"""What holds within a block: interrupts that wait, deterministic algorithms."""

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
