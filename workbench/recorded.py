"""An executor that gives back an earlier run, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from workbench.config import FinetuneJob, did_you_mean, require
from workbench.core import AdapterInfo, Batch, Command, ExecutorInfo, JobShape, Predictor, Request, StepResult
from workbench.model_error import ModelError
from workbench.results.replay import Replay


class Recorded:
    """Plays a Replay again: the same trace, jobs, seed, policy and eviction rules give the same event frames, whatever executor ran then.

    Step k must do the recorded work, else RuntimeError names the first difference. Planning takes the recorded time, unless the new
    replay fixes it. `predictor` is needed for policies that predict, when the replay was loaded from a folder.
    """

    def __init__(self, recording: Replay, *, predictor: Predictor | None = None) -> None:
        parts = getattr(recording, "replicas", None)
        step = "Pass executor=Fleet([Recorded(part) for part in replay.replicas], router=...)."
        require(parts is None, "a recording must be of one executor", type(recording).__name__, step)
        self.recording = recording
        played = recording.executor
        # steps that were measured are played as they were
        error = played.model_error if played.simulated else ModelError(step_error=0.0)
        self.info: ExecutorInfo = replace(played, name=f"Recorded({played.name})", simulated=True, model_error=error)
        self.predictor = predictor or recording.predictor
        self.digests: list[str] = list(recording.digests)
        self.known = {r.request_id: r for r in recording.trace_requests}
        self.adapter_infos: dict[str, AdapterInfo] = {}
        self._num_polls = 0
        self._play_adapters(0)

    def _play_adapters(self, poll: int) -> None:
        for at, name, info in self.recording.tape.adapters:
            if at == poll and info is None:
                self.adapter_infos.pop(name, None)
            elif at == poll and info is not None:
                self.adapter_infos[name] = info

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, JobShape]:
        """The recorded sizes of the jobs. Raises ValueError for a job that the recording lacks."""
        shapes = self.recording.tape.shapes
        for job in jobs:
            if job.id not in shapes:
                raise ValueError(f"a job must be part of the recording, got {job.id!r}. {did_you_mean(job.id, list(shapes))}")
        self._num_polls = 0
        self.adapter_infos.clear()
        self._play_adapters(0)
        return {job.id: shapes[job.id] for job in jobs}

    def admissible(self, request: Request) -> Request:
        """The recorded request, or the recorded refusal. Raises RuntimeError for one that the recording lacks."""
        name = request.request_id
        if name in self.recording.tape.refusals:
            raise ValueError(self.recording.tape.refusals[name])
        if name not in self.known:
            raise RuntimeError(f"a request must be part of the recording, got {name!r}. {did_you_mean(name, list(self.known))}")
        return self.known[name]

    def step(self, batch: Batch) -> StepResult:
        """The recorded result. Raises RuntimeError if the work differs from what was recorded, or goes on after its end."""
        k = batch.step
        if k >= len(self.digests):
            raise RuntimeError(f"the recording ends after {len(self.digests)} steps, step {k} was planned. Record a run that goes on.")
        if batch.digest() != self.digests[k]:
            raise RuntimeError(
                f"step {k} differs from the recording: {self._difference(batch)}. Use the same trace, jobs, seed and policy."
            )
        return self.recording.results[k]

    def _difference(self, batch: Batch) -> str:
        columns = ["owner", "kind", "start", "tokens", "adapter", "version"]
        work = self.recording.work
        then = [tuple(row) for row in work.loc[work["step"] == batch.step, columns].itertuples(index=False)]
        now = [(s.owner, s.kind, s.start, s.tokens, s.adapter, s.version) for s in batch.segments]
        done = self.recording.results[batch.step].layers_done
        now += [(b.owner, "backward", b.top_layer, done.get(b.owner, b.num_layers), b.adapter, 0) for b in batch.backwards]
        for a, b in zip(then, now, strict=False):
            if a != b:
                return f"recorded {_words(a)}, planned {_words(b)}"
        if len(then) != len(now):
            longer, verb = (then, "lacks") if len(then) > len(now) else (now, "adds")
            return f"the plan {verb} {_words(longer[min(len(then), len(now))])}"
        return "the same work, but with other blocks, slots, loads, released owners or layers planned"

    def planning_s(self, call: int) -> float:
        """The recorded planning time of the policy's call number `call`."""
        times = self.recording.tape.plan_times_s
        if call >= len(times):
            raise RuntimeError(f"the recording ends after {len(times)} calls of the policy, call {call} was made")
        return times[call]

    def adopt(self, info: AdapterInfo, source: object) -> None:
        """Nothing: the recording says when its adapters change."""

    def poll(self) -> Sequence[Command]:
        poll, self._num_polls = self._num_polls, self._num_polls + 1
        if poll:
            self._play_adapters(poll)
        return [command for at, command in self.recording.tape.commands if at == poll]

    def end(self) -> None:
        """Nothing is held."""


def _words(row: tuple) -> str:
    owner, kind, start, tokens, adapter, version = row
    amount = f"layers {tokens} below {start}" if kind == "backward" else f"tokens [{start}, {start + tokens})"
    return f"{kind} of {owner!r} {amount} on adapter {adapter!r} version {version}"
