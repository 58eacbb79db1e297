"""What the laws of `conservation` are about, summed up by request and job: part by part while a replay runs, or from all its rows at once.

Of the rows themselves nothing is kept, so that a long replay may forget them.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd

from workbench.core import ENDS
from workbench.results.facts import TOKEN_KINDS, Facts, Rows

CLOCK_S = 1e-6  # sums of a day's floating-point seconds agree far better than this
SEEN = ("token", "prefill", "preempted")
STRAY, ODD, EARLY, SHORT, MISCOUNT = (
    "every row of work must belong to a step",
    "a step's {} tokens must be those of its batch",
    "a step must not begin before the last one ends",
    "a step must last at least plan_s + duration_s",
    "the ledger's count must be arrivals less ends",
)


class Tally:
    """Sums over the rows of a replay's parts, in their order: `add_rows`, then `add_steps` of each.

    By request, as a position in `names` [N]: how often it arrived, ended and was preempted, `begin_s` and `end_s`; when events of a kind
    were `seen` first and last; its tokens and the sum of their numbers; its decode rows and the sum of their positions; its prefilled
    tokens by the batches, by the events, and the lowest and highest of their positions. By job: tokens or layers of each kind of work, and
    (number, sum) of its events. `broken` holds the numbers that first broke a law about single steps.
    """

    def __init__(self, names: pd.Index) -> None:
        num = len(names)
        self.names = names
        self.broken: dict[str, str] = {}
        self.num_arrived, self.num_ended, self.num_preempted = (np.zeros(num, np.int32) for _ in range(3))
        self.has_finished, self.has_strangers = np.zeros(num, bool), False
        self.begin_s, self.end_s = np.full(num, np.nan), np.full(num, np.inf)
        self.seen = {kind: (np.full(num, np.inf), np.full(num, -np.inf)) for kind in SEEN}
        self.num_tokens, self.token_numbers, self.num_rows, self.row_places = (np.zeros(num) for _ in range(4))
        self.prefilled, self.said_prefilled = np.zeros(num), np.zeros(num)
        self.low, self.high = np.full(num, np.inf), np.zeros(num)
        self.job_work: Counter[tuple[str, str]] = Counter()
        self.job_events: dict[tuple[str, str], tuple[int, float]] = {}
        self.last_s = 0.0
        self._step_s = -np.inf
        self._num_before = {"arrived": 0, "ended": 0}
        self._recent: dict[str, np.ndarray] = {"arrived": np.zeros(0), "ended": np.zeros(0)}

    @classmethod
    def of(cls, facts: Facts, names: pd.Index) -> "Tally":
        """Of a whole replay."""
        tally = cls(names)
        tally.add_rows(facts)
        tally.add_steps(facts)
        return tally

    # rows

    def add_rows(self, facts: Facts) -> None:
        """What happened to requests and jobs. Rows of owners that are no requests of the trace are left out and noted."""
        events, tokens = facts.events, facts.tokens
        self.has_strangers |= any((rows.owner < 0).any() for rows in (*events.values(), tokens))
        events = {kind: Rows(*(values[rows.owner >= 0] for values in rows)) for kind, rows in events.items()}
        self.add_moments(events)
        prefill, preempted = events["prefill"], events["preempted"]
        np.add.at(self.num_preempted, preempted.owner, 1)
        np.add.at(self.said_prefilled, prefill.owner, prefill.value)
        owner, count, total, first_s, last_s = (values[tokens.owner >= 0] for values in tokens)
        np.add.at(self.num_tokens, owner, count)
        np.add.at(self.token_numbers, owner, total)
        self._see("token", owner, first_s, last_s)
        self._see("prefill", prefill.owner, prefill.time, prefill.time)
        self._see("preempted", preempted.owner, preempted.time, preempted.time)
        np.add.at(self.num_rows, facts.decodes.owner, facts.decodes.count)
        np.add.at(self.row_places, facts.decodes.owner, facts.decodes.places)
        owner, first, length = facts.prefills
        np.add.at(self.prefilled, owner, length)
        np.minimum.at(self.low, owner, first)
        np.maximum.at(self.high, owner, first + length)
        self.job_work.update(facts.job_work)
        for key, (num, value) in facts.job_events.items():
            before = self.job_events.get(key, (0, 0.0))
            self.job_events[key] = (before[0] + num, before[1] + value)

    def add_moments(self, events: Mapping[str, Rows]) -> None:
        """When requests arrived and ended."""
        ends = [events[kind] for kind in ENDS]
        np.add.at(self.num_arrived, events["arrived"].owner, 1)
        self.begin_s[events["arrived"].owner] = events["arrived"].time
        for rows in ends:
            np.add.at(self.num_ended, rows.owner, 1)
            self.end_s[rows.owner] = rows.time
        self.has_finished[events["finished"].owner] = True
        new = {"arrived": [events["arrived"].time], "ended": [rows.time for rows in ends]}
        self._recent = {what: np.sort(np.concatenate([self._recent[what], *times])) for what, times in new.items()}

    def _see(self, kind: str, owner: np.ndarray, first_s: np.ndarray, last_s: np.ndarray) -> None:
        np.minimum.at(self.seen[kind][0], owner, first_s)
        np.maximum.at(self.seen[kind][1], owner, last_s)

    # steps

    def add_steps(self, facts: Facts) -> None:
        """The steps of the rows that were added last: what is wrong with a single one is noted in `broken`."""
        steps = facts.steps
        if facts.stray is not None:
            self._break(STRAY, f"one of step {facts.stray}")
        for name, done in zip(TOKEN_KINDS, facts.done.T, strict=True):
            said = steps[f"{name}_tokens"]
            for k in np.flatnonzero(np.abs(done - said) > 0.5)[:1]:
                self._break(ODD.format(name), f"{said[k]:.0f} beside {done[k]:.0f} in step {steps['step'][k]}")
        self._add_times(steps)
        self.add_counts(steps)

    def _add_times(self, steps: Mapping[str, np.ndarray]) -> None:
        """Steps come one after another and last what they say: planning and executor; so busy and idle time add up to the span."""
        start, end = steps["start_s"], steps["end_s"]
        if not len(start):
            return
        before = np.concatenate([[self._step_s], end[:-1]])
        for k in np.flatnonzero(start < before - CLOCK_S)[:1]:
            step = int(steps["step"][k])
            self._break(EARLY, f"step {step - 1} to {before[k]:.9f} s, step {step} from {start[k]:.9f} s")
        plan_s, duration_s = steps["plan_s"], steps["duration_s"]
        for k in np.flatnonzero(end - start < plan_s + duration_s - CLOCK_S)[:1]:
            self._break(SHORT, f"{end[k] - start[k]:.9f} s for {plan_s[k]} + {duration_s[k]}")
        self._step_s = float(end[-1])
        self.last_s = max(self.last_s, float(end.max()))

    def add_counts(self, steps: Mapping[str, np.ndarray]) -> None:
        """At the start of every step, `waiting + running` as the ledger counted are the arrivals less the ends until then.

        An event within `CLOCK_S` counts either way. Those that lie before all steps to come are then only counted.
        """
        counted = steps["waiting"] + steps["running"]
        start = np.maximum.accumulate(steps["start_s"])  # that it rises is a law of its own

        def until(what: str, shift: float) -> np.ndarray:
            # events are fewer than steps: from which step on each of them counts
            from_step = start.searchsorted(self._recent[what] - shift, side="left" if shift > 0 else "right")
            return self._num_before[what] + np.bincount(from_step, minlength=len(start) + 1)[:-1].cumsum()

        most = until("arrived", CLOCK_S) - until("ended", -CLOCK_S)
        least = until("arrived", -CLOCK_S) - until("ended", CLOCK_S)
        for k in np.flatnonzero((counted < least) | (counted > most))[:1]:
            self._break(MISCOUNT, f"{counted[k]} beside {least[k]} to {most[k]} at {start[k]:.6f} s")
        for what, times in self._recent.items():
            past = int(np.searchsorted(times, self._step_s - 2 * CLOCK_S))
            self._num_before[what] += past
            self._recent[what] = times[past:].copy()

    def _break(self, law: str, numbers: str) -> None:
        self.broken.setdefault(law, numbers)
