"""Who may join when adapters are more than a batch can hold: skip (vLLM), drain (SGLang), cycle (LoRAX)."""

from dataclasses import dataclass, field

from workbench.policies.common import ELSEWHERE, adapters_of, begin, continue_residents, not_begun, repeat_decodes, residents
from workbench.policy import Plan, RequestView, View


@dataclass(frozen=True)
class FCFSSkip:
    """Decodes first; then the queue in order, over requests whose adapter would be one too many in the batch.

    `max_loras=None` is the executor's own limit of adapters in a batch, `budget_tokens=None` its limit of tokens. Requests for an
    adapter of the batch go on joining, so that the ones skipped may starve.
    Source: vLLM's V1 scheduler (`max_loras`; Kwon et al., SOSP 2023, for the engine).
    """

    max_loras: int | None = None
    budget_tokens: int | None = None

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan, self.budget_tokens)
        batch = adapters_of(residents(view))
        most = view.limits.batch_adapters if self.max_loras is None else self.max_loras
        for request in not_begun(view):
            joined = batch | adapters_of([request])
            if len(joined) > max(most, len(batch)):
                continue
            left -= begin(view, plan, request, left)
            if plan.why and plan.why not in ELSEWHERE:
                break
            batch = batch if plan.why else joined
        repeat_decodes(view, plan)


@dataclass
class Drain:
    """FCFS with skipping, and an end to starving: a running adapter takes no more requests to make room for one that waits too long.

    When the batch is full of adapters and another has waited over `max_wait_s`, the longest-waiting first: the running adapter with
    the fewest tokens left (its longest request counts) drains for it. It admits only requests of at most `tolerance` times those
    tokens, until none of its requests runs. `max_adapters=None` is the number of slots.
    Source: SGLang's LoRA drainer; there `max_wait_s` is 0 (off) unless set, the tolerance 1.2.
    """

    max_wait_s: float = 1.0
    tolerance: float = 1.2
    max_adapters: int | None = None
    draining: dict[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        tokens = self.tokens_left(residents(view))
        most = view.limits.slots if self.max_adapters is None else self.max_adapters
        self.draining = {a: b for a, b in self.draining.items() if a in tokens}
        waiting = not_begun(view)
        if len(tokens) >= most:
            self.mark(view, waiting, tokens)
        left = continue_residents(view, plan)
        for request in waiting:
            name = request.adapter
            if name is not None and name not in tokens and len(tokens) >= most:
                continue
            if name in self.draining and request.expected_left > self.tolerance * tokens[name]:
                continue
            left -= begin(view, plan, request, left)
            if plan.why and plan.why not in ELSEWHERE:
                break
            if not plan.why and name is not None:
                tokens[name] = max(tokens.get(name, 0.0), request.expected_left)

    def tokens_left(self, requests: list[RequestView]) -> dict[str, float]:
        """The most tokens that one of its requests still needs, by adapter."""
        left: dict[str, float] = {}
        for r in requests:
            if r.adapter is not None:
                left[r.adapter] = max(left.get(r.adapter, 0.0), r.expected_left)
        return left

    def mark(self, view: View, waiting: list[RequestView], tokens: dict[str, float]) -> None:
        """Name an adapter to drain for each one that starves and has none yet, the longest-waiting first."""
        oldest = sorted((r for r in waiting if r.adapter is not None), key=lambda r: r.arrival_s)
        for r in oldest:
            assert r.adapter is not None
            starves = view.now_s - r.arrival_s > self.max_wait_s and r.adapter not in tokens and r.adapter not in self.draining.values()
            eligible = [a for a in tokens if a not in self.draining]
            if starves and eligible:
                self.draining[min(eligible, key=lambda a: (tokens[a], a))] = r.adapter


@dataclass
class AdapterCycling:
    """A queue per adapter, at most `max_active` of them served at a time, each for `cycle_s` before it makes room for another.

    The base model counts as an adapter. Active ones without requests leave only if others are pending; the front one leaves once it
    was active for over `cycle_s` and none of its requests is resident. The oldest head among the active adapters still within their
    time begins next, else the oldest of all active ones. `max_active=None` is the number of slots.
    Source: LoRAX (Predibase), its adapter queues: 1,024 adapters, 2 s.
    """

    max_active: int | None = None
    cycle_s: float = 2.0
    active: dict[str | None, float] = field(default_factory=dict, repr=False)
    pending: list[str | None] = field(default_factory=list, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        queues: dict[str | None, list[RequestView]] = {}
        for request in not_begun(view):
            queues.setdefault(request.adapter, []).append(request)
        self.rotate(view, queues)
        left = continue_residents(view, plan)
        heads = {a: queue for a, queue in queues.items() if a in self.active}
        while heads:
            fresh = [a for a in heads if view.now_s - self.active[a] < self.cycle_s]
            chosen = min(fresh or heads, key=lambda a: heads[a][0].arrival_s)
            left -= begin(view, plan, heads[chosen][0], left)
            if plan.why and plan.why not in ELSEWHERE:
                break
            del heads[chosen][0]
            if plan.why or not heads[chosen]:
                del heads[chosen]

    def rotate(self, view: View, queues: dict[str | None, list[RequestView]]) -> None:
        """Let idle adapters go if others are pending, then the front one if its time is over, and fill up."""
        busy = {r.adapter for r in residents(view)}
        known = [a for a in self.pending if a in queues]
        self.pending = known + [a for a in queues if a not in known and a not in self.active]
        num_pending = len(self.pending)
        for adapter in [a for a in self.active if a not in busy and a not in queues][:num_pending]:
            del self.active[adapter]
        front = next(iter(self.active), None)
        if self.active and self.pending and front not in busy and view.now_s - self.active[front] > self.cycle_s:
            del self.active[front]
            self.pending += [front] if front in queues else []
        most = view.limits.slots if self.max_active is None else self.max_active
        while self.pending and len(self.active) < most:
            self.active[self.pending.pop(0)] = view.now_s
