"""`bundle`: everything that an artefact evaluation needs of a comparison or a sweep, in one folder that checks itself.

Rows (the replays' parquet files), the tables made from them, a checksum of every file, and where it all came from. `python -m
workbench.verify folder` makes every table again from the rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.config import require
from workbench.experiments.comparison import GROUPS, Comparison
from workbench.experiments.content_key import code_version
from workbench.experiments.statistics import Difference
from workbench.results.replay import commit_of_code, versions_of_code

if TYPE_CHECKING:
    from workbench.experiments.sweep import Sweep

BUNDLE_FILE, TABLES, REPLAYS, DIFFERENCES_FILE = "bundle.json", "tables", "replays", "differences.json"
README = """# {title}

{caption}

`{replays}/` holds the rows of every run (parquet and JSON), `{tables}/` the tables made from them, `{bundle}` the checksum of every file
and the versions that made it. With the Loquetier Workbench installed (commit {commit}),

    python -m workbench.verify .

checks the checksums, the conservation laws of every run, and makes every table again from the rows.
"""


def bundle_comparison(comparison: Comparison, folder: str | Path, differences: Sequence[Difference] = ()) -> Path:
    """Write a comparison, its tables and its differences into a new folder. Raises FileExistsError if there is one already."""
    folder = _new(folder)
    comparison.save(folder / REPLAYS)
    records = [asdict(d) for d in differences]
    if records:
        (folder / DIFFERENCES_FILE).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return _seal(folder, "comparison", comparison_tables(comparison), "Comparison", comparison.caption)


def comparison_tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """Every table of a comparison: results by policy, seed and request column, and the runs' and jobs' rows."""
    tables = {"runs": comparison.runs} | {f"by_{by}": comparison.table(by=by).reset_index() for by in ("policy", "seed", *GROUPS)}
    jobs = [r.jobs.reset_index().assign(policy=label, seed=seed) for (label, seed), r in comparison.replays.items()]
    return tables | {"jobs": pd.concat(jobs, ignore_index=True)} if any(len(j) for j in jobs) else tables


def bundle_sweep(sweep: "Sweep", folder: str | Path) -> Path:
    """Write a sweep's frame and replays into a new folder. Raises ValueError if replays were not kept, or a run failed."""
    require(bool(sweep.frame["error"].isna().all()), "a bundle needs whole runs; failed ones", sweep.frame["error"].dropna().tolist())
    replays = {run: sweep.replay(run) for run in sweep.frame["run"]}
    folder = _new(folder)
    for run, replay in replays.items():
        replay.save(folder / REPLAYS / run)
    caption = (
        f"{len(sweep.frame)} runs; axes: {', '.join(sweep.axes) or 'none'}; redrawn over seeds: {', '.join(sweep.redrawn) or 'nothing'}"
    )
    return _seal(folder, "sweep", {"runs": sweep.frame.drop(columns="cached")}, "Sweep", caption)


def _new(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"a bundle needs an empty folder, got {str(folder)!r}. Name a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _seal(folder: Path, kind: str, tables: Mapping[str, pd.DataFrame], title: str, caption: str) -> Path:
    (folder / TABLES).mkdir()
    for name, table in tables.items():
        table.to_csv(folder / TABLES / f"{name}.csv", index=False)
    words = {"replays": REPLAYS, "tables": TABLES, "bundle": BUNDLE_FILE, "commit": commit_of_code()}
    (folder / "README.md").write_text(README.format(title=title, caption=caption, **words), encoding="utf-8")
    record: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "commit": commit_of_code(),
        "code": code_version(),
        "versions": dict(versions_of_code()),
        "files": file_checksums(folder),
    }
    (folder / BUNDLE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return folder


def file_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a bundle's folder, its own record left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / BUNDLE_FILE)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
