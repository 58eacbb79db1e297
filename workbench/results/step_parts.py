"""How one step's duration is divided among the kinds of work in it: the one place for that rule.

A kind's part is what the step would have been shorter without it: P(work) - P(work without the kind), P being the replay's predictor,
scaled by measured / predicted duration. What no kind adds alone (weights read once, launches) stays undivided: parts sum to at most
the duration. If they sum to more than P(work), as they do where tokens get dearer the more there are, they are scaled down to it.
Without a predictor, or where it sees no difference, the duration is divided by tokens; a backward layer of n tokens counts as
2 n / num_layers of them (a backward as two forwards). A step of one kind other than prefill is all that kind's: nobody's share
depends on more, and it spares the predictions.
"""

from collections.abc import Sequence

import numpy as np

from workbench.core import Predictor
from workbench.features import INDEX, NAMES, Work

PARTS = ("finetune", "evaluate", "prefill", "decode", "backward", "load")
PART_COLUMNS = tuple(f"{name}_s" for name in PARTS)
PART_FEATURES = ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens", "backward_token_layers", "loads")
_PRESENT = tuple(INDEX[name] for name in PART_FEATURES)
_BACKWARD = tuple(INDEX[name] for name in NAMES if name.startswith("backward_") or name == "optimizer_steps")
_LOAD = (INDEX["loads"], INDEX["load_bytes"])
_PREFILL = PARTS.index("prefill")
_PAIRS, _PREFILL_PAIRS, _CONTEXT = INDEX["finetune_pairs"], INDEX["prefill_pairs"], INDEX["decode_context"]
_REQUESTS, _SAMPLES = INDEX["requests"], INDEX["samples"]


def step_parts(
    values: Sequence[float], duration_s: float, predictor: Predictor | None, num_layers: int, read_s: float = 0.0
) -> tuple[float, ...]:
    """Seconds of each of `PARTS` in a step of `duration_s` whose work is `values` (by `features.NAMES`); `read_s` of it are a load's."""
    if read_s:
        parts = list(step_parts(values, max(0.0, duration_s - read_s), predictor, num_layers))
        parts[-1] += min(read_s, duration_s)
        return tuple(parts)
    present = [k for k, index in enumerate(_PRESENT) if values[index] > 0]
    parts = [0.0] * len(PARTS)
    if len(present) == 1 and present[0] != _PREFILL:
        parts[present[0]] = duration_s
    elif present:
        whole = predictor.predict(Work(values)) if predictor is not None else 0.0
        if predictor is not None:
            for k in present:
                parts[k] = max(0.0, whole - predictor.predict(Work(_without(values, k))))
        if not sum(parts) > 0:
            whole, parts = 0.0, [values[index] for index in _PRESENT]
            parts[4] *= 2 / num_layers
            parts[5] = 0.0
        total = sum(parts)
        scale = duration_s / max(whole, total) if total > 0 else 0.0
        parts = [part * scale for part in parts]
    return tuple(parts)


def all_step_parts(
    values: np.ndarray, duration_s: np.ndarray, predictor: Predictor | None, num_layers: int, read_s: np.ndarray
) -> np.ndarray:
    """`step_parts` of many steps [steps, len(PARTS)], given as features [steps, len(NAMES)], durations and read seconds [steps]."""
    present = values[:, _PRESENT] > 0
    parts = np.where(present, duration_s[:, None], 0.0)
    mixed = (present.sum(axis=1) != 1) | present[:, _PREFILL] | (read_s > 0)
    parts[mixed] = 0.0
    for k in np.flatnonzero(mixed & present.any(axis=1)).tolist():
        parts[k] = step_parts(values[k].tolist(), float(duration_s[k]), predictor, num_layers, float(read_s[k]))
    return parts


def _without(values: Sequence[float], part: int) -> list[float]:
    """The step's work without one of `PARTS`. A decode row is one token, one request and one sample; other requests prefill."""
    v = list(values)
    decodes = values[_PRESENT[3]]
    if part in (0, 1):
        tokens = values[_PRESENT[0]] + values[_PRESENT[1]]
        v[_PAIRS] -= values[_PAIRS] * values[_PRESENT[part]] / tokens
        v[_PRESENT[part]] = 0.0
    elif part == _PREFILL:
        v[_PRESENT[2]] = v[_PREFILL_PAIRS] = 0.0
        v[_REQUESTS] = v[_SAMPLES] = decodes
    elif part == 3:
        v[_PRESENT[3]] = v[_CONTEXT] = 0.0
        v[_REQUESTS] -= decodes
        v[_SAMPLES] -= decodes
    else:
        for index in _BACKWARD if part == 4 else _LOAD:
            v[index] = 0.0
    return v
