"""The clocks of a replay: SimPy's, which can also be moved on without an event, and the wall clock, beside which threads work."""

import heapq
import math
import queue
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import simpy
import simpy.rt
from simpy.events import NORMAL


def _at(env: simpy.Environment, event: simpy.Event, time_s: float, value: object = None) -> simpy.Event:
    """Let `event` happen at exactly this time: a timeout would add a rounded difference to now."""
    assert time_s >= env.now, (time_s, env.now)
    event._ok, event._value = True, value
    heapq.heappush(env._queue, (time_s, NORMAL, next(env._eid), event))
    return event


class Clock(simpy.Environment):
    """SimPy's clock. Where nothing is to happen before a time, going there costs nothing."""

    def is_free(self, time_s: float) -> bool:
        """Whether nothing happens until then; now it is then."""
        if self._queue and self._queue[0][0] <= time_s:
            return False
        self._now = time_s
        return True

    def at(self, time_s: float) -> simpy.Event:
        """An event at exactly this time."""
        return _at(self, simpy.Event(self), time_s)


class WallClock(simpy.rt.RealtimeEnvironment):
    """SimPy's wall clock, which also brings the ends of work in other threads: processes and their state stay in the thread of the loop."""

    def __init__(self) -> None:
        super().__init__(strict=False)
        self._ended: queue.SimpleQueue[tuple[simpy.Event, Future[Any]]] = queue.SimpleQueue()
        self._num_running = 0

    @property
    def wall_s(self) -> float:
        """Seconds since the clock began, which `now` may lag behind while the loop is at work."""
        return time.monotonic() - self.real_start

    def run_in(self, pool: Executor, function: Callable[..., Any], *arguments: Any) -> simpy.Event:
        """An event that happens once `function(*arguments)` has ended in a thread of `pool`; its value is the Future."""
        event = self.event()
        future = pool.submit(function, *arguments)
        self._num_running += 1
        future.add_done_callback(lambda ended: self._ended.put((event, ended)))
        return event

    def step(self) -> None:
        """Process the next event when its time has come; until then, take note of what threads have ended. Raises EmptySchedule if neither
        an event nor a thread is left to wait for.
        """
        while self._num_running:
            left_s = self.peek() - self.wall_s
            try:
                event, ended = self._ended.get(timeout=max(0.0, left_s) if left_s < math.inf else None)
            except queue.Empty:
                break
            self._num_running -= 1
            _at(self, event, max(float(self.now), self.wall_s), ended)
        super().step()
