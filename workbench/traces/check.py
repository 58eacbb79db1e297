"""`traces.validate`: everything that is wrong with a trace's rows, at once; `Trace.from_frame` stops at the first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import did_you_mean
from workbench.traces import frame as trace_frame

PROBLEM_COLUMNS = ("row", "column", "value", "rule", "step")
SHOWN_ROWS = 5


@dataclass(frozen=True, eq=False)
class TraceReport:
    """What `validate` found. `problems`: one line per row and broken rule, sorted by row; row NA is about the whole table.

    Rows count from 0, as in the frame or the file's data (a CSV's row 0 is its line 2), before any sorting.
    """

    name: str
    num_rows: int
    problems: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.problems.empty

    def __repr__(self) -> str:
        if self.ok:
            return "\n".join([f"{self.name}: {self.num_rows:,} rows, no problem", *(f"  note: {n}" for n in self.notes)])
        num_broken = self.problems["row"].nunique()
        lines = [f"{self.name}: {self.num_rows:,} rows, {num_broken:,} of them with problems ({len(self.problems):,} in all)"]
        for (rule, step), rows in self.problems.groupby(["rule", "step"], sort=False):
            shown = [f"row {r} ({v!r})" if not pd.isna(r) else repr(v) for r, v in zip(rows["row"], rows["value"], strict=True)][
                :SHOWN_ROWS
            ]
            more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
            lines.append(f"  - {rule}: {', '.join(shown)}{more}. {step}")
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


def validate(
    source: str | Path | pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    *,
    units: Mapping[str, str] | None = None,
    format: str | None = None,
) -> TraceReport:
    """Every row of a file or a frame that breaks a rule of traces, instead of the first alone.

    `columns`, `units` and `format` as in `Trace.from_file`; a frame has our own columns already, or the ones that `columns` names. Raises
    what reading the file raises: FileNotFoundError, and ValueError for text that does not parse or columns that are not there.
    """
    from workbench.traces.io import frame_of
    from workbench.traces.mapping import mapped

    notes: tuple[str, ...] = ()
    if isinstance(source, pd.DataFrame):
        name, frame = "the frame", source.reset_index(drop=True)
        if columns is not None:
            frame, notes = mapped(frame, columns, units)
    else:
        name = Path(source).name
        frame, notes = frame_of(Path(source), format=format, columns=columns, units=units)
    places = frame.index.to_numpy()
    found = _Problems(frame.reset_index(drop=True), places)
    found.check()
    problems = pd.DataFrame(found.rows, columns=list(PROBLEM_COLUMNS)).astype({"row": "Int64"})
    problems = problems.sort_values("row", kind="stable", ignore_index=True, na_position="first")
    return TraceReport(name, len(frame), problems, notes)


class _Problems:
    """Runs every check of `traces.frame` on the rows that it has not faulted yet, until it passes."""

    def __init__(self, frame: pd.DataFrame, places: np.ndarray) -> None:
        self.frame, self.places = frame, places
        self.rows: list[tuple[Any, ...]] = []
        self.is_broken = np.zeros(len(frame), bool)
        self.is_complete = True

    def check(self) -> None:
        self._columns()
        frame = self.frame
        checks: list[tuple[str, Callable[[pd.DataFrame], Any]]] = [
            ("request_id", trace_frame.check_ids),
            ("arrival_s", trace_frame.check_times),
        ]
        checks += [(name, partial(trace_frame.check_counts, name=name)) for name in trace_frame.COUNTS]
        checks += [(name, partial(trace_frame.check_id_sequences, name=name)) for name in ("prompt_token_ids", "prefix_ids")]
        for name, check in checks:
            if name in frame:
                self._until_it_passes(check, np.arange(len(frame)))
        for name in trace_frame.NUMBERS:
            if name in frame:
                self._until_it_passes(partial(_check_numbers, name=name), np.arange(len(frame)))
        # what one column alone cannot say, on rows that are sound by themselves
        if self.is_complete:
            self._until_it_passes(trace_frame.canonical, np.flatnonzero(~self.is_broken))

    def _columns(self) -> None:
        """Faults of the whole table; unknown and repeated columns are left out of the other checks."""
        names = list(self.frame.columns)
        for name in dict.fromkeys(names):
            if name not in trace_frame.COLUMNS:
                step = f"{did_you_mean(str(name), trace_frame.COLUMNS)} Rename or drop it."
                self.rows.append((pd.NA, name, name, "a trace's columns must be known ones", step))
            elif names.count(name) > 1:
                self.rows.append((pd.NA, name, name, "a trace's columns must be distinct", "Drop one."))
        kept = [i for i, name in enumerate(names) if name in trace_frame.COLUMNS and names.index(name) == i]
        self.frame = self.frame.iloc[:, kept]
        try:
            trace_frame.check_columns(self.frame)
        except ValueError as error:
            self.is_complete = False
            rule, _, step = str(error).partition(". ")
            self.rows.append((pd.NA, "", ", ".join(map(str, self.frame.columns)), rule.partition(", got")[0], step))

    def _until_it_passes(self, check: Callable[[pd.DataFrame], Any], rows: np.ndarray) -> None:
        while True:
            try:
                check(self.frame.iloc[rows].reset_index(drop=True))
                return
            except trace_frame.TraceRuleError as error:
                broken = rows[np.asarray(error.rows)]
                values = self.frame[error.column].iloc[broken].tolist()
                self.rows += [(int(self.places[r]), error.column, v, error.rule, error.step) for r, v in zip(broken, values, strict=True)]
                self.is_broken[broken] = True
                rows = np.delete(rows, np.asarray(error.rows))


def _check_numbers(rows: pd.DataFrame, name: str) -> None:
    """`check_numbers` of one column; no deadline lies before an arrival that is none."""
    arrivals = pd.to_numeric(rows["arrival_s"], errors="coerce") if "arrival_s" in rows else np.nan
    trace_frame.check_numbers(rows[[name]].assign(arrival_s=arrivals))
