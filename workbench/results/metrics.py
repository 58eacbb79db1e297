"""Every definition of a number that is reported, once: event rows -> requests, jobs, gaps -> summary.

Times in seconds on the replay clock. Frames are recomputed from saved rows, never from live objects, so a saved replay gives the
same summary as a fresh one. The words are those of the README's table: TTFT, TPOT, ITL, attainment, goodput, committed tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, inf, sqrt
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench.config import SLO, FinetuneJob, did_you_mean, require
from workbench.core import ENDS, Request
from workbench.results.saturation import saturation

ADMISSION_WAIT_S = 6.0  # the released Loquetier's own measure: admitted within 6 s, or dropped
TARGETS = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
# Work in "service units", as in virtual token counters (VTC, OSDI 2024): one per prompt token, two per output token.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0

SLOs = SLO | Mapping[str, SLO] | None


class Interval(NamedTuple):
    """A quantile of a sample with its distribution-free 95 % interval; an end is nan where the sample is too small for one."""

    value: float
    low: float
    high: float


def slo_of(slo: SLOs, slo_class: str = "") -> SLO:
    """The targets of one request class. A mapping's entry `""` stands for the classes that it does not name.

    Raises ValueError for a class without an entry. Without an SLO there are no targets.
    """
    if slo is None:
        return SLO()
    if isinstance(slo, SLO):
        return slo
    if slo_class not in slo and "" not in slo:
        raise ValueError(f"slo must name every request class, got a request of class {slo_class!r}. {did_you_mean(slo_class, list(slo))}")
    return slo[slo_class] if slo_class in slo else slo[""]


def due_s(
    slo: SLO | None, *, arrival_s: float, first_token_s: float | None = None, last_token_s: float | None = None, generated: int = 0
) -> float:
    """When a request's next token is due by its own targets; inf without one.

    The first token: arrival + ttft_s. A later one: last token + itl_s, and first token + generated * tpot_s (the pace that a
    mean gap of tpot_s allows), whichever comes first. Any token: arrival + e2e_s.
    """
    if slo is None:
        return inf
    due = inf if slo.e2e_s is None else arrival_s + slo.e2e_s
    if first_token_s is None:
        return due if slo.ttft_s is None else min(due, arrival_s + slo.ttft_s)
    if slo.itl_s is not None and last_token_s is not None:
        due = min(due, last_token_s + slo.itl_s)
    if slo.tpot_s is not None:
        due = min(due, first_token_s + generated * slo.tpot_s)
    return due


def token_gaps(events: pd.DataFrame) -> pd.DataFrame:
    """One row per gap between two consecutive tokens of a request: request_id, token (index from 1 of the later one), time_s, itl_s."""
    tokens = _of_kind(events, "token")
    owner, time, index = tokens["owner"].to_numpy(), tokens["time_s"].to_numpy(float), tokens["value"].to_numpy(float)
    codes, names = pd.factorize(owner)
    order = np.lexsort((index, time, codes))
    codes, time, index = codes[order], time[order], index[order]
    later = np.flatnonzero(codes[1:] == codes[:-1]) + 1
    return pd.DataFrame(
        {
            "request_id": np.asarray(names, object)[codes[later]],
            "token": index[later].astype(int),
            "time_s": time[later],
            "itl_s": time[later] - time[later - 1],
        }
    )


def request_frame(requests: Iterable[Request] | pd.DataFrame, events: pd.DataFrame, slo: SLOs = None) -> pd.DataFrame:
    """One row per request that arrived, indexed by request_id. Never-arrived requests (an interrupted replay) have no row.

    arrival_s is the `arrived` event's time, so sessions that arrive by think time are right. `output_tokens` counts what was generated.
    cached_tokens counts the prompt tokens that its first prefill found in the prefix cache and skipped (recomputation after a preemption
    may skip tokens too; they do not count).
    queue_s = first scheduled - arrival; ttft_s = first token - arrival; tpot_s = (last - first) / (tokens - 1), nan below two tokens;
    e2e_s = last token - arrival, nan unless finished; itl_p99_s and itl_max_s over the request's own gaps; itl_slo_s is the
    quantile that its SLO bounds: the smallest gap that at least that share of its gaps does not exceed.
    `met_*` is true only for finished requests, and then when the value is within the target, or there is no target, or the value is
    undefined (one token). `met`: all four. `tardiness_s` = max(0, last token - its own `deadline_s`), nan unless finished.
    `priority` and `deadline_s` are the trace's. `met_pace`: token i came by first + i * tpot_s (itl_s without tpot_s); no part of `met`.
    """
    frame = _identity(requests)
    code = pd.Index(frame.index).get_indexer(pd.Index(events["owner"].to_numpy(object)))
    kind, time = events["kind"].to_numpy(), events["time_s"].to_numpy(float)

    def first(name: str) -> np.ndarray:
        out, mask = np.full(len(frame), np.nan), (kind == name) & (code >= 0)
        np.fmin.at(out, code[mask], time[mask])
        return out

    def count(name: str) -> np.ndarray:
        return np.bincount(code[(kind == name) & (code >= 0)], minlength=len(frame))

    frame["arrival_s"] = first("arrived")
    deadline = frame.pop("deadline_s")
    mask = (kind == "token") & (code >= 0)
    seen = _Tokens.of(code[mask], time[mask], events["value"].to_numpy(float)[mask], len(frame))
    frame["output_tokens"] = seen.count
    scheduled = first("scheduled")
    frame["cached_tokens"] = _cached_tokens(events, code, scheduled)
    frame["queue_s"] = scheduled - frame["arrival_s"]
    frame["ttft_s"] = seen.first - frame["arrival_s"]
    with np.errstate(invalid="ignore", divide="ignore"):
        frame["tpot_s"] = np.where(seen.count > 1, (seen.last - seen.first) / (seen.count - 1), np.nan)
    finished, rejected, aborted = (np.isfinite(first(name)) for name in ("finished", "rejected", "aborted"))
    frame["e2e_s"] = np.where(finished, seen.last - frame["arrival_s"], np.nan)
    frame["itl_p99_s"] = seen.gap_quantile(np.full(len(frame), 0.99))
    frame["itl_max_s"] = seen.gap_quantile(np.ones(len(frame)))
    frame["preemptions"] = count("preempted")
    frame["outcome"] = np.select([finished, rejected, aborted], ["finished", "rejected", "aborted"], "unfinished")
    targets = _targets(frame["slo_class"], slo)
    frame["itl_slo_s"] = seen.gap_quantile(targets["itl_quantile"])
    _judge(frame, targets, seen, finished)
    frame["deadline_s"] = deadline
    frame["tardiness_s"] = np.where(finished, np.maximum(0.0, seen.last - deadline.to_numpy(float)), np.nan)
    return frame[np.isfinite(frame["arrival_s"].to_numpy())]


def _cached_tokens(events: pd.DataFrame, code: np.ndarray, scheduled: np.ndarray) -> np.ndarray:
    """Per request, the tokens of the `cached` event that came with its first prefill: at the time when it was first scheduled."""
    out = np.zeros(len(scheduled), int)
    rows = np.flatnonzero((events["kind"].to_numpy() == "cached") & (code >= 0))
    rows = rows[events["time_s"].to_numpy(float)[rows] == scheduled[code[rows]]]
    out[code[rows]] = events["value"].to_numpy(float)[rows]
    return out


def _identity(requests: Iterable[Request] | pd.DataFrame) -> pd.DataFrame:
    """request_id (index), adapter, tenant, slo_class, priority, prompt_tokens, deadline_s of every request."""
    names = {"adapter": object, "tenant": object, "slo_class": object, "priority": int, "prompt_tokens": float, "deadline_s": float}
    absent = {object: "", int: 0, float: np.nan}
    if isinstance(requests, pd.DataFrame):
        frame = requests.set_index("request_id") if "request_id" in requests.columns else requests
        columns: dict[str, np.ndarray] = {
            n: frame[n].to_numpy() if n in frame.columns else np.full(len(frame), absent[kind], kind) for n, kind in names.items()
        }
        columns["deadline_s"] = pd.to_numeric(pd.Series(columns["deadline_s"]), errors="coerce").to_numpy(float)
        index = frame.index.to_numpy(object)
    else:
        rows = list(requests)
        columns = {n: np.array([getattr(r, n) for r in rows], kind) for n, kind in names.items()}
        index = np.array([r.request_id for r in rows], object)
    columns["adapter"] = np.array([a if isinstance(a, str) and a else None for a in columns["adapter"]], object)
    columns["slo_class"] = np.array([c if isinstance(c, str) else "" for c in columns["slo_class"]], object)
    out = pd.DataFrame(columns, index=pd.Index(index, name="request_id", dtype=object))
    if out.index.has_duplicates:
        raise ValueError(f"request_id must be unique, got {out.index[out.index.duplicated()][0]!r} twice")
    return out.astype({"adapter": object, "tenant": object, "slo_class": object})


class _Tokens(NamedTuple):
    """Token times per request: count, first, last [R]; gaps sorted by (request, gap) with each request's offset [R + 1].

    A row (codes, times, `before`: the request's tokens before it [E]) is one arrival of tokens. It is one token, except where a server
    merged several in one piece: then the row's index is the last one's, and there is one gap, since nobody saw the others.
    """

    count: np.ndarray
    first: np.ndarray
    last: np.ndarray
    gaps: np.ndarray
    offsets: np.ndarray
    codes: np.ndarray
    times: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, code: np.ndarray, time: np.ndarray, index: np.ndarray, num: int) -> "_Tokens":
        order = np.lexsort((index, time, code))
        code, time, index = code[order], time[order], index[order]
        rows = np.bincount(code, minlength=num)
        ends = np.cumsum(rows)
        has = rows > 0
        first, last, count = np.full(num, np.nan), np.full(num, np.nan), np.zeros(num, int)
        first[has], last[has], count[has] = time[(ends - rows)[has]], time[ends[has] - 1], index[ends[has] - 1]
        same = code[1:] == code[:-1]
        before = np.zeros(len(code))
        before[1:][same] = index[:-1][same]
        gaps, owner = np.diff(time)[same], code[1:][same]
        gaps = gaps[np.lexsort((gaps, owner))]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num))]).astype(int)
        return cls(count, first, last, gaps, offsets, code, time, before)

    def gap_quantile(self, quantile: np.ndarray) -> np.ndarray:
        """The ceil(q * n)-th smallest of each request's n gaps; nan without gaps."""
        num = np.diff(self.offsets)
        rank = np.clip(np.ceil(quantile * num - 1e-9).astype(int) - 1, 0, None)
        out = np.full(len(num), np.nan)
        out[num > 0] = self.gaps[(self.offsets[:-1] + rank)[num > 0]]
        return out

    def worst_lateness(self, pace_s: np.ndarray) -> np.ndarray:
        """max over a request's tokens i = 0, 1 ... of time_i - (first + i * pace): at most 0 when it never fell behind its pace."""
        late = self.times - self.first[self.codes] - self.before * pace_s[self.codes]
        out = np.full(len(self.count), -inf)
        np.maximum.at(out, self.codes, late)
        return out


def _targets(slo_class: pd.Series, slo: SLOs) -> dict[str, np.ndarray]:
    """Each request's targets as arrays [R]; inf where there is none."""
    codes, classes = pd.factorize(slo_class.to_numpy(object))
    of_class = [slo_of(slo, c) for c in classes]

    def column(name: str) -> np.ndarray:
        values = [getattr(s, name) for s in of_class]
        return np.array([inf if v is None else v for v in values], float)[codes] if values else np.zeros(0)

    return {name: column(name) for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "itl_quantile")}


def _judge(frame: pd.DataFrame, targets: Mapping[str, np.ndarray], seen: _Tokens, finished: np.ndarray) -> None:
    """Add the met_* columns. A gap equal to its target meets it; 1 ns is forgiven to floating-point sums of the clock."""
    met = finished.copy()
    for name in TARGETS:
        values = frame["itl_slo_s" if name == "itl" else f"{name}_s"].to_numpy(float)
        ok = finished & ~(values > targets[f"{name}_s"] + 1e-9)
        frame[f"met_{name}"] = ok
        met &= ok
    frame["met"] = met
    pace = np.where(np.isfinite(targets["tpot_s"]), targets["tpot_s"], targets["itl_s"])
    free = ~np.isfinite(pace)
    frame["met_pace"] = finished & (free | (seen.worst_lateness(np.where(free, 0.0, pace)) <= 1e-9))


def job_frame(jobs: Iterable[FinetuneJob], events: pd.DataFrame) -> pd.DataFrame:
    """One row per fine-tune job, indexed by job_id, whether or not it ever ran.

    committed_tokens: tokens whose backward is complete; forward_tokens: tokens whose forward ran (work in flight included).
    outcome: finished, stopped, paused or unfinished. Losses are means per labelled token: of a micro-batch, and of the held-out set.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("job_id", "adapter", "arrival_s", "started_s", "ended_s", "outcome")}
    numbers = ("committed_tokens", "forward_tokens", "optimizer_steps", "first_loss", "last_loss", "first_eval_loss", "last_eval_loss")
    columns |= {name: [] for name in (*numbers, "version")}
    of_owner = {owner: rows for owner, rows in events.groupby("owner", sort=False)} if len(events) else {}
    for job in jobs:
        rows = of_owner.get(job.id, events.iloc[:0])
        kind, time, value = rows["kind"].to_numpy(), rows["time_s"].to_numpy(float), rows["value"].to_numpy(float)

        def of(name: str, kind: np.ndarray = kind, value: np.ndarray = value) -> np.ndarray:
            return value[kind == name]

        def when(*names: str, kind: np.ndarray = kind, time: np.ndarray = time) -> float:
            at = time[np.isin(kind, names)]
            return float(at[0]) if len(at) else np.nan

        end = [k for k in kind if k in ("job_finished", "job_stopped", "job_paused", "job_resumed")]
        names = {"job_finished": "finished", "job_stopped": "stopped", "job_paused": "paused"}
        losses, evaluations = of("loss"), of("eval_loss")
        row = {
            "job_id": job.id,
            "adapter": job.adapter,
            "arrival_s": when("job_arrived") if "job_arrived" in kind else job.arrival_s,
            "started_s": when("forward", "backward"),
            "ended_s": when("job_finished", "job_stopped"),
            "outcome": names.get(end[-1], "unfinished") if end else "unfinished",
            "committed_tokens": of("committed").sum(),
            "forward_tokens": of("forward").sum(),
            "optimizer_steps": int((kind == "optimizer_step").sum()),
            "first_loss": losses[0] if len(losses) else np.nan,
            "last_loss": losses[-1] if len(losses) else np.nan,
            "first_eval_loss": evaluations[0] if len(evaluations) else np.nan,
            "last_eval_loss": evaluations[-1] if len(evaluations) else np.nan,
            "version": of("published")[-1] if "published" in kind else np.nan,
        }
        for name, value_ in row.items():
            columns[name].append(value_)
    return pd.DataFrame(columns).set_index("job_id")


def quantile_interval(values: Sequence[float] | np.ndarray, quantile: float, confidence: float = CONFIDENCE) -> Interval:
    """The ceil(q * n)-th smallest value, with the order statistics that bracket the true quantile at `confidence`.

    Assumes independent values. Requests of one replay are autocorrelated, so this interval is a lower bound on the doubt; redraws
    over seeds say more.
    """
    from scipy.special import bdtr

    x = np.sort(np.asarray(values, float)[np.isfinite(np.asarray(values, float))])
    n = len(x)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    value = x[max(ceil(quantile * n - 1e-9) - 1, 0)]
    tail = (1 - confidence) / 2
    spread = int(8 * sqrt(n * quantile * (1 - quantile))) + 8
    ranks = np.arange(max(int(n * quantile) - spread, 0), min(int(n * quantile) + spread, n) + 1)  # number of values below the quantile
    below = bdtr(ranks, n, quantile)  # P(at most `rank` of n values lie below the quantile)
    low = ranks[below <= tail]
    high = ranks[below >= 1 - tail]
    return Interval(
        float(value),
        float(x[low[-1]]) if len(low) and low[-1] < n else np.nan,
        float(x[high[0]]) if len(high) and high[0] < n else np.nan,
    )


def jain(values: Sequence[float] | np.ndarray) -> float:
    """Jain's index (sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything; nan for none or all zero."""
    x = np.asarray(values, float)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if len(x) and x.any() else np.nan


def summary(replay: Any, slo: SLOs = None, measure: tuple[float, float] | None = None) -> dict[str, Any]:
    """A replay as one flat row. `slo` and `measure` default to the replay's own; no rerun is needed to change them.

    Requests count if they *arrived* within `measure` = (start_s, end_s), and are followed to their end (drain); tokens and committed
    fine-tune tokens count if they happened within it. Without a window it is the whole replay. Rates divide by the window's length.
    """
    slo = replay.slo if slo is None else slo
    events, steps = replay.events, replay.steps
    start, end = window(replay.measure if measure is None else measure, events, steps)
    requests = request_frame(replay.requests, events, slo)
    requests = requests[requests["arrival_s"].between(start, end)]
    inside = events[events["time_s"].between(start, end)]
    span = end - start
    row: dict[str, Any] = {"requests": len(requests), "measure_start_s": start, "measure_end_s": end}
    row |= _attainment(requests, slo, span)
    row |= _latency(requests, events, start, end)
    row |= _rates(inside, span)
    row["prefix_hit_share"] = prefix_hit_share(requests)
    row |= _fairness(requests)
    row |= _job_numbers(replay, start, end)
    outcomes = requests["outcome"].value_counts()
    row |= {name: int(outcomes.get(name, 0)) for name in (*ENDS, "unfinished")}
    row["preemptions"] = int((inside["kind"] == "preempted").sum())
    row |= adapter_traffic(inside)
    row["optimizer_steps"] = int((inside["kind"] == "optimizer_step").sum())
    parts = getattr(replay, "replicas", None)
    if parts is None:
        row |= machine(steps, getattr(replay.executor, "num_blocks", None), start, end)
    else:
        from workbench.fleet.metrics import machines

        row |= machines(parts, start, end)
    row |= saturation(events, start, end)
    row["interrupted"] = bool(replay.interrupted)
    return row


def window(measure: tuple[float, float] | None, events: pd.DataFrame, steps: pd.DataFrame) -> tuple[float, float]:
    if measure is None:
        ends = [float(frame[name].max()) for frame, name in ((events, "time_s"), (steps, "end_s")) if len(frame)]
        return 0.0, max(ends, default=0.0)
    start, end = measure
    require(0 <= start < end, "measure must be (start_s, end_s) with 0 <= start_s < end_s", measure)
    return float(start), float(end)


def _attainment(requests: pd.DataFrame, slo: SLOs, span_s: float) -> dict[str, Any]:
    """Shares of arrived requests. A target that no class has is nan, so that no column pretends to have been tested."""
    every = list(slo.values()) if isinstance(slo, Mapping) else [slo or SLO()]
    row: dict[str, Any] = {}
    asked = {name: any(getattr(s, f"{name}_s") is not None for s in every) for name in TARGETS}
    row["attainment"] = _mean(requests["met"]) if any(asked.values()) else np.nan
    for name in TARGETS:
        row[f"attainment_{name}"] = _mean(requests[f"met_{name}"]) if asked[name] else np.nan
    row["attainment_pace"] = _mean(requests["met_pace"]) if asked["tpot"] or asked["itl"] else np.nan
    row["attainment_admission_wait"] = _mean((requests["queue_s"] <= ADMISSION_WAIT_S) & (requests["outcome"] != "rejected"))
    row["goodput_per_s"] = float(requests["met"].sum()) / span_s if span_s > 0 else np.nan
    return row


def _latency(requests: pd.DataFrame, events: pd.DataFrame, start: float, end: float) -> dict[str, Any]:
    gaps = token_gaps(events)
    gaps = gaps[gaps["request_id"].isin(requests.index)]
    values = {name: requests[f"{name}_s"].dropna().to_numpy() for name in ("ttft", "tpot", "e2e")} | {"itl": gaps["itl_s"].to_numpy()}
    row: dict[str, Any] = {}
    for name in TARGETS:
        row[f"{name}_n"] = len(values[name])
        for p in PERCENTILES:
            value, low, high = quantile_interval(values[name], p / 100)
            row |= {f"{name}_p{p}_s": value, f"{name}_p{p}_low_s": low, f"{name}_p{p}_high_s": high}
    row["request_itl_p99_s"] = quantile_interval(requests["itl_p99_s"].to_numpy(), 0.99).value
    row["queue_mean_s"] = float(requests["queue_s"].mean())
    return row


def _rates(inside: pd.DataFrame, span_s: float) -> dict[str, float]:
    """Tokens per second of the window. `decode` counts every output token, also the first, which a prefill gives.

    A `token` row is one token; a `merged` row beside it says how many more a server sent in the same piece.
    """
    total = inside.groupby("kind", observed=True)["value"].sum() if len(inside) else {}
    tokens = {
        "decode": float((inside["kind"] == "token").sum() + total.get("merged", 0.0)),
        "prefill": float(total.get("prefill", 0.0)),
        "finetune": float(total.get("committed", 0.0)),
    }
    return {f"{name}_tokens_per_s": value / span_s if span_s > 0 else np.nan for name, value in tokens.items()}


def adapter_traffic(inside: pd.DataFrame) -> dict[str, Any]:
    """Counts and bytes of adapters that were loaded to the device and read from disk, evictions, and hit shares, of some event rows.

    A hit is a request that found its adapter on the device when it was first scheduled: the step that scheduled it did not load it.
    `adapter_host_hit_share`: the share of loads that found the adapter in host memory. nan without requests for adapters, or loads.
    """
    kind, value = inside["kind"].to_numpy(), inside["value"].to_numpy(float)
    loaded, read = kind == "adapter_loaded", kind == "adapter_read"
    scheduled = (kind == "scheduled") & inside["adapter"].notna().to_numpy()
    places = pd.MultiIndex.from_arrays([inside["step"].to_numpy(), inside["adapter"].to_numpy(object)])
    missed = places[scheduled].isin(places[loaded]) if loaded.any() else np.zeros(int(scheduled.sum()), bool)
    return {
        "adapter_loads": int(loaded.sum()),
        "adapter_load_bytes": float(value[loaded].sum()),
        "adapter_reads": int(read.sum()),
        "adapter_read_bytes": float(value[read].sum()),
        "adapter_evictions": int((kind == "adapter_evicted").sum()),
        "adapter_hit_share": float(1 - missed.mean()) if len(missed) else np.nan,
        "adapter_host_hit_share": float(1 - read.sum() / loaded.sum()) if loaded.any() else np.nan,
    }


def prefix_hit_share(requests: pd.DataFrame) -> float:
    """cached_tokens / prompt_tokens, summed over the requests that were admitted (scheduled at least once); nan where none was, or their
    prompts are not known.

    0 without a prefix cache. Each request counts once: what a preempted one finds when it comes back is no hit.
    """
    admitted = requests[requests["queue_s"].notna().to_numpy()]
    prompt_tokens = admitted["prompt_tokens"].sum()
    return float(admitted["cached_tokens"].sum() / prompt_tokens) if prompt_tokens > 0 else np.nan


def _fairness(requests: pd.DataFrame) -> dict[str, float]:
    """Jain's index over adapters (base-only requests are one group).

    By throughput: output tokens. By slowdown: mean over an adapter's requests of service units / e2e_s (0 if not finished), which is
    inverse slowdown up to a constant that the index does not see; it does not mistake unpopular for unfairly served.
    """
    group = requests["adapter"].fillna("").astype(object).to_numpy() if len(requests) else np.zeros(0, object)
    frame = pd.DataFrame({"group": group, "progress": progress(requests), "tokens": requests["output_tokens"].to_numpy(float)})
    by = frame.groupby("group")
    return {"jain_slowdown": jain(by["progress"].mean().to_numpy()), "jain_throughput": jain(by["tokens"].sum().to_numpy())}


def progress(requests: pd.DataFrame) -> np.ndarray:
    """Service units (prompt + 2 x output tokens) per second of e2e_s of each request, 0 if not finished: inverse slowdown to a constant."""
    units = PROMPT_WEIGHT * requests["prompt_tokens"].to_numpy(float) + OUTPUT_WEIGHT * requests["output_tokens"].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(units / requests["e2e_s"].to_numpy(float), nan=0.0, posinf=0.0)


def _job_numbers(replay: Any, start: float, end: float) -> dict[str, Any]:
    """Fine-tune jobs: how many finished, how many with a deadline met it, and Jain's index of what each got.

    What a job got: committed tokens within the window, per second of its presence there and per weight. nan without jobs, or deadlines.
    """
    jobs, frame = getattr(replay, "finetune_jobs", ()), replay.jobs if len(getattr(replay, "finetune_jobs", ())) else None
    row: dict[str, Any] = {"jobs_finished": 0, "job_deadline_share": np.nan, "jain_jobs": np.nan}
    if frame is None:
        return row
    committed = _of_kind(replay.events, "committed")
    tokens = committed[committed["time_s"].between(start, end)].groupby("owner")["value"].sum()
    shares, met = [], []
    for job in jobs:
        seen = frame.loc[job.id]
        ended = seen["ended_s"] if np.isfinite(seen["ended_s"]) else end
        presence = min(ended, end) - max(seen["arrival_s"], start)
        if presence > 0:
            shares.append(float(tokens.get(job.id, 0.0)) / presence / job.weight)
        if job.deadline_s is not None:
            met.append(bool(seen["outcome"] == "finished" and ended <= job.deadline_s))
    row["jobs_finished"] = int((frame["outcome"] == "finished").sum())
    row["job_deadline_share"] = float(np.mean(met)) if met else np.nan
    row["jain_jobs"] = jain(shares)
    return row


def machine(steps: pd.DataFrame, num_blocks: int | None, start: float, end: float) -> dict[str, Any]:
    """Steps that overlap the window: how many, how busy, KV occupancy (mean weighted by duration).

    Occupied blocks are those that a resident request holds; what only the prefix cache keeps can be taken at any time and counts as free.
    """
    steps = steps[(steps["end_s"] > start) & (steps["start_s"] < end)]
    span = end - start
    row: dict[str, Any] = {"steps": len(steps), "busy_share": np.nan, "planning_share": np.nan}
    row |= {"kv_occupancy_mean": np.nan, "kv_occupancy_max": np.nan}
    if not len(steps) or span <= 0:
        return row
    length = steps["end_s"].clip(upper=end).to_numpy(float) - steps["start_s"].clip(lower=start).to_numpy(float)
    row["busy_share"] = float(length.sum() / span)
    row["planning_share"] = float(steps["plan_s"].sum() / span)
    if num_blocks:
        used = 1.0 - steps["free_blocks"].to_numpy(float) / num_blocks
        row["kv_occupancy_max"] = float(used.max())
        row["kv_occupancy_mean"] = float(np.average(used, weights=length)) if length.sum() > 0 else float(used.mean())
    return row


def _of_kind(events: pd.DataFrame, kind: str) -> pd.DataFrame:
    return events[events["kind"].to_numpy() == kind]


def _mean(flags: pd.Series) -> float:
    return float(flags.mean()) if len(flags) else np.nan
