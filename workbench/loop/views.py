"""What a policy sees: read-only live proxies over the ledger. Reading follows the ledger; writing raises.

Seconds on the replay clock; sizes in tokens unless named otherwise. A view never holds the trace's true output lengths.
"""

from collections.abc import Callable, Iterator, Mapping
from math import inf
from operator import attrgetter
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from workbench.features import Work

if TYPE_CHECKING:
    from workbench.config import SLO
    from workbench.core import AdapterInfo, Predictor
    from workbench.loop.ledger import Ledger
    from workbench.loop.states import JobState, RequestState


class Room(NamedTuple):
    """Amounts of every limit. `view.limits`: totals; `view.free`: now; `plan.left`: after the verbs so far.

    `requests` are resident requests, `slots` those that a new adapter version could take, `batch_adapters` distinct serving
    versions in one batch, `activation_tokens` free arena rows.
    """

    tokens: int
    requests: int
    blocks: int
    batch_adapters: int
    slots: int
    activation_tokens: int


class StepView(NamedTuple):
    """The previous step. `work`: (owner id, kind, tokens; layers for "backward") really done; few policies ask, and a step may have
    hundreds of rows, so it is made by `tell_work` when one does.
    """

    start_s: float
    duration_s: float
    predicted_s: float
    plan_s: float
    stopped_early: bool
    tell_work: Callable[[], tuple[tuple[str, str, int], ...]]

    @property
    def work(self) -> tuple[tuple[str, str, int], ...]:
        return self.tell_work()


def _read(path: str) -> Any:
    """A property that reads one attribute path, in C."""
    return property(attrgetter(path))


class _ReadOnly:
    """A proxy over one mutable record that cannot be written through."""

    __slots__ = ("_state",)
    _state: Any

    def __init__(self, state: Any) -> None:
        object.__setattr__(self, "_state", state)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"views are read-only: a policy acts through the plan's verbs, not by setting {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"views are read-only: {name!r} cannot be deleted")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("views are live: copy the values that you need, not the view")


class RequestView(_ReadOnly):
    """One request, live. Stays readable after the request ended."""

    __slots__ = ("_ledger",)
    _state: "RequestState"
    _ledger: "Ledger"

    def __init__(self, state: "RequestState", ledger: "Ledger") -> None:
        super().__init__(state)
        object.__setattr__(self, "_ledger", ledger)

    id: str = _read("_state.id")
    adapter: str | None = _read("_state.adapter")
    tenant: str = _read("_state.request.tenant")
    slo_class: str = _read("_state.request.slo_class")
    priority: int = _read("_state.request.priority")
    session: str | None = _read("_state.request.session")
    deadline_s: float | None = _read("_state.request.deadline_s")
    prompt_tokens: int = _read("_state.request.prompt_tokens")
    arrival_s: float = _read("_state.arrival_s")
    first_token_s: float | None = _read("_state.first_token_s")
    slo: "SLO | None" = _read("_state.slo")
    generated: int = _read("_state.generated")
    max_tokens: int = _read("_state.max_tokens")
    expected_output: float = _read("_state.expected_output")
    preemptions: int = _read("_state.preemptions")

    @property
    def version(self) -> int | None:
        """The adapter version that it is pinned to; None before its first step, and for a base-only request."""
        return None if self._state.key is None else self._state.key[1]

    @property
    def blocks(self) -> int:
        """KV blocks held; 0 exactly while the request is not resident."""
        return len(self._state.blocks)

    @property
    def cached_tokens(self) -> int:
        """Tokens in the prefix cache: those that a prefill would skip if it began now; once begun, those that it skipped.

        0 on an executor without `info.prefix_cache`, and for a text prompt whose token ids are not known.
        """
        s = self._state
        if s.phase == "waiting" and not s.blocks:
            found = self._ledger.cached_blocks(s)
            return len(found) * self._ledger.info.block_tokens if found else 0
        return s.cached

    @property
    def prefill_left(self) -> int:
        """Tokens that its prefill has still to compute: without those that it skipped, or would skip if it began now."""
        s = self._state
        if s.phase == "running":
            return 0
        if s.blocks:
            return s.context - s.prefilled
        return s.context - self.cached_tokens

    @property
    def expected_left(self) -> float:
        """Output tokens that are still expected; at least 1 while the request is not over."""
        return max(1.0, self._state.expected_output - self._state.generated)

    @property
    def due_s(self) -> float:
        """When the next token is due by the request's own SLO (defined in `metrics.due_s`); inf without one."""
        s = self._state
        return inf if s.slo is None else _due_s(s)

    @property
    def finish_by_s(self) -> float:
        """When its last token is due: the sooner of its own `deadline_s` and arrival + the SLO's `e2e_s`; inf without either."""
        s = self._state
        end = inf if s.slo is None or s.slo.e2e_s is None else s.arrival_s + s.slo.e2e_s
        return end if s.request.deadline_s is None else min(end, s.request.deadline_s)

    def __repr__(self) -> str:
        s = self._state
        return f"RequestView({s.id!r}, {s.phase}, adapter={s.adapter!r}, prefill_left={self.prefill_left}, generated={s.generated})"


def _due_s(s: "RequestState") -> float:
    from workbench.results.metrics import due_s

    assert s.slo is not None
    return due_s(
        s.slo,
        arrival_s=s.arrival_s,
        first_token_s=s.first_token_s,
        last_token_s=s.last_token_s,
        generated=s.generated,
    )


class JobView(_ReadOnly):
    """One fine-tune job, live."""

    __slots__ = ()
    _state: "JobState"

    id: str = _read("_state.id")
    adapter: str = _read("_state.job.adapter")
    tenant: str = _read("_state.job.tenant")
    priority: int = _read("_state.job.priority")
    weight: float = _read("_state.job.weight")
    arrival_s: float = _read("_state.arrival_s")
    layers: int = _read("_state.layers")
    layers_left: int = _read("_state.layers_left")
    committed_tokens: int = _read("_state.committed_tokens")
    last_progress_s: float = _read("_state.last_progress_s")

    @property
    def phase(self) -> Literal["forward", "backward", "evaluate", "paused", "finished", "stopped"]:
        s = self._state
        return "paused" if s.paused and s.is_active else s.phase

    @property
    def deadline_s(self) -> float:
        deadline = self._state.job.deadline_s
        return inf if deadline is None else deadline

    @property
    def next_tokens(self) -> tuple[int, ...]:
        """Lengths of the documents left in this micro-batch's forward (the first may be cut already)."""
        s = self._state
        if s.phase not in ("forward", "evaluate"):
            return ()
        lengths, skip = [], s.offset
        for length in s.current.documents:
            if skip < length:
                lengths.append(length - skip)
            skip = max(0, skip - length)
        return tuple(lengths)

    @property
    def evaluate_left(self) -> int:
        """Tokens left of an evaluation that is due; 0 when none is."""
        s = self._state
        return sum(m.tokens for m in s.evaluation[s.eval_index :]) - s.offset if s.phase == "evaluate" else 0

    @property
    def left_tokens(self) -> int:
        """Tokens that are not committed yet."""
        return self._state.total_tokens - self._state.committed_tokens

    def __repr__(self) -> str:
        return f"JobView({self.id!r}, {self.phase}, next_tokens={self.next_tokens}, layers_left={self.layers_left})"


class AdapterView:
    """One servable adapter's current version, live."""

    __slots__ = ("_ledger", "_name")
    _ledger: "Ledger"
    _name: str

    def __init__(self, ledger: "Ledger", name: str) -> None:
        object.__setattr__(self, "_ledger", ledger)
        object.__setattr__(self, "_name", name)

    __setattr__ = _ReadOnly.__setattr__
    __delattr__ = _ReadOnly.__delattr__
    __deepcopy__ = _ReadOnly.__deepcopy__

    @property
    def _info(self) -> "AdapterInfo":
        return self._ledger.adapter_infos[self._name]

    name: str = _read("_name")
    version: int = _read("_info.version")
    rank: int = _read("_info.rank")
    bytes: int = _read("_info.bytes")

    @property
    def _key(self) -> tuple[str, int]:
        return (self._name, self._info.version)

    @property
    def state(self) -> Literal["gpu", "host", "disk", "loading", "elsewhere"]:
        """Where its weights are: on the device, in host memory, on disk, or on another replica of a fleet, perhaps under way ("loading").

        Loads run inside a step, so that a policy never meets one.
        """
        if self._name in self._ledger.away:
            return "loading" if self._ledger.away[self._name] < inf else "elsewhere"
        if self._key in self._ledger.slots.entries:
            return "gpu"
        return "host" if self._ledger.host.has(self._key, self._info) else "disk"

    @property
    def load_s(self) -> float:
        """Predicted seconds to bring it to the device from host memory, or from disk if it is not there."""
        predictor, read_s = self._ledger.predictor, self._ledger.host.read_s(self._key, self._info)
        if predictor is None:
            return read_s
        work = Work()
        idle_s = predictor.predict(work)
        work.add_load(self._info.bytes)
        return max(0.0, predictor.predict(work) - idle_s) + read_s

    @property
    def read_s(self) -> float:
        """Declared seconds to bring it from disk to host memory, wherever it is now."""
        limits = self._ledger.info
        return limits.read_s + self._info.bytes * limits.read_s_per_byte

    @property
    def ready_s(self) -> float:
        """When it could be used: now on the device, else once it is in host memory and load_s later."""
        here_s = max(self._ledger.now_s, self._ledger.away.get(self._name, 0.0))
        return here_s + (0.0 if self.state == "gpu" else self.load_s)

    @property
    def waiting(self) -> int:
        """Waiting requests for it."""
        return sum(s.adapter == self._name for s in self._ledger.waiting_states())

    @property
    def running(self) -> int:
        """Requests for it that can decode."""
        return sum(s.adapter == self._name for s in self._ledger.running.values())

    @property
    def uses(self) -> int:
        """Requests for it that were scheduled so far."""
        return self._ledger.uses.get(self._name, (0, 0.0))[0]

    @property
    def last_used_s(self) -> float:
        """When a request for it was last scheduled for the first time; -inf before any."""
        return self._ledger.uses.get(self._name, (0, -inf))[1]

    @property
    def pinned(self) -> bool:
        """Whether a resident request holds it, so that it cannot be evicted."""
        slot = self._ledger.slots.entries.get(self._key)
        return slot is not None and slot.refs > 0

    @property
    def merged(self) -> bool:
        """Whether it is merged into the base; no executor here merges."""
        return False

    def __repr__(self) -> str:
        return f"AdapterView({self._name!r}, version={self.version}, rank={self.rank}, {self.state})"


class AdapterViews(Mapping[str, AdapterView]):
    """The servable adapters by name."""

    __slots__ = ("_ledger",)

    def __init__(self, ledger: "Ledger") -> None:
        self._ledger = ledger

    def __getitem__(self, name: str) -> AdapterView:
        if name not in self._ledger.adapter_infos:
            raise KeyError(name)
        return AdapterView(self._ledger, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ledger.adapter_infos)

    def __len__(self) -> int:
        return len(self._ledger.adapter_infos)

    def __repr__(self) -> str:
        return repr(dict(self))


class Oracle:
    """What only a clairvoyant policy may ask: true output lengths and the arrivals to come."""

    __slots__ = ("_arrivals",)

    def __init__(self, arrivals: Callable[[], tuple[tuple[float, str], ...]]) -> None:
        self._arrivals = arrivals

    def output_tokens(self, request: RequestView) -> int:
        """The output length at which the request ends (its max_tokens when the text decides)."""
        return request._state.limit

    def arrivals(self) -> tuple[tuple[float, str], ...]:
        """(time, request id) of every known arrival to come, soonest first."""
        return self._arrivals()


class View:
    """The ledger as a policy sees it; one live object per replay."""

    __slots__ = ("_ledger", "adapters", "oracle", "replica", "rng")
    _ledger: "Ledger"
    adapters: Mapping[str, AdapterView]
    oracle: Oracle | None
    replica: int
    rng: Random

    def __init__(
        self,
        ledger: "Ledger",
        rng: Random,
        oracle: Oracle | None = None,
        replica: int = 0,
        adapters: Mapping[str, AdapterView] | None = None,
    ) -> None:
        adapters = AdapterViews(ledger) if adapters is None else adapters
        for name, value in (("_ledger", ledger), ("rng", rng), ("oracle", oracle), ("replica", replica), ("adapters", adapters)):
            object.__setattr__(self, name, value)

    __setattr__ = _ReadOnly.__setattr__
    __delattr__ = _ReadOnly.__delattr__
    __deepcopy__ = _ReadOnly.__deepcopy__

    now_s: float = _read("_ledger.now_s")
    step: int = _read("_ledger.step")
    can: frozenset[str] = _read("_ledger.info.can")
    block_tokens: int = _read("_ledger.info.block_tokens")
    token_buckets: tuple[int, ...] = _read("_ledger.info.token_buckets")  # what a forward's packed tokens are padded to; (): not at all
    running: tuple[RequestView, ...] = _read("_ledger.running_views")
    waiting: tuple[RequestView, ...] = _read("_ledger.waiting_views")
    arrived: tuple[RequestView, ...] = _read("_ledger.arrived_views")
    finished: tuple[RequestView, ...] = _read("_ledger.finished_views")
    jobs: tuple[JobView, ...] = _read("_ledger.job_views")
    last: StepView | None = _read("_ledger.last_step")
    limits: Room = _read("_ledger.limits")

    @property
    def free(self) -> Room:
        return self._ledger.free_room()

    def predict(self, plan: Any) -> float:
        """The predicted duration of a plan, in seconds."""
        return plan.predicted_s

    def _predictor(self, name: str) -> "Predictor":
        predictor = self._ledger.predictor
        if predictor is None:
            raise ValueError(f"{name} needs an executor with a predictor, got predictor=None. Fit a LatencyModel first.")
        return predictor

    def prefill_s(self, request: RequestView) -> float:
        """Predicted seconds of the request's prefill in one step of its own; 0 when nothing is left of it.

        Raises ValueError without a predictor.
        """
        s, left, predictor = request._state, request.prefill_left, self._predictor("prefill_s")
        if not left:
            return 0.0
        work = Work()
        v = work.values
        v[2], v[7], v[8] = left, 1, 1
        start = s.context - left
        v[5] = (s.context * (s.context + 1) - start * (start + 1)) // 2
        v[9] = s.adapter is not None
        return predictor.predict(work)

    def remaining_s(self, request: RequestView) -> float:
        """Predicted seconds until the request ends if it ran alone: its prefill, then its expected decodes at their mean context.

        Raises ValueError without a predictor.
        """
        s, predictor = request._state, self._predictor("remaining_s")
        seconds, left = self.prefill_s(request), request.prefill_left
        steps = max(s.expected_output - s.generated - (left > 0), 1.0 if not left else 0.0)
        if steps:
            work = Work()
            v = work.values
            v[3] = v[7] = v[8] = 1
            v[6] = s.context + steps / 2
            v[9] = s.adapter is not None
            seconds += steps * predictor.predict(work)
        return seconds

    def slack_s(self, request: RequestView) -> float:
        """Seconds that the request could still be left alone without missing a target, as predicted; below 0 when one is lost already.

        The smaller of next token due - now - its prefill, and last token due - now - all that remains. Infinite without any target.
        Raises ValueError without a predictor.
        """
        due, end = request.due_s, request.finish_by_s
        slack = inf if due == inf else due - self.now_s - self.prefill_s(request)
        return slack if end == inf else min(slack, end - self.now_s - self.remaining_s(request))

    def __repr__(self) -> str:
        return f"View(now_s={self.now_s:.3f}, step={self.step}, running={len(self.running)}, waiting={len(self.waiting)}, jobs={self.jobs})"
