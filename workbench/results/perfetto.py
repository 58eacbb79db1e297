"""A replay in the Chrome trace format, for ui.perfetto.dev and chrome://tracing.

Tracks: the steps (planning, then the parts of its duration by `step_parts`, laid end to end), requests (queued, prefill, decode,
preempted, in as many lanes as ran at once), jobs (forward, evaluate, backward by step; optimiser steps and published versions as
instants), adapters (loads, evictions), and counters of KV blocks, waiting and running requests. With a latency model, each step's
measured duration, and beside it what the model predicts for its work, divided into the terms of its costs. Times are whole nanoseconds of
the replay clock, written in microseconds as the format asks. Format: "Trace Event Format" (Google, the catapult project).
"""

import heapq
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.features import NAMES
from workbench.results.step_parts import PART_COLUMNS, PARTS

if TYPE_CHECKING:
    from workbench.latency import LatencyModel

STEPS, REQUESTS, JOBS, ADAPTERS, PREDICTED = 1, 2, 3, 4, 5
PROCESSES = {STEPS: "steps", REQUESTS: "requests", JOBS: "fine-tune jobs", ADAPTERS: "adapters"}
_ORDER = ("load", "finetune", "evaluate", "prefill", "decode", "backward")
_AMOUNTS = {
    "load": "loads",
    "finetune": "finetune_tokens",
    "evaluate": "evaluate_tokens",
    "prefill": "prefill_tokens",
    "decode": "decode_tokens",
    "backward": "backward_layers",
}
_JOB_KINDS = {"finetune": "forward", "evaluate": "evaluate", "backward": "backward"}
_JOB_INSTANTS = ("optimizer_step", "published", "job_paused", "job_resumed", "job_stopped", "job_finished")


def save_trace(replay: Any, path: str | Path, predicted: "LatencyModel | None" = None) -> Path:
    """Write the replay as one JSON object `{"traceEvents": [...]}`; open it in ui.perfetto.dev. Returns the path.

    `predicted` is a latency model whose prediction of each step stands beside its measured duration. Raises ValueError for anything else.
    """
    path = Path(path)
    events = trace_events(replay, predicted)
    other = {"policy": replay.policy, "executor": replay.executor.name, "device": replay.executor.device, "seed": replay.seed}
    record = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    path.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")
    return path


def trace_events(replay: Any, predicted: "LatencyModel | None" = None) -> list[dict[str, Any]]:
    """The events: metadata first, then by time, a slice before what lies within it. A fleet's replicas have processes of their own."""
    if hasattr(replay, "replicas"):
        events = [_of_replica(event, k) for k, part in enumerate(replay.replicas) for event in trace_events(part, predicted)]
        return sorted(events, key=lambda event: event.get("ts", -1.0))
    writer = _Writer()
    for pid, name in PROCESSES.items():
        writer.name("process_name", pid, 0, name)
    _steps(writer, replay)
    _requests(writer, replay)
    _jobs(writer, replay)
    _adapters(writer, replay)
    if predicted is not None:
        _predicted(writer, replay, predicted)
    return writer.sorted()


def _of_replica(event: dict[str, Any], replica: int) -> dict[str, Any]:
    moved = event | {"pid": event["pid"] + replica * len(PROCESSES)}
    return moved | {"args": {"name": f"replica {replica}: {event['args']['name']}"}} if event["name"] == "process_name" else moved


def _ns(seconds: Any) -> Any:
    """Whole nanoseconds: sums of them are exact, so that slices nest."""
    return np.rint(np.asarray(seconds, float) * 1e9).astype(np.int64)


class _Writer:
    """Events with their times in nanoseconds."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.timed: list[tuple[int, dict[str, Any]]] = []

    def name(self, what: str, pid: int, tid: int, name: str) -> None:
        self.metadata.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})

    def slice(self, name: str, pid: int, tid: int, start: int, end: int, **args: Any) -> None:
        event = {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start / 1e3, "dur": (end - start) / 1e3}
        self.timed.append((start, event | ({"args": args} if args else {})))

    def instant(self, name: str, pid: int, tid: int, at: int, **args: Any) -> None:
        event = {"ph": "i", "name": name, "pid": pid, "tid": tid, "ts": at / 1e3, "s": "t"}
        self.timed.append((at, event | ({"args": args} if args else {})))

    def counter(self, name: str, at: int, value: float, pid: int = STEPS) -> None:
        self.timed.append((at, {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at / 1e3, "args": {"value": value}}))

    def sorted(self) -> list[dict[str, Any]]:
        # stable: a slice was written before what lies within it
        self.timed.sort(key=lambda row: row[0])
        return [*self.metadata, *(event for _, event in self.timed)]


def _steps(writer: _Writer, replay: Any) -> None:
    steps = replay.steps
    writer.name("thread_name", STEPS, 1, f"{replay.policy} on {replay.executor.name}")
    start, end = _ns(steps["start_s"]), _ns(steps["end_s"])
    accepted = np.minimum(_ns(steps["start_s"] + steps["plan_s"]), end)
    parts = {name: steps[column].to_numpy(float) for name, column in zip(PARTS, PART_COLUMNS, strict=True)}
    amounts = {name: steps[column].to_numpy(float) for name, column in _AMOUNTS.items()}
    used = replay.executor.num_blocks - steps["free_blocks"].to_numpy()
    waiting, running, number = (steps[name].to_numpy() for name in ("waiting", "running", "step"))
    for i in range(len(steps)):
        writer.slice(f"step {number[i]}", STEPS, 1, int(start[i]), int(end[i]))
        if accepted[i] > start[i]:
            writer.slice("plan", STEPS, 1, int(start[i]), int(accepted[i]))
        at, since = int(accepted[i]), 0.0
        for name in _ORDER:
            if amounts[name][i] > 0:
                since += parts[name][i]
                until = min(int(accepted[i]) + round(since * 1e9), int(end[i]))
                writer.slice(name, STEPS, 1, at, until, **{_AMOUNTS[name]: amounts[name][i]})
                at = until
        if at < end[i]:
            writer.slice("shared", STEPS, 1, at, int(end[i]))
        writer.counter("KV blocks in use", int(start[i]), int(used[i]))
        writer.counter("waiting requests", int(start[i]), int(waiting[i]))
        writer.counter("running requests", int(start[i]), int(running[i]))


def _requests(writer: _Writer, replay: Any) -> None:
    """One slice per request from arrival to end, its phases inside; a lane holds one request at a time."""
    frame, events = replay.requests, replay.events
    last_s = max(float(events["time_s"].max()), float(replay.steps["end_s"].max()) if len(replay.steps) else 0.0) if len(events) else 0.0
    kinds = ("scheduled", "token", "preempted", "finished", "rejected", "aborted")
    chosen = events[events["kind"].isin(kinds) & events["owner"].isin(frame.index)]
    of_owner = {name: rows for name, rows in chosen.groupby("owner", sort=False)}
    free: list[tuple[int, int]] = []
    num_lanes = 0
    for name, row in frame.sort_values("arrival_s", kind="stable").iterrows():
        rows = of_owner.get(name, chosen.iloc[:0])
        start = int(_ns(row["arrival_s"]))
        end = max(start, int(_ns(rows["time_s"].iloc[-1] if row["outcome"] != "unfinished" else last_s)))
        if free and free[0][0] <= start:
            lane = heapq.heappop(free)[1]
        else:
            num_lanes += 1
            lane = num_lanes
            writer.name("thread_name", REQUESTS, lane, f"lane {lane}")
        heapq.heappush(free, (end, lane))
        met = {"met": bool(row["met"]), "prompt_tokens": row["prompt_tokens"], "output_tokens": int(row["output_tokens"])}
        adapter = "" if row["adapter"] is None else f" ({row['adapter']})"
        writer.slice(f"{name}{adapter}", REQUESTS, lane, start, end, outcome=row["outcome"], **met)
        _phases(writer, lane, start, end, rows)


def _phases(writer: _Writer, lane: int, start: int, end: int, rows: pd.DataFrame) -> None:
    """queued -> prefill -> decode, with the times of preemption cut out as slices of their own."""
    kind, time = rows["kind"].to_numpy(object), _ns(rows["time_s"])

    def phase(name: str, since: int, until: int) -> None:
        if until > since:
            writer.slice(name, REQUESTS, lane, since, until)

    at, state, has_token = start, "queued", False
    for what, when in zip(kind, time.tolist(), strict=True):
        has_token |= what == "token"
        after = {"scheduled": "prefill", "preempted": "preempted"}.get(what, state)
        if what == "token" and state != "decode":
            after = "decode"
        if after != state:
            phase(state, at, when)
            at, state = when, after
        if what in ("preempted", "rejected", "aborted"):
            writer.instant(what, REQUESTS, lane, when)
    phase(state, at, end)


def _jobs(writer: _Writer, replay: Any) -> None:
    work, steps, events = replay.work, replay.steps, replay.events
    lanes = {job.id: lane for lane, job in enumerate(replay.finetune_jobs, start=1)}
    for name, lane in lanes.items():
        writer.name("thread_name", JOBS, lane, name)
    rows = work[work["kind"].isin(_JOB_KINDS) & work["owner"].isin(lanes)]
    place = np.searchsorted(steps["step"].to_numpy(), rows["step"].to_numpy())
    end = _ns(steps["end_s"])[place]
    start = np.minimum(_ns(steps["start_s"] + steps["plan_s"])[place], end)
    for owner, kind, amount, since, until in zip(rows["owner"], rows["kind"], rows["tokens"], start.tolist(), end.tolist(), strict=True):
        unit = "layers" if kind == "backward" else "tokens"
        writer.slice(_JOB_KINDS[kind], JOBS, lanes[owner], since, until, **{unit: amount})
    chosen = events[events["kind"].isin(_JOB_INSTANTS) & events["owner"].isin(lanes)]
    for owner, kind, value, at in zip(chosen["owner"], chosen["kind"], chosen["value"], _ns(chosen["time_s"]).tolist(), strict=True):
        args = {} if pd.isna(value) else {"value": value}
        writer.instant("optimizer step" if kind == "optimizer_step" else kind, JOBS, lanes[owner], at, **args)


def _adapters(writer: _Writer, replay: Any) -> None:
    """Loads last their equal share of the step's loading part; one track per adapter."""
    events, steps = replay.events, replay.steps
    chosen = events[events["kind"].isin(("adapter_loaded", "adapter_evicted"))]
    lanes = {name: lane for lane, name in enumerate(dict.fromkeys(chosen["adapter"]), start=1)}
    for name, lane in lanes.items():
        writer.name("thread_name", ADAPTERS, lane, str(name))
    place = np.searchsorted(steps["step"].to_numpy(), chosen["step"].to_numpy())
    each = steps["load_s"].to_numpy(float) / np.maximum(steps["loads"].to_numpy(float), 1.0)
    times = _ns(chosen["time_s"]).tolist()
    for i, (name, kind, note, at) in enumerate(zip(chosen["adapter"], chosen["kind"], chosen["note"], times, strict=True)):
        if kind == "adapter_evicted" or place[i] >= len(steps):
            writer.instant("load" if kind == "adapter_loaded" else "evict", ADAPTERS, lanes[name], at, version=note)
            continue
        writer.slice("load", ADAPTERS, lanes[name], at, at + round(float(each[place[i]]) * 1e9), version=note)


def _predicted(writer: _Writer, replay: Any, model: "LatencyModel") -> None:
    """Measured steps on one track, and from the same moments on the model's, in as many lanes as it takes where it predicts too long.

    A step that stopped early did less than the work that it is predicted for; it is marked.
    """
    require(hasattr(model, "costs"), "predicted must be a LatencyModel", model, "Fit one with LatencyModel.fit, or load a profile.")
    writer.name("process_name", PREDICTED, 0, f"predicted by {model.info.name} beside measured")
    writer.name("thread_name", PREDICTED, 1, "measured")
    steps = replay.steps
    parts = model.costs.parts(steps[list(NAMES)].to_numpy(float))
    terms, seconds = list(parts.columns), parts.to_numpy(float)
    start, end = np.minimum(_ns(steps["start_s"] + steps["plan_s"]), _ns(steps["end_s"])), _ns(steps["end_s"])
    free: list[tuple[int, int]] = []
    num_lanes = 0
    for i, (number, stopped) in enumerate(zip(steps["step"], steps["stopped_early"], strict=True)):
        since, until = int(start[i]), int(end[i])
        ends = since + _ns(seconds[i].cumsum())
        last = int(ends[-1]) if len(ends) else since
        if free and free[0][0] <= since:
            lane = heapq.heappop(free)[1]
        else:
            num_lanes += 1
            lane = 1 + num_lanes
            writer.name("thread_name", PREDICTED, lane, f"predicted, lane {num_lanes}")
        heapq.heappush(free, (last, lane))
        both = {"measured_us": (until - since) / 1e3, "predicted_us": (last - since) / 1e3, "stopped_early": bool(stopped)}
        writer.slice(f"step {number}", PREDICTED, 1, since, until, **both)
        writer.slice(f"step {number}", PREDICTED, lane, since, last, **both)
        at = since
        for term, upto in zip(terms, ends.tolist(), strict=True):
            if upto > at:
                writer.slice(term, PREDICTED, lane, at, upto)
                at = upto
        writer.counter("predicted - measured, us", since, (last - until) / 1e3, PREDICTED)
