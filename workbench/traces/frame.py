"""The rules of a trace's frame: which columns there are, and what each value must be. One place for every check.

`canonical(frame)` gives the frame back with known columns in a fixed order and fixed types, or raises ValueError with the rule, the
value, its row and the next step.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (pandas types a column as a union of everything that a frame can give)

import hashlib
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import did_you_mean

MAX_TOKENS = 10_000_000  # beyond any context of today: a larger count is a mistake in the data
MAX_TIME_S = 1e9  # about 32 years: a larger time is a clock in milliseconds or since 1970
TEXTS = {"adapter": None, "tenant": "", "slo_class": "", "session": None, "parent_id": None, "prompt": None}
COUNTS = ("prompt_tokens", "output_tokens", "max_tokens")
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
NUMBERS = ("think_s", "temperature", "top_p", "repetition_penalty", "top_k", "seed", "priority", "deadline_s")
COLUMNS = (
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "adapter",
    "max_tokens",
    "prompt",
    "prompt_token_ids",
    "tenant",
    "slo_class",
    "priority",
    "deadline_s",
    "session",
    "parent_id",
    "think_s",
    "prefix_ids",
    *SAMPLING,
    "top_k",
)


def canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """A checked copy with columns in the order of `COLUMNS`, ids and names as text, missing values as None or NA. Index 0..n-1."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"a trace must be a DataFrame, got {type(frame).__name__}. Use pd.DataFrame(rows).")
    check_columns(frame)
    frame = frame.reset_index(drop=True)
    columns: dict[str, Any] = {"request_id": check_ids(frame), "arrival_s": check_times(frame)}
    for name in COUNTS:
        if name in frame:
            columns[name] = check_counts(frame, name)
    columns["adapter"] = _texts(frame, "adapter") if "adapter" in frame else pd.Series([None] * len(frame), dtype=object)
    for name, default in TEXTS.items():
        if name != "adapter" and name in frame:
            columns[name] = pd.Series([default if text is None else text for text in _texts(frame, name)], dtype=object)
    for name in ("prompt_token_ids", "prefix_ids"):
        if name in frame:
            columns[name] = check_id_sequences(frame, name)
    columns |= check_numbers(frame)
    checked = pd.DataFrame({name: columns[name] for name in COLUMNS if name in columns})
    _check_prompts(checked)
    _check_together(checked)
    return checked


def content_checksum(frame: pd.DataFrame) -> str:
    """16 hex digits of a canonical frame's content; equal on every machine and pandas version."""
    digest = hashlib.blake2b(digest_size=8)
    for name in frame.columns:
        column = frame[name]
        digest.update(name.encode())
        if column.dtype == object:
            digest.update(repr(column.tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(column.to_numpy(dtype="<f8", na_value=np.nan)).tobytes())
    return digest.hexdigest()


class TraceRuleError(ValueError):
    """Rows of a column break a rule: `rule`, `column`, `rows` (positions, ascending) and the next `step`; the message names the first."""

    def __init__(self, rule: str, frame: pd.DataFrame, rows: Sequence[int], column: str, step: str) -> None:
        value = frame[column].iloc[rows[0]]
        value = value.item() if isinstance(value, np.generic) else value
        super().__init__(f"{rule}, got {value!r} in row {rows[0]}. {step}")
        self.rule, self.column, self.rows, self.step = rule, column, rows, step

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """So that it comes through from another process as what it is."""
        return _restored, (self.args, vars(self))


def _restored(args: tuple[Any, ...], values: dict[str, Any]) -> TraceRuleError:
    error = TraceRuleError.__new__(TraceRuleError, *args)
    vars(error).update(values)
    return error


def check_columns(frame: pd.DataFrame) -> None:
    names = list(frame.columns)
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"a trace's columns must be known ones, got {name!r}. {did_you_mean(str(name), COLUMNS)} Rename or drop it.")
        if names.count(name) > 1:
            raise ValueError(f"a trace's columns must be distinct, got {name!r} twice. Drop one.")
    for name, step in (("request_id", "Add df.assign(request_id=range(len(df)))."), ("arrival_s", "Add arrival times in seconds from 0.")):
        if name not in names:
            raise ValueError(f"a trace must have the column {name!r}, got {names}. {step}")
    if "output_tokens" in names and not {"prompt_tokens", "prompt", "prompt_token_ids"} & set(names):
        raise ValueError(f"output_tokens must come with prompt_tokens, prompt or prompt_token_ids, got {names}. Add one of them.")


def _numeric(frame: pd.DataFrame, name: str, *, missing: bool, step: str) -> pd.Series:
    """The column as float64 with NaN for missing; raises for text, dates, truth values, infinities and unasked missing values."""
    column = frame[name]
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column) or column.dtype == bool:
        _require(frame, name, pd.Series(True, index=frame.index), f"{name} must be numbers, not {column.dtype}", step)
    absent = column.isna()
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    _require(frame, name, values.isna() & ~absent, f"{name} must be a number", step)
    if not missing:
        _require(frame, name, absent, f"{name} must not be missing", step)
    _require(frame, name, pd.Series(np.isinf(values)), f"{name} must be finite", step)
    return values


def _require(frame: pd.DataFrame, name: str, broken: pd.Series, rule: str, step: str) -> None:
    rows = np.flatnonzero(broken.to_numpy(dtype=bool)).tolist()
    if rows:
        raise TraceRuleError(rule, frame, rows, name, step)


def check_times(frame: pd.DataFrame) -> pd.Series:
    times = _numeric(frame, "arrival_s", missing=False, step="Give seconds from the trace's start, e.g. (t - t.min()).dt.total_seconds().")
    _require(frame, "arrival_s", times < 0, "arrival_s must be at least 0", "Rebase the times: df.arrival_s - df.arrival_s.min().")
    _require(
        frame,
        "arrival_s",
        times > MAX_TIME_S,
        f"arrival_s must be at most {MAX_TIME_S:g} seconds",
        "Convert to seconds from the trace's start.",
    )
    late = times < times.cummax()
    _require(
        frame, "arrival_s", late, "arrival_s must not decrease from row to row", "Sort first: df.sort_values('arrival_s', kind='stable')."
    )
    return times


def check_counts(frame: pd.DataFrame, name: str) -> pd.Series:
    step = {
        "prompt_tokens": "Drop or repair the row (failed requests are often logged with 0 tokens).",
        "output_tokens": "Drop or repair the row, or leave the value missing so that the text decides.",
        "max_tokens": "Leave it missing so that the context limit decides.",
    }[name]
    may_miss = name != "prompt_tokens" or "prompt" in frame or "prompt_token_ids" in frame
    values = _numeric(frame, name, missing=may_miss, step=step)
    _require(frame, name, values < 1, f"{name} must be at least 1", step)
    _require(frame, name, values > MAX_TOKENS, f"{name} must be at most {MAX_TOKENS:,}", step)
    _require(frame, name, (values % 1).fillna(0) != 0, f"{name} must be a whole number", step)
    return values.astype("Int64") if values.isna().any() else values.astype("int64")


def _text(value: Any) -> str | None:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _texts(frame: pd.DataFrame, name: str) -> pd.Series:
    return pd.Series([_text(value) or None for value in frame[name].tolist()], dtype=object)


def check_ids(frame: pd.DataFrame) -> pd.Series:
    ids = _texts(frame, "request_id")
    _require(
        frame, "request_id", ids.isna(), "request_id must not be missing or empty", "Number the rows: df.assign(request_id=range(len(df)))."
    )
    _require(frame, "request_id", ids.duplicated(), "request_id must be unique", "Number the rows: df.assign(request_id=range(len(df))).")
    return ids


def check_id_sequences(frame: pd.DataFrame, name: str) -> pd.Series:
    rows: list[tuple[int, ...] | None] = []
    broken: list[int] = []
    for row, value in enumerate(frame[name].tolist()):
        if value is None or (np.ndim(value) == 0 and not isinstance(value, str) and pd.isna(value)):
            rows.append(None if name == "prompt_token_ids" else ())
            continue
        items = [] if isinstance(value, str) or np.ndim(value) != 1 else list(value)
        is_empty = not items and name == "prompt_token_ids"
        if isinstance(value, str) or np.ndim(value) != 1 or is_empty or not all(isinstance(i, Integral) and i >= 0 for i in items):
            broken.append(row)
            continue
        rows.append(tuple(int(i) for i in items))
    if broken:
        rule, step = f"{name} must be a sequence of integers of at least 0", "Give a list of ids, or leave it missing."
        raise TraceRuleError(rule, frame, broken, name, step)
    return pd.Series(rows, dtype=object)


def check_numbers(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Deadlines, priorities, think times and sampling options; a missing value takes the documented default."""
    columns: dict[str, pd.Series] = {}
    rules: dict[str, tuple[Callable[[pd.Series], pd.Series], str]] = {
        "think_s": (lambda v: v < 0, "think_s must be at least 0"),
        "temperature": (lambda v: v < 0, "temperature must be at least 0 (0 is greedy)"),
        "top_p": (lambda v: (v <= 0) | (v > 1), "top_p must lie in (0, 1]"),
        "repetition_penalty": (lambda v: v <= 0, "repetition_penalty must be above 0 (1 is off)"),
        "top_k": (lambda v: (v < 1) | (v % 1 != 0), "top_k must be a whole number of at least 1"),
        "seed": (lambda v: (v < 0) | (v % 1 != 0) | (v >= 2**53), "seed must be a whole number in 0..2^53-1"),
        "priority": (lambda v: v % 1 != 0, "priority must be a whole number"),
        "deadline_s": (lambda v: v < frame["arrival_s"].astype("float64"), "deadline_s must not lie before arrival_s"),
    }
    for name, (is_broken, rule) in rules.items():
        if name not in frame:
            continue
        values = _numeric(frame, name, missing=True, step="Leave it missing for the default.")
        _require(frame, name, is_broken(values) & values.notna(), rule, "Leave it missing for the default.")
        if name in ("deadline_s", "top_k"):
            columns[name] = values if name == "deadline_s" else values.astype("Int64")
        else:
            default = {"think_s": 0.0, "priority": 0, **SAMPLING}[name]
            columns[name] = values.fillna(default).astype("int64" if isinstance(default, int) else "float64")
    return columns


def _check_prompts(frame: pd.DataFrame) -> None:
    """A request has exactly one kind of prompt, and its length agrees with its token ids (which also fill a missing length in)."""
    has_text = frame["prompt"].notna() if "prompt" in frame else pd.Series(False, index=frame.index)
    has_ids = frame["prompt_token_ids"].notna() if "prompt_token_ids" in frame else pd.Series(False, index=frame.index)
    _require(frame, "request_id", has_text & has_ids, "a request must not have both prompt and prompt_token_ids", "Drop one of the two.")
    if "prompt_tokens" not in frame:
        if has_text.any() or has_ids.any():
            _require(frame, "request_id", ~(has_text | has_ids), "every request must have a prompt", "Give prompt or prompt_token_ids.")
        return
    count = frame["prompt_tokens"]
    _require(
        frame, "request_id", count.isna() & ~has_text & ~has_ids, "prompt_tokens must be given where there is no prompt", "Add the count."
    )
    if has_ids.any():
        lengths = frame["prompt_token_ids"].map(lambda ids: len(ids) if ids is not None else np.nan)
        differ = has_ids & count.notna() & (lengths != count.astype("Float64")).fillna(False)
        _require(
            frame, "prompt_tokens", differ, "prompt_tokens must equal the number of prompt_token_ids", "Drop the column prompt_tokens."
        )


def _check_together(frame: pd.DataFrame) -> None:
    if "max_tokens" in frame and "output_tokens" in frame:
        over = (frame["output_tokens"].astype("Float64") > frame["max_tokens"].astype("Float64")).fillna(False)
        _require(frame, "output_tokens", over, "output_tokens must be at most the request's max_tokens", "Lower it or drop max_tokens.")
    if "parent_id" not in frame:
        return
    row_of = {request_id: row for row, request_id in enumerate(frame["request_id"])}
    broken = pd.Series([parent is not None and row_of.get(parent, row) >= row for row, parent in enumerate(frame["parent_id"])], dtype=bool)
    rule = "parent_id must name an earlier request of the trace"
    _require(frame, "parent_id", broken, rule, "Sort parents first, or leave it missing.")
