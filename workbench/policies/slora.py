"""The admission rules of S-LoRA (arXiv 2311.03285): memory look-ahead, adapter clusters, early abort."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.policies.common import ELSEWHERE, adapters_of, begin, continue_residents, not_begun, repeat_decodes, residents
from workbench.policy import Plan, RequestView, View


def peak_tokens(requests: Sequence[tuple[float, float]]) -> float:
    """The most KV tokens that (length, tokens still to come) pairs will ever hold at once, if all decode together.

    By remaining length, longest first: when the i-th ends, i requests have grown by its remaining length.
    """
    peak = total = 0.0
    for i, (length, left) in enumerate(sorted(requests, key=lambda r: -r[1]), start=1):
        total += length
        peak = max(peak, left * i + total)
    return peak


@dataclass(frozen=True)
class MemoryLookahead:
    """First come, first served; a request begins only if the KV pool will hold everybody to their expected ends.

    With residents and candidate sorted by remaining length, longest first: max_i (remaining_i * i + sum_{j <= i} length_j) has to fit
    the pool less `adapter_tokens` for each distinct adapter (0: adapters have slots of their own, as here; in S-LoRA's unified
    pool they take KV room). Stops at the first that does not fit. When nothing is resident the first begins at all events. Tokens are
    counted, as in S-LoRA's pool of single tokens: with larger blocks, what their ends leave empty may still preempt somebody.
    Source: S-LoRA (Sheng et al., MLSys 2024), its request queue.
    """

    adapter_tokens: int = 0

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan)
        admitted = residents(view)
        pool = view.limits.blocks * view.block_tokens
        for request in not_begun(view):
            candidates = [*admitted, request]
            room = pool - self.adapter_tokens * len(adapters_of(candidates))
            if admitted and peak_tokens([(r.prompt_tokens + r.generated, r.expected_left) for r in candidates]) > room:
                break
            left -= begin(view, plan, request, left)
            if plan.why:
                break
            admitted = candidates
        repeat_decodes(view, plan)


@dataclass(frozen=True)
class AffinityCluster:
    """First come, first served until the batch has `num_adapters` adapters; then requests for those first, and any others to fill it.

    Source: S-LoRA (Sheng et al., MLSys 2024), adapter clustering; it varies the number of clusters and publishes no default.
    """

    num_adapters: int = 4

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan)
        batch, waiting = adapters_of(residents(view)), not_begun(view)
        while waiting:
            request = waiting[0]
            if len(batch) >= self.num_adapters:
                request = next((r for r in waiting if r.adapter is None or r.adapter in batch), request)
            waiting.remove(request)
            left -= begin(view, plan, request, left)
            if plan.why and plan.why not in ELSEWHERE:
                break
            if not plan.why:
                batch |= adapters_of([request])
        repeat_decodes(view, plan)


@dataclass
class EarlyAbort:
    """Abort what cannot begin in time any more; the newest first under overload, else the oldest first.

    A request that never ran is rejected once its wait + `margin_s` reaches its own TTFT target, or `wait_s` where it has none.
    Arrivals and begun requests between two admissions are averaged with weight `newest` on the last; overload is when as many arrive
    as begin. The averages start at 1 and the second never falls below it.
    Source: S-LoRA (Sheng et al., MLSys 2024), its abort queue: 6 s, margin 0.5 s, weight 0.7 (there rounded down to integers).
    """

    wait_s: float = 6.0
    margin_s: float = 0.5
    newest: float = 0.7
    arriving: float = field(default=1.0, repr=False)
    beginning: float = field(default=1.0, repr=False)
    num_arrived: int = field(default=0, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        left = continue_residents(view, plan)
        self.num_arrived += len(view.arrived)
        waiting = not_begun(view)
        for request in waiting:
            if self.is_late(view, request):
                plan.reject(request, f"cannot begin within {self.target_s(request):g} s")
        waiting = [r for r in waiting if r.id not in plan.rejected]
        if plan.left.requests == 0:
            return
        self.arriving = self.newest * self.num_arrived + (1 - self.newest) * self.arriving
        if self.arriving >= self.beginning:
            waiting.reverse()
        begun = 0
        for request in waiting:
            taken = begin(view, plan, request, left)
            left, begun = left - taken, begun + (taken > 0)
            if plan.why and plan.why not in ELSEWHERE:
                break
        if begun:
            self.num_arrived = 0
            self.beginning = max(1.0, self.newest * begun + (1 - self.newest) * self.beginning)

    def target_s(self, request: RequestView) -> float:
        return self.wait_s if request.slo is None or request.slo.ttft_s is None else request.slo.ttft_s

    def is_late(self, view: View, request: RequestView) -> bool:
        return not request.preemptions and view.now_s - request.arrival_s + self.margin_s >= self.target_s(request)
