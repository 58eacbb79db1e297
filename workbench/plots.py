"""One function per figure: a frame in, matplotlib Axes out.

Units stand on the axes, times in milliseconds or seconds as named. A policy keeps its colour, hatch, marker and line style in every
figure; lightness differs too, so that a grey print can be read. `caption` says n, seeds, executor and device.
"""

import io
from collections.abc import Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from workbench import metrics
from workbench.bench import machine
from workbench.config import SLO, require
from workbench.features import NAMES
from workbench.latency_fit import CLASSES, classes_of

# Okabe and Ito's colours, ordered so that neighbours differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#999999", "#F0E442")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "**")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (2, 2)))
SLO_COLOUR = "#B00000"
FEW_REQUESTS = 1000  # below it a p99 rests on fewer than ten requests
TARGET_NAMES = {
    "attainment": "all targets",
    "attainment_ttft": "TTFT",
    "attainment_tpot": "mean TPOT",
    "attainment_itl": "token gaps",
    "attainment_e2e": "end to end",
}
THROUGHPUTS = {"finetune_tokens_per_s": "fine-tuning, committed", "decode_tokens_per_s": "inference, output"}
KIND_COLOURS = {
    "decode": "#0072B2",
    "prefill": "#56B4E9",
    "fine-tune forward": "#E69F00",
    "fine-tune backward": "#D55E00",
    "evaluate": "#CC79A7",
}
CAUSE_STYLES = {
    "own": ("its own compute", "#0072B2", ""),
    "behind_decode": ("behind decodes of others", "#7FB8D9", ""),
    "behind_prefill": ("behind prefill of others", "#56B4E9", "//"),
    "behind_finetune": ("behind fine-tune forward", "#E69F00", ""),
    "behind_evaluate": ("behind evaluation", "#CC79A7", ""),
    "behind_backward": ("behind backward", "#D55E00", "xx"),
    "admission": ("waiting for admission", "#BBBBBB", ""),
    "adapter": ("waiting for an adapter", "#F0E442", "//"),
    "kv_blocks": ("waiting for KV blocks", "#009E73", ".."),
    "preempted": ("preempted", "#000000", ""),
    "planning": ("planning", "#777777", ".."),
    "idle": ("nothing ran", "#FFFFFF", "\\\\"),
}
QUANTITIES = {
    "arrival_s": "arrival (s)",
    "gap": "gap / mean gap at that time",
    "prompt_tokens": "prompt (tokens)",
    "output_tokens": "output (tokens)",
    "adapter rank": "adapter, by popularity",
}


class Style(NamedTuple):
    """How one policy is drawn."""

    colour: str
    hatch: str
    marker: str
    line: Any


class NotebookFigure(Figure):
    """A figure that shows itself once, as a PNG, where it is a cell's value; pyplot, which would show it again, knows nothing of it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        return buffer.getvalue()


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style per policy, by its place in the comparison."""
    size = len(COLOURS)
    return {v: Style(COLOURS[i % size], HATCHES[i % size], MARKERS[i % size], LINES[i % size]) for i, v in enumerate(labels)}


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
    ax = ax or _axes()
    names = [n for n in TARGET_NAMES if n in runs and not runs[n].isna().all()]
    _bars(ax, runs, names, scale=100.0, digits=1)
    ax.set_xticks(range(len(names)), [_target_label(n, slo) for n in names])
    ax.set_ylim(0, 109)
    ax.set_ylabel("SLO attainment (% of arrived requests)")
    return _finish(ax, caption, legend)


def throughput(runs: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Committed fine-tune tokens and output tokens per second of the window: bars by policy, whiskers over seeds."""
    ax = ax or _axes()
    _bars(ax, runs, list(THROUGHPUTS), scale=1.0, digits=0)
    ax.set_xticks(range(len(THROUGHPUTS)), [n.replace(", ", ",\n") for n in THROUGHPUTS.values()])
    ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    ax.set_ylabel("throughput (tokens/s)")
    return _finish(ax, caption, legend)


def by_load(
    runs: pd.DataFrame, y: str = "attainment", *, x: str = "rate_per_s", ax: Axes | None = None, caption: str = "", legend: bool = True
) -> Axes:
    """One line per policy over a load that was swept, with a band over seeds. `runs`: rows with policy, seed, `x` and `y`."""
    ax = ax or _axes()
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
    return _finish(ax, caption, legend)


def timeline(events: pd.DataFrame, *, bin_s: float | None = None, axes: Sequence[Axes] | None = None, caption: str = "") -> Sequence[Axes]:
    """Offered requests/s, output tokens/s and committed fine-tune tokens/s over time, one line per policy, a band over seeds.

    `events`: `Comparison.events`, or a replay's events with a `policy` column. `bin_s`: about 60 bins unless given.
    """
    axes = list(axes if axes is not None else NotebookFigure(figsize=(9, 6), layout="constrained").subplots(3, 1, sharex=True))
    end = float(events["time_s"].max()) if len(events) else 1.0
    width = bin_s or max(end / 60, 1e-3)
    edges = np.arange(0.0, end + width, width)
    kinds = (("arrived", "offered\n(requests/s)"), ("token", "output\n(tokens/s)"), ("committed", "fine-tuning,\ncommitted (tokens/s)"))
    seeds = events["seed"] if "seed" in events else pd.Series(0, index=events.index)
    for ax, (kind, name) in zip(axes, kinds, strict=True):
        for label, style in styles(list(dict.fromkeys(events["policy"]))).items():
            shown = (kind, "merged") if kind == "token" else (kind,)
            rows = events[events["kind"].isin(shown) & (events["policy"] == label)]
            weights = rows["value"].where(rows["kind"].isin(("committed", "merged")), 1.0)
            chosen = [rows.index[seeds[rows.index] == seed] for seed in seeds[events["policy"] == label].unique()]
            rates = np.array([np.histogram(rows["time_s"][i], edges, weights=weights[i])[0] for i in chosen]) / width
            ax.stairs(rates.mean(axis=0), edges, color=style.colour, linestyle=style.line, label=label, linewidth=1.4)
            if len(rates) > 1:
                ax.fill_between(edges[:-1], rates.min(axis=0), rates.max(axis=0), step="post", color=style.colour, alpha=0.2, linewidth=0)
        ax.set_ylabel(name)
        ax.set_ylim(bottom=0)
        _finish(ax, "", legend=False)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes[-1].set_xlabel(f"time (s), in bins of {width:.3g} s")
    return [*axes[:-1], _finish(axes[-1], caption, legend=False)]


def distribution(
    frame: pd.DataFrame,
    value: str = "ttft_s",
    *,
    slo_s: float | None = None,
    ax: Axes | None = None,
    caption: str = "",
    legend: bool = True,
) -> Axes:
    """Share of rows whose `value` (a time in seconds) is at most x, by policy. Undefined values count, so a line may end below 100 %.

    `frame`: request rows (`ttft_s`, `tpot_s`, `itl_p99_s`, `e2e_s`) or `metrics.token_gaps` (`itl_s`), with a `policy` column. The tail
    above 99 % is greyed where a policy has fewer than 1,000 rows.
    """
    ax = ax or _axes()
    few = False
    for label, style in styles(list(dict.fromkeys(frame["policy"]))).items():
        rows = frame.loc[frame["policy"] == label, value]
        times = np.sort(rows.dropna().to_numpy(float)) * 1e3
        few |= len(rows) < FEW_REQUESTS
        ax.step(times, np.arange(1, len(times) + 1) / len(rows) * 100, where="post", color=style.colour, linestyle=style.line, label=label)
    if slo_s is not None:
        ax.axvline(slo_s * 1e3, color=SLO_COLOUR, linewidth=1.2)
        ax.annotate(f"SLO {slo_s * 1e3:g} ms ", (slo_s * 1e3, 4), color=SLO_COLOUR, ha="right", rotation=90, va="bottom", fontsize=8)
    if few:
        ax.axhspan(99, 101, color="#DDDDDD", zorder=0)
        ax.annotate(
            "p99 is uncertain: fewer than 1,000 rows", (0.99, 98.6), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=7
        )
    ax.set_xscale("log")
    ax.set_ylim(0, 101)
    names = {"ttft_s": "time to first token", "itl_s": "gap between tokens", "tpot_s": "mean time per output token", "e2e_s": "end to end"}
    ax.set_xlabel(f"{names.get(value, value.removesuffix('_s'))} (ms)")
    ax.set_ylabel(f"share of {'gaps' if value == 'itl_s' else 'arrived requests'} (%)")
    return _finish(ax, caption, legend)


def loss(events: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Mean loss of each micro-batch over committed tokens, one line per policy and job; points: the held-out loss."""
    ax = ax or _axes()
    frame = events if "policy" in events else events.assign(policy="")
    kinds = {"loss", "eval_loss", "committed"}
    for label, style in styles(list(dict.fromkeys(frame["policy"]))).items():
        rows = frame[(frame["policy"] == label) & frame["kind"].isin(kinds)]
        if "seed" in rows:
            rows = rows[rows["seed"] == rows["seed"].min()]
        for job, of_job in rows.groupby("owner", sort=False):
            tokens = of_job["value"].where(of_job["kind"] == "committed", 0.0).cumsum()
            name = f"{label}, {job}" if label else str(job)
            for kind, marker, line in (("loss", "", style.line), ("eval_loss", style.marker, "")):
                of = of_job["kind"] == kind
                if of.any():
                    tag = name if kind == "loss" else f"{name}, held out"
                    ax.plot(tokens[of], of_job["value"][of], color=style.colour, marker=marker, linestyle=line or "none", label=tag)
    ax.set_xlabel("fine-tuning progress (committed tokens)")
    ax.set_ylabel("loss (nat per labelled token)")
    return _finish(ax, caption, legend)


def predicted_vs_measured(steps: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Each step's predicted against its measured duration, by class of step, with the line of equality and a band of 10 %.

    `steps`: rows with `duration_s`, `predicted_s` and the features, such as `LatencyModel.steps` or a replay's steps.
    """
    ax = ax or _axes(5, 5)
    kinds = classes_of(steps[list(NAMES)].to_numpy(float))
    measured, predicted = steps["duration_s"].to_numpy(float) * 1e3, steps["predicted_s"].to_numpy(float) * 1e3
    for index, (name, colour, marker) in enumerate(zip(CLASSES, (COLOURS[4], COLOURS[1], COLOURS[0]), MARKERS, strict=False)):
        chosen = kinds == index
        if chosen.any():
            label = f"{name} ({chosen.sum()} steps)"
            ax.scatter(measured[chosen], predicted[chosen], s=12, color=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
    ends = np.array([min(measured.min(), predicted[predicted > 0].min()), max(measured.max(), predicted.max())]) * (0.9, 1.1)
    ax.plot(ends, ends, color="black", linewidth=1)
    ax.fill_between(ends, ends * 0.9, ends * 1.1, color="#CCCCCC", alpha=0.6, linewidth=0, label="within 10 %", zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="measured step time (ms)", ylabel="predicted step time (ms)", xlim=ends, ylim=ends)
    return _finish(ax, caption, legend)


def step_timeline(
    steps: pd.DataFrame, *, start_s: float = 0.0, end_s: float | None = None, ax: Axes | None = None, caption: str = ""
) -> Axes:
    """What each step did: one bar per step and kind of work over time, darker for more tokens (layers for the backward)."""
    ax = ax or _axes(9, 2.6)
    end_s = float(steps["end_s"].max()) if end_s is None else end_s
    steps = steps[(steps["end_s"] > start_s) & (steps["start_s"] < end_s)]
    columns = dict(
        zip(KIND_COLOURS, ("decode_tokens", "prefill_tokens", "finetune_tokens", "backward_layers", "evaluate_tokens"), strict=True)
    )
    kinds = [k for k, column in columns.items() if (steps[column] > 0).any()]
    for row, kind in enumerate(kinds):
        amount = steps[columns[kind]].to_numpy(float)
        chosen = amount > 0
        bars = np.column_stack([steps["start_s"], steps["end_s"] - steps["start_s"]])[chosen]
        shade = 0.3 + 0.7 * amount[chosen] / amount.max()
        ax.broken_barh(bars.tolist(), (row - 0.4, 0.8), facecolors=[(*to_rgb(KIND_COLOURS[kind]), a) for a in shade])
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set(xlim=(start_s, end_s), xlabel="time (s)")
    return _finish(ax, caption, legend=False)


def roofline(rows: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Kernels against what the device allows: FLOP/s reached over FLOPs per byte (least of each), under its bandwidth and matrix rate.

    `rows`: bench rows of one device; those with microseconds, bytes and FLOPs are drawn. The roof stands where the device's rates
    were measured (Williams, Waterman, Patterson: Roofline, CACM 2009). Raises ValueError for rows of several devices, or none to draw.
    """
    rows = rows[(rows["unit"] == "us") & rows["num_bytes"].notna() & rows["flops"].notna()]
    devices = list(dict.fromkeys(rows["device"]))
    require(len(devices) == 1, "a roofline needs kernel rows of exactly one device", devices, "Choose rows by their device.")
    ax = ax or _axes(7, 4.5)
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
    return _finish(ax, caption or devices[0], legend)


def attribution(
    frame: pd.DataFrame, *, of: str = "TTFT", ax: Axes | None = None, caption: str = "", source: Any = None, legend: bool = True
) -> Axes:
    """Where requests' time went: one stacked bar of mean seconds per policy, over its seeds. `frame`: `attribution.by_policy`.

    `of` names the time on the axis. `source` is what the frame was made from (a Comparison, or a Replay): it completes the caption with
    executor and device, and says so where they are simulated.
    """
    ax = ax or _axes(8, 4)
    means = frame.groupby("policy", sort=False)[[f"{name}_s" for name in CAUSE_STYLES]].mean()
    below = np.zeros(len(means))
    for name, (label, colour, hatch) in CAUSE_STYLES.items():
        values = means[f"{name}_s"].to_numpy(float)
        if np.nansum(np.abs(values)) > 0:
            ax.bar(range(len(means)), values, 0.6, bottom=below, color=colour, hatch=hatch, edgecolor="#444444", linewidth=0.4, label=label)
            below = below + np.nan_to_num(values)
    for x, total in enumerate(below):
        ax.annotate(f"{total:.3g}", (x, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xticks(range(len(means)), [fill(str(label), max(10, 72 // len(means))) for label in means.index], fontsize=8)
    ax.set_xlim(-0.6, len(means) - 0.4)
    ax.set_ylim(0, float(below.max(initial=0.0)) * 1.08 or 1.0)
    ax.set_ylabel(f"mean {of} per request (s)")
    if legend and ax.get_legend_handles_labels()[1]:
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return _finish(ax, "; ".join(filter(None, (_said_of(frame, source), caption))), legend=False)


def _said_of(frame: pd.DataFrame, source: Any) -> str:
    """n, seeds, executor and device of an attribution."""
    low, high, seeds = int(frame["requests"].min()), int(frame["requests"].max()), frame["seed"].nunique()
    n = f"n = {low if low == high else f'{low}–{high}'} requests a run, {seeds} seed{'s' if seeds != 1 else ''}"
    if source is None:
        return n
    info = source.executor
    return f"{n}; {f'simulated by {info.name} fitted on' if info.simulated else f'measured on {info.name},'} {info.device}"


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
        _finish(ax, "", legend=False)
    figure.axes[0].set_ylabel("share at most x (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    if caption:
        figure.supxlabel(fill(caption, 40 * len(names)), x=0.01, ha="left", fontsize=7, color="#444444")
    return figure


def _axes(width: float = 6.0, height: float = 4.0) -> Axes:
    return NotebookFigure(figsize=(width, height), layout="constrained").subplots()


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


def _finish(ax: Axes, caption: str, legend: bool) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend and ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    if caption:
        text = fill(caption, max(40, int(ax.figure.bbox.width / ax.figure.dpi * 17)))
        ax.annotate(text, (0, 0), (0, -40), "axes fraction", "offset points", va="top", fontsize=7, color="#444444", annotation_clip=False)
    return ax
