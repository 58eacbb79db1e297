"""The columns of a replay's frames, and frames from rows or columns with the types that they have everywhere."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from workbench.features import NAMES
from workbench.results.step_parts import PART_COLUMNS

EVENT_COLUMNS = ("time_s", "step", "kind", "owner", "adapter", "value", "note")
STEP_COLUMNS = (
    "step",
    "start_s",
    "end_s",
    "duration_s",
    "gpu_s",
    "host_s",
    "plan_s",
    "predicted_s",
    "stopped_early",
    "waiting",
    "running",
    "free_blocks",
    *NAMES,
    "queue_why",
    *PART_COLUMNS,
)
WORK_COLUMNS = ("step", "owner", "kind", "start", "tokens", "adapter", "version")
_TEXT = ("kind", "owner", "adapter", "note", "queue_why")
_INTEGERS = ("step", "waiting", "running", "free_blocks", "start", "tokens", "version")


def column(name: str, values: Any) -> pd.Series:
    """A frame's column: text as objects whatever it holds, counts as integers, everything else as floats."""
    dtype = object if name in _TEXT else "int64" if name in _INTEGERS else "bool" if name == "stopped_early" else "float64"
    return pd.Series(values, dtype=dtype)


def rows_to_frame(rows: Sequence[tuple[Any, ...]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame from row tuples. Events come in the order of time, ties as given."""
    frame = rows_as_given(rows, columns)
    return sorted_by_time(frame) if columns[0] == "time_s" else frame


def rows_as_given(rows: Sequence[tuple[Any, ...]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame from row tuples in their order."""
    data = dict(zip(columns, zip(*rows, strict=True), strict=True)) if rows else {name: [] for name in columns}
    return pd.DataFrame({name: column(name, data[name]) for name in columns})


def sorted_by_time(events: pd.DataFrame) -> pd.DataFrame:
    """Events in the order of time, ties as they were."""
    return events if events["time_s"].is_monotonic_increasing else events.sort_values("time_s", kind="stable", ignore_index=True)


def text_as_objects(frame: pd.DataFrame) -> pd.DataFrame:
    """Text columns as objects with None for what is missing, as `rows_to_frame` makes them; for frames that were read from a file."""
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.StringDtype) or frame[name].dtype == object or isinstance(frame[name].dtype, pd.Int64Dtype):
            values = frame[name].astype(object)
            frame[name] = values.where(values.notna(), None)
    return frame
