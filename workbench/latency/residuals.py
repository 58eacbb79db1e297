"""How steps differ from their prediction, as recorded: drawn again in simulated replays.

Consecutive steps are drawn in blocks, so that slow ones come in runs as they did. A drawn step of another class (`latency.terms.CLASSES`)
than the one to be made stands for its rank: the slowest of a hundred prefills becomes the slowest of a hundred decodes. So every class
has exactly the errors that it was recorded with, delays by the host among them, which the fit did not follow.
"""

import random

import numpy as np

from workbench.features import Work
from workbench.latency.terms import CLASSES, classes_of

BLOCK = 16  # consecutive residuals drawn together: slow steps come in runs
FEWEST = 8  # steps of a class; with fewer, those of all classes say how it varies


class Residuals:
    """Relative residuals in the order of recording: for each class what it would have been had every step been of that class."""

    def __init__(self, values: np.ndarray, residual: np.ndarray) -> None:
        """Of steps given as features [n, len(NAMES)] and measured / predicted - 1 [n]."""
        kinds = classes_of(values)
        rank = np.empty(len(residual))
        for kind in np.unique(kinds):
            chosen = np.flatnonzero(kinds == kind)
            rank[chosen[np.argsort(residual[chosen], kind="stable")]] = (np.arange(len(chosen)) + 0.5) / len(chosen)
        self._series: list[list[float]] = []
        for kind in range(len(CLASSES)):
            chosen = residual[kinds == kind] if (kinds == kind).sum() >= FEWEST else residual
            series = np.quantile(chosen, rank, method="hazen")
            self._series.append(np.where((kinds == kind) & (len(chosen) < len(residual)), residual, series).tolist())

    def stream(self, seed: int, noise: float = 0.0) -> "Stream":
        """The residuals of one replay, with independent noise of that standard deviation on top. Equal seeds give equal streams."""
        return Stream(self._series, seed, noise)


class Stream:
    """Draws 1 + the relative residual of the next step, at least 0.1, given its class; or of the next ones, to be made or not."""

    def __init__(self, series: list[list[float]], seed: int, noise: float) -> None:
        self._series, self._noise, self._num = series, noise, len(series[0])
        self._rng, self._extra_rng = random.Random(f"residuals:{seed}"), random.Random(f"noise:{seed}")
        self._coming: list[int] = []
        self._extra: list[float] = []
        self._at = 0

    def __call__(self, kind: int) -> float:
        value = self.preview(kind, 1)[0]
        self._at += 1
        return value

    def preview(self, kind: int, num: int) -> list[float]:
        """What the next `num` calls would give."""
        if self._at + num > len(self._coming):
            self._fill(num)
        first, last, series = self._at, self._at + num, self._series[kind]
        if self._noise:
            pairs = zip(self._coming[first:last], self._extra[first:last], strict=True)
            return [1.0 + max(series[k] + extra, -0.9) for k, extra in pairs]
        return [1.0 + (r if (r := series[k]) > -0.9 else -0.9) for k in self._coming[first:last]]

    def skip(self, num: int) -> None:
        self._at += num

    def _fill(self, num: int) -> None:
        """Let at least `num` places in the recording be at hand: whole blocks, from its end on to its beginning."""
        del self._coming[: self._at], self._extra[: self._at]
        self._at = 0
        coming = self._coming
        while len(coming) < num:
            first = self._rng.randrange(self._num)
            coming += [k % self._num for k in range(first, first + BLOCK)]
        if self._noise:
            self._extra += [self._extra_rng.gauss(0.0, self._noise) for _ in range(len(coming) - len(self._extra))]


def class_of(work: Work) -> int:
    """The step's class as an index into `CLASSES`, as `classes_of`."""
    v = work.values
    if v[12]:
        return 0
    if v[0] or v[1]:
        return 1
    return 2 if v[2] else 3
