"""Steps in a row in which the same requests decode and nothing else happens, made at one go: what `plan.repeat()` asks for, in O(1) a step.

The steps are those that the serving loop would make one by one, bit for bit. Their number is bounded by the first request that ends, by
the next event of the clock, by the first block that is lacking and by what the policy asked for; the last step may hold an event.
An executor takes part if it has `preview` and `skip` (`latency.LatencyModel`): it promises to report nothing but durations of such
steps, to have no commands and to change no adapter in them.
"""

from array import array
from bisect import bisect_left
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from workbench.core import Batch
from workbench.loop.checks import check_duration
from workbench.loop.commit import end_together, log_refused

if TYPE_CHECKING:
    from workbench.loop.clock import Clock
    from workbench.loop.ledger import Ledger
    from workbench.loop.plan import Plan

FIRST_AT_ONCE, MOST_AT_ONCE = 24, 1536
"""So many durations are drawn ahead where it is not known how many will do: at first, then four times as many each time; and at most."""

NO_ROWS = Batch(step=0)


def is_alone(plan: "Plan") -> bool:
    """Whether a plan decodes all running requests and changes nothing else."""
    others = plan.prefills or plan.finetunes or plan.evaluates or plan.backwards or plan.loads
    return plan.decodes_all and not (others or plan.preempted or plan.rejected or plan.evicted or plan.held)


class Run:
    """The steps of a plan and of its repetitions, looked at ahead and then made: their tokens counted, their rows written.

    `ends`, `durations` and `predicted` are of every step that could be made: before `horizon_s`, the time of the next event that is known
    to reach the ledger, or with that event in the last of them; at most `most`. Where something comes before, `cut` leaves out those
    after it. Until then nothing is taken and nothing drawn. Planning counts for the first step.

    The serving loop waits at the end of the last step for `event`, then calls `finish`; what comes from outside before has to `cut` first.
    """

    __slots__ = (
        "counts",
        "durations",
        "ends",
        "event",
        "executor",
        "is_fixed",
        "ledger",
        "made",
        "num",
        "plan",
        "plan_s",
        "predicted",
        "released",
        "start_s",
        "step",
    )

    def __init__(self, ledger: "Ledger", executor: Any, plan: "Plan", start_s: float, plan_s: float, most: float, horizon_s: float) -> None:
        self.ledger, self.executor, self.plan, self.start_s, self.plan_s = ledger, executor, plan, start_s, plan_s
        self.step = ledger.step
        self.counts = (len(ledger.requests) - len(ledger.running), len(ledger.running))
        if plan.refused or ledger.refused:
            log_refused(ledger, plan, start_s + plan_s)
        self.released = tuple(ledger.released)
        ledger.released.clear()
        self.ends, self.durations, self.predicted = array("d"), array("d"), array("d")
        self._look_ahead(most, horizon_s)
        self.num, self.made = len(self.ends), 0
        self.is_fixed = False
        self.event: simpy.Event | None = None

    def _look_ahead(self, most: float, horizon_s: float) -> None:
        """How the steps go."""
        ledger, work, ends, durations = self.ledger, self.plan.work, self.ends, self.durations
        most = min(most, ledger.decoding.steps_to_end, ledger.decoding.steps_to_block(ledger.blocks.num_free))
        now_s, delay_s, at_once = self.start_s, self.plan_s, MOST_AT_ONCE
        if horizon_s < inf:
            step_s = ledger.jump_step_s
            at_once = min(max(int((horizon_s - now_s) / step_s * 1.2) + 2, 2), MOST_AT_ONCE) if step_s > 0 else FIRST_AT_ONCE
        while len(ends) < most:
            predicted, drawn = self.executor.preview(work, int(min(most - len(ends), at_once)), len(ends))
            at_once = min(max(4 * at_once, FIRST_AT_ONCE), MOST_AT_ONCE)
            first_s = now_s + (delay_s + drawn[0])
            if isinstance(drawn, np.ndarray):
                ahead: Any = drawn.copy()
                ahead[0] = first_s
                np.add.accumulate(ahead, out=ahead)
                least_s = np.minimum.reduce(drawn)
            else:
                ahead = list(accumulate(drawn[1:], initial=first_s))
                least_s = min(drawn)
            now_s, delay_s = float(ahead[-1]), 0.0
            if not (least_s >= 0 and now_s < inf):
                for duration_s in drawn:
                    check_duration(duration_s)
            if now_s >= horizon_s:
                num = bisect_left(ahead, horizon_s) + 1
                predicted, drawn, ahead = predicted[:num], drawn[:num], ahead[:num]
                most = 0
            for column, values in ((self.predicted, predicted), (durations, drawn), (ends, ahead)):
                column.frombytes(values.tobytes()) if isinstance(values, np.ndarray) else column.fromlist(values)

    @property
    def end_s(self) -> float:
        """When its last step ends."""
        return self.ends[self.num - 1]

    def cut(self, now_s: float, clock: "Clock") -> None:
        """Something comes from outside: the step that it falls into becomes the last one, and those before it are made."""
        if not self.is_fixed:
            last = bisect_left(self.ends, now_s)
            if last + 1 < self.num and self.event is not None:
                # whoever waits for the end waits for another one
                event = clock.at(self.ends[last])
                event.callbacks, self.event.callbacks = self.event.callbacks, event.callbacks
                self.event = event
            self._fix(last + 1)
            if last:
                self._make(last)
                self.ledger.now_s = self.ends[last - 1]

    def stop(self, now_s: float) -> None:
        """The replay is stopped: only the steps that have ended are made."""
        if self.is_fixed:
            self.ledger.history.drop_steps(self.num - self.made)
        else:
            num = bisect_left(self.ends, now_s)
            if num:
                self._fix(num)
                self._make(num)

    def finish(self) -> None:
        """Make all the steps that are left; the clock stands at the end of the last one."""
        ledger, num = self.ledger, self.num
        if not self.is_fixed:
            self._fix(num)
        end_s = self.ends[num - 1]
        ended = self._make(num)
        ledger.step = self.step + num - 1
        if ended:
            end_together(ledger, ended, end_s)
            if not ledger.num_resident:
                ledger.slots.unprotect()
        ledger.jump_step_s = self.durations[num - 1]
        ledger.step += 1

    def _fix(self, num: int) -> None:
        """Its first `num` steps will be made: take the blocks that they need, in the order of the steps, and write their rows."""
        self.num, self.is_fixed = num, True
        ledger = self.ledger
        if num < len(self.ends):
            del self.ends[num:], self.durations[num:], self.predicted[num:]
        plan = self.plan
        growing, free_blocks = ledger.decoding.grow_ahead(num, ledger.blocks.num_free)
        if growing:
            ledger.grow(growing)
        self.executor.skip(num)
        ledger.history.add_run(
            self.step,
            self.start_s,
            self.plan_s,
            self.ends,
            self.durations,
            self.predicted,
            free_blocks,
            counts=self.counts,
            features=plan.work.values,
            queue_why=plan.queue_why,
            released=self.released,
        )

    def _make(self, upto: int) -> "list[Any]":
        """Count the tokens of the steps before `upto` that are not made yet; the requests that have reached their limit with them."""
        made, ledger = self.made, self.ledger
        if upto == made:
            return []
        ends = self.ends[made:upto] if made or upto < len(self.ends) else self.ends
        ledger.history.decoded(self.step + made, ends)
        self.made, last = upto, upto - 1
        ledger.step = self.step + upto
        start_s = self.ends[last - 1] if last else self.start_s
        ledger.last = (NO_ROWS, self.durations[last], start_s, self.predicted[last], 0.0 if last else self.plan_s)
        ledger.last_plan = self.plan
        return ledger.decoding.advance(upto - made, ends[-1])
