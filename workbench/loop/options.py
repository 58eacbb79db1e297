"""What a replay is asked for beside its trace, executor and policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.config import SLO, FinetuneJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `replay.replay`, as they were given: for one executor, or for every replica of a fleet."""

    jobs: tuple[FinetuneJob, ...]
    slo: SLO | Mapping[str, SLO] | None
    seed: int
    clock: str
    planning: str | float
    lengths: Any
    measure: tuple[float, float] | None
    overlap: bool
    until: str | float | None
    evict: Any
    events: str | Path | None
