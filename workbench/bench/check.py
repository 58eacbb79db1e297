"""Which targets the rows meet."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.bench.rows import CORRECTNESS, OURS, newest
from workbench.bench.targets import TARGETS, Target, applies


@dataclass(frozen=True)
class Verdict:
    """One target and the newest row for it; None where nothing was measured, or what was measured came before a failed check."""

    target: Target
    row: pd.Series | None

    @property
    def is_met(self) -> bool:
        return self.row is not None and self.target.is_met(float(self.row["p50"]))

    @property
    def state(self) -> str:
        if self.row is None:
            return "MISSING"
        if not self.is_met:
            return "MISSED"
        return "stretch reached" if self.target.is_stretched(float(self.row["p50"])) else "met"


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """The newest rows for which targets are defined, correctness rows left out: one per cell, system and metric."""
    fits = [applies(w, s, d) for w, s, d in zip(frame["workload"], frame["shape"], frame["device"], strict=True)]
    rows = newest(frame[fits])
    rows = rows[rows["cell"] != CORRECTNESS]
    return rows.groupby(["workload", "cell", "system", "metric"], sort=False).tail(1)


def judge(frame: pd.DataFrame, workloads: Sequence[str] = (), targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """A verdict for every target (of these workloads)."""
    rows = comparable(frame)
    ours = rows[rows["system"] == OURS]
    found = {(r["workload"], r["cell"], r["metric"]): r for _, r in ours.iterrows()}
    return [Verdict(t, found.get((t.workload, t.cell, t.metric))) for t in targets if not workloads or t.workload in workloads]


def report(verdicts: Sequence[Verdict]) -> str:
    """One line a target, and what is left."""
    lines = [f"{'':8s} {'cell':46s} {'metric':22s} {'measured':>10s} {'must':>9s} {'stretch':>9s} {'unit':9s}"]
    for v in verdicts:
        t = v.target
        measured = "-" if v.row is None else f"{float(v.row['p50']):.4g}"
        sign = ">=" if t.at_least else "<="
        stretch = "-" if t.stretch is None else f"{t.stretch:g}"
        where = "" if v.row is None else f" ({v.row['device']}, {v.row['commit']}, {v.row['date'][:10]})"
        lines.append(
            f"{t.workload:8s} {t.cell:46s} {t.metric:22s} {measured:>10s} {sign + format(t.must, 'g'):>9s} {stretch:>9s} {t.unit:9s} "
            f"{v.state}{where}"
        )
    states = [v.state for v in verdicts]
    missed, missing = states.count("MISSED"), states.count("MISSING")
    lines.append(f"{len(states) - missed - missing} of {len(states)} met, {missed} missed, {missing} missing")
    return "\n".join(lines)
