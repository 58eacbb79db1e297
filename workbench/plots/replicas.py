"""How evenly replicas were used."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.plots.style import finish, new_axes, styles

REPLICA_VALUES = {
    "requests": "requests",
    "busy_share": "busy (% of the window)",
    "adapter_loads": "adapter loads",
    "decode_tokens": "output (tokens)",
    "prefill_tokens": "prefill (tokens)",
    "finetune_tokens": "fine-tuning, committed (tokens)",
}


def by_replica(frame: pd.DataFrame, value: str = "busy_share", *, ax: Axes | None = None, caption: str = "", legend: bool = True) -> Axes:
    """One bar per replica and policy, at the mean over seeds. `frame`: `FleetReplay.by_replica` with the replica as a column, and `policy`.

    `value`: requests, busy_share, adapter_loads, decode_tokens, prefill_tokens or finetune_tokens.
    """
    ax = ax or new_axes()
    scale = 100.0 if value.endswith("_share") else 1.0
    means = frame.groupby(["policy", "replica"], sort=False)[value].mean().unstack() * scale
    width = 0.8 / len(means)
    for place, (label, style) in enumerate(styles(list(means.index)).items()):
        x = np.arange(len(means.columns)) + (place - (len(means) - 1) / 2) * width
        ax.bar(x, means.loc[label], width * 0.94, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.5, label=label)
    ax.set_xticks(range(len(means.columns)), [str(number) for number in means.columns])
    ax.set(xlabel="replica", ylabel=REPLICA_VALUES.get(value, value))
    return finish(ax, caption, legend)
