"""Synthetic arrivals: constant, Poisson, gamma (bursty), piecewise rates, ServeGen's production clients, and fine-tune jobs.

All but `servegen` draw arrivals only; lengths come from `.with_lengths(source, seed=)`.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (pandas types a column as a union of everything that a frame can give)

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd

from workbench.config import FinetuneJob, require
from workbench.seeds import generator
from workbench.traces.io import shipped
from workbench.traces.trace import Trace

E6_PHASES = ((120.0, 1.0), (180.0, 2.5), (300.0, 2.0), (420.0, 1.0))  # (end in s, requests/s): the paper's changing load, 630 requests
SERVEGEN = ("m-large", "deepseek-r1")
WINDOW_S = 600.0  # ServeGen fits each client's arrivals per window of ten minutes


def _trace(times: np.ndarray, name: str, duration_s: float, *notes: str, redrawn: bool = True) -> Trace:
    frame = pd.DataFrame({"request_id": [str(i) for i in range(len(times))], "arrival_s": times})
    trace = Trace.from_frame(frame, name=name, duration_s=duration_s)
    return trace.derived(trace._frame, "arrivals" if redrawn else None, *notes)


def _check(rate: float, duration_s: float) -> None:
    require(math.isfinite(rate) and rate > 0, "rate must be above 0 requests per second", rate)
    require(math.isfinite(duration_s) and duration_s > 0, "duration_s must be above 0", duration_s)


def renewal(rng: np.random.Generator, shape: float, scale: float, duration_s: float) -> np.ndarray:
    """Arrivals in (0, duration_s) with independent gamma gaps."""
    expected = duration_s / (shape * scale)
    chunk = int(expected + 4 * math.sqrt(expected / shape) + 16)
    times = np.cumsum(rng.gamma(shape, scale, chunk))
    while times[-1] < duration_s:
        times = np.concatenate([times, times[-1] + np.cumsum(rng.gamma(shape, scale, chunk))])
    return times[times < duration_s]


def constant(*, rate: float, duration_s: float) -> Trace:
    """Arrivals 1 / rate apart from time 0 on: `rate=1, duration_s=800` is the paper's E1."""
    _check(rate, duration_s)
    times = np.arange(math.ceil(rate * duration_s - 1e-9)) / rate
    return _trace(times, "constant", duration_s, f"constant {rate:g}/s", redrawn=False)


def poisson(*, rate: float, duration_s: float, seed: int) -> Trace:
    """Poisson arrivals (independent exponential gaps)."""
    _check(rate, duration_s)
    return _trace(renewal(generator("poisson", seed), 1.0, 1 / rate, duration_s), "poisson", duration_s, f"Poisson {rate:g}/s")


def gamma(*, rate: float, cv: float, duration_s: float, seed: int) -> Trace:
    """Gamma gaps with coefficient of variation `cv`: 1 is Poisson, above 1 bursty, below 1 smoother."""
    _check(rate, duration_s)
    require(0.01 <= cv <= 100, "cv must lie in 0.01..100", cv)
    times = renewal(generator("gamma", seed), 1 / cv**2, cv**2 / rate, duration_s)
    return _trace(times, "gamma", duration_s, f"gamma {rate:g}/s, CV {cv:g}")


def piecewise(
    phases: Sequence[tuple[float, float]], *, arrivals: Literal["constant", "poisson"] = "poisson", seed: int | None = None
) -> Trace:
    """A rate that changes: `phases` are (end in s, requests per second), in order; a rate of 0 is a pause.

    `piecewise(E6_PHASES, arrivals="constant")` is the load of the paper's E6. Poisson arrivals need a seed.
    """
    ends = [0.0, *(float(end) for end, _ in phases)]
    rates = [float(rate) for _, rate in phases]
    require(len(rates) > 0 and bool(np.all(np.diff(ends) > 0)), "phases must have increasing ends above 0", tuple(phases))
    require(all(math.isfinite(r) and r >= 0 for r in rates), "rates must be at least 0 requests per second", rates)
    require(arrivals in ("constant", "poisson"), 'arrivals must be "constant" or "poisson"', arrivals)
    if arrivals == "poisson" and seed is None:
        raise ValueError('arrivals="poisson" draws at random and needs a seed, got None. Pass seed=0, or arrivals="constant".')
    parts = [np.empty(0)]
    for i, rate in enumerate(rates):
        start, length = ends[i], ends[i + 1] - ends[i]
        if rate == 0:
            continue
        if arrivals == "constant":
            parts.append(start + np.arange(math.ceil(rate * length - 1e-9)) / rate)
        else:
            assert seed is not None
            parts.append(start + renewal(generator("piecewise", seed, i), 1.0, 1 / rate, length))
    shape = ", ".join(f"{rate:g}/s to {end:g} s" for end, rate in phases)
    return _trace(np.concatenate(parts), "piecewise", ends[-1], f"{arrivals} arrivals, {shape}", redrawn=arrivals == "poisson")


def jobs_at(template: FinetuneJob, arrivals_s: Iterable[float]) -> tuple[FinetuneJob, ...]:
    """One job like `template` per arrival time, in order, each with an adapter (`NAME-0`, `NAME-1`, ...) and a seed of its own.

    A deadline is kept as a span from the job's arrival. Raises ValueError for a template with a `job_id`, and for negative times.
    """
    require(template.job_id is None, "jobs need ids of their own: the template must have no job_id", template.job_id, "Leave it out.")
    times = sorted(float(t) for t in arrivals_s)
    require(not times or (times[0] >= 0 and math.isfinite(times[-1])), "arrivals must be at least 0 seconds and finite", times[:1])
    span = None if template.deadline_s is None else template.deadline_s - template.arrival_s
    return tuple(
        replace(
            template,
            adapter=f"{template.adapter}-{i}",
            arrival_s=t,
            deadline_s=None if span is None else t + span,
            seed=template.seed + i,
        )
        for i, t in enumerate(times)
    )


def jobs_poisson(template: FinetuneJob, *, rate_per_h: float, duration_s: float, seed: int) -> tuple[FinetuneJob, ...]:
    """Fine-tune jobs as a trace: Poisson arrivals at `rate_per_h` jobs an hour, each a copy of `template` by `jobs_at`.

    `jobs_at(template, traces.job_arrivals().arrival_s[:20] - start)` takes recorded ones instead.
    """
    _check(rate_per_h, duration_s)
    return jobs_at(template, renewal(generator("jobs", seed), 1.0, 3600 / rate_per_h, duration_s))


def servegen(
    dataset: Literal["m-large", "deepseek-r1"],
    *,
    seed: int,
    clients: int | Sequence[int] | None = None,
    start_s: float = 0.0,
    duration_s: float = 3600.0,
) -> Trace:
    """Requests of production clients, from ServeGen's fits (alibaba/ServeGen): `tenant` is the client.

    Each client's gaps are gamma or Weibull with the parameters of its own ten-minute window, from `start_s` of the recording on.
    `clients`: how many of the busiest in that span, or which; None takes all (m-large: about 400 requests/s). Lengths come from the
    client's own quantiles, prompt and output drawn independently (ServeGen's generator ties them to one number). A client without
    known lengths is an error: leave it out, or use `servegen_arrivals`.
    """
    arrivals = servegen_arrivals(dataset, seed=seed, clients=clients, start_s=start_s, duration_s=duration_s)
    quantiles = pd.read_parquet(shipped(f"servegen_{dataset}_length_quantiles.parquet"))
    known = set(quantiles["client"].tolist())
    unknown = sorted({int(t) for t in arrivals.frame["tenant"]} - known)
    require(
        not unknown, "every client must have known lengths", unknown, "Choose other clients=, or servegen_arrivals(...).with_lengths(...)."
    )
    levels = np.array(json.loads(shipped("servegen_quantile_levels.json").read_text()))
    frame = arrivals.frame.assign(prompt_tokens=1, output_tokens=1)
    for client, rows in frame.groupby("tenant", sort=True).groups.items():
        own = quantiles[quantiles["client"] == int(str(client))].sort_values("t")
        times = frame.loc[rows, "arrival_s"].to_numpy() + start_s
        latest = np.maximum(np.searchsorted(own["t"].to_numpy(), times, side="right") - 1, 0)
        for column, source in (("prompt_tokens", "prompt_q"), ("output_tokens", "output_q")):
            u = generator("servegen", dataset, column, int(str(client)), seed).uniform(size=len(rows))
            tables = own[source].tolist()
            drawn = np.array([np.interp(x, levels, tables[k]) for x, k in zip(u, latest, strict=True)])
            frame.loc[rows, column] = np.maximum(np.rint(drawn), 1).astype(np.int64)
    trace = Trace.from_frame(frame, name=arrivals.name, duration_s=duration_s)
    note = "lengths: the clients' own, prompt and output independent"
    return trace.derived(trace._frame, "arrivals", *arrivals.notes).derived(trace._frame, "lengths", note)


def servegen_arrivals(
    dataset: Literal["m-large", "deepseek-r1"],
    *,
    seed: int,
    clients: int | Sequence[int] | None = None,
    start_s: float = 0.0,
    duration_s: float = 3600.0,
) -> Trace:
    """As `servegen`, without lengths."""
    require(dataset in SERVEGEN, f"dataset must be one of {', '.join(SERVEGEN)}", dataset)
    require(start_s >= 0 and duration_s > 0 and math.isfinite(duration_s), "start_s and duration_s must be positive", (start_s, duration_s))
    table = pd.read_parquet(shipped(f"servegen_{dataset}_client_windows.parquet"))
    last = float(table["t"].max()) + WINDOW_S
    require(start_s + duration_s <= last, f"the span must end within the recording's {last:g} s", start_s + duration_s)
    span = table[(table["t"] + WINDOW_S > start_s) & (table["t"] < start_s + duration_s)]
    chosen = _chosen(span, clients)
    ids, times = [], []
    for client, window, pattern, shape, scale in zip(
        *(span[c].to_numpy() for c in ("client", "t", "pattern", "shape", "scale")), strict=True
    ):
        if client in chosen:
            rng = generator("servegen", dataset, int(client), int(window), seed)
            part = window + _client_window(rng, pattern, float(shape), float(scale)) - start_s
            part = part[(part >= 0) & (part < duration_s)]
            times.append(part)
            ids.append(np.full(len(part), client))
    arrival = np.concatenate(times) if times else np.empty(0)
    tenant = np.concatenate(ids) if ids else np.empty(0, dtype=int)
    order = np.argsort(arrival, kind="stable")
    frame = pd.DataFrame({"request_id": np.arange(len(order)), "arrival_s": arrival[order], "tenant": tenant[order]})
    trace = Trace.from_frame(frame, name=f"servegen-{dataset}", duration_s=duration_s)
    return trace.derived(trace._frame, "arrivals", f"{len(chosen)} clients of {dataset}, {start_s:g}-{start_s + duration_s:g} s")


def _chosen(span: pd.DataFrame, clients: int | Sequence[int] | None) -> set[int]:
    busiest = span.groupby("client")["rate"].sum().sort_values(ascending=False, kind="stable").index.tolist()
    if clients is None:
        return set(busiest)
    if isinstance(clients, int):
        require(1 <= clients <= len(busiest), f"clients must lie in 1..{len(busiest)} (those active in the span)", clients)
        return set(busiest[:clients])
    missing = sorted(set(clients) - set(busiest))
    require(not missing, "clients must be active in the span", missing, f"Active: {sorted(busiest)[:20]} ...")
    return set(clients)


def _client_window(rng: np.random.Generator, pattern: str, shape: float, scale: float) -> np.ndarray:
    if pattern == "Gamma":
        return renewal(rng, shape, scale, WINDOW_S)
    mean = scale * math.gamma(1 + 1 / shape)
    chunk = int(2 * WINDOW_S / mean) + 16
    times = np.cumsum(scale * rng.weibull(shape, chunk))
    while times[-1] < WINDOW_S:
        times = np.concatenate([times, times[-1] + np.cumsum(scale * rng.weibull(shape, chunk))])
    return times[times < WINDOW_S]
