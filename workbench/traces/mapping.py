"""Users' own tables as canonical columns: which of their columns is which of ours, and in which unit their times are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import did_you_mean, require
from workbench.traces.frame import COLUMNS

TIMES = ("arrival_s", "deadline_s", "think_s")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}


def check_mapping(columns: Mapping[str, str], units: Mapping[str, str] | None) -> None:
    """Raise ValueError for a name or a unit that there is not."""
    for name in columns:
        require(name in COLUMNS, "columns must map a trace's columns to the file's", name, did_you_mean(str(name), COLUMNS))
    for name, unit in (units or {}).items():
        require(name in TIMES, "units are for columns of times", name, did_you_mean(str(name), TIMES))
        require(unit in (*UNITS, "datetime"), f"a unit must be one of {', '.join(UNITS)} or datetime", unit)


def mapped(table: pd.DataFrame, columns: Mapping[str, str], units: Mapping[str, str] | None = None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """(the table with our column names, times in seconds from the first arrival, sorted by it; notes on what was done).

    The index holds the rows' places in the table. Missing ids are numbers from 0. Times that are dates need no unit. A value that is no
    time stays as it is, for the trace's check to name. Raises ValueError for a column that the table lacks.
    """
    check_mapping(columns, units)
    missing = [c for c in columns.values() if c not in table]
    if missing:
        raise ValueError(
            f"columns must name columns of the file, got {missing[0]!r}. {did_you_mean(missing[0], list(map(str, table.columns)))}"
        )
    frame = pd.DataFrame({name: table[source] for name, source in columns.items()}).reset_index(drop=True)
    if "request_id" not in frame:
        frame.insert(0, "request_id", [str(i) for i in range(len(frame))])
    left_out = [str(c) for c in table.columns if c not in set(columns.values())]
    notes = [f"columns left out: {', '.join(left_out)}"] if left_out else []
    given = units or {}
    for name in set(TIMES) & set(frame.columns):
        frame[name] = _seconds(frame[name], given.get(name))
    if "arrival_s" not in frame:
        return frame, tuple(notes)
    arrival: Any = pd.to_numeric(frame["arrival_s"], errors="coerce")
    if len(frame) and not arrival.isna().any() and np.isfinite(arrival).all():
        first = float(arrival.min())
        for name in ("arrival_s", "deadline_s"):
            if name in frame and first != 0:
                # rounded to a nanosecond: subtraction leaves digits that the file never had
                frame[name] = (pd.to_numeric(frame[name], errors="coerce") - first).round(9)
        if not arrival.is_monotonic_increasing:
            late = int((arrival < arrival.cummax()).sum())
            frame = frame.sort_values("arrival_s", kind="stable")
            notes.append(f"sorted by arrival: {late:,} rows were out of order")
    return frame, tuple(notes)


def _seconds(column: Any, unit: str | None) -> Any:
    numbers = pd.to_numeric(column, errors="coerce") if not pd.api.types.is_datetime64_any_dtype(column) else None
    if unit not in (None, "datetime") or (unit is None and numbers is not None and not numbers.isna().all()):
        scaled = numbers if numbers is None or unit is None else numbers * UNITS[unit]
        return column if scaled is None else scaled.where(scaled.notna(), column)
    dates: Any = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    if dates.isna().all():
        return column
    seconds = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    return seconds.where(seconds.notna(), column)
