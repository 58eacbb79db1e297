"""How evenly a fleet was used: utilisation, memory and work by replica, and their imbalance in a summary."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.results.metrics import jain, machine, window

MACHINE = ("steps", "busy_share", "planning_share", "kv_occupancy_mean", "kv_occupancy_max")


def by_replica(replicas: Sequence[Any], measure: tuple[float, float] | None) -> pd.DataFrame:
    """One row per replica, index replica, over the window `measure` (None: the whole of the longest).

    requests: given to it within the window; jobs: placed on it. decode, prefill and finetune tokens (committed) and adapter_loads
    within the window; busy_share, planning_share: seconds of its steps, and of planning, over the window; KV occupancy as in a summary.
    """
    ends = [window(measure, part.events, part.steps) for part in replicas]
    start, end = min(s for s, _ in ends), max(e for _, e in ends)
    return _rows(replicas, start, end)


def _rows(replicas: Sequence[Any], start: float, end: float) -> pd.DataFrame:
    rows = []
    for number, part in enumerate(replicas):
        inside = part.events[part.events["time_s"].between(start, end)]
        kind, value = inside["kind"].to_numpy(), inside["value"].to_numpy(float)
        rows.append(
            {
                "replica": number,
                "requests": int((kind == "arrived").sum()),
                "jobs": len(part.finetune_jobs),
                "decode_tokens": int((kind == "token").sum()),
                "prefill_tokens": int(value[kind == "prefill"].sum()),
                "finetune_tokens": int(value[kind == "committed"].sum()),
                "adapter_loads": int((kind == "adapter_loaded").sum()),
                "adapter_migrations": int((kind == "adapter_migrated").sum()),
            }
            | machine(part.steps, part.executor.num_blocks, start, end)
        )
    frame = pd.DataFrame(rows).set_index("replica")
    # a replica without a step was idle and held nothing
    return frame.fillna(dict.fromkeys(MACHINE, 0.0))


def machines(replicas: Sequence[Any], start: float, end: float) -> dict[str, Any]:
    """The summary's rows on the machine for a fleet: the mean replica's shares, and how far replicas are apart.

    busy_share, planning_share and kv_occupancy_mean are means over replicas, steps is their sum, kv_occupancy_max the largest.
    `imbalance_*` is largest / mean over replicas (1: all alike) of busy time, and of tokens (prefilled, decoded, committed);
    `jain_replicas` is Jain's index of those tokens.
    """
    frame = _rows(replicas, start, end)
    row: dict[str, Any] = {"steps": int(frame["steps"].sum())}
    row |= {name: float(frame[name].mean()) for name in ("busy_share", "planning_share", "kv_occupancy_mean")}
    row["kv_occupancy_max"] = float(frame["kv_occupancy_max"].max())
    tokens = frame[["decode_tokens", "prefill_tokens", "finetune_tokens"]].sum(axis=1).to_numpy(float)
    row |= {"replicas": len(frame), "busy_share_min": float(frame["busy_share"].min()), "busy_share_max": float(frame["busy_share"].max())}
    row |= {"imbalance_busy": _imbalance(frame["busy_share"].to_numpy(float)), "imbalance_tokens": _imbalance(tokens)}
    row |= {"jain_replicas": jain(tokens), "adapter_migrations": int(frame["adapter_migrations"].sum())}
    return row


def _imbalance(values: np.ndarray) -> float:
    return float(values.max() / values.mean()) if values.any() else np.nan
