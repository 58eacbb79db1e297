"""The mutable records inside the ledger: where one request and one fine-tune job stand. Only the ledger writes them."""

from typing import Any, Literal

from workbench.config import SLO, FinetuneJob
from workbench.core import AdapterInfo, JobShape, MicroBatch, Request
from workbench.loop.decoding import Stint
from workbench.loop.pools import Version
from workbench.loop.prefix_cache import BlockKey

RequestPhase = Literal["waiting", "running", "finished", "rejected", "aborted"]
JobPhase = Literal["forward", "backward", "evaluate", "finished", "stopped"]


class RequestState:
    """One request. `context` is prompt + generated tokens: the KV tokens that its next decode needs; `capacity` is what its blocks hold.

    `own_generated` and `own_last_token_s` hold outside a `stint`; within one, the group that it decodes with counts for it (`decoding`).
    `table` is `blocks` as a tuple, or empty where that has to be made anew.
    `keys` names the contents of the prompt's full blocks for the prefix cache (None before they are needed), `cached` counts the tokens
    that its latest prefill found there.
    `limit` is the output length at which it ends (the trace's, or max_tokens); `key` the pinned (adapter, version), None for the base.
    A request holds blocks exactly while it holds its slot and counts as resident.
    """

    __slots__ = (
        "adapter",
        "admitted",
        "arrival_s",
        "blocks",
        "cached",
        "capacity",
        "expected_output",
        "first_token_s",
        "id",
        "info",
        "key",
        "keys",
        "limit",
        "max_tokens",
        "outputs",
        "own_generated",
        "own_last_token_s",
        "phase",
        "preemptions",
        "prefilled",
        "prompt",
        "request",
        "seq",
        "slo",
        "stint",
        "table",
        "view",
    )

    def __init__(self, request: Request, seq: int, arrival_s: float, max_tokens: int, slo: SLO | None) -> None:
        self.request = request
        self.id = request.request_id
        self.adapter = request.adapter
        self.seq = seq
        self.arrival_s = arrival_s
        self.max_tokens = max_tokens
        self.limit = max_tokens if request.output_tokens is None else min(request.output_tokens, max_tokens)
        self.slo = slo
        self.expected_output = float(max_tokens)
        self.phase: RequestPhase = "waiting"
        self.admitted = False
        self.info: AdapterInfo | None = None
        self.key: Version | None = None
        self.keys: list[BlockKey] | None = None
        self.prompt = request.prompt_tokens
        self.own_generated = 0
        self.stint: Stint | None = None
        self.prefilled = 0
        self.cached = 0
        self.capacity = 0
        self.blocks: list[int] = []
        self.table: tuple[int, ...] = ()
        self.first_token_s: float | None = None
        self.own_last_token_s: float | None = None
        self.preemptions = 0
        self.outputs: list[int] = []
        self.view: Any = None

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        stint = self.stint
        return self.own_generated if stint is None else stint.base + stint.group.count

    @property
    def context(self) -> int:
        stint = self.stint
        return self.prompt + (self.own_generated if stint is None else stint.base + stint.group.count)

    @property
    def last_token_s(self) -> float | None:
        """When its latest token came; None before the first."""
        stint = self.stint
        return self.own_last_token_s if stint is None or stint.group.count == stint.first else stint.group.last_s

    def add_token(self, time_s: float) -> None:
        """One more token, outside a stint."""
        assert self.stint is None, self.id
        self.own_generated += 1
        self.own_last_token_s = time_s
        if self.first_token_s is None:
            self.first_token_s = time_s


class Queue(dict[str, RequestState]):
    """Requests by id, in their order, with their `views` beside them: who lists the views touches none of the records."""

    __slots__ = ("views",)

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, Any] = {}

    def enter(self, s: RequestState) -> None:
        self[s.id] = s
        self.views[s.id] = s.view

    def leave(self, name: str) -> bool:
        """Whether it was there."""
        if self.pop(name, None) is None:
            return False
        del self.views[name]
        return True

    def sort(self) -> None:
        """By arrival."""
        states = sorted(self.values(), key=lambda s: s.seq)
        self.clear()
        for s in states:
            self.enter(s)

    def clear(self) -> None:
        super().clear()
        self.views.clear()


class JobState:
    """One fine-tune job: forward (offset) -> backward (layers left) -> committed -> perhaps evaluate -> next micro-batch."""

    __slots__ = (
        "arrival_s",
        "committed_tokens",
        "eval_index",
        "eval_sum",
        "eval_tokens",
        "evaluation",
        "id",
        "index",
        "job",
        "last_progress_s",
        "layers",
        "layers_left",
        "loss_sum",
        "loss_tokens",
        "micro_batch",
        "offset",
        "optimizer_steps",
        "paused",
        "phase",
        "rows",
        "shape",
        "total_tokens",
        "view",
    )

    def __init__(self, job: FinetuneJob, shape: JobShape, num_layers: int, total_tokens: int) -> None:
        self.job = job
        self.id = job.id
        self.shape = shape
        self.layers = num_layers
        self.arrival_s = job.arrival_s
        self.last_progress_s = job.arrival_s
        self.paused = False
        self.evaluation: tuple[MicroBatch, ...] = tuple(shape.evaluation())
        self.index = shape.first_micro_batch
        self.optimizer_steps = sum(shape.micro_batch(i).ends_window for i in range(self.index))
        self.total_tokens = total_tokens
        self.committed_tokens = 0
        self.phase: JobPhase = "forward" if self.index < shape.num_micro_batches else "finished"
        self.micro_batch: MicroBatch | None = shape.micro_batch(self.index) if self.phase == "forward" else None
        self.offset = 0
        self.layers_left = 0
        self.rows: int | None = None
        self.eval_index = 0
        self.loss_sum, self.loss_tokens = 0.0, 0
        self.eval_sum, self.eval_tokens = 0.0, 0
        self.view: Any = None

    @property
    def is_active(self) -> bool:
        return self.phase not in ("finished", "stopped")

    @property
    def current(self) -> MicroBatch:
        """The micro-batch that the next chunk belongs to, training or evaluation."""
        micro_batch = self.evaluation[self.eval_index] if self.phase == "evaluate" else self.micro_batch
        assert micro_batch is not None
        return micro_batch

    def next_micro_batch(self) -> None:
        """Go to the next training micro-batch, or finish."""
        self.index += 1
        self.offset = 0
        if self.index < self.shape.num_micro_batches:
            self.phase, self.micro_batch = "forward", self.shape.micro_batch(self.index)
        else:
            self.phase, self.micro_batch = "finished", None


def check_job(job: FinetuneJob, shape: JobShape, *, activation_tokens: int, max_batch_tokens: int, can: frozenset[str]) -> int:
    """The tokens that the job has to train. Raises ValueError if a micro-batch could never run within an executor's limits."""
    sizes = [shape.micro_batch(i).tokens for i in range(shape.first_micro_batch, shape.num_micro_batches)]
    total_tokens = sum(sizes)
    sizes += [m.tokens for m in shape.evaluation()]
    if not sizes:
        return 0
    largest = max(sizes)
    if min(sizes) < 1:
        raise ValueError(
            f"every micro-batch must hold at least 1 token, job {job.id!r} has one of {min(sizes)}. Remove its empty examples."
        )
    if largest > activation_tokens:
        raise ValueError(
            f"a micro-batch must fit activation_tokens={activation_tokens}, job {job.id!r} has one of {largest} tokens. "
            "Raise EngineConfig.activation_tokens, or lower the job's batch_size or max_tokens."
        )
    if "chunk" not in can and largest > max_batch_tokens:
        raise ValueError(
            f"a micro-batch must fit max_batch_tokens={max_batch_tokens} on an executor that cannot cut it, job {job.id!r} has one of "
            f"{largest} tokens. Raise EngineConfig.max_batch_tokens, or lower the job's batch_size or max_tokens."
        )
    return total_tokens
