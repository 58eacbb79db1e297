"""Where the time of requests went."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.model_error import how
from workbench.plots.style import brief, finish, new_axes

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


def attribution(
    frame: pd.DataFrame, *, of: str = "TTFT", ax: Axes | None = None, caption: str = "", source: Any = None, legend: bool = True
) -> Axes:
    """Where requests' time went: one stacked bar of mean seconds per policy, over its seeds. `frame`: `attribution.by_policy`.

    `of` names the time on the axis. `source` is what the frame was made from (a Comparison, or a Replay): it completes the caption with
    executor and device, and says so where they are simulated.
    """
    ax = ax or new_axes(8, 4)
    means = frame.groupby("policy", sort=False)[[f"{name}_s" for name in CAUSE_STYLES]].mean()
    below = np.zeros(len(means))
    for name, (label, colour, hatch) in CAUSE_STYLES.items():
        values = means[f"{name}_s"].to_numpy(float)
        if np.nansum(np.abs(values)) > 0:
            ax.bar(range(len(means)), values, 0.6, bottom=below, color=colour, hatch=hatch, edgecolor="#444444", linewidth=0.4, label=label)
            below = below + np.nan_to_num(values)
    for x, total in enumerate(below):
        ax.annotate(f"{total:.3g}", (x, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xticks(range(len(means)), [brief(str(label), max(10, 72 // len(means))) for label in means.index], fontsize=8)
    ax.set_xlim(-0.6, len(means) - 0.4)
    ax.set_ylim(0, float(below.max(initial=0.0)) * 1.08 or 1.0)
    ax.set_ylabel(f"mean {of} per request (s)")
    if legend and ax.get_legend_handles_labels()[1]:
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return finish(ax, "; ".join(filter(None, (_said_of(frame, source), caption))), legend=False)


def _said_of(frame: pd.DataFrame, source: Any) -> str:
    """n, seeds, executor and device of an attribution."""
    low, high, seeds = int(frame["requests"].min()), int(frame["requests"].max()), frame["seed"].nunique()
    n = f"n = {low if low == high else f'{low}–{high}'} requests a run, {seeds} seed{'s' if seeds != 1 else ''}"
    if source is None:
        return n
    return f"{n}; {how(source.executor, 'ttft_p50_s', 'ttft_p99_s')}"
