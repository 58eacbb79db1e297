"""Fair shares among tenants or adapters: virtual token counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from workbench.policies.common import ELSEWHERE, begin, continue_residents, not_begun
from workbench.policy import Plan, RequestView, View


@dataclass
class FairCounters:
    """Admit from whoever was served least: a counter per adapter or tenant, of weighted tokens.

    A counter grows by `input_weight` per prompt token when a request first begins (its first output token comes with that), and by
    `output_weight` per decoded token, each divided by the client's weight (`weights`, 1 unless named). A client whose queue was empty
    is lifted to the least counter of those that were waiting, so that nobody saves up. No client is held back while there is room.
    Source: VTC (Sheng et al., OSDI 2024): weights 1 and 2; one client per adapter in S-LoRA's implementation.
    """

    by: Literal["adapter", "tenant"] = "adapter"
    input_weight: float = 1.0
    output_weight: float = 2.0
    weights: Mapping[str | None, float] = field(default_factory=dict)
    counters: dict[str | None, float] = field(default_factory=dict, repr=False)
    backlogged: set[str | None] = field(default_factory=set, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        queues: dict[str | None, list[RequestView]] = {}
        for request in not_begun(view):
            queues.setdefault(self.client(request), []).append(request)
        self.lift(queues)
        left = continue_residents(view, plan)
        decoded = {s.id for s in plan.decodes}
        for request in view.running:
            if request.id in decoded:
                self.charge(request, self.output_weight)
        while queues:
            client = min(queues, key=lambda c: (self.counters.get(c, 0.0), queues[c][0].arrival_s))
            request = queues[client][0]
            taken = begin(view, plan, request, left)
            left -= taken
            if taken and not request.preemptions:
                self.charge(request, self.input_weight * request.prompt_tokens)
            if plan.why and plan.why not in ELSEWHERE:
                break
            del queues[client][0]
            if plan.why or not queues[client]:
                del queues[client]

    def client(self, request: RequestView) -> str | None:
        return request.adapter if self.by == "adapter" else request.tenant

    def charge(self, request: RequestView, tokens: float) -> None:
        client = self.client(request)
        self.counters[client] = self.counters.get(client, 0.0) + tokens / self.weights.get(client, 1.0)

    def lift(self, queues: Mapping[str | None, list[RequestView]]) -> None:
        """Whoever begins to wait starts from the least counter among those who wait already."""
        waiting = {c for c in queues if c in self.backlogged}
        for client in [c for c in queues if c not in waiting]:
            least = min((self.counters.get(c, 0.0) for c in waiting), default=0.0)
            self.counters[client] = max(self.counters.get(client, 0.0), least)
            waiting.add(client)
        self.backlogged = waiting
