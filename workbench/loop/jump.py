"""Steps in a row in which the same requests decode and nothing else happens, made at one go: what `plan.repeat()` asks for, in O(1) a step.

The steps are those that the serving loop would make one by one, bit for bit. Their number is bounded by the first request that ends, by
the next event of the clock, by the first block that is lacking and by what the policy asked for; the last step may hold an event.
An executor takes part if it has `preview` and `skip` (`latency.LatencyModel`): it promises to report nothing but durations of such
steps, to have no commands and to change no adapter in them.
"""

from bisect import bisect_left
from collections.abc import Generator
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import simpy

from workbench.core import Batch
from workbench.features import INDEX, Work
from workbench.loop.checks import check_duration
from workbench.loop.commit import end_together, log_refused

if TYPE_CHECKING:
    from workbench.loop.clock import Clock
    from workbench.loop.ledger import Ledger
    from workbench.loop.plan import Plan

FIRST_AT_ONCE, MOST_AT_ONCE = 24, 1536
"""So many durations are drawn ahead: at first, then four times as many each time, up to the most."""

NO_ROWS = Batch(step=0)
_CONTEXT = INDEX["decode_context"]


class Run(NamedTuple):
    """Steps of a jump: each one's end, duration, predicted duration, and free blocks at its start."""

    ends: list[float]
    durations: list[float]
    predicted: list[float]
    free_blocks: list[int]


def is_alone(plan: "Plan") -> bool:
    """Whether a plan decodes all running requests and changes nothing else."""
    others = plan.prefills or plan.finetunes or plan.evaluates or plan.backwards or plan.loads
    return plan.decodes_all and not (others or plan.preempted or plan.rejected or plan.evicted or plan.held)


def jump(
    ledger: "Ledger", executor: Any, clock: "Clock", plan: "Plan", plan_s: float, most: int | None, horizon_s: float
) -> Generator[simpy.Event, Any, int]:
    """Run the plan, and the same again until something happens or `most` steps are made; gives their number, at least 1.

    `horizon_s` is the time of the next event that could reach the ledger: the step that it falls into is the last one. Planning counts for
    the first step.
    """
    group, history, start_s = ledger.decoding, ledger.history, float(clock.now)
    counts = (len(ledger.requests) - len(ledger.running), len(ledger.running))
    if plan.refused or ledger.refused:
        log_refused(ledger, plan, start_s + plan_s)
    released = tuple(ledger.released)
    ledger.released.clear()
    run = _grow(ledger, executor, plan, start_s, plan_s, inf if most is None else most, horizon_s)
    ends, step, num = run.ends, ledger.step, len(run.ends)
    history.add_run(step, start_s, plan_s, *run, counts=counts, features=plan.work.values, queue_why=plan.queue_why, released=released)
    end_s, before = ends[-1], 0
    if not clock.is_free(end_s):
        # what arrives in the last step belongs to it, and comes before its tokens
        if num > 1:
            history.decoded(step, ends[:-1])
            group.advance(num - 1, ends[-2])
            ledger.step += num - 1
            before = num - 1
            if not clock.is_free(ends[-2]):
                yield clock.at(ends[-2])
        yield clock.at(end_s)
    history.decoded(step + before, ends[before:])
    ledger.step = step + num - 1
    ended = group.advance(num - before, end_s)
    if ended:
        end_together(ledger, ended, end_s)
        if not ledger.num_resident:
            ledger.slots.unprotect()
    last_s = start_s if num == 1 else ends[-2]
    ledger.last = (NO_ROWS, run.durations[-1], last_s, run.predicted[-1], plan_s if num == 1 else 0.0)
    ledger.last_plan = plan
    ledger.step += 1
    return num


def _grow(ledger: "Ledger", executor: Any, plan: "Plan", start_s: float, plan_s: float, most: float, horizon_s: float) -> Run:
    """How the steps go, and the blocks that they need, taken in their order."""
    group, num_free = ledger.decoding, ledger.blocks.num_free
    most = min(most, group.steps_to_end)
    run = Run([], [], [], [])
    work, now_s, delay_s, at_once = Work(plan.work.values), start_s, plan_s, FIRST_AT_ONCE
    while len(run.ends) < most:
        made = len(run.ends)
        work.values[_CONTEXT] = group.context + made * group.num
        predicted, drawn = executor.preview(work, min(most - made, at_once))
        at_once = min(4 * at_once, MOST_AT_ONCE)
        ends = list(accumulate([delay_s + drawn[0], *drawn[1:]], initial=now_s))[1:]
        num = min(bisect_left(ends, horizon_s) + 1, len(ends))
        free_blocks = _take_blocks(ledger, group.count + made, num, num_free)
        num = len(free_blocks)
        executor.skip(num)
        if num:
            now_s, delay_s = ends[num - 1], 0.0
            num_free = ledger.blocks.num_free
            run.ends.extend(ends[:num])
            run.durations.extend(drawn[:num])
            run.predicted.extend(predicted[:num])
            run.free_blocks.extend(free_blocks)
        if num < len(ends) or now_s >= horizon_s:
            break
    if not (min(run.durations) >= 0 and now_s < inf):
        check_duration(min(run.durations))
        check_duration(max(run.durations))
    return run


def _take_blocks(ledger: "Ledger", first: int, num: int, num_free: int) -> list[int]:
    """Let the group grow in `num` steps from its count `first` on, or in fewer if blocks are lacking: the free ones before each step."""
    growing, block_tokens = ledger.decoding.growing, ledger.decoding.block_tokens
    out = []
    for count in range(first, first + num):
        needed = growing[count % block_tokens]
        if needed:
            if len(needed) > num_free:
                break
            ledger.grow(needed)
            out.append(num_free)
            num_free -= len(needed)
        else:
            out.append(num_free)
    return out
