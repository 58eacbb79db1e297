"""What happened over time: rates, latencies, losses, steps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from workbench.config import require
from workbench.core import ENDS
from workbench.plots.style import SLO_COLOUR, NotebookFigure, finish, log_ticks, new_axes, styles

FEW_REQUESTS = 1000  # below it a p99 rests on fewer than ten requests
KIND_COLOURS = {
    "decode": "#0072B2",
    "prefill": "#56B4E9",
    "fine-tune forward": "#E69F00",
    "fine-tune backward": "#D55E00",
    "evaluate": "#CC79A7",
}
PHASE_COLOURS = {"waiting": "#BBBBBB", "prefill": "#56B4E9", "decode": "#0072B2", "preempted": "#D55E00"}


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
        finish(ax, "", legend=False)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes[-1].set_xlabel(f"time (s), in bins of {width:.3g} s")
    return [*axes[:-1], finish(axes[-1], caption, legend=False)]


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
    ax = ax or new_axes()
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
            "p99 is uncertain: fewer than 1,000 rows",
            (0.99, 98.6),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
    ax.set_xscale("log")
    log_ticks(ax.xaxis)
    ax.set_ylim(0, 101)
    names = {"ttft_s": "time to first token", "itl_s": "gap between tokens", "tpot_s": "mean time per output token", "e2e_s": "end to end"}
    ax.set_xlabel(f"{names.get(value, value.removesuffix('_s'))} (ms)")
    ax.set_ylabel(f"share of {'gaps' if value == 'itl_s' else 'arrived requests'} (%)")
    return finish(ax, caption, legend)


def loss(events: pd.DataFrame, *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """Mean loss of each micro-batch over committed tokens, one line per policy and job; points: the held-out loss."""
    ax = ax or new_axes()
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
    return finish(ax, caption, legend)


def step_timeline(
    steps: pd.DataFrame, *, start_s: float = 0.0, end_s: float | None = None, ax: Axes | None = None, caption: str = ""
) -> Axes:
    """What each step did: one bar per step and kind of work over time, darker for more tokens (layers for the backward)."""
    ax = ax or new_axes(9, 2.6)
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
    return finish(ax, caption, legend=False)


def request_timeline(
    events: pd.DataFrame, steps: pd.DataFrame, request_id: str, *, axes: Sequence[Axes] | None = None, caption: str = ""
) -> Sequence[Axes]:
    """One request's life (waiting, prefill, decode, preempted; a tick per token), above what the steps held meanwhile.

    `events` and `steps` of one replay. Raises ValueError for a request that never arrived.
    """
    mine = events[events["owner"] == request_id]
    require(bool((mine["kind"] == "arrived").any()), "request_id must be of a request that arrived", request_id)
    figure_axes = axes if axes is not None else NotebookFigure(figsize=(9, 4), layout="constrained").subplots(2, 1, height_ratios=(1, 2))
    life, below = figure_axes
    changes = {"arrived": "waiting", "scheduled": "prefill", "token": "decode", "preempted": "preempted"}
    state, since, last = "waiting", float(mine["time_s"].iloc[0]), float(mine["time_s"].max())
    seen: set[str] = set()
    for kind, time in zip([*mine["kind"], "finished"], [*mine["time_s"], last], strict=True):
        after = state if kind in ENDS else changes.get(kind, state)
        if (after != state or kind in ENDS) and time > since:
            colour = PHASE_COLOURS[state]
            life.broken_barh([(since, time - since)], (-0.4, 0.8), facecolors=colour, label=state if state not in seen else None)
            seen.add(state)
            since = time
        state = after
    tokens = mine.loc[mine["kind"] == "token", "time_s"].to_numpy(float)
    life.vlines(tokens, -0.4, 0.4, color="black", linewidth=0.8, label="a token")
    start = float(mine["time_s"].iloc[0])
    margin = 0.03 * max(last - start, 1e-6)
    life.set(yticks=[0], xlim=(start - margin, last + margin))
    life.set_yticklabels([f"request {request_id}"])
    finish(life, "", legend=False)
    life.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    life.tick_params(labelbottom=False)
    return [life, step_timeline(steps, start_s=start - margin, end_s=last + margin, ax=below, caption=caption)]
