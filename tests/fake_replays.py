"""Replays made by hand for tests of measurement: right in form, with numbers from a one-line queue."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import SLO
from workbench.core import ExecutorInfo, Request
from workbench.features import INDEX, NAMES
from workbench.results import metrics

SLOS = SLO(ttft_s=0.5, itl_s=0.08)
INFO = ExecutorInfo(
    name="Engine(tiny)",
    device="test device",
    num_layers=2,
    max_model_len=512,
    max_batch_tokens=512,
    max_requests=16,
    num_blocks=64,
    block_tokens=16,
    num_slots=4,
    max_batch_adapters=4,
    activation_tokens=1024,
)
COLUMNS = ["time_s", "step", "kind", "owner", "adapter", "value", "note"]


@dataclass
class FakeTrace:
    """The part of a Trace that a comparison reads."""

    requests: tuple[Request, ...]
    name: str = "poisson"
    redrawn: tuple[str, ...] = ("arrivals",)
    notes: tuple[str, ...] = ()

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"request_id": [r.request_id for r in self.requests], "arrival_s": [r.arrival_s for r in self.requests]})

    def __len__(self) -> int:
        return len(self.requests)


def trace_of(seed: int, num: int = 60) -> FakeTrace:
    times = np.cumsum(np.random.default_rng(seed).exponential(0.25, num))
    return FakeTrace(
        tuple(
            Request(request_id=f"r{i}", arrival_s=float(t), prompt_tokens=20, output_tokens=8, adapter=f"a{i % 3}")
            for i, t in enumerate(times)
        )
    )


def fake_replay(trace: FakeTrace, *, policy: Any, seed: int, executor: Any, slo=SLOS, measure=None, gap_s: float = 0.05, **_: Any):
    """A single server that prefills for 0.1 s and decodes alone; every fourth step trains."""
    rng = np.random.default_rng([seed, 7])
    gap_s = getattr(policy, "gap_s", gap_s)
    rows, steps, now, committed = [], [], 0.0, 0
    for request in trace.requests:
        owner, adapter = request.request_id, request.adapter
        rows.append((request.arrival_s, 0, "arrived", owner, adapter, np.nan, ""))
        start = max(now, request.arrival_s)
        rows.append((start, 0, "scheduled", owner, adapter, np.nan, ""))
        times = start + 0.05 + np.cumsum(gap_s * rng.lognormal(0, 0.3, request.output_tokens))
        rows += [(t, 0, "token", owner, adapter, i + 1.0, "") for i, t in enumerate(times)] + [
            (times[-1], 0, "finished", owner, adapter, np.nan, "")
        ]
        values = np.zeros(len(NAMES))
        values[INDEX["decode_tokens"]], values[INDEX["prefill_tokens"]] = 8, 20 if rng.random() < 0.5 else 0
        if rng.random() < 0.4:
            values[INDEX["finetune_tokens"]], values[INDEX["backward_layers"]], values[INDEX["backward_token_layers"]] = 64, 2, 128
            committed += 64
            rows += [(times[-1], 0, "loss", "job:t", "t", 3.0 * np.exp(-committed / 2000) + rng.normal(0, 0.05), "")]
            rows += [(times[-1], 0, "committed", "job:t", "t", 64.0, "")]
            if committed % 320 == 0:
                rows += [(times[-1], 0, "eval_loss", "job:t", "t", 3.1 * np.exp(-committed / 2000), "")]
        duration = float(times[-1] - start)
        extra = {"step": len(steps), "start_s": start, "end_s": times[-1], "duration_s": duration, "plan_s": 0.0, "free_blocks": 32}
        steps.append(extra | {"predicted_s": duration * rng.lognormal(0, 0.1)} | dict(zip(NAMES, values, strict=True)))
        now = float(times[-1])
    events = pd.DataFrame(rows, columns=COLUMNS).sort_values("time_s", kind="stable", ignore_index=True)
    replay = SimpleNamespace(
        events=events,
        steps=pd.DataFrame(steps),
        requests=metrics.request_frame(trace.requests, events, slo),
        slo=slo,
        measure=measure,
        executor=getattr(executor, "info", executor),
        interrupted=False,
        policy=policy,
        seed=seed,
    )
    replay.summary = lambda: metrics.summary(replay)
    return replay
