"""How fast the replay of a fleet is: eight replicas on the Azure conversation trace, requests simulated per CPU-second."""

from workbench.bench import machine
from workbench.bench.session import Session
from workbench.fleet import Fleet
from workbench.fleet.routers import LeastLoaded
from workbench.latency import LatencyModel

NUM_REPLICAS = 8
CELL = f"{NUM_REPLICAS} replicas, repeat()"


def run(session: Session, seconds: float) -> None:
    """The fleet's cell in about `seconds`: a first replay of few requests tells how many more there is time for."""
    from workbench.bench.replaying import LONGEST_CONTEXT, PROBE_REQUESTS, PROFILE, Repeating, timed_replay

    if not session.wants(CELL):
        return
    fleet = Fleet(LatencyModel.load(PROFILE).with_limits(max_model_len=LONGEST_CONTEXT), NUM_REPLICAS, router=LeastLoaded())
    probe = timed_replay(session, fleet, Repeating(), [], PROBE_REQUESTS)
    most = max(PROBE_REQUESTS, int(0.8 * probe.num_requests / probe.wall_s * seconds))
    found = timed_replay(session, fleet, Repeating(), [], most)
    note = f"{fleet.info.name}; the trace's first {found.num_requests} requests in {found.num_steps} steps, least loaded first, no job"
    rate = found.num_requests / found.cpu_s
    session.record(CELL, "requests", [rate], "per CPU-s", n=found.num_requests, device=machine.cpu_name(), note=note)
