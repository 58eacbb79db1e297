"""How fast the replay of a fleet is: eight replicas on the Azure conversation trace, requests simulated per CPU-second."""

from typing import Any

from workbench.bench import machine
from workbench.bench.session import Session
from workbench.fleet import Fleet
from workbench.routers import LeastLoaded

NUM_REPLICAS = 8
CELL = f"{NUM_REPLICAS} replicas, repeat()"


def run(session: Session, seconds: float) -> None:
    """The fleet's cell in about `seconds`: a first replay of few requests tells how many more there is time for."""
    from workbench.bench.replaying import PROBE_REQUESTS, Repeating, simulator, timed_replay

    if not session.wants(CELL):
        return

    def fleet() -> Any:
        return Fleet(simulator(), NUM_REPLICAS, router=LeastLoaded())

    probe = timed_replay(session, Repeating(), PROBE_REQUESTS, fleet())
    found = timed_replay(session, Repeating(), max(PROBE_REQUESTS, int(0.8 * probe.num_requests / probe.wall_s * seconds)), fleet())
    note = f"{found.executor}; the trace's first {found.num_requests} requests in {found.num_steps} steps, least loaded first"
    rate = found.num_requests / found.cpu_s
    session.record(CELL, "requests", [rate], "per CPU-s", n=found.num_requests, device=machine.cpu_name(), note=note)
