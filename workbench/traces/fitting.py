"""Fitting a synthetic generator to a real trace, and saying how well it fits.

Arrivals: a rate that is constant within each of a few equal phases, and gamma gaps once that rate is divided out (shape 1: Poisson,
below 1: bursty). Lengths: prompt and output jointly log-normal, cut at the longest seen. Adapters: Zipf. What is left over (how one
request's length depends on its adapter or hour, sessions, shared prefixes) is not modelled, and `report()` shows what it costs.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.seeds import generator
from workbench.traces.synthesis import renewal
from workbench.traces.trace import Trace

MIN_REQUESTS = 20
MAX_PHASES, REQUESTS_A_PHASE = 24, 100
MAX_EXPONENT = 10.0
MAX_SHAPE = 1e4  # gaps that vary by 1 %: as good as constant
CURVE_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Token counts: round(exp(normal(log_mean, log_sd))), at least 1 and at most `longest`."""

    log_mean: float
    log_sd: float
    longest: int

    def of_normal(self, z: np.ndarray) -> np.ndarray:
        """Counts from standard normal draws [n]."""
        return np.clip(np.rint(np.exp(self.log_mean + self.log_sd * z)), 1, self.longest).astype(np.int64)

    def cdf(self, tokens: np.ndarray) -> np.ndarray:
        """P(count <= tokens) [n], rounding and the cut included."""
        from scipy.special import ndtr

        z = (np.log(np.maximum(np.floor(tokens) + 0.5, 0.5)) - self.log_mean) / max(self.log_sd, 1e-12)
        return np.select([tokens < 1, tokens >= self.longest], [0.0, 1.0], np.asarray(ndtr(z)))


@dataclass(frozen=True, kw_only=True)
class TraceGenerator:
    """A fitted workload. `sample(duration_s, seed)` draws a trace of any length; `report()` holds it against the trace it was fitted to.

    `phases`: (end in s, requests per second); they repeat when more is drawn than `phases` cover. `shape`: of the gamma gaps, 1 / CV^2.
    `correlation`: of the logs of prompt and output tokens. `adapters`: names, most popular first; `exponent`: Zipf's, over them;
    `base_share`: requests without an adapter.
    """

    phases: tuple[tuple[float, float], ...]
    shape: float
    prompt: LogNormal | None
    output: LogNormal | None
    correlation: float
    adapters: tuple[str, ...]
    exponent: float
    base_share: float
    source: Trace = field(repr=False)

    @property
    def rate(self) -> float:
        """Mean requests per second."""
        return float(self._expected(np.array([self.phases[-1][0]]))[0] / self.phases[-1][0])

    def sample(self, duration_s: float, seed: int) -> Trace:
        """A trace of `duration_s` seconds; equal seeds give equal traces."""
        require(np.isfinite(duration_s) and duration_s > 0, "duration_s must be above 0", duration_s)
        times = self._arrivals(duration_s, generator("fitted", "arrivals", seed))
        columns: dict[str, Any] = {"request_id": [str(i) for i in range(len(times))], "arrival_s": times}
        if self.prompt is not None and self.output is not None:
            rng = generator("fitted", "lengths", seed)
            z = rng.standard_normal((2, len(times)))
            columns["prompt_tokens"] = self.prompt.of_normal(z[0])
            columns["output_tokens"] = self.output.of_normal(self.correlation * z[0] + np.sqrt(1 - self.correlation**2) * z[1])
        if self.adapters:
            rng = generator("fitted", "adapters", seed)
            chosen = np.array(self.adapters, object)[rng.choice(len(self.adapters), len(times), p=self._shares())]
            chosen[rng.random(len(times)) < self.base_share] = None
            columns["adapter"] = chosen
        trace = Trace.from_frame(pd.DataFrame(columns), name=f"fitted to {self.source.name}", duration_s=duration_s)
        note = (
            f"drawn from a fit to {self.source.name}: {self.rate:.3g}/s in {len(self.phases)} phases, gamma gaps of shape {self.shape:.3g}"
        )
        trace = trace.derived(trace._frame, "arrivals", note)
        for name, is_drawn in (("lengths", self.prompt is not None), ("adapters", bool(self.adapters))):
            trace = trace.derived(trace._frame, name) if is_drawn else trace
        return trace

    def report(self) -> pd.DataFrame:
        """One row per fitted quantity: `ks` (the largest distance of the two distribution functions), n, and both means.

        Rows: arrival times over the trace's span, gaps with the rate divided out, prompt and output tokens, adapters by rank.
        """
        rows = {}
        for name, values, cdf, mean in self._quantities():
            rows[name] = {"ks": _distance(values, cdf), "n": len(values), "mean": float(values.mean()), "fitted_mean": mean}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")

    def curves(self) -> pd.DataFrame:
        """Both distribution functions of every row of `report()`: quantity, x, real, fitted. For `plots.trace_fit`."""
        frames = []
        for name, values, cdf, _ in self._quantities():
            grid = np.geomspace(1, values.max(), CURVE_POINTS) if name.endswith("_tokens") else np.linspace(0, values.max(), CURVE_POINTS)
            grid = grid if name in ("arrival_s", "gap") else np.floor(grid)
            x = np.unique(np.concatenate([grid, np.quantile(values, np.linspace(0, 1, CURVE_POINTS), method="nearest")]))
            real = np.searchsorted(np.sort(values), x, side="right") / len(values)
            frames.append(pd.DataFrame({"quantity": name, "x": x, "real": real, "fitted": cdf(x)}))
        return pd.concat(frames, ignore_index=True)

    # the pieces

    def _quantities(self) -> list[tuple[str, np.ndarray, Any, float]]:
        """(name, the source's values, fitted distribution function, fitted mean)."""
        from scipy.stats import gamma

        frame = self.source.frame
        times = frame["arrival_s"].to_numpy(float)
        total = self._expected(np.array([self.phases[-1][0]]))[0]
        middle = sum((a + b) / 2 * rate * (b - a) for (b, rate), a in zip(self.phases, self._starts(), strict=True)) / total
        gaps = np.diff(self._expected(times))
        found = [
            ("arrival_s", times, lambda t: self._expected(t) / total, float(middle)),
            ("gap", gaps, gamma(self.shape, scale=1 / self.shape).cdf, 1.0),
        ]
        for name, fitted in (("prompt_tokens", self.prompt), ("output_tokens", self.output)):
            if fitted is not None:
                values = np.arange(1, fitted.longest + 1)
                mean = float(1 + (1 - fitted.cdf(values[:-1])).sum()) if fitted.longest > 1 else 1.0
                found.append((name, frame[name].to_numpy(float), fitted.cdf, mean))
        if self.adapters:
            rank = {name: k for k, name in enumerate(self.adapters, start=1)}
            ranks = frame["adapter"].dropna().map(rank).to_numpy(float)
            shares = self._shares()
            cumulative = np.concatenate([[0.0], np.cumsum(shares)])
            found.append(
                ("adapter rank", ranks, lambda k: cumulative[np.floor(k).astype(int)], float(shares @ np.arange(1, len(rank) + 1)))
            )
        return found

    def _starts(self) -> list[float]:
        return [0.0, *(end for end, _ in self.phases[:-1])]

    def _expected(self, times: np.ndarray) -> np.ndarray:
        """Expected requests until each time within the phases [n]."""
        ends = np.array([0.0, *(end for end, _ in self.phases)])
        counts = np.array([rate for _, rate in self.phases]) * np.diff(ends)
        return np.interp(times, ends, np.concatenate([[0.0], np.cumsum(counts)]))

    def _arrivals(self, duration_s: float, rng: np.random.Generator) -> np.ndarray:
        """Gamma renewals in expected requests, mapped back to time phase by phase, round after round."""
        ends = np.array([0.0, *(end for end, _ in self.phases)])
        total, span = float(self._expected(ends[-1:])[0]), float(ends[-1])
        rounds = int(np.ceil(duration_s / span))
        units = renewal(rng, self.shape, 1 / self.shape, rounds * total)
        cumulative = self._expected(ends)
        whole, part = np.divmod(units, total)
        times = whole * span + np.interp(part, cumulative, ends)
        return times[times < duration_s]

    def _shares(self) -> np.ndarray:
        weights = np.arange(1, len(self.adapters) + 1) ** -self.exponent
        return weights / weights.sum()


def fit(trace: Trace, *, num_phases: int | None = None) -> TraceGenerator:
    """Fit a generator to `trace`: by moments (gaps, lengths) and maximum likelihood (Zipf).

    `num_phases`: how many equal phases the rate may change between; None: one per 100 requests, at most 24. Raises ValueError for fewer
    than 20 requests, a closed loop, and a trace whose requests all arrive at once.
    """
    require(len(trace) >= MIN_REQUESTS, f"a fit needs at least {MIN_REQUESTS} requests", len(trace))
    require(not trace.is_closed, "a fit needs arrival times, not a closed loop", trace.name, "Drop parent_id from its frame.")
    frame, span = trace.frame, trace.duration_s
    times = frame["arrival_s"].to_numpy(float)
    require(times[-1] > times[0], "a fit needs requests at different times", float(times[0]))
    num = max(1, min(MAX_PHASES, len(trace) // REQUESTS_A_PHASE)) if num_phases is None else num_phases
    require(1 <= num <= len(trace), f"num_phases must lie in 1..{len(trace)}", num)
    ends = span * np.arange(1, num + 1) / num
    counts, _ = np.histogram(times, np.concatenate([[0.0], ends]))
    phases = tuple((float(end), float(count / (span / num))) for end, count in zip(ends, counts, strict=True))
    prompt, output, correlation = _lengths(frame)
    adapters, exponent, base_share = _popularity(frame)
    fitted: dict[str, Any] = {"prompt": prompt, "output": output, "correlation": correlation, "adapters": adapters}
    fitted |= {"phases": phases, "exponent": exponent, "base_share": base_share, "source": trace}
    gaps = np.diff(TraceGenerator(shape=1.0, **fitted)._expected(times))
    shape = min(float(gaps.mean() ** 2 / max(gaps.var(), 1e-300)), MAX_SHAPE)
    return TraceGenerator(shape=shape, **fitted)


def _lengths(frame: pd.DataFrame) -> tuple[LogNormal | None, LogNormal | None, float]:
    names = ["prompt_tokens", "output_tokens"]
    if not set(names) <= set(frame.columns) or frame[names].isna().to_numpy().any():
        return None, None, 0.0
    logs = np.log(frame[names].to_numpy(float))
    mean, sd = logs.mean(axis=0), logs.std(axis=0)
    correlation = float(np.corrcoef(logs.T)[0, 1]) if (sd > 1e-9).all() else 0.0
    prompt, output = (
        LogNormal(log_mean=float(mean[k]), log_sd=float(sd[k]), longest=int(frame[name].max())) for k, name in enumerate(names)
    )
    return prompt, output, correlation


def _popularity(frame: pd.DataFrame) -> tuple[tuple[str, ...], float, float]:
    """(names by popularity, the exponent s that makes counts of p ~ rank^-s likeliest, share of requests without an adapter)."""
    counts = frame["adapter"].value_counts()
    base_share = float(frame["adapter"].isna().mean())
    if len(counts) < 2:
        return tuple(map(str, counts.index)), 0.0, base_share
    from scipy.optimize import minimize_scalar

    logs, numbers = np.log(np.arange(1, len(counts) + 1)), counts.to_numpy(float)

    def cost(s: float) -> float:
        return float(s * (numbers @ logs) + numbers.sum() * np.log(np.exp(-s * logs).sum()))

    found: Any = minimize_scalar(cost, bounds=(0.0, MAX_EXPONENT), method="bounded", options={"xatol": 1e-6})
    return tuple(map(str, counts.index)), float(found.x), base_share


def _distance(values: np.ndarray, cdf: Any) -> float:
    """Kolmogorov and Smirnov's distance, right for distributions with steps too: both functions compared at and just below each value."""
    x, counts = np.unique(values, return_counts=True)
    above = np.cumsum(counts) / len(values)
    below = above - counts / len(values)
    return float(max(np.abs(cdf(x) - above).max(), np.abs(cdf(np.nextafter(x, -np.inf)) - below).max()))
