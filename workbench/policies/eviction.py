"""Rules for which adapter gives up its device slot, or its place in host memory: `replay(evict=...)`. `WeightedEviction` is another one.

A rule is called with the adapter that needs room, those that may go, and the view; it names them in the order in which they should go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.config import require
from workbench.policy import AdapterView, View


@dataclass(frozen=True)
class LRU:
    """The one whose latest request was scheduled longest ago."""

    def __call__(self, wanted: AdapterView, evictable: Sequence[AdapterView], view: View) -> list[str]:
        return [a.name for a in sorted(evictable, key=lambda a: (a.last_used_s, a.name))]


@dataclass(frozen=True)
class LFU:
    """The one with the fewest requests scheduled so far; of those the least recently used."""

    def __call__(self, wanted: AdapterView, evictable: Sequence[AdapterView], view: View) -> list[str]:
        return [a.name for a in sorted(evictable, key=lambda a: (a.uses, a.last_used_s, a.name))]


@dataclass(frozen=True)
class CostAware:
    """The one whose expected cost of coming back is least: its uses, halved every `half_life_s` without one, times what it would take.

    On the device ("gpu") a place is a slot, so what counts is the time to load it again, from disk if it is not in host memory. In host
    memory a place is bytes, so it is the time to read it again per byte.
    Source: the frequency and cost terms of greedy-dual-size-frequency (Cherkasova, HP Laboratories, 1998); the decay in place of its clock,
    and its half-life, are ours. S-LoRA (arXiv 2311.03285) and CaraServe (arXiv 2401.11240) are where loads cost what they do.
    """

    tier: Literal["gpu", "host"] = "gpu"
    half_life_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.tier in ("gpu", "host"), "tier must be 'gpu' or 'host'", self.tier)
        require(self.half_life_s > 0, "half_life_s must be above 0 seconds", self.half_life_s)

    def __call__(self, wanted: AdapterView, evictable: Sequence[AdapterView], view: View) -> list[str]:
        def loss(a: AdapterView) -> float:
            uses = a.uses * 0.5 ** ((view.now_s - a.last_used_s) / self.half_life_s) if a.uses else 0.0
            return uses * (a.load_s if self.tier == "gpu" else a.read_s / a.bytes)

        return [a.name for a in sorted(evictable, key=lambda a: (loss(a), a.last_used_s, a.name))]
