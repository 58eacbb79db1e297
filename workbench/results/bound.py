"""What no schedule can exceed: attainment and fine-tune throughput bounded by work and capacity alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from typing import Any

import numpy as np

from workbench.config import FinetuneJob, require
from workbench.core import Executor, ExecutorInfo, JobShape, Predictor, Request
from workbench.features import INDEX, Work, causal_pairs
from workbench.fleet import Fleet
from workbench.results.metrics import SLOs, slo_of

TOLERANCE_S = 1e-9  # what metrics forgive, too


@dataclass(frozen=True, kw_only=True)
class UpperBound:
    """No policy gets above these numbers on the same requests, jobs, limits and targets.

    `attainment` is of the requests that arrive within the window, `finetune_tokens_per_s` is without serving anybody.
    """

    requests: int
    attainment: float
    finetune_tokens_per_s: float
    _program: "_Program" = field(repr=False)

    def finetune_at(self, attainment: float) -> float:
        """At most so many committed fine-tune tokens/s beside at least this attainment. Raises ValueError above the bound on it.

        A target that forgives late gaps lets tokens be put off until after the window, and so does this bound: see `sustained_at`.
        """
        self._check(attainment)
        return min(self._program.finetune_at(attainment * self.requests), self.finetune_tokens_per_s)

    def sustained_at(self, attainment: float) -> float:
        """The same for schedules that owe no more work at the end of the window than at its start: of requests that have arrived and will
        meet their targets, and of micro-batches that have begun. So no schedule keeps up more for long.
        """
        self._check(attainment)
        return min(self._program.sustained_at(attainment * self.requests), self.finetune_at(attainment))

    def _check(self, attainment: float) -> None:
        require(0 <= attainment <= self.attainment, f"attainment must lie in [0, {self.attainment:.4g}], its own bound", attainment)


def upper_bound(
    trace: Any,
    *,
    executor: Executor,
    slo: SLOs,
    jobs: Sequence[FinetuneJob] = (),
    measure: tuple[float, float] | None = None,
    points: int = 48,
) -> UpperBound:
    """The relaxation of a replay on `executor` to work and capacity; `measure` as in `replay` (None: up to the last arrival).

    Relaxed: requests may be met in fractions; steps are left out except that each holds at most `max_requests` rows; adapters, slots,
    loads, the arena, prefix sharing (a prompt that could be shared counts one token) and when jobs arrive cost nothing; of the
    intervals, about `points` starts and ends are looked at.

    Why it is a bound: a forward of n packed tokens lasts at least a + b n (`_Forward`: a line below the costs of every size) and the sum
    of what its rows cost beside. So whatever is met by its deadline has put its own seconds, b for each of its tokens and
    a / `max_requests` for each of its rows into the time between arrival and deadline, and for every interval these sums are at most its
    length (its KV blocks times seconds at most the pool times that length). Every schedule therefore is a feasible point of the linear
    program that maximises the requests met, or the tokens trained, under just these inequalities, and the maximum, rounded down to whole
    requests, is no less than what it attains. Without serving, a trained token takes its share of the forward that is best for it.

    It holds for durations that are a non-negative sum of the features, of constants for what is present, of hinges and of costs by
    padded size: `FixedCost`, and a `LatencyModel` without its residuals.
    Raises ValueError without a predictor, for closed sessions (arrivals then depend on the schedule), and for requests whose length the
    text decides.
    """
    require(not isinstance(executor, Fleet), "a bound is of one executor", executor.info.name, "Bound a replica on its share of the trace.")
    require(executor.predictor is not None, "a bound needs an executor with a predictor", executor.info.name, "Fit a LatencyModel first.")
    requests = list(trace.requests if hasattr(trace, "requests") else trace)
    for r in requests:
        require(r.parent_id is None, "a bound needs arrivals that do not depend on the schedule", f"{r.request_id} after {r.parent_id}")
        require(r.output_tokens is not None, "a bound needs output_tokens of every request", r.request_id, "Use with_lengths on the trace.")
    last = max((r.arrival_s for r in requests), default=0.0)
    start, end = measure or (0.0, last)
    rule = "measure must be (start_s, end_s) with 0 <= start_s < end_s"
    require(0 <= start < end, rule, (start, end), "Name the window: without arrivals after 0 s there is none to take.")
    assert executor.predictor is not None
    shapes = executor.begin(jobs, seed=0)
    try:
        forward = _Forward.below(executor.predictor, executor.info, [r for r in requests if start <= r.arrival_s <= end])
        needs = [_need(r, executor, executor.predictor, slo, forward) for r in requests if start <= r.arrival_s <= end]
        alone_s, beside_s, tokens = _training(shapes, executor.predictor, executor.info, forward)
    finally:
        executor.end()
    possible = [n for n in needs if n is not None]
    program = _Program.of(possible, executor.info.num_blocks, (start, end), beside_s, tokens, points)
    met = floor(program.most_met() + 1e-6)
    return UpperBound(
        requests=len(needs),
        attainment=met / len(needs) if needs else float("nan"),
        finetune_tokens_per_s=replace(program, token_s=alone_s).finetune_at(0.0),
        _program=program,
    )


@dataclass(frozen=True)
class _Need:
    """What a request that meets its targets takes: seconds by its first and by its last deadline, and block-seconds by the last."""

    arrival_s: float
    first_due_s: float
    last_due_s: float
    first_s: float
    total_s: float
    block_seconds: float


def _seconds(predictor: Predictor, **features: float) -> float:
    """The part of a step's duration that grows with these features, and with them alone: constants and hinges are left out."""
    scale = 1.0 / (1.0 + sum(features.values()))
    once, twice = (_work(**{name: value * times * scale for name, value in features.items()}) for times in (1, 2))
    return max(0.0, (predictor.predict(twice) - predictor.predict(once)) / scale)


@dataclass(frozen=True)
class _Forward:
    """A line below what forwards cost: one of n packed tokens, n up to `max_batch_tokens`, lasts at least `step_s` + `token_s` * n beside
    what its rows cost by themselves, and none lasts less than `least_s`.
    """

    step_s: float
    token_s: float
    least_s: float

    @classmethod
    def below(cls, predictor: Predictor, info: ExecutorInfo, requests: Sequence[Request]) -> "_Forward":
        """Of all such lines the one by which serving these requests takes most.

        Each kind of row alone shows what a size costs; rows of several kinds in one forward never cost less than the cheapest kind would.
        """
        from scipy.optimize import linprog

        costs = np.full(info.max_batch_tokens, inf)
        for kind in ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens"):
            most = min(info.max_requests, info.max_batch_tokens) if kind == "decode_tokens" else info.max_batch_tokens
            row_s = _seconds(predictor, **{kind: 1})
            found = np.array([predictor.predict(_work(**{kind: n})) - row_s * n for n in range(1, most + 1)])
            costs[:most] = np.minimum(costs[:most], found)
        sizes = np.arange(1, len(costs) + 1)
        rows = sum(max(r.output_tokens or 1, 1) for r in requests) / min(info.max_requests, info.max_batch_tokens)
        tokens = sum(r.prompt_tokens + max((r.output_tokens or 1) - 1, 0) for r in requests)
        # the line that by which serving takes most, in units in which its numbers are about 1; the solver's tolerance is taken off again
        most_s, most = float(costs.max()) or 1.0, sizes[-1]
        highest = linprog(
            [-rows, -tokens / most],
            A_ub=np.column_stack([np.ones(most), sizes / most]),
            b_ub=costs / most_s,
            bounds=(0, None),
            method="highs",
        )
        assert highest.status == 0, highest.message
        token_s = float(min(highest.x[1] * most_s / most, (costs / sizes).min()))
        return cls(max(0.0, float((costs - token_s * sizes).min())), token_s, float(costs.min()))


def _work(**features: float) -> Work:
    work = Work()
    for name, value in features.items():
        work.values[INDEX[name]] = value
    return work


def _need(request: Request, executor: Executor, predictor: Predictor, slo: SLOs, forward: _Forward) -> _Need | None:
    """None when the request misses its targets even alone."""
    try:
        r = executor.admissible(request)
    except ValueError:
        return None
    info, target = executor.info, slo_of(slo, r.slo_class)
    output = min(r.output_tokens or 0, r.max_tokens if r.max_tokens is not None else info.max_model_len - r.prompt_tokens)
    may_share = bool(r.prefix_ids or r.session or r.prompt or r.prompt_token_ids)
    prompt = 1 if may_share else r.prompt_tokens
    decodes = output - 1
    contexts = decodes * prompt + decodes * (decodes + 1) // 2
    first_s = _seconds(predictor, prefill_tokens=prompt, prefill_pairs=prompt * (prompt + 1) // 2, requests=1, samples=1)
    decode_s = _seconds(predictor, decode_tokens=decodes, decode_context=contexts, requests=decodes, samples=decodes) if decodes else 0.0
    steps = ceil(prompt / info.max_batch_tokens)
    shortest_ttft_s = first_s + max(forward.least_s * steps, forward.step_s * steps + forward.token_s * prompt)
    shortest_tpot_s = forward.least_s + decode_s / decodes if decodes else 0.0
    ttft, tpot, itl, e2e = (inf if t is None else t + TOLERANCE_S for t in (target.ttft_s, target.tpot_s, target.itl_s, target.e2e_s))
    if shortest_ttft_s > ttft or shortest_tpot_s > tpot or shortest_ttft_s + decodes * shortest_tpot_s > e2e:
        return None
    # a quantile that leaves no gap out bounds every gap, and the smallest possible one is a step with one decode
    if ceil(target.itl_quantile * decodes - 1e-9) < decodes:
        itl = inf
    if decodes and forward.least_s + _seconds(predictor, decode_tokens=1, decode_context=prompt + 1, requests=1, samples=1) > itl:
        return None
    pace = min(tpot, itl)
    first_due = r.arrival_s + ttft
    last_due = min(r.arrival_s + e2e, first_due + decodes * pace if decodes else first_due)
    share_s = forward.step_s / min(info.max_requests, info.max_batch_tokens)
    blocks = 0 if may_share else -(-prompt // info.block_tokens)
    return _Need(
        arrival_s=r.arrival_s,
        first_due_s=min(first_due, last_due),
        last_due_s=last_due,
        first_s=first_s + forward.token_s * prompt + share_s,
        total_s=first_s + decode_s + forward.token_s * (prompt + decodes) + share_s * output,
        block_seconds=blocks * (first_s + decode_s + forward.least_s * output),
    )


def _training(shapes: Mapping[str, JobShape], predictor: Predictor, info: ExecutorInfo, forward: _Forward) -> tuple[float, float, int]:
    """The fewest seconds that one committed token takes without serving and beside it, and how many tokens there are."""
    batches = [s.micro_batch(i).documents for s in shapes.values() for i in range(s.first_micro_batch, s.num_micro_batches)]
    if not batches:
        return 0.0, 0.0, 0
    # without serving, all packed tokens of a step are at least these, and n tokens cost at least n times what one costs where tokens are
    # cheapest; beside it the line below all forwards counts, which serving counts by, too
    alone_s = min(_beyond_s(predictor, 0.0, finetune_tokens=n) / n for n in range(1, info.max_batch_tokens + 1))
    beside_s = _seconds(predictor, finetune_tokens=1) + forward.token_s
    are_alike = len({sum(documents) for documents in batches}) == 1
    cheapest, layers = inf, info.num_layers
    # several jobs' layers in one step may be padded together: no token of a layer costs less than where it is cheapest
    most = max(map(sum, batches))
    token_layers_s = min(_beyond_s(predictor, 1e-9, backward_token_layers=n, backward_layers=1) / n for n in range(1, most + 1))
    for documents in set(batches):
        tokens = sum(documents)
        pairs = causal_pairs(documents, 0, tokens)
        seconds = _seconds(predictor, finetune_pairs=pairs) + _seconds(predictor, backward_pair_layers=pairs * layers)
        seconds += _seconds(predictor, backward_starts=1)
        if are_alike:  # each layer of each backward has as many tokens: what it costs adds up, however layers share steps
            seconds += _beyond_s(predictor, 1e-9, backward_token_layers=tokens * layers, backward_layers=layers)
        else:
            seconds += tokens * layers * token_layers_s
        cheapest = min(cheapest, seconds / tokens)
    return alone_s + cheapest, beside_s + cheapest, sum(map(sum, batches))


def _beyond_s(predictor: Predictor, least: float, **features: float) -> float:
    """What a step with these features takes longer than with the share `least` of them: above 0, constants for what is there drop out."""
    little = _work(**{name: least * value for name, value in features.items()})
    return max(0.0, predictor.predict(_work(**features)) - predictor.predict(little))


@dataclass(frozen=True)
class _Program:
    """maximise over x in [0, 1]^n, and trained tokens: rows [m, n] @ x <= lengths [m], and the window's seconds."""

    rows: np.ndarray
    lengths: np.ndarray
    inside_s: np.ndarray
    total_s: np.ndarray
    window: tuple[float, float]
    token_s: float
    tokens: int

    @classmethod
    def of(cls, needs: list[_Need], num_blocks: int, window: tuple[float, float], token_s: float, tokens: int, points: int) -> "_Program":
        columns = np.array([[n.arrival_s, n.first_due_s, n.last_due_s, n.first_s, n.total_s, n.block_seconds] for n in needs]).reshape(
            -1, 6
        )
        arrival, first_due, last_due, first_s, total_s, block_seconds = columns.T
        starts = _some(arrival, points)
        ends = _some(np.concatenate([first_due, last_due]), points)
        rows, lengths = [], []
        for a in starts:
            for b in ends[ends > a]:
                inside = arrival >= a
                seconds = np.where(inside & (last_due <= b), total_s, np.where(inside & (first_due <= b), first_s, 0.0))
                rows += [seconds, np.where(inside & (last_due <= b), block_seconds, 0.0)]
                lengths += [b - a, num_blocks * (b - a)]
        end = window[1]
        inside_s = np.where(last_due <= end, total_s, np.where(first_due <= end, first_s, 0.0))
        return cls(np.array(rows).reshape(len(rows), len(needs)), np.array(lengths), inside_s, total_s, window, token_s, tokens)

    def most_met(self) -> float:
        """The largest sum of x."""
        num = len(self.inside_s)
        if num == 0 or not len(self.rows):
            return float(num)
        return -self._solve(np.append(-np.ones(num), 0.0), self.rows, self.lengths)

    def finetune_at(self, met: float) -> float:
        """The most trained tokens per second of the window beside at least `met` requests."""
        if self.tokens == 0:
            return 0.0
        num, (start, end) = len(self.inside_s), self.window
        if self.token_s == 0:
            return self.tokens / (end - start)
        # tokens in units of the most that the window holds, so that every coefficient is about 1
        most = min(float(self.tokens), end / self.token_s)
        window = np.append(self.inside_s, most * self.token_s)[None]
        rows = np.vstack([np.hstack([self.rows, np.zeros((len(self.rows), 1))]), window, np.append(-np.ones(num), 0.0)[None]])
        bounds = np.concatenate([self.lengths, [end + TOLERANCE_S, -met + 1e-6]])
        return -self._solve(np.append(np.zeros(num), -1.0), rows, bounds) * most / (end - start)

    def sustained_at(self, met: float) -> float:
        """The most trained tokens per second of the window beside the whole work of the `met` requests that take least."""
        length = self.window[1] - self.window[0]
        if self.tokens == 0 or self.token_s == 0:
            return self.tokens / length
        work_s = np.append(0.0, np.cumsum(np.sort(self.total_s)))
        left_s = length + TOLERANCE_S - np.interp(met - 1e-6, np.arange(len(work_s)), work_s)
        return min(max(0.0, left_s) / self.token_s, self.tokens) / length

    def _solve(self, objective: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> float:
        from scipy.optimize import linprog

        padded = rows if rows.shape[1] == len(objective) else np.hstack([rows, np.zeros((len(rows), 1))])
        found = linprog(objective, A_ub=padded, b_ub=lengths, bounds=(0, 1), method="highs")
        assert found.status == 0, found.message
        return float(found.fun)


def _some(values: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` of the finite values, evenly over their order; any choice of intervals gives a bound."""
    finite = np.unique(values[np.isfinite(values)])
    if len(finite) <= most:
        return finite
    return finite[np.linspace(0, len(finite) - 1, most).round().astype(int)]
