"""How requests spread over adapters, each rule named as what it is (the literature's names often are not)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import pandas as pd

from workbench.config import require


class Popularity(Protocol):
    """A rule that gives each row of a trace's frame one of `names` (most popular first), or None for the base model."""

    @property
    def is_random(self) -> bool: ...

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]: ...


def _drawn(weights: np.ndarray, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
    return [names[int(i)] for i in rng.choice(len(names), size=len(frame), p=weights / weights.sum())]


@dataclass(frozen=True)
class uniform:
    """Every adapter with the same probability, independently for each request."""

    is_random = True

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        return _drawn(np.ones(len(names)), frame, names, rng)


@dataclass(frozen=True)
class zipf:
    """True Zipf: the k-th most popular adapter has weight 1 / k^s. s = 0 is uniform."""

    s: float = 1.0
    is_random = True

    def __post_init__(self) -> None:
        require(0 <= self.s < 100, "s must lie in 0..100", self.s)

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        return _drawn(np.arange(1, len(names) + 1, dtype=float) ** -self.s, frame, names, rng)


@dataclass(frozen=True)
class geometric:
    """Each adapter `ratio` times as popular as the next. Punica's and SGLang's benchmarks call this "zipf" (ratio 1.5)."""

    ratio: float = 1.5
    is_random = True

    def __post_init__(self) -> None:
        require(1 <= self.ratio < 1e6, "ratio must be at least 1 (1 is uniform)", self.ratio)

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        return _drawn(self.ratio ** -np.arange(len(names), dtype=float), frame, names, rng)


@dataclass(frozen=True)
class s_lora_power:
    """S-LoRA's benchmark: adapter floor(N x power(alpha)). *Uniform* at its default alpha = 1; below 1 the first adapters are popular."""

    alpha: float = 1.0
    is_random = True

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha must be above 0", self.alpha)

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        indices = np.minimum((rng.power(self.alpha, len(frame)) * len(names)).astype(int), len(names) - 1)
        return [names[int(i)] for i in indices]


@dataclass(frozen=True)
class round_robin:
    """Request i to adapter i mod N, in order of arrival (the paper's E7)."""

    is_random = False

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        return [names[i % len(names)] for i in range(len(frame))]


@dataclass(frozen=True)
class per_phase:
    """One adapter per phase of the trace; `ends_s` are the phases' ends (the paper's E6: 120, 180, 300, 420)."""

    ends_s: tuple[float, ...]
    is_random = False

    def __init__(self, *ends_s: float) -> None:
        object.__setattr__(self, "ends_s", tuple(float(end) for end in ends_s))
        increases = all(a < b for a, b in pairwise((0.0, *self.ends_s)))
        require(len(ends_s) > 0 and increases, "ends_s must be increasing times above 0", ends_s)

    def __repr__(self) -> str:
        return f"per_phase({', '.join(f'{end:g}' for end in self.ends_s)})"

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        require(len(names) == len(self.ends_s), f"per_phase needs one adapter for each of its {len(self.ends_s)} phases", len(names))
        times = frame["arrival_s"].to_numpy()
        last = float(times.max(initial=0.0))
        require(last <= self.ends_s[-1], f"per_phase must cover the last arrival at {last:g} s", self.ends_s, "Add a phase, or slice.")
        phases = np.minimum(np.searchsorted(self.ends_s, times, side="right"), len(names) - 1)
        return [names[int(i)] for i in phases]


@dataclass(frozen=True)
class clients:
    """Clients (the column `tenant`) as adapters: the busiest client gets the first name, and so on.

    `others` says what happens to clients beyond the last name: "error", or "base" (they use the base model).
    """

    others: Literal["error", "base"] = "error"
    is_random = False

    def __post_init__(self) -> None:
        require(self.others in ("error", "base"), 'others must be "error" or "base"', self.others)

    def assign(self, frame: pd.DataFrame, names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
        require(
            "tenant" in frame, "clients() needs the column tenant", list(frame.columns), "Use a trace that knows its clients (servegen)."
        )
        counts = frame.groupby("tenant", sort=True).size().sort_values(ascending=False, kind="stable")
        if self.others == "error":
            require(len(counts) <= len(names), "clients() needs an adapter for every client", f"{len(names)} for {len(counts)} clients")
        adapter_of = dict(zip(counts.index, names, strict=False))
        return [adapter_of.get(tenant) for tenant in frame["tenant"]]
