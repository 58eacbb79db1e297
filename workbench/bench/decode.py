"""W1: a decode step in the steady state, by batch size and adapters, requests dealt out to the adapters in turn."""

import statistics
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from workbench.bench import correctness, floors
from workbench.bench.rows import OURS
from workbench.bench.session import Session
from workbench.core import Request

if TYPE_CHECKING:
    from workbench.runtime.driver import Driver

SECONDS = 60.0
SETS: dict[str, tuple[int, ...]] = {"no LoRA": (), "4 x r8": (8,) * 4, "4 x r64": (64,) * 4, "32 x r16": (16,) * 32}
MIXED, UNIFORM = (8, 24, 32, 64), (32,) * 4  # the same sum
RATIO_BATCHES = (16, 64)


def run(session: Session) -> bool:
    """Every cell of the table, then what a batch without LoRA pays beside adapters and what mixed ranks cost. False if the check fails."""
    if not session.check(correctness.serving_errors(session)):
        return False
    for name, ranks in SETS.items():
        cells = {batch: f"{name}, B={batch}" for batch in session.sizes.batches}
        wanted = {batch: cell for batch, cell in cells.items() if session.wants(cell)}
        if not wanted:
            continue
        with decoding(session, ranks, max(wanted)) as step:
            for batch, cell in wanted.items():
                record_steps(session, cell, session.times(lambda batch=batch: step(batch)), ranks, batch)
    batch = RATIO_BATCHES[0]
    if session.wants(cell := f"no LoRA row beside 4 x r8, B={batch}"):
        _beside(session, cell, batch)
    for batch in RATIO_BATCHES:
        if batch in session.sizes.batches and session.wants(cell := f"r8 + r24 + r32 + r64, B={batch}"):
            _mixed(session, cell, batch)
    return True


def record_steps(session: Session, cell: str, seconds: Sequence[float], ranks: Sequence[int], batch: int, system: str = OURS) -> None:
    context = session.sizes.context_tokens
    num_bytes, rates = floors.decode_bytes(session.engine, ranks, batch, context), session.rates()
    floor = None if rates is None else 1e3 * num_bytes / rates[0]
    note = f"context from {context} tokens"
    session.record(cell, "step", [1e3 * s for s in seconds], "ms", floor=floor, num_bytes=num_bytes, system=system, note=note)


@contextmanager
def decoding(session: Session, ranks: Sequence[int], rows: int, adapters: Sequence[str | None] = ()):
    """Yields `step(batch) -> seconds`: a decode of the first `batch` of `rows` requests that stand at the context.

    `adapters` names the requests' adapters in turn (None: the base alone); by default all of `ranks`.
    """
    from workbench.runtime.driver import Driver

    compute_keys(session, rows)
    with session.adapters(ranks) as names, Driver(session.engine, seed=session.seed) as driver:
        ids = assume_context(driver, session, rows, adapters or names or (None,))

        def step(batch: int, first: int = 0) -> float:
            driver.decode(ids[first : first + batch])
            return driver.step().duration_s

        yield step


def assume_context(driver: "Driver", session: Session, rows: int, adapters: Sequence[str | None]) -> list[str]:
    """`rows` requests with all but the last token of their context behind them, as the keys and values that lie in the pool."""
    for request in _requests(session, rows, adapters):
        driver.add(request)
        driver.assume(request.request_id, request.prompt_tokens - 1)
    return list(driver.runs)


def compute_keys(session: Session, rows: int) -> None:
    """Really prefill `rows` requests, once in a run: a driver hands blocks out in one order, so later ones find these keys and values.

    No duration depends on them, but a pool of zeros draws less power than one of numbers.
    """
    from workbench.runtime.driver import Driver

    if session.rows_with_keys >= rows:
        return
    with Driver(session.engine, seed=session.seed) as driver:
        per_step = max(1, driver.info.max_batch_tokens // session.sizes.context_tokens)
        for i, request in enumerate(_requests(session, rows, (None,)), start=1):
            driver.add(request)
            driver.prefill(request.request_id)
            if i % per_step == 0 or i == rows:
                driver.step()
    session.rows_with_keys = rows


def _requests(session: Session, rows: int, adapters: Sequence[str | None]) -> list[Request]:
    context = session.sizes.context_tokens
    return [
        Request(request_id=f"r{i}", arrival_s=0.0, prompt_tokens=context, output_tokens=1, adapter=adapters[i % len(adapters)])
        for i in range(rows)
    ]


def _beside(session: Session, cell: str, batch: int) -> None:
    """A batch of the base alone before and after four adapters lie in the slots, twice: A B A B."""
    without: list[float] = []
    beside: list[float] = []
    for _ in range(2):
        with decoding(session, SETS["4 x r8"], batch + 4, [None] * batch + [f"adapter-{i}" for i in range(4)]) as step:
            without += session.times(lambda step=step: step(batch))
            step(4, batch)  # rows of the four adapters: from now on they lie in slots
            beside += session.times(lambda step=step: step(batch))
    _ratio(session, cell, "over no adapters", beside, without)


def _mixed(session: Session, cell: str, batch: int) -> None:
    """Mixed ranks and a uniform rank of the same sum, A B A B."""
    found: dict[tuple[int, ...], list[float]] = {MIXED: [], UNIFORM: []}
    for ranks in (MIXED, UNIFORM) * 2:
        with decoding(session, ranks, batch) as step:
            found[ranks] += session.times(lambda step=step: step(batch))
    _ratio(session, cell, "over 4 x r32", found[MIXED], found[UNIFORM])


def _ratio(session: Session, cell: str, metric: str, above: Sequence[float], below: Sequence[float]) -> None:
    top, bottom = statistics.median(above), statistics.median(below)
    note = f"medians {1e3 * top:.3f} and {1e3 * bottom:.3f} ms, measured in turn (A B A B)"
    session.record(cell, metric, [top / bottom], "x", n=len(above) + len(below), note=note)
