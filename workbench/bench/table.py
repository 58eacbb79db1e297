"""The results tables, written from the newest rows: those with a target between README's markers, all of them beside the rows."""

import re
from typing import Any

import pandas as pd

from workbench.bench.check import comparable
from workbench.bench.rows import OURS
from workbench.bench.targets import WORKLOADS, find
from workbench.config import require

BLOCK = re.compile(r"(<!-- bench: begin -->\n).*?(<!-- bench: end -->)", re.DOTALL)
TITLES = {
    "w1": "Decode, steady state (W1)",
    "w2": "Offline (W2)",
    "w3": "Online (W3)",
    "w4": "Fine-tuning (W4)",
    "w5": "Kernels (W5)",
    "w6": "Serving beside fine-tuning (W6)",
    "contest": "Policies 14 to 21",
    "model": "Whole replays, model against engine",
    "replay": "The replay itself",
}


FULL_HEAD = """# Bench rows

Every CSV file here holds the rows of one workload, as `python -m workbench.bench` wrote them; `python -m workbench.bench table benchmarks`
makes this table, and the shorter one in the project's README. `wall_clock.json` is what `make test-wall-clock` printed.
"""


def full(frame: pd.DataFrame) -> str:
    """The text of the README beside the rows: every newest comparable row."""
    return FULL_HEAD + "\n" + markdown(frame)


def markdown(frame: pd.DataFrame, *, only_targets: bool = False) -> str:
    """The newest comparable rows: a table with a line per number, baselines under what they are baselines of.

    `only_targets` leaves out baselines and the numbers that have no target.
    """
    rows = comparable(frame)
    if only_targets:
        has_target = [find(row["workload"], row["cell"], row["metric"]) is not None for _, row in rows.iterrows()]
        rows = rows[pd.Series(has_target, index=rows.index, dtype=bool) & (rows["system"] == OURS)]
    if not len(rows):
        return "No row on a device that targets are defined for yet.\n"
    lines = ["| | cell | system | measured (p20 to p80) | time over floor | must | vLLM | device, date, commit |", "| --- " * 8 + "|"]
    for workload in WORKLOADS:
        of = rows[rows["workload"] == workload]
        cells = {cell: i for i, cell in enumerate(dict.fromkeys(of["cell"]))}
        of = of.assign(place=of["cell"].map(cells), is_baseline=of["system"] != OURS).sort_values(["place", "is_baseline"], kind="stable")
        title = TITLES[workload]
        for _, row in of.iterrows():
            lines.append(_line(title, row))
            title = ""
    return "\n".join(lines) + "\n"


def _line(title: str, row: Any) -> str:
    target = find(row["workload"], row["cell"], row["metric"])
    value = f"{row['metric']} {_number(row['p50'], unlike=None if target is None else target.must)} {row['unit']}"
    if not pd.isna(row["p20"]):
        value += f" ({_number(row['p20'])} to {_number(row['p80'])})"
    ratio = "" if pd.isna(row["ratio"]) else f"{row['ratio']:.2f}"
    must = vllm = ""
    if target is not None:
        vllm = "" if target.vllm is None else _number(target.vllm)
        if row["system"] == OURS:
            must = (
                f"{'≥' if target.at_least else '≤'} {_number(target.must)}: {'met' if target.is_met(float(row['p50'])) else '**missed**'}"
            )
    commit = row["commit"] + (" with changes" if row["dirty"] else "")
    where = f"{row['device']}, {row['date'][:10]}, {commit}"
    return f"| {title} | {row['cell']} | {row['system']} | {value} | {ratio} | {must} | {vllm} | {where} |"


def _number(value: float, unlike: float | None = None) -> str:
    """Three digits, or more where the value would be taken for `unlike`, which it is not."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if unlike is None or value == unlike or text != _number(unlike):
        return text
    return next(found for digits in range(4, 18) if float(found := f"{value:.{digits}g}") != unlike)


def updated(readme: str, frame: pd.DataFrame) -> str:
    """The README's text with the table of these rows. Raises ValueError without the two markers."""
    require(BLOCK.search(readme) is not None, "README must hold the markers <!-- bench: begin --> and <!-- bench: end -->", "no such block")
    return BLOCK.sub(lambda found: found.group(1) + "\n" + markdown(frame, only_targets=True) + "\n" + found.group(2), readme)
