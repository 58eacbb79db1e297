"""Recording what a function launches, to launch all of it at once from then on: CUDA graphs that share one memory."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch


class Replayable(Protocol):
    """Something recorded."""

    def replay(self) -> None:
        """Launch all of it."""
        ...


@dataclass(frozen=True, slots=True)
class Rerun:
    """Stands for a recording where there is no CUDA: the function itself."""

    run: Callable[[], object]

    def replay(self) -> None:
        self.run()


class Recorder:
    """Records on one device; what recorded functions allocate comes from one memory, so that only one of them may be in use at a time.

    CUDA allows one recording at a time in a process. Threads that run steps on other devices go on meanwhile ("thread_local").
    """

    _one_at_a_time: ClassVar = threading.Lock()
    # torch's own stream for recordings is of whichever device recorded first
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: Any = None

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once on a stream apart, so that what is not compiled yet is compiled before a recording."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def record(self, run: Callable[[], object]) -> Replayable:
        """What replays all that `run` launches, on the addresses that it has now; `run` must not wait for the device."""
        if self.device.type != "cuda":
            return Rerun(run)
        with self._one_at_a_time:
            if self.device not in self._streams:
                self._streams[self.device] = torch.cuda.Stream(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, stream=self._streams[self.device], capture_error_mode="thread_local"):
                run()
        self._memory = self._memory or graph.pool()
        return graph
