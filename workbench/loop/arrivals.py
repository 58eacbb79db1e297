"""What comes to a replay from its trace, on the clock: requests, next turns of sessions, jobs. One for all replicas of a fleet."""

import heapq
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from workbench.config import FinetuneJob
from workbench.core import Request
from workbench.loop.ledger import Ledger


class Arrivals:
    """SimPy processes that hand every request to `deliver(request, arrival_s)` and every job to `start(job)` when it is due.

    `ledgers` are those of the replicas that are served; `ended` counts the requests of all of them. With `is_stalled` nothing that still
    may come is waited for: every replica sleeps, and the clock has no event left.
    """

    def __init__(self, env: simpy.Environment, requests: Sequence[Request], jobs: Sequence[FinetuneJob]) -> None:
        self.env = env
        self.num_requests, self.jobs = len(requests), sorted(jobs, key=lambda j: j.arrival_s)
        self.open = sorted((r for r in requests if r.parent_id is None), key=lambda r: r.arrival_s)
        self.children: dict[str, list[Request]] = {}
        for request in requests:
            if request.parent_id is not None:
                self.children.setdefault(request.parent_id, []).append(request)
        self.num_opened = self.num_ended = self.num_jobs_arrived = 0
        self.thinking: list[tuple[float, str]] = []
        self.ledgers: list[Ledger] = []
        self.is_stalled = False

    @property
    def is_closed_loop(self) -> bool:
        """Whether some requests arrive only after others have ended."""
        return self.num_requests > len(self.open)

    def bring_requests(self, deliver: Callable[[Request, float], None]) -> Generator[simpy.Event, Any, None]:
        for request in self.open:
            if request.arrival_s > self.env.now:
                yield self.env.timeout(request.arrival_s - self.env.now)
            self.num_opened += 1
            deliver(request, request.arrival_s)

    def bring_jobs(self, start: Callable[[FinetuneJob], None]) -> Generator[simpy.Event, Any, None]:
        for job in self.jobs:
            if job.arrival_s > self.env.now:
                yield self.env.timeout(job.arrival_s - self.env.now)
            self.num_jobs_arrived += 1
            start(job)

    def ended(self, request_id: str, deliver: Callable[[Request, float], None]) -> None:
        """A request ended: its session goes on after the think time."""
        self.num_ended += 1
        for child in self.children.get(request_id, ()):
            at = float(self.env.now) + child.think_s
            heapq.heappush(self.thinking, (at, child.request_id))
            self.env.process(self._bring_child(child, at, deliver))

    def _bring_child(self, request: Request, at: float, deliver: Callable[[Request, float], None]) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(request.think_s)
        self.thinking.remove((at, request.request_id))
        heapq.heapify(self.thinking)
        deliver(request, at)

    @property
    def next_s(self) -> float:
        """When the next request arrives, as far as it is known; inf for none."""
        opened = self.open[self.num_opened].arrival_s if self.num_opened < len(self.open) else math.inf
        return min(opened, self.thinking[0][0] if self.thinking else math.inf)

    @property
    def next_job_s(self) -> float:
        """When the next job arrives; inf for none."""
        return self.jobs[self.num_jobs_arrived].arrival_s if self.num_jobs_arrived < len(self.jobs) else math.inf

    @property
    def is_pending(self) -> bool:
        """Whether an arrival is still to come, by itself or because another replica ends a request."""
        if self.num_jobs_arrived < len(self.jobs) or self.next_s < math.inf:
            return True
        return self.is_closed_loop and len(self.ledgers) > 1 and not self.is_stalled and any(ledger.requests for ledger in self.ledgers)

    def to_come(self) -> tuple[tuple[float, str], ...]:
        """(time, request id) of every known arrival to come, soonest first."""
        opened = [(r.arrival_s, r.request_id) for r in self.open[self.num_opened :]]
        return tuple(sorted(opened + self.thinking))

    def is_over(self, until: str | float) -> bool:
        """Whether the replay has reached its end: "requests", "jobs" or a second."""
        if isinstance(until, (int, float)):
            return self.env.now >= until
        if self.num_ended < self.num_requests:
            return False
        return until == "requests" or (self.num_jobs_arrived == len(self.jobs) and not any(ledger.jobs for ledger in self.ledgers))
