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
FILL = 1024  # at least so many are drawn ahead
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
        series: list[np.ndarray] = []
        for kind in range(len(CLASSES)):
            chosen = residual[kinds == kind] if (kinds == kind).sum() >= FEWEST else residual
            drawn = np.quantile(chosen, rank, method="hazen")
            series.append(np.where((kinds == kind) & (len(chosen) < len(residual)), residual, drawn))
        self._series = np.array(series)

    def stream(self, seed: int, noise: float = 0.0) -> "Stream":
        """The residuals of one replay, with independent noise of that standard deviation on top. Equal seeds give equal streams."""
        return Stream(self._series, seed, noise)


class Stream:
    """Draws 1 + the relative residual of the next step, at least 0.1, given its class; or of the next ones, to be made or not.

    `series` [classes, steps] is what is drawn from, block by block: one row is taken according to the class of each step.
    """

    def __init__(self, series: np.ndarray, seed: int, noise: float) -> None:
        self._series, self._noise = series, noise
        self._factors = _factors(series)
        self._rng, self._extra_rng = random.Random(f"residuals:{seed}"), random.Random(f"noise:{seed}")
        self._coming = np.empty((len(series), 0))  # factors [classes, steps at hand]
        self._at = 0

    def __call__(self, kind: int) -> float:
        if self._at == self._coming.shape[1]:
            self._fill(1)
        self._at += 1
        return float(self._coming[kind, self._at - 1])

    def preview(self, kind: int, num: int, first: int = 0) -> np.ndarray:
        """What the next `num` calls after the `first` ones would give."""
        if self._at + first + num > self._coming.shape[1]:
            self._fill(first + num)
        first += self._at
        return self._coming[kind, first : first + num]

    def skip(self, num: int) -> None:
        self._at += num

    def _fill(self, num: int) -> None:
        """Let at least `num` residuals be at hand: whole blocks, from the recording's end on to its beginning."""
        kept, length = self._coming[:, self._at :], self._series.shape[1]
        blocks = -(-max(num - kept.shape[1], FILL) // BLOCK)
        bits, draw, starts = length.bit_length(), self._rng.getrandbits, []
        while len(starts) < blocks:
            start = draw(bits)  # what `randrange(length)` does, without its checks
            if start < length:
                starts.append(start)
        which = ((np.array(starts)[:, None] + np.arange(BLOCK)) % length).ravel()
        if self._noise:
            new = _factors(self._series[:, which] + [self._extra_rng.gauss(0.0, self._noise) for _ in range(len(which))])
        else:
            new = self._factors[:, which]
        self._coming = np.concatenate([kept, new], axis=1)
        self._at = 0


def _factors(residuals: np.ndarray) -> np.ndarray:
    return 1.0 + np.maximum(residuals, -0.9)


def class_of(work: Work) -> int:
    """The step's class as an index into `CLASSES`, as `classes_of`."""
    v = work.values
    if v[12]:
        return 0
    if v[0] or v[1]:
        return 1
    return 2 if v[2] else 3
