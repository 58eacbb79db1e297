"""The serving loop with requests that come from outside while it runs: what `serve` has behind its socket."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from workbench.config import SLO, FinetuneJob
from workbench.core import Executor, Request, StepResult
from workbench.loop.clock import WallClock
from workbench.loop.options import Options
from workbench.policy import Policy
from workbench.results.replay import Replay
from workbench.serving_loop import ServingLoop

POLL_S = 0.1
"""How often an idle loop looks for commands and new adapters."""


@dataclass(slots=True)
class Delivery:
    """What a request got since the last delivery: token ids, and how it ended (and why), if it did.

    "finished"; "refused": it could never run here; "rejected": the policy turned it away; "aborted".
    """

    tokens: list[int] = field(default_factory=list)
    end: tuple[str, str] | None = None


class LiveRun(ServingLoop):
    """A replay on the wall clock whose trace is what `submit` brings, from other threads, until `stop`.

    Everything else is the replay's: ledger, plan, policy, fine-tune jobs beside the requests, events and steps. `deliver` is called in
    the loop's thread after every step. Without `keep` nothing is recorded, so that a server may run for days.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        jobs: Sequence[FinetuneJob],
        slo: SLO | Mapping[str, SLO] | None,
        seed: int,
        *,
        deliver: Callable[[Mapping[str, Delivery]], None],
        keep: bool,
    ) -> None:
        options = Options(
            jobs=tuple(jobs),
            slo=slo,
            seed=seed,
            clock="wall",
            planning="measured",
            lengths="max",
            measure=None,
            overlap=False,
            until=None,
            evict=None,
            events=None,
        )
        super().__init__((), executor, policy, options)
        self.deliver, self.keep = deliver, keep
        self.known_adapters = dict(executor.adapter_infos)
        self.received: list[Request] = []
        self.has_begun = threading.Event()
        self._changed = threading.Condition()
        self._arrived: list[tuple[Request, float]] = []
        self._cancelled: list[str] = []
        self._is_stopping = self._is_draining = self._is_closed = False
        self._deliveries: dict[str, Delivery] = {}
        self._open: set[str] = set()
        self._names: set[str] = set()
        self._arriving: str | None = None

    # from other threads

    def submit(self, request: Request) -> bool:
        """A request arrives now; False once the loop stops. Ids must be new, and `output_tokens=None` ends at the end of sequence."""
        with self._changed:
            if self._is_stopping or self._is_closed:
                return False
            self._arrived.append((request, time.monotonic()))
            self._open.add(request.request_id)
            self._names.add(request.request_id)
            self._changed.notify()
            return True

    def is_known(self, request_id: str) -> bool:
        """Whether a request of this id is waiting, running or recorded."""
        return request_id in self._names

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this request any more: it ends before the next step."""
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def stop(self, *, drain: bool) -> None:
        """End the loop; with `drain` once every request has ended. Jobs stop where they stand."""
        with self._changed:
            self._is_stopping, self._is_draining = True, drain
            self._changed.notify()

    # the loop's own thread

    def run(self, progress: bool | None = False) -> Replay:
        """Serve until `stop`. Raises ReplayError when policy or executor fail; whatever happens, every request learns of its end."""
        reason = "the server stopped"
        try:
            return super().run(progress)
        except BaseException as error:
            reason = str(error)
            raise
        finally:
            self.has_begun.set()
            with self._changed:
                self._is_closed = True
                left = list(self._open)
                self._open.clear()
            if left:
                self.deliver({name: Delivery(end=("aborted", reason)) for name in left})

    def _poll(self, now: float) -> bool:
        changed = super()._poll(now)
        self.has_begun.set()
        with self._changed:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
        for request, at in arrived:
            self.received.append(request)
            self._arriving = request.request_id
            self._arrive(request, min(self._on_clock(at), now))
            self._arriving = None
        for name in cancelled:
            state = self.ledger.requests.get(name)
            if state is not None:
                self.ledger.end(state, "aborted", now, "the client closed its connection")
                self.repeating = None
        return changed

    def _on_clock(self, at: float) -> float:
        assert isinstance(self.env, WallClock)
        return max(0.0, at - self.env.real_start)

    def _sleep(self, until_s: float) -> Generator[simpy.Event, Any, None]:
        """Really wait, for something from outside cannot wake SimPy's clock."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._is_stopping):
                left_s = min(until_s, self.env.peek()) - self._on_clock(time.monotonic())
                if left_s <= 0 or not self._changed.wait(min(left_s, POLL_S)):
                    break
        yield self.env.timeout(max(0.0, self._on_clock(time.monotonic()) - self.env.now))

    def _is_pending(self) -> bool:
        return not self._is_stopping or bool(self._arrived)

    def _is_over(self) -> bool:
        if not self._is_stopping or (self._is_draining and (self.ledger.requests or self._arrived)):
            return False
        self.requests = tuple(self.received)
        return True

    def _record(self, batch: Any, result: Any, *rest: Any) -> None:
        super()._record(batch, result, *rest)
        for owner, token in (result.tokens if isinstance(result, StepResult) else {}).items():
            self._deliveries.setdefault(owner, Delivery()).tokens.append(token)
        if not self.ledger.ended:  # else `_settle` comes next, which says who ended too
            self._deliver()

    def _settle(self) -> None:
        ended = list(self.ledger.ended)
        super()._settle()
        for state in ended:
            note = "" if state.phase == "finished" else self._note_of(state.id)
            phase = "refused" if state.id == self._arriving else state.phase
            self._deliveries.setdefault(state.id, Delivery()).end = (phase, note)
        self._deliver()

    def _deliver(self) -> None:
        """Let those who wait have what came for them, and forget what nobody asks for any more."""
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, {}
            with self._changed:
                ended_names = {name for name, delivery in deliveries.items() if delivery.end is not None}
                self._open -= ended_names
                if not self.keep:
                    self._names -= ended_names
            self.deliver(deliveries)
        if not self.keep:
            self._forget()

    def _note_of(self, request_id: str) -> str:
        return next((row[-1] for row in reversed(self.ledger.rows) if row[3] == request_id), "")

    def _forget(self) -> None:
        self.ledger.history.forget()
        for rows in (self.tape.plan_times_s, self.received):
            rows.clear()
        for record in (self.resolved, self.outputs, self.tape.refusals):
            record.clear()

    def _result(self, interrupted: bool, error: str | None) -> Replay:
        self.requests = tuple(self.received)
        return super()._result(interrupted, error)

    def _checked(self, result: Replay) -> Replay:
        return super()._checked(result) if self.keep else result
