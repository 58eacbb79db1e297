"""The virtual clock of a replay: SimPy's, which can also be moved on without an event."""

import heapq

import simpy
from simpy.events import NORMAL


class Clock(simpy.Environment):
    """SimPy's clock. Where nothing is to happen before a time, going there costs nothing."""

    def is_free(self, time_s: float) -> bool:
        """Whether nothing happens until then; now it is then."""
        if self._queue and self._queue[0][0] <= time_s:
            return False
        self._now = time_s
        return True

    def at(self, time_s: float) -> simpy.Event:
        """An event at exactly this time: a timeout would add a rounded difference to now."""
        assert time_s >= self._now, (time_s, self._now)
        event = simpy.Event(self)
        event._ok, event._value = True, None
        heapq.heappush(self._queue, (time_s, NORMAL, next(self._eid), event))
        return event
