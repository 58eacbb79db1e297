"""Changes of a trace's canonical frame, as functions from frame to frame."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from workbench.core import Request, Sampling
from workbench.seeds import generator
from workbench.traces.frame import SAMPLING


def session_roots(frame: pd.DataFrame) -> np.ndarray:
    """For each row the row of its closed session's first request; itself where a request waits for no other."""
    roots = np.arange(len(frame))
    if "parent_id" in frame:
        row_of = {request_id: row for row, request_id in enumerate(frame["request_id"])}
        for row, parent in enumerate(frame["parent_id"]):
            if parent is not None:
                roots[row] = roots[row_of[parent]]
    return roots


def kept(frame: pd.DataFrame, mask: np.ndarray) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """(the rows of `mask`, notes). One whose parent is cut off arrives at its own time, and a note says how many."""
    frame = frame.loc[mask].reset_index(drop=True)
    if "parent_id" not in frame:
        return frame, ()
    known = {None, *frame["request_id"]}
    orphans = sum(parent not in known for parent in frame["parent_id"])
    if orphans == 0:
        return frame, ()
    parents = [parent if parent in known else None for parent in frame["parent_id"]]
    frame = frame.assign(parent_id=pd.Series(parents, dtype=object))
    return frame, (f"{orphans:,} requests whose parent was cut off arrive at their own time",)


def thinned(frame: pd.DataFrame, count: int, *key: int | str) -> np.ndarray:
    """Mask of `count` rows drawn without replacement; a closed session is in it as a whole, so that it may hold a few less."""
    roots = session_roots(frame)
    order = generator("thin", *key).permutation(np.unique(roots))
    sizes = np.bincount(roots, minlength=len(frame))[order]
    return np.isin(roots, order[np.cumsum(sizes) <= count])


def superposed(frame: pd.DataFrame, count: int, duration_s: float, seed: int) -> pd.DataFrame:
    """The frame and copies of it, each turned by a random offset within `duration_s`; the last copy is thinned to reach `count` rows."""
    frames, missing, copy = [frame], count - len(frame), 1
    while missing > 0:
        part = frame if missing >= len(frame) else kept(frame, thinned(frame, missing, seed, copy))[0]
        if len(part) == 0:  # closed sessions are all longer than what is missing
            break
        offset = generator("superpose", seed, copy).uniform(0, duration_s)
        times = part["arrival_s"].to_numpy()
        first = times[session_roots(part)]
        turned = np.mod(first + offset, duration_s) + (times - first)
        frames.append(renamed(moved(part, turned), lambda name, k=copy: f"{name}~{k}"))
        missing -= len(part)
        copy += 1
    return pd.concat(frames, ignore_index=True).sort_values("arrival_s", kind="stable", ignore_index=True)


def moved(frame: pd.DataFrame, times: np.ndarray) -> pd.DataFrame:
    """The frame with its arrivals at `times` (deadlines move along), sorted."""
    columns: dict[str, Any] = {"arrival_s": times}
    if "deadline_s" in frame:
        columns["deadline_s"] = frame["deadline_s"].to_numpy() + (times - frame["arrival_s"].to_numpy())
    return frame.assign(**columns).sort_values("arrival_s", kind="stable", ignore_index=True)


def renamed(frame: pd.DataFrame, rename: Callable[[str], str]) -> pd.DataFrame:
    """Other request ids, and the same change in parents and sessions."""
    columns = {}
    for column in ("request_id", "parent_id", "session"):
        if column in frame:
            columns[column] = pd.Series([None if name is None else rename(name) for name in frame[column]], dtype=object)
    return frame.assign(**columns)


def requests_of(frame: pd.DataFrame) -> tuple[Request, ...]:
    """A canonical frame's rows as requests."""
    columns = {name: [_plain(value) for value in frame[name].tolist()] for name in frame.columns}
    options = [name for name in (*SAMPLING, "top_k") if name in columns]
    sampling = [columns.pop(name) for name in options]
    if "prompt_token_ids" in columns:
        given = columns.get("prompt_tokens", [None] * len(frame))
        columns["prompt_tokens"] = [
            count if ids is None else len(ids) for count, ids in zip(given, columns["prompt_token_ids"], strict=True)
        ]
    # A text prompt's length is known only to the model's tokenizer: the executor fills it in when it admits the request.
    columns["prompt_tokens"] = [0 if count is None else count for count in columns.get("prompt_tokens", [0] * len(frame))]
    columns.setdefault("output_tokens", [None] * len(frame))
    names = list(columns)
    rows = zip(*columns.values(), strict=True)
    if not options:
        return tuple(Request(**dict(zip(names, row, strict=True))) for row in rows)
    drawn = [Sampling(**dict(zip(options, values, strict=True))) for values in zip(*sampling, strict=True)]
    return tuple(Request(**dict(zip(names, row, strict=True)), sampling=how) for row, how in zip(rows, drawn, strict=True))


def _plain(value: Any) -> Any:
    """A cell as a plain Python value, None where it is missing."""
    if value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value
