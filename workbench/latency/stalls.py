"""Delays that come by time, whatever a step does: under sustained load a step lasts some milliseconds longer now and then.

In those that were measured a core of the host was slow for a moment. They are rare in a calibration, whose steps have pauses between them,
and they decide what a quantile of token gaps is worth: a stall makes the gap of everybody who decodes late at once. So they are measured in
replays, and drawn by busy time and not by step.
"""

import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from math import inf
from typing import Any

import numpy as np

from workbench.config import require

LEAST_S, MOST_S = 0.003, 0.05  # shorter ones are noise; longer ones something else: a compilation, a graph that is recorded
LEAST_SHARE = 0.1  # of the step: what long steps differ by is noise, too
KINDS = ("prefill_tokens", "decode_tokens", "finetune_tokens", "evaluate_tokens", "backward_layers", "optimizer_steps")
WINDOW = 41  # steps of a kind whose median ratio of measured to predicted is what is usual at that time


@dataclass(frozen=True)
class Stalls:
    """`per_s` stalls a second of busy time, at random (Poisson), each of one of these lengths in `seconds`."""

    per_s: float
    seconds: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        require(self.per_s >= 0, "per_s must be at least 0 stalls a second", self.per_s)
        require(bool(self.seconds) or not self.per_s, "stalls need lengths to draw from", self.seconds, "Give seconds=.")
        require(all(s > 0 for s in self.seconds), "stalls must last more than 0 seconds", min(self.seconds, default=0.0))

    @classmethod
    def of(cls, replays: Iterable[Any], *, source: str = "") -> "Stalls":
        """What measured replays show: steps that lasted LEAST_S to MOST_S longer, and LEAST_SHARE of their time, than their prediction and
        those of their kind around them say.

        A kind is what of prefill, decode, forward, evaluation, backward and update a step holds: a kind that is predicted wrongly does not
        stall. Steps that stopped early are left out. Raises ValueError for replays without predictions.
        """
        found: list[float] = []
        busy_s = 0.0
        for replay in replays:
            steps = replay.steps[~replay.steps["stopped_early"].to_numpy(bool)]
            ratio = steps["duration_s"] / steps["predicted_s"]
            require(bool(ratio.notna().all()), "stalls are seen beside predictions", str(replay.policy), "Replay with a latency model.")
            kind = (steps[list(KINDS)] > 0).to_numpy() @ (1 << np.arange(len(KINDS)))
            usual = ratio.groupby(kind).transform(lambda r: r.rolling(WINDOW, center=True, min_periods=1).median())
            usual_s = steps["predicted_s"] * usual
            over_s = (steps["duration_s"] - usual_s).to_numpy(float)
            least_s = np.maximum(LEAST_S, LEAST_SHARE * usual_s.to_numpy(float))
            found += over_s[(over_s >= least_s) & (over_s <= MOST_S)].tolist()
            busy_s += float(steps["duration_s"].sum())
        require(busy_s > 0, "stalls are seen in replays that ran steps", busy_s)
        return cls(len(found) / busy_s, tuple(round(s, 6) for s in sorted(found)), source)

    def stream(self, seed: int) -> "StallStream":
        """The stalls of one replay; equal seeds give equal ones."""
        return StallStream(self, seed)

    def __str__(self) -> str:
        if not self.per_s:
            return "no stalls"
        middle, longest = self.seconds[len(self.seconds) // 2], max(self.seconds)
        return f"{self.per_s:.2f} stalls a busy second, median {1e3 * middle:.1f} ms, longest {1e3 * longest:.0f} ms"


class StallStream:
    """How much longer each step lasts, given how long it would last: for the next step, or for the next ones, to be made or not."""

    def __init__(self, stalls: Stalls, seed: int) -> None:
        self._stalls, self._rng = stalls, random.Random(f"stalls:{seed}")
        self._busy_s, self._passed = 0.0, 0
        self._times: list[float] = []  # of busy time, at which they come
        self._sums = [0.0]  # seconds of the first 0, 1, ... of them
        self._ends: list[float] = []  # busy time after each previewed step
        self._counts: list[int] = []  # how many have come by then
        self._draw()

    def __call__(self, duration_s: float) -> float:
        """Seconds that the next step lasts longer."""
        self._busy_s += duration_s
        if self._busy_s < self._times[self._passed]:
            return 0.0
        before, self._passed = self._passed, self._until(self._busy_s)
        return self._sums[self._passed] - self._sums[before]

    def preview(self, durations_s: Sequence[float], first: int = 0) -> list[float]:
        """What the next calls after the `first` ones, which were previewed already, would give for these durations; empty where no step of
        them stalls.
        """
        del self._ends[first:], self._counts[first:]
        begins_s, passed = (self._ends[-1], self._counts[-1]) if first else (self._busy_s, self._passed)
        if isinstance(durations_s, np.ndarray):  # the sums are the same, one after another
            ends = np.add.accumulate(np.concatenate(([begins_s], durations_s)))[1:].tolist()
        else:
            ends = list(islice(accumulate(durations_s, initial=begins_s), 1, None))
        self._ends += ends
        if ends[-1] < self._times[passed]:
            self._counts += [passed] * len(ends)
            return []
        counts = [self._until(end_s) for end_s in ends]
        self._counts += counts
        return [self._sums[now] - self._sums[before] for before, now in pairwise([passed, *counts])]

    def skip(self, num: int) -> None:
        """So many of the previewed steps were made."""
        if num:
            self._busy_s, self._passed = float(self._ends[num - 1]), self._counts[num - 1]
        self._ends, self._counts = [], []

    def _until(self, busy_s: float) -> int:
        """How many come up to this busy time; the next one is drawn as well."""
        while self._times[-1] <= busy_s:
            self._draw()
        return bisect_right(self._times, busy_s)

    def _draw(self) -> None:
        if not self._stalls.per_s:
            self._times.append(inf)
            return
        self._times.append((self._times[-1] if self._times else 0.0) + self._rng.expovariate(self._stalls.per_s))
        self._sums.append(self._sums[-1] + self._rng.choice(self._stalls.seconds))
