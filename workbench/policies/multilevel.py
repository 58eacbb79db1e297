"""Levels by request size with quotas of their own, and which adapter to evict for the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from workbench.policies.common import ELSEWHERE, begin, continue_residents, not_begun, residents
from workbench.policy import AdapterView, Plan, RequestView, View


@dataclass(frozen=True)
class WeightedEviction:
    """An eviction rule: the lowest score first, by how often and how lately an adapter was used, and how large it is to load again.

    Each part is relative to the largest among the evictable: uses, 1 / seconds since the last use, bytes.
    Source: Chameleon (arXiv 2411.17741): 0.45, 0.10, 0.45 (from secondary text).
    """

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45

    def __call__(self, wanted: AdapterView, evictable: Sequence[AdapterView], view: View) -> list[str]:
        parts = [(a.uses, 1.0 / max(view.now_s - a.last_used_s, 1e-9), a.bytes) for a in evictable]
        most = [max(column) or 1.0 for column in zip(*parts)]
        weights = (self.frequency, self.recency, self.size)
        score = [sum(w * x / m for w, x, m in zip(weights, part, most)) for part in parts]
        order = sorted(range(len(parts)), key=lambda i: (score[i], evictable[i].name))
        return [evictable[order[0]].name] if order else []


@dataclass
class MultiLevelQueue:
    """Small requests do not wait behind large ones: up to `levels` queues by size, each with a share of the KV tokens.

    The size of a request is a weighted sum of its prompt, its expected output and its adapter's bytes, each relative to the largest
    seen. K-means over the last `window` arrivals divides sizes into levels; a level's quota of the KV pool is its share of their
    tokens. Within its quota each level admits by arrival, small sizes first; a head without a slot for its adapter is bypassed. What
    is left of the quotas is lent in the same order. A needed slot is taken from the adapter that `eviction` names.
    Source: Chameleon (arXiv 2411.17741); K <= 4; the weights of the size are recalled.
    """

    levels: int = 4
    prompt_weight: float = 0.3
    output_weight: float = 0.5
    adapter_weight: float = 0.2
    window: int = 128
    eviction: WeightedEviction = field(default_factory=WeightedEviction)
    recent: list[tuple[float, float, float]] = field(default_factory=list, repr=False)
    largest: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0), repr=False)
    bounds: list[float] = field(default_factory=list, repr=False)
    shares: list[float] = field(default_factory=lambda: [1.0], repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        self.learn(view)
        left = continue_residents(view, plan)
        bounds, shares = self.bounds, self.shares
        pool = view.limits.blocks * view.block_tokens
        queues: list[list[RequestView]] = [[] for _ in shares]
        for request in not_begun(view):
            queues[self.level(view, request, bounds)].append(request)
        used = [0.0] * len(shares)
        for request in residents(view):
            used[self.level(view, request, bounds)] += request.prompt_tokens + request.expected_output
        for is_lent in (False, True):
            for level, queue in enumerate(queues):
                for request in list(queue):
                    tokens = request.prompt_tokens + request.expected_output
                    if not is_lent and used[level] and used[level] + tokens > shares[level] * pool:
                        break
                    self.make_room(view, plan, request)
                    left -= begin(view, plan, request, left)
                    if plan.why in ELSEWHERE:
                        continue
                    if plan.why:
                        return
                    queue.remove(request)
                    used[level] += tokens

    def parts(self, view: View, request: RequestView) -> tuple[float, float, float]:
        adapter = view.adapters.get(request.adapter) if request.adapter is not None else None
        return (float(request.prompt_tokens), request.expected_output, 0.0 if adapter is None else float(adapter.bytes))

    def size(self, parts: tuple[float, float, float]) -> float:
        weights = (self.prompt_weight, self.output_weight, self.adapter_weight)
        return sum(w * p / m for w, p, m in zip(weights, parts, self.largest))

    def learn(self, view: View) -> None:
        for request in view.arrived:
            parts = self.parts(view, request)
            self.recent = [*self.recent, parts][-self.window :]
            self.largest = (max(self.largest[0], parts[0]), max(self.largest[1], parts[1]), max(self.largest[2], parts[2]))
        if view.arrived:
            self.divide()

    def divide(self) -> None:
        """Upper bounds of all levels but the last, and each level's share of the tokens that came lately."""
        from scipy.cluster.vq import kmeans

        sizes = np.array([self.size(p) for p in self.recent])
        centres = np.unique(np.quantile(sizes, (np.arange(self.levels) + 0.5) / self.levels))
        if len(centres) > 1:
            centres = np.sort(np.ravel(kmeans(sizes[:, None], centres[:, None])[0]))
        bounds = (centres[1:] + centres[:-1]) / 2
        tokens = np.bincount(np.searchsorted(bounds, sizes), [p[0] + p[1] for p in self.recent], len(centres))
        self.bounds, self.shares = bounds.tolist(), (tokens / tokens.sum()).tolist()

    def level(self, view: View, request: RequestView, bounds: list[float]) -> int:
        return sum(self.size(self.parts(view, request)) > b for b in bounds)

    def make_room(self, view: View, plan: Plan, request: RequestView) -> None:
        """Evict by the rule when the request's adapter is not on the device and every slot is taken."""
        if request.adapter is None or view.adapters[request.adapter].state == "gpu":
            return
        loaded = [a for a in view.adapters.values() if a.state == "gpu"]
        if len(loaded) + len(plan.loads) - len(plan.evicted) < view.limits.slots:
            return
        idle = [a for a in loaded if not a.pinned and (a.name, a.version) not in plan.versions | plan.evicted]
        for name in self.eviction(view.adapters[request.adapter], idle, view):
            plan.evict(name)
