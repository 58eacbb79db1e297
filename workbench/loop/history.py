"""What happened in a replay, as columns: written while it runs, made into frames when somebody looks.

A step's row and most events are written as they happen. The tokens and work rows of steps in which all running requests decoded are not:
they follow from each request's `Stint` and from the ends of the steps. So do the digests of batches whose decode rows were left out.
"""

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np
import pandas as pd

from workbench.core import NOTHING, Batch, Predictor, Segment, StepResult
from workbench.features import INDEX, NAMES
from workbench.loop.decoding import Decoding, Stint
from workbench.results.frames import EVENT_COLUMNS, STEP_COLUMNS, WORK_COLUMNS, column, rows_as_given, sorted_by_time
from workbench.results.step_parts import PART_COLUMNS, all_step_parts

EventRow = tuple[float, int, str, str, str | None, float | None, str]
"""time_s, step, kind, owner, adapter, value, note: the columns of a replay's `events`."""

WorkRow = tuple[int, str, str, int, int, str | None, int]
"""step, owner, kind, start, tokens, adapter, version: the columns of a replay's `work`."""

STEP_TIMES = ("end_s", "duration_s", "predicted_s")
RUN_TIMES = ("start_s", "plan_s", "gpu_s", "host_s")
RUN_COLUMNS = ("step", *RUN_TIMES, "waiting", "running")
_packed = Struct(f"{len(RUN_COLUMNS) + len(NAMES)}d").pack
_CONTEXT, _ROWS = INDEX["decode_context"], INDEX["decode_tokens"]
_KIND_RANK = {"finetune": 0, "evaluate": 1, "prefill": 2, "decode": 3, "backward": 4}
RICH = ("tokens", "layers_done", "losses", "eval_losses", "published")


class History:
    """The rows of a replay so far; those of steps before `first_step`, and of counts of the group before `first_count`, it forgot.

    Runs are steps in a row that did the same work but for longer contexts: a row of `runs` (`RUN_COLUMNS`, then the features) is about the
    first one; a later step begins where the one before ended, without planning. Counts of the decoding group have runs, too:
    in `decoded_step` the step of the first, in `decoded_after` how many rows of `events` came before their tokens, and in `decoded_s`
    the end of each count. `batches` holds what the batches without the rows of the group had beside them, where anything; `released` what
    those of longer runs released; `as_planned` the steps whose executor only said how long their backward slices took; `odd_rows` how many
    rows a batch had for the group where not one each, which `conservation` reports.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.first_step = self.first_count = self.num_decoded = 0
        self.events: list[EventRow] = []
        self.work: list[WorkRow] = []
        self.decoded_first: list[int] = []
        self.decoded_step: list[int] = []
        self.decoded_after: list[int] = []
        self.decoded_s = array("d")
        self.end_s, self.duration_s, self.predicted_s = array("d"), array("d"), array("d")
        self.free_blocks = array("q")
        self.runs = array("d")
        self.run_why: list[str] = []
        self.stopped: dict[int, Sequence[float]] = {}
        self.read_s: dict[int, float] = {}
        self.results: dict[int, StepResult] = {}
        self.as_planned: set[int] = set()
        self.digests: dict[int, str] = {}
        self.odd_rows: dict[int, int] = {}
        self.batches: dict[int, Batch] = {}
        self.released: dict[int, tuple[str, ...]] = {}

    # writing

    @property
    def num_steps(self) -> int:
        return self.first_step + len(self.free_blocks)

    @property
    def num_runs(self) -> int:
        return len(self.run_why)

    def decoded(self, step: int, ends: Sequence[float]) -> None:
        """In the steps from `step` on, with these ends, the whole group decoded; all of `events` so far came before their tokens."""
        self.decoded_first.append(self.first_count + len(self.decoded_s))
        self.decoded_step.append(step)
        self.decoded_after.append(len(self.events))
        self.decoded_s.extend(ends)
        self.num_decoded += len(ends) * self.decoding.num

    def add_step(
        self,
        batch: Batch,
        result: StepResult | float,
        times: tuple[float, float, float, float],
        counts: tuple[int, int, int],
        features: Sequence[float],
        queue_why: str,
        *,
        done: Sequence[float] | None,
        has_rows: bool,
    ) -> None:
        """One step, with what the executor reported or only how long it took.

        `times` are its start, its end, planning and predicted seconds, `counts` the waiting, the running and free blocks.

        `done` are the features of what was really done, for a step that stopped early. Without `has_rows` the batch lacks those of
        the group.
        """
        step = batch.step
        start_s, end_s, plan_s, predicted_s = times
        self.end_s.append(end_s)
        if isinstance(result, StepResult):
            duration_s, gpu_s, host_s = result.duration_s, result.gpu_s, result.host_s
            if result.stopped_early or any((result.tokens, result.layers_done, result.losses, result.eval_losses, result.published)):
                self.results[step] = result
        else:
            duration_s, gpu_s, host_s, result = result, result, 0.0, NOTHING
            if batch.backwards:
                self.as_planned.add(step)
        self.duration_s.append(duration_s)
        self.predicted_s.append(predicted_s)
        waiting, running, free_blocks = counts
        self.runs.frombytes(_packed(step, start_s, plan_s, gpu_s, host_s, waiting, running, *features))
        self.free_blocks.append(free_blocks)
        self.run_why.append(queue_why)
        if done is not None:
            self.stopped[step] = done
        if batch.loads:
            self.read_s[step] = sum([load.read_s for load in batch.loads])
        if has_rows:
            self.digests[step] = batch.digest()
        elif batch.segments or batch.backwards or batch.loads or batch.admitted or batch.released:
            self.batches[step] = batch
        work, num_in_group = self.work, 0
        is_group = has_rows and bool(self.decoded_step) and self.decoded_step[-1] == step
        for s in batch.segments:
            if is_group and s.kind == "decode":
                num_in_group += 1
            else:
                work.append((step, s.owner, s.kind, s.start, s.tokens, s.adapter, s.version))
        if is_group and num_in_group != features[_ROWS]:
            self.odd_rows[step] = num_in_group
        for b in batch.backwards:
            layers = result.layers_done.get(b.owner, b.num_layers)
            work.append((step, b.owner, "backward", b.top_layer, layers, b.adapter, 0))

    def add_run(
        self,
        step: int,
        start_s: float,
        plan_s: float,
        ends: Sequence[float],
        durations: Sequence[float],
        predicted: Sequence[float],
        free_blocks: Sequence[int],
        *,
        counts: tuple[int, int],
        features: Sequence[float],
        queue_why: str,
        released: tuple[str, ...],
    ) -> None:
        """Steps from `step` on in which only the group decoded; planning counts for the first of them."""
        self.end_s.extend(ends)
        self.duration_s.extend(durations)
        self.predicted_s.extend(predicted)
        self.runs.frombytes(_packed(step, start_s, plan_s, durations[0], 0.0, *counts, *features))
        self.free_blocks.extend(free_blocks)
        self.run_why.append(queue_why)
        if released:
            self.released[step] = released

    def drop_steps(self, num: int) -> None:
        """Forget the last `num` steps, all of the latest run: they did not end."""
        if num:
            for values in (self.end_s, self.duration_s, self.predicted_s, self.free_blocks):
                del values[-num:]
            width = len(RUN_COLUMNS) + len(NAMES)
            if self.runs[-width] == self.num_steps:
                del self.runs[-width:]
                self.run_why.pop()
                self.released.pop(self.num_steps, None)

    @property
    def size(self) -> int:
        """How many rows it has, about."""
        return len(self.events) + len(self.work) + len(self.free_blocks) + self.num_decoded

    def forget(self) -> None:
        """Forget all rows; what is decoded from now on is known as before."""
        self.first_step, self.first_count, self.num_decoded = self.num_steps, self.decoding.count, 0
        for values in (self.runs, self.free_blocks, self.decoded_s, self.end_s, self.duration_s, self.predicted_s):
            del values[:]
        rows = (self.events, self.work, self.run_why, self.decoded_first, self.decoded_step, self.decoded_after)
        of_steps = (self.stopped, self.read_s, self.results, self.as_planned, self.digests, self.odd_rows, self.batches, self.released)
        for values in (*rows, *of_steps, self.decoding.stints):
            values.clear()

    # reading

    def stints(self) -> list[Stint]:
        """All stints, those that go on included, in the order of batch rows."""
        return sorted([*self.decoding.stints, *self.open_stints()], key=lambda s: s.row)

    def open_stints(self) -> list[Stint]:
        found = {id(s.stint): s.stint for group in self.decoding.growing for s in group}
        return [s for s in found.values() if s.first < self.decoding.count]

    def spans(self, stints: Sequence[Stint]) -> tuple[np.ndarray, np.ndarray]:
        """First and last (exclusive) count of each stint, without those that were forgotten [S]."""
        first = np.array([s.first for s in stints], np.int64)
        last = np.array([self.decoding.count if s.last is None else s.last for s in stints], np.int64)
        return np.maximum(first, self.first_count), last

    def steps_of_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """For each count of the group since `first_count`: its step, and how many rows of `events` came before its tokens [counts]."""
        first = np.array(self.decoded_first, np.int64) - self.first_count
        num = np.diff(np.append(first, len(self.decoded_s)))
        place = np.arange(len(self.decoded_s)) - np.repeat(first, num)
        return np.repeat(np.array(self.decoded_step, np.int64), num) + place, np.repeat(np.array(self.decoded_after, np.int64), num)

    def rows_of_group(self) -> tuple[list[Stint], np.ndarray, np.ndarray]:
        """Stints, and for each row of the group its stint's index and its count since `first_count` [N], in the order of the batches."""
        stints = self.stints()
        first, last = self.spans(stints)
        num = last - first
        which = np.repeat(np.arange(len(stints)), num)
        count = np.arange(len(which)) - np.repeat(np.cumsum(num) - num, num) + first[which]
        order = np.argsort(count, kind="stable")
        return stints, which[order], count[order] - self.first_count

    def event_rows(self) -> list[EventRow]:
        """The events as tuples, in the order in which they were written: by step."""
        frame = self.events_frame(by_time=False).astype(object)
        frame = frame.where(frame.notna(), None)
        return list(frame.itertuples(index=False, name=None))

    def events_frame(self, *, by_time: bool = True) -> pd.DataFrame:
        """`events`: what was written, with the group's tokens in their places."""
        written = rows_as_given(self.events, EVENT_COLUMNS)
        stints, which, count = self.rows_of_group()
        if len(which):
            steps, after = (values[count] for values in self.steps_of_counts())
            place = np.arange(len(which)) + after
            rest = np.arange(len(written)) + np.searchsorted(after, np.arange(len(written)), side="right")
            base = np.array([s.base for s in stints], np.int64)
            tokens = {
                "time_s": np.asarray(self.decoded_s)[count],
                "step": steps,
                "kind": "token",
                "owner": _objects([s.owner for s in stints])[which],
                "adapter": _objects([s.adapter for s in stints])[which],
                "value": (base[which] + count + self.first_count + 1).astype(float),
                "note": "",
            }
            merged = {}
            for name in EVENT_COLUMNS:
                values = written[name].to_numpy()
                merged[name] = out = np.empty(len(which) + len(written), values.dtype)
                out[rest], out[place] = values, tokens[name]
            written = pd.DataFrame({name: column(name, values) for name, values in merged.items()})
        return sorted_by_time(written) if by_time else written

    def work_frame(self) -> pd.DataFrame:
        """`work`: one row for each segment and backward slice."""
        written = rows_as_given(self.work, WORK_COLUMNS)
        stints, which, count = self.rows_of_group()
        if not len(which):
            return written
        step = self.steps_of_counts()[0][count]
        start = np.array([s.prompt + s.base for s in stints], np.int64)[which] + count + self.first_count - 1
        rows = {
            "step": step,
            "owner": _objects([s.owner for s in stints])[which],
            "kind": np.full(len(which), "decode", object),
            "start": start,
            "tokens": np.ones(len(which), np.int64),
            "adapter": _objects([s.adapter for s in stints])[which],
            "version": np.array([s.version for s in stints], np.int64)[which],
        }
        rank = np.array([_KIND_RANK[kind] for kind in written["kind"]], np.int64)
        key = np.concatenate([written["step"].to_numpy() * 8 + rank, step * 8 + _KIND_RANK["decode"]])
        order = np.argsort(key, kind="stable")
        return pd.DataFrame({name: column(name, np.concatenate([written[name].to_numpy(), rows[name]])[order]) for name in WORK_COLUMNS})

    def features(self) -> np.ndarray:
        """Planned work of each step by `features.NAMES` [steps, len(NAMES)]."""
        num = self.run_lengths()
        values = np.repeat(self.run_rows()[:, len(RUN_COLUMNS) :], num, axis=0)
        place = np.arange(len(values)) - np.repeat(np.cumsum(num) - num, num)
        values[:, _CONTEXT] += place * values[:, _ROWS]
        return values

    def run_rows(self) -> np.ndarray:
        """What is known of each run's first step, by `RUN_COLUMNS` and `features.NAMES` [runs, columns]."""
        return np.array(self.runs, float).reshape(-1, len(RUN_COLUMNS) + len(NAMES))

    def run_lengths(self) -> np.ndarray:
        """How many steps each run has [runs]."""
        return np.diff(np.append(self.run_rows()[:, 0].astype(np.int64), self.num_steps))

    def run_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Waiting and running requests when each run began [runs]."""
        return tuple(self.run_rows()[:, RUN_COLUMNS.index(name)].astype(np.int64) for name in ("waiting", "running"))  # type: ignore[return-value]

    def steps_frame(self, predictor: Predictor | None, num_layers: int) -> pd.DataFrame:
        """`steps`: one row for each step, its duration divided among the kinds of work by `step_parts`."""
        num, features = self.run_lengths(), self.features()
        waiting, running = self.run_counts()
        steps = np.arange(self.first_step, self.num_steps)
        data: dict[str, Any] = {"step": steps} | self.all_times()
        stopped = np.isin(steps, [step for step, result in self.results.items() if result.stopped_early])
        data |= {"stopped_early": stopped, "waiting": np.repeat(waiting, num), "running": np.repeat(running, num)}
        data["free_blocks"] = np.array(self.free_blocks, np.int64)
        data |= dict(zip(NAMES, features.T, strict=True))
        data["queue_why"] = np.repeat(_objects(self.run_why), num)
        done = features.copy()
        for step, values in self.stopped.items():
            done[step - self.first_step] = values
        read_s = np.zeros(len(done))
        for step, seconds in self.read_s.items():
            read_s[step - self.first_step] = seconds
        parts = all_step_parts(done, data["duration_s"], predictor, num_layers, read_s)
        data |= dict(zip(PART_COLUMNS, parts.T, strict=True))
        return pd.DataFrame({name: column(name, data[name]) for name in STEP_COLUMNS})

    def all_times(self, names: Sequence[str] = (*STEP_TIMES, *RUN_TIMES)) -> dict[str, np.ndarray]:
        """Start, end, duration, device, host, planning and predicted seconds of each step [steps], or those of `names`, by column of
        `steps`.
        """
        rows, out = self.run_rows(), {}
        first = rows[:, 0].astype(np.int64) - self.first_step
        for name in names:
            if name in STEP_TIMES:
                out[name] = np.array(getattr(self, name), float)
                continue
            # but for the first step of a run, it begins with the end of the one before, is not planned, and is all on the device
            if name == "start_s":
                out[name] = np.roll(self.end_s, 1)
            else:
                out[name] = np.array(self.duration_s, float) if name == "gpu_s" else np.zeros(len(self.end_s))
            out[name][first] = rows[:, RUN_COLUMNS.index(name)]
        return out

    def all_results(self) -> list[StepResult]:
        """What the executor reported of each step."""
        at = self.all_times()
        rows = zip(range(self.first_step, self.num_steps), *(at[n].tolist() for n in ("duration_s", "gpu_s", "host_s")), strict=True)
        layers: dict[int, dict[str, int]] = {}
        for step, owner, kind, _, num_layers, *_ in self.work:
            if kind == "backward" and step in self.as_planned:
                layers.setdefault(step, {})[owner] = num_layers
        return [
            self.results.get(step) or StepResult(duration_s=duration, gpu_s=gpu, host_s=host, layers_done=layers.get(step, {}))
            for step, duration, gpu, host in rows
        ]

    def all_digests(self) -> list[str]:
        """Each step's `Batch.digest()`; where the batch was made without the rows of the group, they are put in again."""
        stints, which, count = self.rows_of_group()
        steps, _ = self.steps_of_counts()
        bounds = np.searchsorted(count, np.arange(len(steps) + 1)).tolist()
        place = {step: k for k, step in enumerate(steps.tolist())}
        rows, out = which.tolist(), []
        for step in range(self.first_step, self.num_steps):
            if step in self.digests:
                out.append(self.digests[step])
                continue
            batch = self.batches.get(step) or Batch(step=step, released=self.released.get(step, ()))
            segments: list[Segment] = []
            if step in place:
                k = place[step]
                segments = [self._segment(stints[row], k + self.first_count) for row in rows[bounds[k] : bounds[k + 1]]]
            whole = Batch(step, (*batch.segments, *segments), batch.backwards, batch.loads, batch.admitted, batch.released)
            out.append(whole.digest())
        return out

    def _segment(self, stint: Stint, count: int) -> Segment:
        """The decode row of a stint at a count of the group."""
        context = stint.prompt + stint.base + count
        blocks = tuple(stint.blocks[: -(-context // self.decoding.block_tokens)])
        return Segment("decode", stint.owner, stint.adapter, stint.version, context - 1, 1, blocks, True)


def _objects(values: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out
