"""Names for the parts of a step, for profilers: NVTX ranges (Nsight Systems) and torch.profiler's own.

Off, a part is one shared object whose entering and leaving does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

VARIABLE = "LOQUETIER_RANGES"
_NOTHING = nullcontext()


@contextmanager
def _named(name: str) -> Iterator[None]:
    with record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class Parts:
    """`with parts("forward"):` names what runs inside; `is_on` says whether anything is named at all."""

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on or os.environ.get(VARIABLE) == "1"

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return _named(name) if self.is_on else _NOTHING

    @contextmanager
    def on(self) -> Iterator[None]:
        """Named within this block, whatever holds outside."""
        before, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = before
