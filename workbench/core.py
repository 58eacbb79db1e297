"""The facts that flow through the workbench, as frozen, torch-free values.

`trace -> Request -> Ledger -> View -> Policy -> Plan -> Batch -> executor.step -> StepResult -> Event rows`.
"""

import hashlib
import marshal
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from workbench.model_error import ModelError

Kind = Literal["finetune", "evaluate", "prefill", "decode"]
KINDS: tuple[Kind, ...] = ("finetune", "evaluate", "prefill", "decode")
BUCKETS = ("token_buckets", "sequence_buckets", "decode_buckets", "backward_buckets")  # fields of ExecutorInfo
Capability = Literal["chunk", "mixed", "cut_backward", "safepoint", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are drawn.

    Noise is a counter-based function of (seed, position, token id), so the schedule cannot change it.
    `temperature=0` is greedy; `top_k=None` keeps the whole vocabulary.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for the whole vocabulary, got {self.top_k}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}")

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest logit is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One inference request: what the client sends, and what the trace says will happen.

    `output_tokens` is the length that really happens; policies never see it. `None` means that the text decides:
    generation ends at the end-of-sequence token or at `max_tokens`. `max_tokens=None` means the context limit decides.
    Times in seconds on the replay clock. `parent_id` makes a closed session: the request arrives `think_s` after its parent ends.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int | None
    adapter: str | None = None
    max_tokens: int | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    tenant: str = ""
    slo_class: str = ""
    priority: int = 0
    deadline_s: float | None = None
    session: str | None = None
    parent_id: str | None = None
    think_s: float = 0.0
    prefix_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()


_REQUEST_VALUES = attrgetter(*(f.name for f in fields(Request)))
_REQUEST_SETTERS = tuple(Request.__dict__[f.name].__set__ for f in fields(Request))
_RESOLVED = tuple([f.name for f in fields(Request)].index(name) for name in ("prompt_tokens", "prompt_token_ids", "max_tokens"))


def resolved(request: Request, prompt_tokens: int, prompt_token_ids: tuple[int, ...] | None, max_tokens: int) -> Request:
    """The request with what an executor has found out; `dataclasses.replace` in a quarter of its time, for every request of a replay."""
    values = list(_REQUEST_VALUES(request))
    for place, value in zip(_RESOLVED, (prompt_tokens, prompt_token_ids, max_tokens), strict=True):
        values[place] = value
    new = object.__new__(Request)
    for setter, value in zip(_REQUEST_SETTERS, values, strict=True):
        setter(new, value)
    return new


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens in one batch with one owner, one adapter and one kind.

    `start` is the position of the first token: in the sequence (prefill, decode) or in the job's micro-batch (finetune, evaluate).
    `blocks` is the sequence's block table and covers `start + tokens`; those before `start` may be shared with other sequences. `rows` is
    the first activation-arena row of the micro-batch.
    `documents` holds the token counts of all the micro-batch's documents (a document attends only to itself).
    """

    kind: Kind
    owner: str
    adapter: str | None
    version: int
    start: int
    tokens: int
    blocks: tuple[int, ...] = ()
    samples: bool = False
    micro_batch: int | None = None
    rows: int | None = None
    documents: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.tokens


_FIELDS = fields(Segment)


class Row(namedtuple("Row", [f.name for f in _FIELDS], defaults=[f.default for f in _FIELDS if f.default is not MISSING])):
    """A Segment's values under the same names, made in a tenth of the time: what the batches of executors with `simulate` hold."""

    __slots__ = ()
    end = Segment.end


@dataclass(frozen=True, slots=True)
class Backward:
    """A slice of a job's backward pass: `num_layers` decoder layers downwards from `top_layer` (exclusive upper end).

    `documents` are the micro-batch's token counts. `ends_window` says that an optimiser step follows once layer 0 is done, `is_first`
    that the slice begins at the model's last layer, where an executor prepares the pass.
    """

    owner: str
    adapter: str
    micro_batch: int
    rows: int
    documents: tuple[int, ...]
    top_layer: int
    num_layers: int
    ends_window: bool
    is_first: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def is_last(self) -> bool:
        """Whether this slice reaches layer 0, so that the micro-batch is committed."""
        return self.num_layers == self.top_layer


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Copy one adapter version into a device slot before the step's forward; `read_s`: after reading it from disk, by what was declared."""

    adapter: str
    version: int
    slot: int
    rank: int
    bytes: int
    read_s: float = 0.0


# read_s is a time and no work, is_first follows from top_layer
_VALUES: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    kind: attrgetter(*(f.name for f in fields(kind) if f.name not in ("read_s", "is_first"))) for kind in (Segment, Backward, AdapterLoad)
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one step does, as a value: print it, save it, compare it, replay it.

    Segments are ordered finetune, evaluate, prefill (by adapter), decode (by adapter). `admitted` names requests that the executor
    sees for the first time; `released` names owners that hold nothing any more. `stop_after_s`: the time from the step's start after
    which the backward stops at the next layer; to the next arrival (`plan.stop_on_arrival()`) or as a policy said (`plan.stop_after()`).
    """

    step: int
    segments: tuple[Segment, ...] = ()
    backwards: tuple[Backward, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    admitted: tuple[Request, ...] = ()
    released: tuple[str, ...] = ()
    stop_after_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return sum(s.tokens for s in self.segments)

    def of(self, kind: Kind) -> Iterator[Segment]:
        return (s for s in self.segments if s.kind == kind)

    def digest(self) -> str:
        """16 hex digits that are equal exactly when the work is: the identity that `Recorded` checks."""
        segments = [tuple(s) if isinstance(s, Row) else _VALUES[Segment](s) for s in self.segments]
        rows = [segments] if segments else []
        rows += [list(map(_VALUES[type(row)], rows)) for rows in (self.backwards, self.loads) for row in rows[:1]]
        work = (self.step, len(self.segments), len(self.backwards), rows, [r.request_id for r in self.admitted], self.released)
        # marshal's format 2 has no references: equal values give equal bytes, five times faster than their repr
        return hashlib.blake2b(marshal.dumps(work, 2), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did. `duration_s` runs from plan accepted to sampled tokens on the host, input building included.

    `tokens` maps request id to sampled token id (empty from executors without text). `layers_done` maps job id to backward layers
    really run (fewer than planned when the step stopped early). `losses` maps job id to (sum of token losses, labelled tokens) of the
    finetune rows of this step, `eval_losses` the same of its evaluate rows. `published` maps adapter to the version this step published.
    """

    duration_s: float
    gpu_s: float = 0.0
    host_s: float = 0.0
    tokens: Mapping[str, int] = field(default_factory=dict)
    layers_done: Mapping[str, int] = field(default_factory=dict)
    stopped_early: bool = False
    losses: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    eval_losses: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)


NOTHING = StepResult(duration_s=0.0)
"""What a step reported that reported nothing but how long it took."""


ENDS = ("finished", "rejected", "aborted")  # the kinds of event of which each request has one at its end


@dataclass(frozen=True, slots=True)
class Event:
    """One row of a replay's record. `kind` names what happened; `owner` is a request or job id; `value` depends on the kind."""

    time_s: float
    step: int
    kind: str
    owner: str
    adapter: str | None = None
    value: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What scheduling needs to know of one adapter's current version; `tier` is where it lies when a replay begins."""

    name: str
    version: int
    rank: int
    bytes: int
    tier: Literal["gpu", "host", "disk"] = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """An executor's fixed limits: what the ledger and the plan account against.

    `max_batch_tokens` and `max_requests` bound one step, `num_blocks` the KV pool (blocks of `block_tokens` tokens), `num_slots`
    the adapter versions on the device, `activation_tokens` the arena of kept fine-tune activations. With `prefix_cache` the ledger lets
    requests share the blocks of equal prompt prefixes (`workbench.loop.prefix_cache`); the executor only has to read what it wrote earlier.
    `host_bytes` bounds the adapters in host memory (None: it holds them all); the others are read from disk in `read_s` seconds and
    `read_s_per_byte` for each byte, before they are copied to a slot (`workbench.loop.tiers`). `model_error` is no limit: it says beside a
    simulated result how far this model's whole replays were from measured ones, as far as anyone looked.
    An executor that pads says what to, ascending: `token_buckets` for the packed tokens of a step and `sequence_buckets` for its
    requests, `decode_buckets` for the rows of one that holds nothing but decodes (more rows than the largest are padded as tokens),
    `backward_buckets` for the tokens of a micro-batch in the backward. Nothing is padded beyond the largest, or where there are none.
    """

    name: str
    device: str
    num_layers: int
    max_model_len: int
    max_batch_tokens: int
    max_requests: int
    num_blocks: int
    block_tokens: int
    num_slots: int
    max_batch_adapters: int
    activation_tokens: int
    can: frozenset[str] = frozenset({"chunk", "mixed", "cut_backward", "safepoint"})
    eos_token_ids: frozenset[int] = frozenset()
    simulated: bool = False
    prefix_cache: bool = False
    host_bytes: int | None = None
    read_s: float = 0.0
    read_s_per_byte: float = 0.0
    token_buckets: tuple[int, ...] = ()
    sequence_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()
    backward_buckets: tuple[int, ...] = ()
    model_error: "ModelError | None" = None

    def __post_init__(self) -> None:
        for name in BUCKETS:
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
            ascending = all(a < b for a, b in pairwise((0, *getattr(self, name))))
            if not ascending:
                raise ValueError(f"{name} must ascend from at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch of a job, sizes only: token count of each document, labelled tokens, and its place in the window."""

    documents: tuple[int, ...]
    labelled: int
    ends_window: bool
    window_labelled: int

    @property
    def tokens(self) -> int:
        return sum(self.documents)


class JobShape(Protocol):
    """The sizes of a prepared job; implemented by `workbench.data.PreparedJob`."""

    @property
    def num_micro_batches(self) -> int: ...

    @property
    def first_micro_batch(self) -> int: ...

    def micro_batch(self, index: int) -> MicroBatch: ...

    def evaluation(self) -> Sequence[MicroBatch]:
        """The held-out set as micro-batches; empty when the job evaluates nothing."""
        ...

    def evaluates_after(self, index: int) -> bool:
        """Whether an evaluation is due once micro-batch `index` is committed (only ever true at the end of a window)."""
        ...


Command = tuple[Literal["pause", "resume", "stop", "publish"], str]


class Predictor(Protocol):
    """Predicts a step's mean duration from its work (`workbench.features.Work`)."""

    def predict(self, work: Any) -> float: ...


@runtime_checkable
class Executor(Protocol):
    """Anything that can run or predict a batch.

    A replay reads `predictor` (an engine without one calibrates itself then), calls `begin` once, then `step` for every batch, then
    `end`, whatever happened in between. `step` is a transaction: if it raises, the executor is as it was before the call.
    `admissible` returns the request with its defaults resolved (prompt_tokens of a text prompt, max_tokens) and raises ValueError for
    one it could never run: unknown adapter, prompt beyond the context, more blocks than the pool has. `poll` drains the commands that
    a user gave through `engine.jobs[...]` since the last call.
    """

    @property
    def predictor(self) -> "Predictor | None": ...

    @property
    def info(self) -> ExecutorInfo: ...

    @property
    def adapter_infos(self) -> Mapping[str, AdapterInfo]: ...

    def begin(self, jobs: Sequence[Any], *, seed: int) -> Mapping[str, JobShape]: ...

    def admissible(self, request: Request) -> Request: ...

    def step(self, batch: Batch) -> StepResult: ...

    def poll(self) -> Sequence[Command]: ...

    def end(self) -> None: ...


def as_record(value: Any) -> dict[str, Any]:
    """A frozen value as a flat dict (one level), for a frame's row."""
    return {f.name: getattr(value, f.name) for f in fields(value)}
