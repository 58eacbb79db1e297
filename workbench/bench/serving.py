"""What W2, W3 and W6 share: nothing is compiled or recorded inside what they measure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from workbench.bench.session import Session
from workbench.config import FinetuneJob
from workbench.core import Request
from workbench.policies import FCFS
from workbench.replay import Replay, replay

WARM_REQUESTS, WARM_OUTPUT_TOKENS = 64, 8
ADAPTER_RANKS = (8,) * 4


def warm_up(session: Session, adapters: Sequence[str | None]) -> None:
    """Record the decode graphs, and prefill and decode the beginning of a dense trace with these adapters in turn."""
    session.engine.warm_up()
    requests = with_adapters(session.requests("w3-20rps")[:WARM_REQUESTS], adapters)
    run(session, [replace(r, output_tokens=min(r.output_tokens or 1, WARM_OUTPUT_TOKENS)) for r in requests], FCFS())


def with_adapters(requests: Sequence[Request], adapters: Sequence[str | None]) -> list[Request]:
    """The requests dealt out to these adapters in turn."""
    return [replace(request, adapter=adapters[i % len(adapters)]) for i, request in enumerate(requests)]


def run(session: Session, requests: Sequence[Request], policy: Any, jobs: Sequence[FinetuneJob] = (), **options: Any) -> Replay:
    """A replay on the engine's own step times, on the virtual clock, planning measured; without jobs no prediction is asked for."""
    engine = session.engine
    if jobs:
        return replay(requests, executor=engine, policy=policy, jobs=jobs, seed=session.seed, progress=False, **options)
    with engine.uncalibrated():
        return replay(requests, executor=engine, policy=policy, seed=session.seed, progress=False, **options)
