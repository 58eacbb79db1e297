"""What every replay must conserve: tokens, work, requests and time. Checked once at its end, from two bookkeepings that must agree.

The events (what happened), the work rows (what the batches held) and the counts beside the steps (what the ledger said) are written in
different places. A disagreement is a bug, in the product or in an executor, never a result.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.loop.history import History
from workbench.results.facts import TOKEN_KINDS, Facts, Rows, Tokens, facts_of_frames, facts_of_history, joined_facts
from workbench.results.metrics import ENDS, job_frame
from workbench.results.stream import Stream
from workbench.server.protocol import ServerInfo

CLOCK_S = 1e-6  # sums of a day's floating-point seconds agree far better than this


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
    if is_new and isinstance(replay.history, Stream):
        parts = replay.history.parts
    elif is_new and isinstance(replay.history, History):
        parts = [facts_of_history(replay.history, names)]
    else:
        parts = [facts_of_frames(replay, names)]
    facts = parts[0] if len(parts) == 1 else joined_facts(parts)
    if isinstance(replay.executor, ServerInfo):
        check_requests(facts.events, facts.tokens, names)
        return
    for part in parts:
        check_work(part)
    check_time(facts.steps)
    check_requests(facts.events, facts.tokens, names)
    check_littles_law(facts.events, facts.steps, names)
    check_tokens(facts, replay, names)
    check_jobs(facts, replay)


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


def check_time(steps: pd.DataFrame) -> None:
    """Steps come one after another and last what they say: planning and executor; so busy and idle time add up to the span."""
    start, end = steps["start_s"].to_numpy(float), steps["end_s"].to_numpy(float)
    early = np.flatnonzero(start[1:] < end[:-1] - CLOCK_S)
    if len(early):
        k = int(early[0])
        _fail("a step must not begin before the last one ends", f"step {k} to {end[k]:.9f} s, step {k + 1} from {start[k + 1]:.9f} s")
    short = np.flatnonzero(end - start < steps["plan_s"].to_numpy(float) + steps["duration_s"].to_numpy(float) - CLOCK_S)
    if len(short):
        row = steps.iloc[int(short[0])]
        _fail(
            "a step must last at least plan_s + duration_s",
            f"{row['end_s'] - row['start_s']:.9f} s for {row['plan_s']} + {row['duration_s']}",
        )


def check_work(facts: Facts) -> None:
    """The tokens of a step's work rows are the tokens that its features say, kind by kind."""
    if facts.stray is not None:
        _fail("every row of work must belong to a step", f"one of step {facts.stray}")
    for name, done in zip(TOKEN_KINDS, facts.done.T, strict=True):
        said = facts.steps[f"{name}_tokens"].to_numpy(float)
        wrong = np.flatnonzero(np.abs(done - said) > 0.5)
        if len(wrong):
            k = int(wrong[0])
            step = facts.steps["step"].iloc[k]
            _fail(f"a step's {name} tokens must be those of its batch", f"{said[k]:.0f} beside {done[k]:.0f} in step {step}")


def check_requests(events: Mapping[str, Rows], tokens: Tokens, names: pd.Index) -> None:
    """A request arrives once, ends at most once, not before it arrives, and does nothing after its end."""
    num = len(names)
    arrived = np.bincount(events["arrived"].owner, minlength=num)
    ended = np.sum([np.bincount(events[kind].owner, minlength=num) for kind in ENDS], axis=0)
    for count, rule in ((arrived, "a request must arrive at most once"), (ended, "a request must end at most once")):
        if (count > 1).any():
            k = int(np.argmax(count))
            _fail(rule, f"{count[k]} times for {names[k]!r}")
    if (ended > arrived).any():
        _fail("a request must arrive before it ends", f"an end without an arrival for {names[int(np.argmax(ended > arrived))]!r}")
    begin, end = _moments(events, num)
    seen = [("token", tokens.owner, tokens.first_s, tokens.last_s)]
    seen += [(kind, rows.owner, rows.time, rows.time) for kind, rows in events.items() if kind in ("prefill", "preempted")]
    for kind, owner, first_s, last_s in seen:
        late = last_s > end[owner] + CLOCK_S
        wrong = late | ~(first_s >= begin[owner] - CLOCK_S)
        if wrong.any():
            k = int(np.argmax(wrong))
            span = f"{begin[owner[k]]:.6f} to {end[owner[k]]:.6f} s"
            at = last_s[k] if late[k] else first_s[k]
            _fail(f"a request must see its {kind} between arrival and end", f"{names[owner[k]]!r} at {at:.6f} s, there from {span}")


def _moments(events: Mapping[str, Rows], num: int) -> tuple[np.ndarray, np.ndarray]:
    """When each request arrived (nan: never) and ended (inf: not yet)."""
    begin, end = np.full(num, np.nan), np.full(num, np.inf)
    begin[events["arrived"].owner] = events["arrived"].time
    for kind in ENDS:
        end[events[kind].owner] = events[kind].time
    return begin, end


def check_littles_law(events: Mapping[str, Rows], steps: pd.DataFrame, names: pd.Index) -> None:
    """L = lambda W, as the identity that it is on one sample path (Stidham, Operations Research 22, 1974), and the ledger's own count.

    The integral of the number in the system must be the sum of the times that requests spent there; and at the start of every step,
    `waiting + running` as the ledger counted must be the arrivals less the ends until then (an event within `CLOCK_S` counts either way).
    """
    begin, end = _moments(events, len(names))
    there = np.isfinite(begin)
    ended = np.sort(end[there & np.isfinite(end)])
    arrived = np.sort(begin[there])
    if not len(arrived):
        return
    last = max(arrived[-1], ended[-1] if len(ended) else 0.0, float(steps["end_s"].max()) if len(steps) else 0.0)
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
    start = steps["start_s"].to_numpy(float)
    counted = steps["waiting"].to_numpy() + steps["running"].to_numpy()

    def until(moments: np.ndarray, shift: float) -> np.ndarray:
        return np.searchsorted(moments, start + shift, side="right" if shift > 0 else "left")

    most = until(arrived, CLOCK_S) - until(ended, -CLOCK_S)
    least = until(arrived, -CLOCK_S) - until(ended, CLOCK_S)
    wrong = np.flatnonzero((counted < least) | (counted > most))
    if len(wrong):
        k = int(wrong[0])
        _fail("the ledger's count must be arrivals less ends", f"{counted[k]} beside {least[k]} to {most[k]} at {start[k]:.6f} s")


def check_tokens(facts: Facts, replay: Any, names: pd.Index) -> None:
    """Every output token is one row of work at its own position, every finished request has the tokens that its trace asks for.

    A request that was never preempted prefills each prompt token at most once and up to the last, then decodes one position a token.
    """
    num, events, tokens, decodes = len(names), facts.events, facts.tokens, facts.decodes
    if (tokens.owner < 0).any() or (events["prefill"].owner < 0).any():
        _fail("tokens must belong to requests of the trace", "another owner")
    count, total = np.bincount(tokens.owner, tokens.count, num), np.bincount(tokens.owner, tokens.total, num)
    wrong = total != count * (count + 1) / 2
    if wrong.any():
        k = int(np.argmax(wrong))
        _fail(
            "a request's tokens must be numbered 1, 2, ... each once", f"{count[k]:.0f} tokens that sum to {total[k]:.0f} for {names[k]!r}"
        )
    owner, first, length = facts.prefills
    done = np.bincount(owner, length, num)
    said = np.bincount(events["prefill"].owner, events["prefill"].value, num)
    if (done != said).any():
        k = int(np.argmax(done != said))
        _fail("prefilled tokens must be those of the batches", f"{said[k]:.0f} beside {done[k]:.0f} for {names[k]!r}")
    prompt = np.array([r.prompt_tokens for r in replay.trace_requests], float)
    preempted = np.bincount(events["preempted"].owner, minlength=num)
    steady = (preempted == 0) & (count > 0)
    rows, places = np.bincount(decodes.owner, decodes.count, num), np.bincount(decodes.owner, decodes.places, num)
    low, high = np.full(num, np.inf), np.zeros(num)
    np.minimum.at(low, owner, first)
    np.maximum.at(high, owner, first + length)
    laws = (
        ("each prompt token must be prefilled once", done, high - low),
        ("the prefill must reach the end of the prompt", high, prompt),
        ("every token after the first must be one decode row", rows, count - 1),
        ("decode rows must stand at consecutive positions", places, (count - 1) * prompt + (count - 1) * (count - 2) / 2),
    )
    for law, have, want in laws:
        wrong = steady & (have != want)
        if wrong.any():
            k = int(np.argmax(wrong))
            _fail(law, f"{have[k]:.0f} beside {want[k]:.0f} for {names[k]!r}")
    _check_lengths(events["finished"].owner, count.astype(int), replay.trace_requests)


def _check_lengths(finished: np.ndarray, count: np.ndarray, requests: Any) -> None:
    """A finished request has the length that the trace and `max_tokens` give; one whose text decides has at most `max_tokens`."""
    for k in finished.tolist():
        request = requests[k]
        limits = [n for n in (request.output_tokens, request.max_tokens) if n is not None]
        if limits and (count[k] > min(limits) or (request.output_tokens is not None and count[k] != min(limits))):
            _fail(
                "a finished request must have the output tokens that it asks for", f"{count[k]} of {min(limits)} for {request.request_id!r}"
            )


def check_jobs(facts: Facts, replay: Any) -> None:
    """Fine-tune tokens: what was committed went forward before, and through every layer backward; nothing is committed twice."""
    if not replay.finetune_jobs:
        return
    (owner, kind, length), num_layers = facts.work, replay.executor.num_layers
    passes = facts.job_events.loc[facts.job_events["kind"].to_numpy() == "committed", "owner"].value_counts().to_dict()
    for name, row in job_frame(replay.finetune_jobs, facts.job_events).iterrows():
        mine = owner == name
        tokens = length[mine]
        forward, layers = float(tokens[kind[mine] == "finetune"].sum()), int(tokens[kind[mine] == "backward"].sum())
        if forward != row["forward_tokens"]:
            _fail("forward tokens must be those of the batches", f"{row['forward_tokens']:.0f} beside {forward:.0f} for {name!r}")
        if row["committed_tokens"] > forward:
            _fail("committed tokens must have gone forward", f"{row['committed_tokens']:.0f} of {forward:.0f} for {name!r}")
        needed = int(passes.get(str(name), 0)) * num_layers
        if not needed <= layers < needed + max(num_layers, 1):
            _fail("every committed micro-batch must go backward through each layer once", f"{layers} layers beside {needed} for {name!r}")
