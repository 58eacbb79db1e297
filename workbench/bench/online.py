"""W3: Poisson arrivals of 30 s, four adapters, on the virtual clock: time to first token and time per output token."""

from typing import Any

from workbench import traces
from workbench.bench import correctness, serving
from workbench.bench.session import Session
from workbench.core import Request
from workbench.policies import FCFS

SECONDS = 100.0
RATES = (5, 10, 20)
MANY = 1000  # requests that a p99 wants; below it rests on fewer than ten


def run(session: Session) -> bool:
    """The shipped traces, then a thousand requests at each rate while time is left. False if the check fails."""
    if not session.check(correctness.serving_errors(session)):
        return False
    many = session.sizes.max_requests or MANY
    cells = [(f"{rate} req/s", rate, None) for rate in RATES] + [(f"{rate} req/s, {many} requests", rate, many) for rate in RATES[::-1]]
    with session.adapters(serving.ADAPTER_RANKS) as names:
        is_warm = False
        for cell, rate, count in cells:
            if not session.wants(cell):
                continue
            if not is_warm:
                serving.warm_up(session, names)
                is_warm = True
            _measure(session, cell, session.requests(f"w3-{rate}rps") if count is None else _many(session, rate, count))
    return True


def _many(session: Session, rate: int, count: int) -> list[Request]:
    """`count` Poisson arrivals at `rate`, with lengths as in the shipped trace of that rate."""
    made = traces.poisson(rate=rate, duration_s=2.0 * count / rate + 10.0, seed=session.seed).head(count)
    made = made.with_lengths(f"w3-{rate}rps", seed=session.seed)
    return session.requests(made.assign_adapters(len(serving.ADAPTER_RANKS), popularity=traces.round_robin(), seed=session.seed))


def _measure(session: Session, cell: str, requests: list[Request]) -> None:
    result = serving.run(session, requests, FCFS())
    found: dict[str, Any] = result.summary()
    finished = f"{found['finished']} of {found['requests']} finished, {result.policy}"
    for name in ("ttft", "tpot"):
        for p in (50, 99):
            value, low, high = (1e3 * found[f"{name}_p{p}{end}_s"] for end in ("", "_low", "_high"))
            note = f"95 % interval {low:.3g} to {high:.3g} ms if requests were independent; {finished}"
            session.record(cell, f"{name.upper()} p{p}", [value], "ms", n=int(found[f"{name}_n"]), note=note)
