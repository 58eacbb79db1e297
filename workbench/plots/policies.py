"""Policies beside each other: attainment and throughput, over a load, against each other, and how sure a difference is."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench import metrics
from workbench.config import SLO
from workbench.plots.style import NotebookFigure, finish, new_axes, styles

TARGET_NAMES = {
    "attainment": "all targets",
    "attainment_ttft": "TTFT",
    "attainment_tpot": "mean TPOT",
    "attainment_itl": "token gaps",
    "attainment_e2e": "end to end",
}
THROUGHPUTS = {"finetune_tokens_per_s": "fine-tuning, committed", "decode_tokens_per_s": "inference, output"}


def overview(runs: pd.DataFrame, *, caption: str = "", slo: metrics.SLOs = None) -> Figure:
    """SLO attainment and throughput beside each other, one legend, the caption below."""
    labels = list(dict.fromkeys(runs["policy"]))
    figure = NotebookFigure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    attainment(runs, ax=left, slo=slo, legend=False)
    throughput(runs, ax=right, legend=False)
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, [fill(n, 90) for n in names], loc="outside upper left", ncols=1 if max(map(len, labels)) > 40 else 2, frameon=False
    )
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
    return finish(ax, caption, legend)


def throughput(runs: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Committed fine-tune tokens and output tokens per second of the window: bars by policy, whiskers over seeds."""
    ax = ax or new_axes()
    _bars(ax, runs, list(THROUGHPUTS), scale=1.0, digits=0)
    ax.set_xticks(range(len(THROUGHPUTS)), [n.replace(", ", ",\n") for n in THROUGHPUTS.values()])
    ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    ax.set_ylabel("throughput (tokens/s)")
    return finish(ax, caption, legend)


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
    ax.set_xlabel({"rate_per_s": "arrival rate (requests/s)"}.get(x, x))
    ax.set_ylabel("SLO attainment (% of arrived requests)" if scale == 100.0 else THROUGHPUTS.get(y, y) + " (tokens/s)")
    ax.set_ylim(0, 105 if scale == 100.0 else None)
    return finish(ax, caption, legend)


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
