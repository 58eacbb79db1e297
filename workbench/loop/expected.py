"""A predictor of `lengths` at work in one replay: what it is shown, and what becomes of its answer."""

import copy
from dataclasses import replace
from math import isfinite
from typing import Any

from workbench.config import did_you_mean, require
from workbench.core import Request
from workbench.lengths import NAMED, LengthPredictor, Max


class Expected:
    """A copy of a predictor that begins anew. Raises ValueError from `predict` for what is no number above 0."""

    def __init__(self, name: str, predictor: Any, seed: int) -> None:
        self.name = name
        self._predictor: LengthPredictor = copy.deepcopy(predictor)
        self._is_max = isinstance(predictor, Max)  # the default: a million requests should not pay for it
        self._sees_all = "oracle" in getattr(predictor, "needs", ())
        self._learn = getattr(self._predictor, "learn", None)
        begin = getattr(self._predictor, "begin", None)
        if begin is not None:
            begin(seed)

    def predict(self, request: Request, max_tokens: int) -> float:
        """Expected output tokens, within 1 .. max_tokens; the predictor sees the true length only if it declares that it needs it."""
        if self._is_max:
            return float(max_tokens)
        truth = request.output_tokens if self._sees_all else None
        value = float(self._predictor(replace(request, output_tokens=truth, max_tokens=max_tokens)))
        require(isfinite(value) and value > 0, f"lengths={self.name} must predict a number of tokens above 0 ({request.request_id})", value)
        return min(max(value, 1.0), float(max_tokens))

    def learn(self, request: Request, output_tokens: int) -> None:
        """A request has finished with that many tokens."""
        if self._learn is not None:
            self._learn(replace(request, output_tokens=None), output_tokens)


def length_predictor(lengths: Any, seed: int = 0) -> Expected:
    """The predictor named "oracle", "max" or "history", or one of your own (`workbench.lengths`), for a replay of that seed.

    Raises ValueError for another name, and for what cannot be called.
    """
    rule = "lengths must be 'oracle', 'max', 'history' or a callable (an instance of a predictor)"
    if isinstance(lengths, str):
        require(lengths in NAMED, rule, lengths, did_you_mean(lengths, list(NAMED)))
        return Expected(lengths, NAMED[lengths](), seed)
    is_predictor = callable(lengths) and not isinstance(lengths, type)
    require(is_predictor, rule, lengths)
    name = getattr(lengths, "__name__", None)
    return Expected(name if isinstance(name, str) else repr(lengths), lengths, seed)
