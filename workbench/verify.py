"""`python -m workbench.verify FOLDER`: does a bundle hold what it says? Every table is made again from the rows.

Checks, each reported: the checksum of every file; the conservation laws of every replay; every table and every difference against the
one recomputed from the rows (numbers to a relative 1e-9, for another machine's arithmetic). Exit status 0 if all hold, 1 if not.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench.experiments.bundle import BUNDLE_FILE, DIFFERENCES_FILE, REPLAYS, TABLES, comparison_tables, file_checksums
from workbench.experiments.comparison import Comparison
from workbench.results.conservation import ConservationError, check_conservation
from workbench.results.replay import load_replay

TOLERANCE = 1e-9
EXACT = ("policy", "seed", "run", "error")


class Check(NamedTuple):
    """One thing that was looked at; `problem` is empty where it holds."""

    what: str
    problem: str = ""


def verify(folder: str | Path) -> list[Check]:
    """Every check of a bundle. Raises FileNotFoundError without one in the folder, ValueError for one of another format."""
    folder = Path(folder)
    if not (folder / BUNDLE_FILE).is_file():
        raise FileNotFoundError(f"a bundle must hold {BUNDLE_FILE}, got {str(folder)!r}. Pass the folder given to bundle().")
    record = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
    if record.get("format") != 1:
        raise ValueError(f"{BUNDLE_FILE}: format must be 1, got {record.get('format')!r}. Verify with the version that wrote it.")
    checks = list(_files(folder, record["files"]))
    makers = {"comparison": _comparison, "sweep": _sweep}
    try:
        checks += makers[record["kind"]](folder)
    except Exception as error:  # whatever a damaged file does to its reader is a finding
        checks.append(Check("rows can be read and computed with", f"{type(error).__name__}: {error}"))
    return checks


def _files(folder: Path, expected: Mapping[str, str]) -> Iterator[Check]:
    found = file_checksums(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield Check(f"file {name}", "is missing")
        elif name not in expected:
            yield Check(f"file {name}", "is not part of the bundle")
        else:
            yield Check(f"file {name}", "" if found[name] == expected[name] else "differs from its checksum")


def _comparison(folder: Path) -> Iterator[Check]:
    comparison = Comparison.load(folder / REPLAYS)
    yield from (_laws(f"{label}, seed {seed}", replay) for (label, seed), replay in comparison.replays.items())
    yield from _tables(folder, comparison_tables(comparison))
    if (folder / DIFFERENCES_FILE).is_file():
        for stored in json.loads((folder / DIFFERENCES_FILE).read_text(encoding="utf-8")):
            block_s = stored["block_s"] if stored["over"] == "blocks" else None
            options = {name: stored[name] for name in ("metric", "over", "confidence", "resamples")}
            again = asdict(comparison.difference(stored["a"], stored["b"], block_s=block_s, **options))
            wrong = [n for n in ("estimate", "low", "high", "p_value", "n") if not np.isclose(again[n], stored[n], rtol=1e-6, atol=1e-12)]
            said = "; ".join(f"{name} {stored[name]!r}, recomputed {again[name]!r}" for name in wrong)
            yield Check(f"difference {stored['metric']}: {stored['a']} less {stored['b']}", said)


def _sweep(folder: Path) -> Iterator[Check]:
    stored = _read(folder / TABLES / "runs.csv")
    rows = []
    for _, row in stored.iterrows():
        replay = load_replay(folder / REPLAYS / str(row["run"]))
        yield _laws(f"run {row['run']}", replay)
        summary = dict(replay.summary())
        own = {name: row[name] for name in stored.columns if name not in summary}
        rows.append(own | {"policy": replay.policy, "seed": replay.seed} | summary)
    yield from _tables(folder, {"runs": pd.DataFrame(rows)[list(stored.columns)]})


def _laws(name: str, replay: Any) -> Check:
    if replay.interrupted:
        return Check(f"conservation laws of {name}", "the replay was interrupted")
    try:
        check_conservation(replay)
    except ConservationError as error:
        return Check(f"conservation laws of {name}", str(error))
    return Check(f"conservation laws of {name}")


def _tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> Iterator[Check]:
    stored = {file.stem for file in (folder / TABLES).glob("*.csv")}
    for name in sorted(stored | tables.keys()):
        if name not in stored or name not in tables:
            yield Check(f"table {name}", "is missing" if name not in stored else "is none that the rows give")
            continue
        text = io.StringIO(tables[name].to_csv(index=False))
        yield Check(f"table {name}", table_difference(_read(folder / TABLES / f"{name}.csv"), _read(text)))


def _read(source: Any) -> pd.DataFrame:
    return pd.read_csv(source, dtype=dict.fromkeys(EXACT, str), keep_default_na=False, na_values=[""])


def table_difference(stored: pd.DataFrame, again: pd.DataFrame) -> str:
    """The first cell in which a stored table differs from the recomputed one, in words; empty if none does."""
    if list(stored.columns) != list(again.columns) or len(stored) != len(again):
        return f"has {stored.shape} cells in columns {list(stored.columns)}, recomputed {again.shape} in {list(again.columns)}"
    for column in stored.columns:
        a, b = stored[column], again[column]
        if pd.api.types.is_numeric_dtype(a) and pd.api.types.is_numeric_dtype(b):
            same = np.isclose(a.to_numpy(float), b.to_numpy(float), rtol=TOLERANCE, atol=1e-12, equal_nan=True)
        else:
            same = (a.astype(object).where(a.notna(), None) == b.astype(object).where(b.notna(), None)) | (a.isna() & b.isna())
            same = same.to_numpy(bool)
        if not same.all():
            k = int(np.argmin(same))
            return f"row {k}, column {column}: {a.iloc[k]!r} stored, {b.iloc[k]!r} recomputed"
    return ""


def main(arguments: list[str] | None = None, show: Callable[[str], Any] = print) -> int:
    """The command line: prints every check, returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workbench.verify", description="Recompute every table of a bundle from its rows.")
    parser.add_argument("folder", help="the folder given to bundle()")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    options = parser.parse_args(arguments)
    checks = verify(options.folder)
    for check in checks:
        if check.problem or not options.quiet:
            show(f"{'FAILED' if check.problem else 'ok    '}  {check.what}{': ' + check.problem if check.problem else ''}")
    wrong = sum(bool(check.problem) for check in checks)
    show(f"{len(checks) - wrong} of {len(checks)} checks hold." if not wrong else f"{wrong} of {len(checks)} checks FAILED.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
