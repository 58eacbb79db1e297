"""Python's garbage collections: between steps, where no time is taken, instead of in the middle of one.

A step leaves a hundred to a few hundred objects and hardly a circle. Python collects whenever enough objects were made, in whatever runs
just then. Beside an 8B model on an H100, going through 20,000 young objects lasted 4 to 23 ms, and three times in a replay of 3,000 steps
it fell on a step or a plan.
"""

import gc
from types import TracebackType

SELDOM, OFTEN = 20_000, 2_000
"""After so many new objects, those that went by themselves not counted."""


class Garbage:
    """Within this context Python collects by itself no more; `collect`, called between two steps, does it if it is due.

    Generations are collected in turn by the interpreter's own thresholds, the oldest each time twice as seldom as before, so that the cost
    stays linear in the number of objects. Who has switched collections off has none here either.
    """

    def __init__(self, often: bool = False) -> None:
        """`often`: where the clock runs on meanwhile, so that each is short."""
        self.threshold, self.is_wanted = OFTEN if often else SELDOM, False
        _, self.middle, self.oldest = gc.get_threshold()

    def __enter__(self) -> "Garbage":
        self.is_wanted = gc.isenabled() and gc.get_threshold()[0] > 0
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_wanted:
            gc.enable()
        self.is_wanted = False

    def collect(self) -> None:
        """Collect now if enough objects were made since."""
        if not self.is_wanted:
            return
        young, middle, old = gc.get_count()
        if young < self.threshold:
            return
        if middle <= self.middle:
            gc.collect(0)
        elif old <= self.oldest:
            gc.collect(1)
        else:
            self.oldest *= 2
            gc.collect(2)
