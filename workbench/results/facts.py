"""What `conservation` checks, as arrays: taken from a replay's frames, or, without making any, from the history that they are made from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench.features import INDEX
from workbench.loop.history import RUN_COLUMNS, History
from workbench.results.frames import EVENT_COLUMNS, rows_as_given
from workbench.results.metrics import ENDS

TOKEN_KINDS = ("finetune", "evaluate", "prefill", "decode")
_FEATURES = tuple(f"{kind}_tokens" for kind in TOKEN_KINDS)
_EVENTS = ("arrived", *ENDS, "prefill", "preempted")
_KINDS = frozenset((*_EVENTS, "token", "scheduled", "cached", "refused", "adapter_loaded", "adapter_evicted"))  # no job has these


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
    """`steps` has at least the times, the counts and the planned tokens of each step, `done` [steps, 4] the tokens of its rows of work.

    `stray` is the step number of a row of work whose step there is not. `prefills` are (owner, start, tokens) of the prefill rows, `work`
    (owner, kind, tokens) of the jobs' rows, `job_events` at least the jobs' rows of `events`.
    """

    steps: pd.DataFrame
    events: Mapping[str, Rows]
    tokens: Tokens
    decodes: Decodes
    prefills: tuple[np.ndarray, np.ndarray, np.ndarray]
    done: np.ndarray
    stray: int | None
    work: tuple[np.ndarray, np.ndarray, np.ndarray]
    job_events: pd.DataFrame


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
    return Facts(
        steps=steps,
        events=by_kind,
        tokens=Tokens(tokens.owner, np.ones(len(tokens.owner)), tokens.value, tokens.time, tokens.time),
        decodes=Decodes(owner[decode], np.ones(int(decode.sum())), start[decode]),
        prefills=(owner[prefill], start[prefill], length[prefill]),
        done=_done(kind[at >= 0], at[at >= 0], length[at >= 0], len(steps)),
        stray=int(step[at < 0][0]) if (at < 0).any() else None,
        work=(work["owner"].to_numpy(), kind, work["tokens"].to_numpy()),
        job_events=events,
    )


def facts_of_history(history: History, names: pd.Index) -> Facts:
    """The facts as a history tells them: a run of tokens is what one request decoded with the group without a break."""
    by_kind = _by_kind_of_rows(history.events, names)
    tokens, decodes, at_step = _of_group(history, names)
    alone, is_decode = by_kind.pop("token"), [row for row in history.work if row[2] == "decode"]
    prefills = [row for row in history.work if row[2] == "prefill"]
    others = [row for row in history.work if row[2] not in ("prefill", "decode")]
    ones = np.ones(len(alone.owner))
    owner = {kind: names.get_indexer(_column(rows, 1)) for kind, rows in (("prefill", prefills), ("decode", is_decode))}
    done = _done(_column(history.work, 2), _numbers(history.work, 0) - history.first_step, _numbers(history.work, 4), len(at_step))
    done[:, TOKEN_KINDS.index("decode")] += at_step
    return Facts(
        steps=_plain_steps(history),
        events=by_kind,
        tokens=Tokens(*map(_joined, zip(tokens, (alone.owner, ones, alone.value, alone.time, alone.time), strict=True))),
        decodes=Decodes(*map(_joined, zip(decodes, (owner["decode"], np.ones(len(is_decode)), _numbers(is_decode, 3)), strict=True))),
        prefills=(owner["prefill"], _numbers(prefills, 3).astype(float), _numbers(prefills, 4).astype(float)),
        done=done,
        stray=None,
        work=(_column(others, 1), _column(others, 2), _numbers(others, 4)),
        job_events=rows_as_given([row for row in history.events if row[2] not in _KINDS], EVENT_COLUMNS),
    )


def joined_facts(parts: Sequence[Facts]) -> Facts:
    """The facts of a replay from those of its parts, one after another; without `done`, which is of use within a part only."""
    first = parts[0]
    return Facts(
        steps=pd.concat([part.steps for part in parts], ignore_index=True),
        events={kind: Rows(*map(_joined, zip(*(part.events[kind] for part in parts), strict=True))) for kind in first.events},
        tokens=Tokens(*map(_joined, zip(*(part.tokens for part in parts), strict=True))),
        decodes=Decodes(*map(_joined, zip(*(part.decodes for part in parts), strict=True))),
        prefills=_three(part.prefills for part in parts),
        done=np.zeros((0, len(TOKEN_KINDS))),
        stray=None,
        work=_three(part.work for part in parts),
        job_events=pd.concat([part.job_events for part in parts], ignore_index=True),
    )


def _joined(values: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(values))


def _three(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, third = map(_joined, zip(*parts, strict=True))
    return first, second, third


def _column(rows: Sequence[tuple[Any, ...]], place: int) -> np.ndarray:
    out = np.empty(len(rows), object)
    out[:] = [row[place] for row in rows]
    return out


def _numbers(rows: Sequence[tuple[Any, ...]], place: int) -> np.ndarray:
    return np.array([row[place] for row in rows], np.int64)


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


def _by_kind_of_rows(events: Sequence[tuple[Any, ...]], names: pd.Index) -> dict[str, Rows]:
    """What `_by_kind` gives for a frame of these rows, which is not made."""
    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in (*_EVENTS, "token")}
    for row in events:
        if row[2] in found:
            found[row[2]].append(row)
    out = {}
    for name, rows in found.items():
        time, step, value = (np.array([row[k] for row in rows], kind) for k, kind in ((0, float), (1, np.int64), (5, float)))
        out[name] = Rows(time, step, names.get_indexer(_column(rows, 3)), value)
    return out


def _done(kind: np.ndarray, at: np.ndarray, tokens: np.ndarray, num_steps: int) -> np.ndarray:
    """Tokens of each kind in each step [steps, 4] from rows of work."""
    return np.column_stack([np.bincount(at[kind == name], tokens[kind == name], num_steps).astype(float) for name in TOKEN_KINDS])


def _plain_steps(history: History) -> pd.DataFrame:
    """The columns of `steps` that are checked."""
    num, features = history.run_lengths(), history.run_rows()[:, len(RUN_COLUMNS) :]
    waiting, running = history.run_counts()
    data = {"step": np.arange(history.first_step, history.num_steps)} | history.all_times()
    data |= {"waiting": np.repeat(waiting, num), "running": np.repeat(running, num)}
    return pd.DataFrame(data | {name: np.repeat(features[:, INDEX[name]], num) for name in _FEATURES})
