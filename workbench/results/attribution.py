"""Why did it miss? Where the time of each request went, from the saved rows of a replay.

Every moment from a request's arrival to its first or last token has one cause, by what the request was and what the machine did:

| column | the request's seconds |
| --- | --- |
| `admission_s` | waiting: the resident limit, or a policy that did not try to admit it and served others |
| `adapter_s` | waiting for a slot or a place among the batch's adapters; steps' time for copying adapters to the device |
| `kv_blocks_s` | waiting for KV blocks, or left out of a decode for lack of one |
| `behind_prefill_s`, `behind_decode_s` | others' prefills; decodes of others where it decodes not itself |
| `behind_finetune_s`, `behind_evaluate_s`, `behind_backward_s` | fine-tune forward, evaluation and backward in its steps or before them |
| `preempted_s` | from a preemption to the next token: the wait and the recomputation |
| `planning_s` | scheduling decisions, whatever else held then |
| `idle_s` | no step ran: the policy waited, or planned nothing |
| `own_s` | its own prefill tokens, the decodes that it is one of (a batch of them runs as one), and what a step costs anyway |

A step's duration is divided by `step_parts`. In a step with work of its own, a request is behind the parts of the others, and the rest is
its own; in any other step it is behind each kind in proportion to its part. A waiting request has the reason for which prefill refused
it, or else the one for which prefill stopped before it. Refused for lack of tokens or of time (`within_s`), or come in the middle of
a step, it is behind that step's work; not tried at all, behind the step's training, and for the rest of it waiting for admission.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.results.step_parts import PART_COLUMNS, PART_FEATURES, PARTS

CAUSES = (
    "admission",
    "adapter",
    "kv_blocks",
    "behind_prefill",
    "behind_decode",
    "behind_finetune",
    "behind_evaluate",
    "behind_backward",
    "preempted",
    "planning",
    "idle",
    "own",
)
CAUSE_COLUMNS = tuple(f"{name}_s" for name in CAUSES)
_OF_PART = {part: "adapter" if part == "load" else f"behind_{part}" for part in PARTS}
_TRAINING = ("finetune", "evaluate", "backward")
_OF_WHY = {"requests": "admission", "blocks": "kv_blocks", "slots": "adapter", "batch_adapters": "adapter", "adapter_loading": "adapter"}
# What a request is at a moment: behind the step's work, waiting and not refused by itself, or held by one cause alone.
_BEHIND, _UNTRIED = 0, 1
_HELD = {"admission": 2, "adapter": 3, "kv_blocks": 4, "preempted": 5}
_ENDS = ("first token", "last token", "rejected", "aborted", "unfinished")


def attribution(replay: Any, of: Literal["ttft", "e2e"] = "ttft") -> pd.DataFrame:
    """Seconds of each cause of `CAUSES` per arrived request, index request_id.

    `total_s` is the sum: the measured TTFT (`until` "first token") or end-to-end time ("last token"). A request that never came so
    far is followed to its rejection or abortion, or to the end of the replay ("unfinished"). `met` is whether it met its SLO.
    Raises ValueError for a replay whose rows lack what this needs (measured elsewhere, or saved before steps had these columns).
    """
    require(of in ("ttft", "e2e"), "of must be 'ttft' or 'e2e'", of)
    if hasattr(replay, "replicas"):
        # a request waits for the steps of its own replica only
        return pd.concat([attribution(part, of) for part in replay.replicas if len(part.requests)]).loc[replay.requests.index]
    events, steps, work = replay.events, replay.steps, replay.work
    missing = [name for name in ("queue_why", *PART_COLUMNS) if name not in steps]
    require(
        not missing, "an attribution needs steps with the columns queue_why and " + ", ".join(PART_COLUMNS), missing, "Replay it again."
    )
    requests = replay.requests
    facts = _Facts.of(requests.index, events, of, float(steps["end_s"].max()) if len(steps) else 0.0)
    clock = _Clock(steps, float(events["time_s"].min()) if len(events) else 0.0, float(facts.end.max()) if len(facts.end) else 0.0)
    seconds = {name: np.zeros(len(requests)) for name in CAUSES}
    for cause, function in (("planning", clock.planning()), ("idle", clock.idle())):
        seconds[cause] += clock.between(function, facts.arrival, facts.end)
    _add_states(seconds, clock, facts)
    _add_own_work(seconds, clock, facts, work)
    frame = pd.DataFrame({f"{name}_s": values for name, values in seconds.items()}, index=requests.index)
    frame["total_s"] = frame.sum(axis=1)
    frame["until"] = np.asarray(_ENDS, object)[facts.until]
    frame["met"] = requests["met"]
    return frame


def by_policy(comparison: Any, of: Literal["ttft", "e2e"] = "ttft", *, missed: bool = False) -> pd.DataFrame:
    """Mean seconds of each cause per request, one row per policy and seed; `missed=True` counts only requests that missed their SLO.

    `comparison` is a Comparison, or a mapping of (policy, seed) to replays. Requests count if they arrived within the replay's `measure`
    window. `requests` is how many there were; without any, the means are nan.
    """
    replays: Mapping[tuple[str, int], Any] = getattr(comparison, "replays", comparison)
    rows = []
    for (label, seed), replay in replays.items():
        frame = attribution(replay, of)
        low, high = replay.measure or (0.0, np.inf)
        chosen = replay.requests["arrival_s"].between(low, high) & ~(frame["met"] & missed)
        means = frame.loc[chosen, list(CAUSE_COLUMNS)].mean()
        rows.append({"policy": label, "seed": seed, "requests": int(chosen.sum())} | means.to_dict())
    return pd.DataFrame(rows, columns=["policy", "seed", "requests", *CAUSE_COLUMNS])


class _Facts(NamedTuple):
    """What happened to each request [R]: when, and the rows of what changed its state, as codes into the requests' index."""

    index: pd.Index
    arrival: np.ndarray
    end: np.ndarray
    until: np.ndarray  # index into _ENDS
    scheduled: np.ndarray  # nan where never
    refusals: pd.DataFrame  # code, time, why
    preemptions: pd.DataFrame  # code, time, resume

    @classmethod
    def of(cls, index: pd.Index, events: pd.DataFrame, of: str, last_s: float) -> "_Facts":
        code = index.get_indexer(pd.Index(events["owner"].to_numpy(object)))
        kind, time = events["kind"].to_numpy(object), events["time_s"].to_numpy(float)

        def rows(name: str) -> np.ndarray:
            return np.flatnonzero((kind == name) & (code >= 0))

        def first(name: str, pick: Any = np.fmin) -> np.ndarray:
            out, i = np.full(len(index), np.nan), rows(name)
            pick.at(out, code[i], time[i])
            return out

        tokens = rows("token")
        first_token, last_token = first("token"), np.where(np.isfinite(first("finished")), first("token", np.fmax), np.nan)
        candidates = [first_token if of == "ttft" else last_token, first("rejected"), first("aborted")]
        until = np.select([np.isfinite(c) for c in candidates], [0 if of == "ttft" else 1, 2, 3], 4)
        replay_end = max(last_s, float(time.max()) if len(time) else 0.0)
        end = np.select([np.isfinite(c) for c in candidates], candidates, replay_end)
        refused = rows("refused")
        refusals = pd.DataFrame({"code": code[refused], "time": time[refused], "why": events["note"].to_numpy(object)[refused]})
        at = rows("preempted")
        preempted = pd.DataFrame({"code": code[at], "time": time[at]})
        seen = pd.DataFrame({"code": code[tokens], "time": time[tokens], "resume": time[tokens]})
        seen = seen[np.isin(seen["code"], preempted["code"])]
        preempted = pd.merge_asof(preempted, seen, on="time", by="code", direction="forward", allow_exact_matches=False)
        return cls(index, first("arrived"), end, until, first("scheduled"), refusals, preempted.fillna({"resume": np.inf}))

    def in_preemption(self, code: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether each request was preempted at that time [n]; from the preemption on, up to the token that ends it."""
        if not len(self.preemptions):
            return np.zeros(len(code), bool)
        asked = pd.DataFrame({"code": code, "time": time, "row": np.arange(len(code))}).sort_values("time", kind="stable")
        found = pd.merge_asof(asked, self.preemptions, on="time", by="code").sort_values("row")
        return (found["resume"] > found["time"]).to_numpy(bool)


class _Clock:
    """The time axis, cut at every step's start, acceptance and end, and functions on it as cumulative seconds at these knots."""

    def __init__(self, steps: pd.DataFrame, first_s: float, last_s: float) -> None:
        start, end = steps["start_s"].to_numpy(float), steps["end_s"].to_numpy(float)
        self.start, self.end, self.number = start, end, steps["step"].to_numpy()
        self.accepted = np.minimum(start + steps["plan_s"].to_numpy(float), end)
        inner = np.column_stack([start, self.accepted, end]).ravel()
        self.knots = np.concatenate([[min(first_s, *inner[:1])], inner, [max(last_s, *inner[-1:])]])
        self.length = np.diff(self.knots)
        self.executing = end - self.accepted
        self.parts = steps[list(PART_COLUMNS)].to_numpy(float)
        total = self.parts.sum(axis=1)
        # a step that was measured as nothing has no parts, but may have taken time on a wall clock
        amounts = np.where(total[:, None] > 0, self.parts, steps[list(PART_FEATURES)].to_numpy(float) > 0)
        self.shares = amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1e-300)
        self.why = steps["queue_why"].fillna("").to_numpy(object)

    def _cumulative(self, place: int, amount: np.ndarray) -> np.ndarray:
        increments = np.zeros(len(self.length))
        increments[place::3] = amount
        return np.concatenate([[0.0], np.cumsum(increments)])

    def idle(self) -> np.ndarray:
        return self._cumulative(0, self.length[0::3])

    def planning(self) -> np.ndarray:
        return self._cumulative(1, self.length[1::3])

    def between(self, function: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.interp(end, self.knots, function) - np.interp(start, self.knots, function)

    def known_from(self, arrival: np.ndarray) -> np.ndarray:
        """When the first plan that could know of each arrival was begun [R]; inf if none was."""
        return np.append(self.start, np.inf)[np.searchsorted(self.start, arrival, side="left")]

    def functions(self, state: int) -> dict[str, np.ndarray]:
        """Cause -> cumulative seconds of the steps' execution that a request in this state owes to it."""
        amounts: dict[str, np.ndarray] = {}

        def add(cause: str, amount: np.ndarray) -> None:
            amounts[cause] = amounts.get(cause, 0.0) + amount

        for cause, held in _HELD.items():
            if state == held:
                add(cause, self.executing)
        if state in (_BEHIND, _UNTRIED):
            is_untried = (self.why == "") & (state == _UNTRIED)
            left = self.executing.copy()
            if state == _UNTRIED:
                for why, cause in _OF_WHY.items():
                    held_s = np.where(self.why == why, self.executing, 0.0)
                    add(cause, held_s)
                    left -= held_s
            for k, part in enumerate(PARTS):
                behind = left * self.shares[:, k]
                add(_OF_PART[part] if part in _TRAINING else "admission", np.where(is_untried, behind, 0.0))
                add(_OF_PART[part], np.where(is_untried, 0.0, behind))
        return {cause: self._cumulative(2, amount) for cause, amount in amounts.items() if np.any(amount)}


def _add_states(seconds: dict[str, np.ndarray], clock: _Clock, facts: _Facts) -> None:
    """Add what each request owes to causes by its state alone, from change to change of it."""
    num = len(facts.arrival)
    everyone = np.arange(num)
    known = clock.known_from(facts.arrival)
    refused, preempted = facts.refusals, facts.preemptions
    code, time = refused["code"].to_numpy(), refused["time"].to_numpy(float)
    is_resident = facts.scheduled[code] <= time
    none_left = np.where(is_resident, _BEHIND, _UNTRIED)
    states = {why: _HELD[cause] for why, cause in _OF_WHY.items()}
    why_state = np.array([states.get(why, _BEHIND) for why in refused["why"]], int)
    why_state = np.where(refused["why"].to_numpy(object) == "", none_left, why_state)
    keep = ~facts.in_preemption(code, time)
    resumed = preempted[np.isfinite(preempted["resume"])]
    # columns: code, time, state; of rows at one time the last one counts
    tables = [
        (everyone, facts.arrival, np.full(num, _BEHIND)),
        (everyone, known, np.full(num, _UNTRIED)),
        (resumed["code"].to_numpy(), resumed["resume"].to_numpy(float), np.full(len(resumed), _BEHIND)),
        (code[keep], time[keep], why_state[keep]),
        (everyone, facts.scheduled, np.full(num, _BEHIND)),
        (preempted["code"].to_numpy(), preempted["time"].to_numpy(float), np.full(len(preempted), _HELD["preempted"])),
    ]
    code, time, state = (np.concatenate(column) for column in zip(*tables, strict=True))
    rank = np.repeat(np.arange(len(tables)), [len(t[0]) for t in tables])
    real = np.isfinite(time)
    order = np.lexsort((rank[real], time[real], code[real]))
    code, time, state = code[real][order], time[real][order], state[real][order]
    is_last = np.append(code[1:] != code[:-1], True)
    end = facts.end[code]
    stop = np.minimum(np.where(is_last, end, np.append(time[1:], np.inf)), end)
    start = np.minimum(time, end)
    for value in np.unique(state):
        chosen = (state == value) & (stop > start)
        for cause, function in clock.functions(int(value)).items():
            spans = clock.between(function, start[chosen], stop[chosen])
            seconds[cause] += np.bincount(code[chosen], weights=spans, minlength=num)


def _add_own_work(seconds: dict[str, np.ndarray], clock: _Clock, facts: _Facts, work: pd.DataFrame) -> None:
    """In steps with work of its own: take back what `_add_states` put behind others in proportion, add their parts and its own."""
    num = len(facts.arrival)
    kind = work["kind"].to_numpy(object)
    rows = np.flatnonzero((kind == "prefill") | (kind == "decode"))
    step = np.searchsorted(clock.number, work["step"].to_numpy()[rows])
    tokens, is_prefill = work["tokens"].to_numpy(float)[rows], kind[rows] == "prefill"
    prefilled = np.bincount(step[is_prefill], weights=tokens[is_prefill], minlength=len(clock.start))
    code = facts.index.get_indexer(pd.Index(work["owner"].to_numpy(object)[rows]))
    keep = clock.accepted[step] < facts.end[code]
    keep &= ~facts.in_preemption(code, clock.accepted[step])
    code, step, tokens, is_prefill = code[keep], step[keep], tokens[keep], is_prefill[keep]
    change = clock.parts - clock.executing[:, None] * clock.shares
    for k, part in enumerate(PARTS):
        if np.any(change[:, k]):
            seconds[_OF_PART[part]] += np.bincount(code, weights=change[step, k], minlength=num)
    own = (clock.executing - clock.parts.sum(axis=1))[step]
    mine = clock.parts[step, PARTS.index("decode")] * ~is_prefill
    seconds["behind_decode"] -= np.bincount(code, weights=mine, minlength=num)
    own += mine
    mine = np.where(is_prefill, clock.parts[step, PARTS.index("prefill")] * tokens / np.maximum(prefilled[step], 1.0), 0.0)
    seconds["behind_prefill"] -= np.bincount(code, weights=mine, minlength=num)
    seconds["own"] += np.bincount(code, weights=own + mine, minlength=num)
