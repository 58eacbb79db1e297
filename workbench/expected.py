"""What the scheduler believes about output lengths: `RequestView.expected_output`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workbench.config import require
from workbench.core import Request
from workbench.states import RequestState


class LengthPredictor:
    """Expected output tokens of a request when it arrives; `learn` sees every request that ends."""

    def __init__(self, name: str, predict: Callable[[Request, int], float]) -> None:
        self.name = name
        self.predict = predict

    def learn(self, state: RequestState) -> None:
        """Take note of an ended request; only "history" does."""


class HistoryPredictor(LengthPredictor):
    """The mean output of finished requests of the same adapter, else of all, else max_tokens; never above max_tokens."""

    def __init__(self) -> None:
        super().__init__("history", self._mean)
        self._totals: dict[str | None, tuple[int, int]] = {}
        self._all = (0, 0)

    def learn(self, state: RequestState) -> None:
        if state.phase == "finished":
            total, num = self._totals.get(state.adapter, (0, 0))
            self._totals[state.adapter] = (total + state.generated, num + 1)
            self._all = (self._all[0] + state.generated, self._all[1] + 1)

    def _mean(self, request: Request, max_tokens: int) -> float:
        total, num = self._totals.get(request.adapter, self._all)
        return min(total / num, float(max_tokens)) if num else float(max_tokens)


def length_predictor(lengths: Any) -> LengthPredictor:
    """The predictor named "oracle" (the trace's own length), "max" (max_tokens) or "history", or a callable on the request.

    A callable sees the request without its true output length.
    """
    if lengths == "history":
        return HistoryPredictor()
    if lengths == "max":
        return LengthPredictor("max", lambda _, max_tokens: float(max_tokens))
    if lengths == "oracle":
        return LengthPredictor("oracle", lambda r, most: float(most if r.output_tokens is None else min(r.output_tokens, most)))
    require(callable(lengths), "lengths must be 'oracle', 'max', 'history' or a callable", lengths)
    return LengthPredictor(getattr(lengths, "__name__", repr(lengths)), lambda r, _: float(lengths(replace(r, output_tokens=None))))
