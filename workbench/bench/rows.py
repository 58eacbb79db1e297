"""One measured number is one row; rows are appended to CSV files, one per workload, and never changed."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.config import require

CORRECTNESS = "correctness"  # the cell of a workload's own check
OURS = "workbench"  # the system that targets are for; baselines have names of their own
IDENTITY = ("workload", "cell", "system", "metric", "shape", "device")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured, how it compares, and where it comes from.

    `p50` is the value: the median of `n` measurements with `p20` and `p80` beside it, or a number that is one by nature (a percentile
    over `n` requests, a total). `floor` is the best that the hardware allows, in the same unit, and `ratio` time over floor (floor over
    rate where the unit is per second). `must` and `stretch` stand only where the targets are defined. `num_bytes` and `flops` are the
    least work of one call.
    """

    workload: str
    cell: str
    system: str
    metric: str
    unit: str
    p20: float | None
    p50: float
    p80: float | None
    n: int
    floor: float | None
    ratio: float | None
    must: float | None
    stretch: float | None
    correct: bool
    num_bytes: float | None
    flops: float | None
    shape: str
    device: str
    torch: str
    triton: str
    cuda: str
    driver: str
    commit: str
    dirty: bool
    date: str
    seed: int
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: str
    note: str


COLUMNS = tuple(f.name for f in fields(Row))
DTYPES: Any = {f.name: {str: str, bool: bool, int: int}.get(f.type, float) for f in fields(Row)}
BLANK: Any = {name: [""] for name, dtype in DTYPES.items() if dtype is float}


def is_rate(unit: str) -> bool:
    """Whether more is better by its unit: something per second."""
    return unit.endswith("/s")


def over_floor(unit: str, value: float, floor: float | None) -> float | None:
    """Time over floor, at best 1: value / floor, or floor / value of a rate. None without a floor."""
    if not floor or not value:
        return None
    return floor / value if is_rate(unit) else value / floor


def quantiles(values: Sequence[float]) -> tuple[float | None, float, float | None]:
    """p20, p50, p80; the outer two only where there are at least three values."""
    require(len(values) > 0, "a row needs at least one value", len(values))
    ordered = sorted(values)
    last = len(ordered) - 1
    if last < 2:
        return None, statistics.median(ordered), None
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def append(folder: Path, row: Row) -> Path:
    """Add a row to `folder`/WORKLOAD.csv, which is made where there is none. Raises ValueError for a file with other columns."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.workload}.csv"
    is_new = not file.exists()
    if not is_new:
        with file.open(newline="", encoding="utf-8") as found:
            header = tuple(next(csv.reader(found), ()))
        require(header == COLUMNS, f"{file} must have the columns of this version", header, "Write into another folder (--into).")
    with file.open("a", newline="", encoding="utf-8") as into:
        writer = csv.writer(into, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(["" if value is None else _text(value) for value in asdict(row).values()])
    return file


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(folder: Path) -> pd.DataFrame:
    """Every row of a folder, in the order written. Raises FileNotFoundError where there is no row file.

    Files with an underscore in their names hold something else beside the rows.
    """
    files = [file for file in sorted(folder.glob("*.csv")) if "_" not in file.stem]
    if not files:
        raise FileNotFoundError(f"{folder} must hold row files (WORKLOAD.csv), got none. Run python -m workbench.bench --into {folder}.")
    frames = [pd.read_csv(file, dtype=DTYPES, keep_default_na=False, na_values=BLANK) for file in files]
    return pd.concat(frames, ignore_index=True)


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row of each identity (`IDENTITY`), without those that a later failed check of their workload has made worthless."""
    last = frame.assign(order=range(len(frame))).sort_values(["date", "order"], kind="stable")
    last = last.groupby(list(IDENTITY), sort=False).tail(1)
    failed = last[(last["cell"] == CORRECTNESS) & ~last["correct"].astype(bool)]
    stale = pd.Series(False, index=last.index)
    for _, row in failed.iterrows():
        stale |= (
            (last["cell"] != CORRECTNESS)
            & (last["date"] <= row["date"])
            & ((last[["workload", "shape", "device"]] == row[["workload", "shape", "device"]]).all(axis=1))
        )
    return last[~stale & last["correct"].astype(bool)].sort_values("order").drop(columns="order")
