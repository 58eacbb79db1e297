"""What every replay must conserve: tokens, work, requests and time. Checked once at its end, from two bookkeepings that must agree.

The events (what happened), the work rows (what the batches held) and the counts beside the steps (what the ledger said) are written in
different places. A disagreement is a bug, in the product or in an executor, never a result.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.core import Request
from workbench.loop.history import History
from workbench.results.facts import TOKEN_KINDS, facts_of_frames, facts_of_history
from workbench.results.stream import Stream
from workbench.results.tally import CLOCK_S, EARLY, MISCOUNT, ODD, SHORT, STRAY, Tally
from workbench.server.protocol import ServerInfo


class ConservationError(RuntimeError):
    """A replay whose rows contradict one another."""


def check_conservation(replay: Any) -> None:
    """Raise ConservationError with the law and its numbers if a replay breaks one: time, work, tokens, requests, Little's law.

    A fleet's replay must conserve on every replica, and give each request to one. Of a server's replay only the requests can be checked:
    its steps are not seen. From the frames, or from the history that they are made from while none is made yet. Cost is linear in the
    number of rows.
    """
    if hasattr(replay, "replicas"):
        check_fleet(replay)
        return
    names = pd.Index([r.request_id for r in replay.trace_requests], dtype=object)
    is_new = not {"events", "steps", "work", "jobs"} & replay.__dict__.keys()
    if isinstance(replay.executor, ServerInfo):
        tally = Tally(names)
        tally.add_rows(facts_of_frames(replay, names))
        check_requests(tally)
        return
    if is_new and isinstance(replay.history, Stream):
        tally = replay.history.tally or Tally(names)
    elif is_new and isinstance(replay.history, History):
        tally = Tally.of(facts_of_history(replay.history, names), names)
    else:
        tally = Tally.of(facts_of_frames(replay, names), names)
    for law in (STRAY, *map(ODD.format, TOKEN_KINDS), EARLY, SHORT):
        check_steps(tally, law)
    check_requests(tally)
    check_littles_law(tally)
    check_tokens(tally, replay.trace_requests)
    check_jobs(tally, replay)


def check_fleet(replay: Any) -> None:
    """Every replica conserves; each request and job of the trace is on one of them at most, and nothing else is."""
    for number, part in enumerate(replay.replicas):
        try:
            check_conservation(part)
        except ConservationError as error:
            raise ConservationError(f"replica {number}: {error}") from error
    rows = (
        ("requests", [r.request_id for r in replay.trace_requests], [r.request_id for p in replay.replicas for r in p.trace_requests]),
        ("jobs", [j.id for j in replay.finetune_jobs], [j.id for p in replay.replicas for j in p.finetune_jobs]),
    )
    for what, known, given in rows:
        twice = next((name for name, num in Counter(given).items() if num > 1), None)
        if twice is not None:
            _fail(f"{what} must be given to one replica each", f"{twice!r} on several")
        strange = set(given) - set(known)
        if strange:
            _fail(f"replicas must have {what} of the trace only", f"{sorted(strange)[0]!r}")


def _fail(law: str, numbers: str) -> None:
    raise ConservationError(f"{law}, got {numbers}. This is a bug in the runtime or in an executor: keep the replay and report it.")


def check_steps(tally: Tally, law: str) -> None:
    """No step broke this law."""
    if law in tally.broken:
        _fail(law, tally.broken[law])


def check_requests(tally: Tally) -> None:
    """A request arrives once, ends at most once, not before it arrives, and does nothing after its end."""
    arrived, ended, names = tally.num_arrived, tally.num_ended, tally.names
    for count, rule in ((arrived, "a request must arrive at most once"), (ended, "a request must end at most once")):
        if (count > 1).any():
            k = int(np.argmax(count))
            _fail(rule, f"{count[k]} times for {names[k]!r}")
    if (ended > arrived).any():
        _fail("a request must arrive before it ends", f"an end without an arrival for {names[int(np.argmax(ended > arrived))]!r}")
    begin, end = tally.begin_s, tally.end_s
    for kind, (first_s, last_s) in tally.seen.items():
        late = last_s > end + CLOCK_S
        wrong = late | (np.isfinite(first_s) & ~(first_s >= begin - CLOCK_S))
        if wrong.any():
            k = int(np.argmax(wrong))
            span = f"{begin[k]:.6f} to {end[k]:.6f} s"
            at = last_s[k] if late[k] else first_s[k]
            _fail(f"a request must see its {kind} between arrival and end", f"{names[k]!r} at {at:.6f} s, there from {span}")


def check_littles_law(tally: Tally) -> None:
    """L = lambda W, as the identity that it is on one sample path (Stidham, Operations Research 22, 1974), and the ledger's own count.

    The integral of the number in the system must be the sum of the times that requests spent there; and at the start of every step,
    `waiting + running` as the ledger counted must be the arrivals less the ends until then (`Tally.add_counts`).
    """
    begin, end = tally.begin_s, tally.end_s
    there = np.isfinite(begin)
    ended = np.sort(end[there & np.isfinite(end)])
    arrived = np.sort(begin[there])
    if not len(arrived):
        return
    last = max(arrived[-1], ended[-1] if len(ended) else 0.0, tally.last_s)
    spent = np.minimum(end[there], last) - begin[there]
    times = np.concatenate([arrived, ended, [last]])
    change = np.concatenate([np.ones(len(arrived)), -np.ones(len(ended)), [0.0]])
    order = np.argsort(times, kind="stable")
    number = np.cumsum(change[order])
    area = float(np.sum(number[:-1] * np.diff(times[order])))
    if (spent < -CLOCK_S).any() or abs(area - spent.sum()) > CLOCK_S * max(1.0, spent.sum()):
        _fail(
            "Little's law: the integral of the number in the system must be the time spent there", f"{area:.6f} beside {spent.sum():.6f} s"
        )
    check_steps(tally, MISCOUNT)


def check_tokens(tally: Tally, requests: Sequence[Request]) -> None:
    """Every output token is one row of work at its own position, every finished request has the tokens that its trace asks for.

    A request that was never preempted prefills each prompt token at most once and up to the last, then decodes one position a token.
    """
    if tally.has_strangers:
        _fail("tokens must belong to requests of the trace", "another owner")
    names, count, total, done, said = tally.names, tally.num_tokens, tally.token_numbers, tally.prefilled, tally.said_prefilled
    wrong = total != count * (count + 1) / 2
    if wrong.any():
        k = int(np.argmax(wrong))
        _fail(
            "a request's tokens must be numbered 1, 2, ... each once", f"{count[k]:.0f} tokens that sum to {total[k]:.0f} for {names[k]!r}"
        )
    if (done != said).any():
        k = int(np.argmax(done != said))
        _fail("prefilled tokens must be those of the batches", f"{said[k]:.0f} beside {done[k]:.0f} for {names[k]!r}")
    prompt = np.array([r.prompt_tokens for r in requests], float)
    steady = (tally.num_preempted == 0) & (count > 0)
    laws = (
        ("each prompt token must be prefilled once", done, tally.high - tally.low),
        ("the prefill must reach the end of the prompt", tally.high, prompt),
        ("every token after the first must be one decode row", tally.num_rows, count - 1),
        ("decode rows must stand at consecutive positions", tally.row_places, (count - 1) * prompt + (count - 1) * (count - 2) / 2),
    )
    for law, have, want in laws:
        wrong = steady & (have != want)
        if wrong.any():
            k = int(np.argmax(wrong))
            _fail(law, f"{have[k]:.0f} beside {want[k]:.0f} for {names[k]!r}")
    _check_lengths(np.flatnonzero(tally.has_finished), count.astype(int), requests)


def _check_lengths(finished: np.ndarray, count: np.ndarray, requests: Any) -> None:
    """A finished request has the length that the trace and `max_tokens` give; one whose text decides has at most `max_tokens`."""
    for k in finished.tolist():
        request = requests[k]
        limits = [n for n in (request.output_tokens, request.max_tokens) if n is not None]
        if limits and (count[k] > min(limits) or (request.output_tokens is not None and count[k] != min(limits))):
            _fail(
                "a finished request must have the output tokens that it asks for", f"{count[k]} of {min(limits)} for {request.request_id!r}"
            )


def check_jobs(tally: Tally, replay: Any) -> None:
    """Fine-tune tokens: what was committed went forward before, and through every layer backward; nothing is committed twice."""
    num_layers = replay.executor.num_layers
    for name in (job.id for job in replay.finetune_jobs):
        forward, layers = float(tally.job_work[name, "finetune"]), int(tally.job_work[name, "backward"])
        _, said = tally.job_events.get((name, "forward"), (0, 0.0))
        passes, committed = tally.job_events.get((name, "committed"), (0, 0.0))
        if forward != said:
            _fail("forward tokens must be those of the batches", f"{said:.0f} beside {forward:.0f} for {name!r}")
        if committed > forward:
            _fail("committed tokens must have gone forward", f"{committed:.0f} of {forward:.0f} for {name!r}")
        needed = passes * num_layers
        if not needed <= layers < needed + max(num_layers, 1):
            _fail("every committed micro-batch must go backward through each layer once", f"{layers} layers beside {needed} for {name!r}")
