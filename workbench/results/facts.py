"""What `conservation` checks, as arrays: taken from a replay's frames, or, without making any, from the history that they are made from."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench.core import ENDS
from workbench.features import INDEX
from workbench.loop.history import RUN_COLUMNS, History

TOKEN_KINDS = ("finetune", "evaluate", "prefill", "decode")
_FEATURES = tuple(f"{kind}_tokens" for kind in TOKEN_KINDS)
_TIMES = ("start_s", "end_s", "plan_s", "duration_s")
_EVENTS = ("arrived", *ENDS, "prefill", "preempted")
_JOB_EVENTS = ("forward", "committed")
_JOB_WORK = ("finetune", "evaluate", "backward")


class Rows(NamedTuple):
    """Columns of the rows of some kinds, owners as positions in a common index."""

    time: np.ndarray
    step: np.ndarray
    owner: np.ndarray
    value: np.ndarray


class Tokens(NamedTuple):
    """Runs of consecutive tokens of a request each: how many, the sum of their numbers, when the first and the last came."""

    owner: np.ndarray
    count: np.ndarray
    total: np.ndarray
    first_s: np.ndarray
    last_s: np.ndarray


class Decodes(NamedTuple):
    """Runs of consecutive decode rows of a request each: how many, and the sum of their positions."""

    owner: np.ndarray
    count: np.ndarray
    places: np.ndarray


class Facts(NamedTuple):
    """`steps` has the times, the counts and the planned tokens of each step by column, `done` [steps, 4] the tokens of its rows of work.

    `stray` is the step number of a row of work whose step there is not. `prefills` are (owner, start, tokens) of the prefill rows. By
    owner and kind, `job_work` sums up the tokens (layers) of the jobs' rows of work, `job_events` has (number, sum) of their events.
    """

    steps: Mapping[str, np.ndarray]
    events: Mapping[str, Rows]
    tokens: Tokens
    decodes: Decodes
    prefills: tuple[np.ndarray, np.ndarray, np.ndarray]
    done: np.ndarray
    stray: int | None
    job_work: Mapping[tuple[str, str], float]
    job_events: Mapping[tuple[str, str], tuple[int, float]]


def facts_of_frames(replay: Any, names: pd.Index) -> Facts:
    """The facts as the replay's frames tell them."""
    events, steps, work = replay.events, replay.steps, replay.work
    by_kind = _by_kind(events, names)
    tokens = by_kind.pop("token")
    kind, step = work["kind"].to_numpy(), work["step"].to_numpy()
    owner = names.get_indexer(pd.Index(work["owner"].to_numpy(object)))
    start, length = work["start"].to_numpy(float), work["tokens"].to_numpy(float)
    decode, prefill = (kind == "decode") & (owner >= 0), (kind == "prefill") & (owner >= 0)
    at = pd.Index(steps["step"].to_numpy()).get_indexer(step)
    of_jobs = work[np.isin(kind, _JOB_WORK)].groupby(["owner", "kind"])["tokens"].sum()
    job_events = events[np.isin(events["kind"], _JOB_EVENTS)].groupby(["owner", "kind"])["value"].agg(["size", "sum"])
    counts = {name: steps[name].to_numpy() for name in ("step", "waiting", "running")}
    return Facts(
        steps=counts | {name: steps[name].to_numpy(float) for name in (*_TIMES, *_FEATURES)},
        events=by_kind,
        tokens=Tokens(tokens.owner, np.ones(len(tokens.owner)), tokens.value, tokens.time, tokens.time),
        decodes=Decodes(owner[decode], np.ones(int(decode.sum())), start[decode]),
        prefills=(owner[prefill], start[prefill], length[prefill]),
        done=_done(kind[at >= 0], at[at >= 0], length[at >= 0], len(steps)),
        stray=int(step[at < 0][0]) if (at < 0).any() else None,
        job_work=of_jobs.to_dict(),
        job_events=dict(zip(job_events.index, job_events.itertuples(index=False, name=None), strict=True)),
    )


def facts_of_history(history: History, names: pd.Index) -> Facts:
    """The facts as a history tells them: a run of tokens is what one request decoded with the group without a break."""
    events = _by_kind_of_rows(history.events)
    work = _by_kind_of_rows(history.work)
    tokens, decodes, at_step = _of_group(history, names)
    by_kind = {kind: _rows(events.get(kind, []), names) for kind in (*_EVENTS, "token")}
    alone = by_kind.pop("token")
    ones = np.ones(len(alone.owner))
    places = {kind: _places(work.get(kind, []), names) for kind in ("prefill", "decode")}
    owner, start, _ = places["decode"]
    done = np.zeros((len(at_step), len(TOKEN_KINDS)))
    for k, kind in enumerate(TOKEN_KINDS):
        np.add.at(done[:, k], _numbers(work.get(kind, []), 0) - history.first_step, _numbers(work.get(kind, []), 4))
    done[:, TOKEN_KINDS.index("decode")] += at_step
    job_work: Counter[tuple[str, str]] = Counter()
    for row in (row for kind in _JOB_WORK for row in work.get(kind, [])):
        job_work[row[1], row[2]] += row[4]
    job_events: dict[tuple[str, str], tuple[int, float]] = {}
    for row in (row for kind in _JOB_EVENTS for row in events.get(kind, [])):
        num, value = job_events.get((row[3], row[2]), (0, 0.0))
        job_events[row[3], row[2]] = (num + 1, value + row[5])
    return Facts(
        steps=_plain_steps(history),
        events=by_kind,
        tokens=Tokens(*map(_joined, zip(tokens, (alone.owner, ones, alone.value, alone.time, alone.time), strict=True))),
        decodes=Decodes(*map(_joined, zip(decodes, (owner, np.ones(len(owner)), start), strict=True))),
        prefills=places["prefill"],
        done=done,
        stray=None,
        job_work=job_work,
        job_events=job_events,
    )


def _joined(values: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(values))


def _by_kind_of_rows(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of events or of work, whose third column is their kind."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        kept = found.get(row[2])
        if kept is None:
            found[row[2]] = [row]
        else:
            kept.append(row)
    return found


def _numbers(rows: Sequence[tuple[Any, ...]], place: int, kind: Any = np.int64) -> np.ndarray:
    return np.array([row[place] for row in rows], kind)


def _owners(rows: Sequence[tuple[Any, ...]], place: int, names: pd.Index) -> np.ndarray:
    return names.get_indexer(pd.Index([row[place] for row in rows], dtype=object))


def _rows(rows: Sequence[tuple[Any, ...]], names: pd.Index) -> Rows:
    """Rows of events."""
    return Rows(_numbers(rows, 0, float), _numbers(rows, 1), _owners(rows, 3, names), _numbers(rows, 5, float))


def _places(rows: Sequence[tuple[Any, ...]], names: pd.Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner, start and tokens of rows of work."""
    return _owners(rows, 1, names), _numbers(rows, 3, float), _numbers(rows, 4, float)


def _of_group(history: History, names: pd.Index) -> tuple[Tokens, Decodes, np.ndarray]:
    """What the group decoded: tokens and decode rows of each stint, and how many decode rows each step had [steps]."""
    stints = history.stints()
    first, last = history.spans(stints)
    stints = [s for s, n in zip(stints, (last - first).tolist(), strict=True) if n]
    first, last = first[last > first], last[last > first]
    count, begin = last - first, first - history.first_count
    base, prompt = (np.array([getattr(s, name) for s in stints], np.int64) for name in ("base", "prompt"))
    owner = names.get_indexer(pd.Index([s.owner for s in stints], dtype=object))
    ends = np.array(history.decoded_s, float)
    total = count * (2 * base + first + last + 1) / 2  # of the tokens base + first + 1 to base + last
    tokens = Tokens(owner, count, total, ends[begin], ends[begin + count - 1])
    num = len(ends)
    change = np.bincount(begin, minlength=num + 1) - np.bincount(last - history.first_count, minlength=num + 1)
    rows = np.zeros(len(history.free_blocks))
    rows[history.steps_of_counts()[0] - history.first_step] = np.cumsum(change)[:num]
    for step, said in history.odd_rows.items():
        rows[step - history.first_step] = said
    return tokens, Decodes(owner, count, total + count * (prompt - 2)), rows


def _by_kind(events: pd.DataFrame, names: pd.Index) -> dict[str, Rows]:
    owner = names.get_indexer(pd.Index(events["owner"].to_numpy(object)))
    kind, kinds = pd.factorize(events["kind"].to_numpy(object))
    columns = [events["time_s"].to_numpy(float), events["step"].to_numpy(), owner, events["value"].to_numpy(float)]
    out = {}
    for name in (*_EVENTS, "token"):
        mask = kind == (list(kinds).index(name) if name in kinds else -2)
        out[name] = Rows(*(c[mask] for c in columns))
    return out


def _done(kind: np.ndarray, at: np.ndarray, tokens: np.ndarray, num_steps: int) -> np.ndarray:
    """Tokens of each kind in each step [steps, 4] from rows of work."""
    return np.column_stack([np.bincount(at[kind == name], tokens[kind == name], num_steps).astype(float) for name in TOKEN_KINDS])


def _plain_steps(history: History) -> dict[str, np.ndarray]:
    """The columns of `steps` that are checked."""
    num, features = history.run_lengths(), history.run_rows()[:, len(RUN_COLUMNS) :]
    waiting, running = history.run_counts()
    data = {"step": np.arange(history.first_step, history.num_steps)} | history.all_times(_TIMES)
    data |= {"waiting": np.repeat(waiting, num), "running": np.repeat(running, num)}
    return data | {name: np.repeat(features[:, INDEX[name]], num) for name in _FEATURES}
