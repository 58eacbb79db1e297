"""Policies beside each other: attainment and throughput, over a load, against each other, and how sure a difference is.

Captions end with the model's error on what is drawn, where rows are those of a Comparison, Sweep or Capacity and were simulated.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.config import SLO
from workbench.experiments.search import Capacity
from workbench.experiments.statistics import Difference
from workbench.model_error import with_error
from workbench.plots.style import SLO_COLOUR, NotebookFigure, brief, finish, new_axes, styles
from workbench.results import metrics
from workbench.results.bound import UpperBound

TARGET_NAMES = {
    "attainment": "all targets",
    "attainment_ttft": "TTFT",
    "attainment_tpot": "mean TPOT",
    "attainment_itl": "token gaps",
    "attainment_e2e": "end to end",
}
LOADS = {
    "rate_per_s": "arrival rate (requests/s)",
    "load": "load (requests/s)",
    "bias": "every step longer by (share of its duration)",
}
THROUGHPUTS = {"finetune_tokens_per_s": "fine-tuning, committed", "decode_tokens_per_s": "inference, output"}


def overview(runs: pd.DataFrame, *, caption: str = "", slo: metrics.SLOs = None) -> Figure:
    """SLO attainment and throughput beside each other, one legend, the caption below."""
    figure = NotebookFigure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bare = runs.copy()
    bare.attrs = {}  # said once, below both
    attainment(bare, ax=left, slo=slo, legend=False)
    throughput(bare, ax=right, legend=False)
    caption = with_error(caption, runs, "attainment", *THROUGHPUTS)
    handles, names = left.get_legend_handles_labels()
    names = [brief(name, 90) for name in names]
    figure.legend(handles, names, loc="outside upper left", ncols=1 if max(map(len, names)) > 40 else 2, frameon=False)
    if caption:
        figure.supxlabel(fill(caption, 150), x=0.01, ha="left", fontsize=8, color="#444444")
    return figure


def attainment(runs: pd.DataFrame, *, ax: Axes | None = None, slo: metrics.SLOs = None, caption: str = "", legend: bool = True) -> Axes:
    """Share of arrived requests that met all targets, and each alone: bars by policy, whiskers over seeds. `runs`: `Comparison.runs`."""
    ax = ax or new_axes()
    names = [n for n in TARGET_NAMES if n in runs and not runs[n].isna().all()]
    _bars(ax, runs, names, scale=100.0, digits=1)
    ax.set_xticks(range(len(names)), [_target_label(n, slo) for n in names])
    ax.set_ylim(0, 109)
    ax.set_ylabel("SLO attainment (% of arrived requests)")
    return finish(ax, with_error(caption, runs, "attainment"), legend)


def throughput(runs: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Committed fine-tune tokens and output tokens per second of the window: bars by policy, whiskers over seeds."""
    ax = ax or new_axes()
    _bars(ax, runs, list(THROUGHPUTS), scale=1.0, digits=0)
    ax.set_xticks(range(len(THROUGHPUTS)), [n.replace(", ", ",\n") for n in THROUGHPUTS.values()])
    ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    ax.set_ylabel("throughput (tokens/s)")
    return finish(ax, with_error(caption, runs, *THROUGHPUTS), legend)


def by_load(
    runs: pd.DataFrame, y: str = "attainment", *, x: str = "rate_per_s", ax: Axes | None = None, caption: str = "", legend: bool = True
) -> Axes:
    """One line per policy over a load that was swept, with a band over seeds. `runs`: rows with policy, seed, `x` and `y`."""
    ax = ax or new_axes()
    scale = 100.0 if y.startswith("attainment") else 1.0
    for label, style in styles(list(dict.fromkeys(runs["policy"]))).items():
        groups = runs[runs["policy"] == label].groupby(x)[y]
        mean, low, high = groups.mean() * scale, groups.min() * scale, groups.max() * scale
        ax.plot(mean.index, mean, color=style.colour, marker=style.marker, linestyle=style.line, label=label)
        if (high > low).any():
            ax.fill_between(mean.index, low, high, color=style.colour, alpha=0.2, linewidth=0)
    ax.set_xlabel(LOADS.get(x, x))
    ax.set_ylabel("SLO attainment (% of arrived requests)" if scale == 100.0 else THROUGHPUTS.get(y, y) + " (tokens/s)")
    ax.set_ylim(0, 105 if scale == 100.0 else None)
    return finish(ax, with_error(caption, runs, y), legend)


def tradeoff(
    runs: pd.DataFrame,
    *,
    by: str = "policy_name",
    bound: UpperBound | None = None,
    target: float | None = None,
    ax: Axes | None = None,
    caption: str = "",
    legend: bool = True,
) -> Axes:
    """Attainment against committed fine-tune tokens/s: a line per `by` through its settings' means, a cross of the range over seeds each.

    `runs`: rows with `policy` (the setting), `by`, `attainment` and `finetune_tokens_per_s`, such as `Sweep.frame`. `bound` is drawn as the
    line that no schedule crosses, `target` as the attainment that is asked for.
    """
    ax = ax or new_axes(8, 4)
    x, y = "finetune_tokens_per_s", "attainment"
    for label, style in styles(list(dict.fromkeys(runs[by]))).items():
        rows = runs[runs[by] == label]
        values = rows[[x, y]].astype(float).assign(**{y: rows[y].astype(float) * 100})
        settings = values.groupby(rows["policy"], sort=False)
        mean = settings.mean().sort_values(x)
        below, above = ((f.loc[mean.index] - mean).abs().T.to_numpy() for f in (settings.min(), settings.max()))
        spread = {"xerr": [below[0], above[0]], "yerr": [below[1], above[1]], "elinewidth": 0.8, "capsize": 2}
        line = style.line if len(mean) > 1 else "none"
        ax.errorbar(mean[x], mean[y], color=style.colour, marker=style.marker, linestyle=line, label=label, clip_on=False, **spread)
    if bound is not None:
        share = np.linspace(0.0, bound.attainment, 9)
        lines = {
            "upper bound:\nno schedule beyond": ("-", bound.finetune_at),
            "in the long run:\nno schedule beyond": (":", bound.sustained_at),
        }
        for label, (line, most) in lines.items():
            ax.plot([most(float(a)) for a in share], share * 100, color="black", linewidth=1, linestyle=line, label=label)
    if target is not None:
        ax.axhline(target * 100, color=SLO_COLOUR, linewidth=1, label=f"asked for:\n{target:.0%} meet the SLO")
    ax.set(xlabel="committed fine-tuning (tokens/s)", ylabel="SLO attainment (% of arrived requests)", ylim=(0, 105))
    ax.set_xlim(left=-0.01 * ax.get_xlim()[1])
    if legend:
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return finish(ax, with_error(caption, runs, y, x), legend=False)


def differences(found: Mapping[str, Difference], *, unit: str, ax: Axes | None = None, caption: str = "") -> Axes:
    """Paired differences with their intervals, one row each under its name; where a row's line crosses 0 nothing was shown."""
    ax = ax or new_axes(6.5, 0.9 + 0.5 * len(found))
    for row, difference in enumerate(found.values()):
        around = [[difference.estimate - difference.low], [difference.high - difference.estimate]]
        ax.errorbar([difference.estimate], [row], xerr=np.nan_to_num(around), color=styles(["a"])["a"].colour, marker="o", capsize=4)
        text = f"{difference.estimate:+,.0f}" if abs(difference.estimate) >= 100 else f"{difference.estimate:+.3g}"
        ax.annotate(text, (difference.estimate, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(found)), [fill(name, 34) for name in found])
    ax.set(xlabel=unit, ylim=(len(found) - 0.4, -0.6))
    return finish(ax, caption, legend=False)


def capacity(found: Sequence[Capacity], *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Attainment over load, one line per searched policy with its 95 % interval over seeds; a ring where it still met each target."""
    ax = ax or new_axes(7.5, 4.2)
    targets = sorted({float(t) for one in found for t in one.table.index})
    for target in targets:
        ax.axhline(target * 100, color=SLO_COLOUR, linewidth=0.8)
        ax.annotate(f" {target:.0%}", (1, target * 100), xycoords=("axes fraction", "data"), color=SLO_COLOUR, fontsize=8, va="center")
    for (label, style), one in zip(styles([one.policy for one in found]).items(), found, strict=True):
        rows = one.points
        ax.plot(
            rows["load"], rows[one.metric] * 100, color=style.colour, marker=style.marker, markersize=4, linestyle=style.line, label=label
        )
        low, high = (rows[name].clip(0, 1) * 100 for name in ("low", "high"))
        ax.fill_between(rows["load"], low, high, color=style.colour, alpha=0.15, linewidth=0)
        met = one.table.dropna(subset="capacity")
        heights = rows.set_index("load")[one.metric].loc[met["capacity"]] * 100
        ax.plot(met["capacity"], heights, linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=style.colour)
    lowest = min(float(one.points[one.metric].min()) for one in found)
    ax.set(xlabel=LOADS["load"], ylabel="SLO attainment (% of arrived requests)", ylim=(max(0.0, lowest * 100 - 8), 102))
    return finish(ax, with_error(caption, [one.runs for one in found], *dict.fromkeys(one.metric for one in found)), legend)


def _bars(ax: Axes, runs: pd.DataFrame, names: Sequence[str], *, scale: float, digits: int) -> None:
    """Grouped bars: a group per column, a bar per policy at the mean over seeds, a whisker from the least to the largest."""
    by_policy = styles(list(dict.fromkeys(runs["policy"])))
    width = 0.8 / len(by_policy)
    for place, (label, style) in enumerate(by_policy.items()):
        rows = runs.loc[runs["policy"] == label, list(names)].astype(float) * scale
        mean = rows.mean().to_numpy()
        x = np.arange(len(names)) + (place - (len(by_policy) - 1) / 2) * width
        whiskers = np.abs([mean - rows.min().to_numpy(), rows.max().to_numpy() - mean]) if len(rows) > 1 else None
        ax.bar(
            x,
            mean,
            width * 0.94,
            yerr=whiskers,
            color=style.colour,
            hatch=style.hatch,
            edgecolor="white",
            linewidth=0.5,
            label=label,
            capsize=2,
        )
        tops = mean + whiskers[1] if whiskers is not None else mean
        for at, value, top in zip(x, mean, tops, strict=True):
            if np.isfinite(value):
                ax.annotate(f"{value:,.{digits}f}", (at, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)


def _target_label(name: str, slo: metrics.SLOs) -> str:
    """ "TTFT" with its target in milliseconds under it, where one SLO holds for every class."""
    field = name.removeprefix("attainment_") + "_s"
    target = getattr(slo, field, None) if isinstance(slo, SLO) else None
    if target is None:
        return TARGET_NAMES[name]
    share = f", {slo.itl_quantile:.0%} of them" if name == "attainment_itl" and isinstance(slo, SLO) else ""
    return f"{TARGET_NAMES[name]}\n≤ {target * 1e3:g} ms{share}"
