"""What was fitted, against what was measured: latency models, traces, kernels."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.bench import machine
from workbench.config import require
from workbench.features import NAMES
from workbench.latency.terms import CLASSES, classes_of, group_of
from workbench.plots.style import COLOURS, MARKERS, NotebookFigure, finish, log_ticks, new_axes, styles

LEAST_SHARE = 0.005  # of the predicted time of some class of step: below that a term has no row of its own
QUANTITIES = {
    "arrival_s": "arrival (s)",
    "gap": "gap / mean gap at that time",
    "prompt_tokens": "prompt (tokens)",
    "output_tokens": "output (tokens)",
    "adapter rank": "adapter, by popularity",
}


def predicted_vs_measured(steps: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Each step's predicted against its measured duration, by class of step, with the line of equality and a band of 10 %.

    `steps`: rows with `duration_s`, `predicted_s` and the features, such as `LatencyModel.steps` or a replay's steps.
    """
    ax = ax or new_axes(5, 5)
    kinds = classes_of(steps[list(NAMES)].to_numpy(float))
    measured, predicted = steps["duration_s"].to_numpy(float) * 1e3, steps["predicted_s"].to_numpy(float) * 1e3
    for index, (name, colour, marker) in enumerate(zip(CLASSES, (COLOURS[4], COLOURS[2], COLOURS[1], COLOURS[0]), MARKERS, strict=False)):
        chosen = kinds == index
        if chosen.any():
            label = f"{name} ({chosen.sum()} steps)"
            ax.scatter(measured[chosen], predicted[chosen], s=12, color=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
    ends = np.array([min(measured.min(), predicted[predicted > 0].min()), max(measured.max(), predicted.max())]) * (0.9, 1.1)
    ax.plot(ends, ends, color="black", linewidth=1)
    ax.fill_between(ends, ends * 0.9, ends * 1.1, color="#CCCCCC", alpha=0.6, linewidth=0, label="within 10 %", zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="measured step time (ms)", ylabel="predicted step time (ms)", xlim=ends, ylim=ends)
    log_ticks(ax.xaxis, ax.yaxis)
    return finish(ax, caption, legend)


def costs(shares: pd.DataFrame, cost_us: pd.Series, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """What a step's time is made of: a row per term of a latency model (all buckets of padded work in one), a bar per class of
    step, and what one unit of the term costs. Terms that make less than LEAST_SHARE of every class are one row together.

    `shares`: `CostModel.shares(steps)`; `cost_us`: `CostModel.table()`, microseconds per unit.
    """
    small = shares.max(axis=1) < LEAST_SHARE
    if small.sum() > 1:
        others = shares[small].sum().rename(f"{small.sum()} other terms")
        shares = pd.concat([shares[~small], others.to_frame().T])
    order = shares.max(axis=1).sort_values().index
    ax = ax or new_axes(8, 1.2 + 0.34 * len(order))
    height = 0.8 / len(shares.columns)
    for place, (name, style) in enumerate(styles(list(shares.columns)).items()):
        rows = np.arange(len(order)) + ((len(shares.columns) - 1) / 2 - place) * height
        ax.barh(rows, shares.loc[order, name] * 100, height * 0.92, color=style.colour, hatch=style.hatch, edgecolor="white", label=name)
    for row, term in enumerate(order):
        units = cost_us[[group_of(name) == term for name in cost_us.index]]
        if units.empty:
            continue
        cost = " to ".join(f"{c:,.0f}" if c >= 100 else f"{c:.3g}" for c in dict.fromkeys((units.min(), units.max())))
        ax.annotate(cost, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.annotate("µs per unit", (1.02, len(order) - 0.35), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    ax.set_yticks(range(len(order)), [str(term).replace("_", " ") for term in order])
    ax.set(xlabel="share of the predicted time of such steps (%)", ylim=(-0.6, len(order) - 0.4))
    return finish(ax, caption, legend)


def roofline(rows: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Kernels against what the device allows: FLOP/s reached over FLOPs per byte (least of each), under its bandwidth and matrix rate.

    `rows`: bench rows of one device; those with microseconds, bytes and FLOPs are drawn. The roof stands where the device's rates
    were measured (Williams, Waterman, Patterson: Roofline, CACM 2009). Raises ValueError for rows of several devices, or none to draw.
    """
    rows = rows[(rows["unit"] == "us") & rows["num_bytes"].notna() & rows["flops"].notna()]
    devices = list(dict.fromkeys(rows["device"]))
    require(len(devices) == 1, "a roofline needs kernel rows of exactly one device", devices, "Choose rows by their device.")
    ax = ax or new_axes(7, 4.5)
    intensity = (rows["flops"] / rows["num_bytes"]).to_numpy(float)
    reached = (rows["flops"] / rows["p50"]).to_numpy(float) / 1e6  # FLOP per microsecond are MFLOP/s; in TFLOP/s
    names = (rows["system"] + ", " + rows["metric"]).to_numpy()
    for name, style in styles(list(dict.fromkeys(names))).items():
        chosen = names == name
        ax.scatter(intensity[chosen], reached[chosen], color=style.colour, marker=style.marker, s=22, label=name, zorder=3)
    rates = machine.rates(devices[0])
    if rates is not None:
        ends = np.geomspace(intensity.min() / 2, max(intensity.max(), rates[1] / rates[0]) * 2, 200)
        label = f"{rates[0] / 1e12:g} TB/s, {rates[1] / 1e12:g} TFLOP/s"
        ax.plot(ends, np.minimum(ends * rates[0], rates[1]) / 1e12, color="black", linewidth=1, label=label)
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="reached (TFLOP/s)")
    return finish(ax, caption or devices[0], legend)


def trace_fit(curves: pd.DataFrame, report: pd.DataFrame, *, caption: str = "") -> Figure:
    """A fitted trace against the real one: both distribution functions of every quantity, the distance (KS) above each.

    `curves` and `report`: `TraceGenerator.curves()` and `.report()`.
    """
    names = list(dict.fromkeys(curves["quantity"]))
    figure = NotebookFigure(figsize=(2.6 * len(names), 2.8), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        rows = curves[curves["quantity"] == name]
        for column, style in zip(("real", "fitted"), styles(("real", "fitted")).values(), strict=True):
            ax.step(rows["x"], rows[column] * 100, where="post", color=style.colour, linestyle=style.line, label=column)
        if name.endswith("_tokens"):
            ax.set_xscale("log")
        ax.set_title(f"KS {report.loc[name, 'ks']:.3f}, n = {report.loc[name, 'n']:,.0f}", fontsize=8)
        ax.set_xlabel(QUANTITIES[name])
        ax.set_ylim(0, 101)
        finish(ax, "", legend=False)
    figure.axes[0].set_ylabel("share at most x (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    if caption:
        figure.supxlabel(fill(caption, 40 * len(names)), x=0.01, ha="left", fontsize=7, color="#444444")
    return figure
