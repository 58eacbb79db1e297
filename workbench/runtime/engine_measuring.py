"""The engine's part that prepares and measures: recorded graphs, the latency model beside it, and the trace of one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from workbench.config import require
from workbench.core import Batch, Predictor, StepResult
from workbench.progress import progress_bar
from workbench.runtime.engine_step import EngineStep
from workbench.runtime.guards import deterministic_algorithms


class EngineMeasuring(EngineStep):
    """A part of `Engine`: what is done before a replay, or to look into one."""

    _active: bool

    def __init__(self) -> None:
        super().__init__()
        self._predictor: Predictor | None = None
        self._calibrating = False
        self._trace_to: Path | None = None

    @property
    def predictor(self) -> Predictor | None:
        """The latency model beside the engine that `within_s` and `view.predict` ask; measured on this engine at first need."""
        if self._predictor is None and not self._calibrating:
            self.calibrate()
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        self._predictor = predictor

    def calibrate(self, **options: Any) -> Any:
        """Run a short mix of steps of every kind, fit a `LatencyModel` to them, keep it as `predictor`, and return it.

        `options` are those of `calibrate.measure`; progress=False shows no bar.
        """
        from workbench.runtime.calibrate import calibrate

        with self.uncalibrated():
            self._predictor = calibrate(self, **options)  # pyright: ignore[reportArgumentType]  (every engine is an Engine)
        return self._predictor

    def warm_up(self, progress: bool | None = None) -> None:
        """Record the CUDA graphs for the adapters and jobs known now, so that no step pays for it; nothing on the CPU.

        `begin` does so where `EngineConfig.warm_up` says; what is recorded already costs nothing. `progress` shows a bar, or never (False);
        None takes `EngineConfig.progress`.
        """
        with self.lock, deterministic_algorithms(self.config.deterministic):
            require(not self._active, "warm_up needs an idle engine", "a running replay", "Call it before.")
            if self._graphs is None:
                return
            for version in self._current.items():
                self._table.expect(self._versions[version].tensors)
            has_adapters, arena = bool(self._current), self.runner.arena
            recordings = self._graphs.recordings(self.config.max_requests, has_adapters=has_adapters)
            if self.runner.mixed is not None:
                recordings += self.runner.mixed.recordings(has_adapters=has_adapters, trains=arena is not None)
            for state in self._states.values():
                if self._backward_graphs is not None and arena is not None:
                    recordings += self._backward_graphs.recordings(state, arena)
            with progress_bar(len(recordings), "recording graphs", "graph", self.config.progress if progress is None else progress) as bar:
                for record in recordings:
                    record()
                    bar.update()

    def step(self, batch: Batch) -> StepResult:
        """Run one batch. Raises OutOfMemory (and anything else that went wrong) with the engine as it was before the call."""
        if self._trace_to is None:
            return super().step(batch)
        path, self._trace_to = self._trace_to, None
        return self._traced(batch, path)

    def trace_step(self, path: str | Path, batch: Batch | None = None) -> StepResult | None:
        """Write the Chrome trace of one step (torch.profiler): host operators, kernels on CUDA, and the parts of the step by name.

        Of `batch`, which is run now and whose result is returned; or, without one, of the next step that anybody runs (None is returned).
        Open the file in ui.perfetto.dev or chrome://tracing. The trace costs time: such a step's duration is not the usual one.
        """
        if batch is None:
            self._trace_to = Path(path)
            return None
        return self._traced(batch, Path(path))

    def _traced(self, batch: Batch, path: Path) -> StepResult:
        on_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
        with self.lock, self.runner.parts.on(), profile(activities=activities) as profiler:
            with self.runner.parts(f"step {batch.step}"):
                result = super().step(batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return result

    @contextmanager
    def uncalibrated(self) -> Iterator[None]:
        """Within this, `predictor` does not start a calibration: for work that no policy asks a prediction for."""
        before, self._calibrating = self._calibrating, True
        try:
            yield
        finally:
            self._calibrating = before
