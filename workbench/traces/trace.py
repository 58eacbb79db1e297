"""`Trace`: requests with their arrival times, as a frozen value; every change gives a new trace that says what was done to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from workbench.config import require
from workbench.core import Request, Sampling
from workbench.seeds import generator
from workbench.traces import frame as trace_frame
from workbench.traces import ops as trace_ops

if TYPE_CHECKING:
    from workbench.traces.popularity import Popularity


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What clients send, and when. Make one with `Trace.from_frame`, `traces.load` or a synthesis; never by hand.

    `duration_s` is the span that the trace covers (at least its last arrival); rates divide by it. `redrawn` names what a seed drew
    ("arrivals", "lengths", "adapters"), `notes` says in words what was done, for a figure's legend. Two traces are equal when their
    requests are (`checksum`), whatever their names.
    """

    _frame: pd.DataFrame
    name: str
    duration_s: float
    redrawn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, name: str = "trace", duration_s: float | None = None) -> "Trace":
        """A trace of the frame's rows; its index plays no part.

        Columns: `request_id` and `arrival_s` (seconds, sorted) are needed. `prompt_tokens` and `output_tokens` may be added later by
        `with_lengths`; `adapter` missing means the base model. Optional: `prompt` or `prompt_token_ids` instead of `prompt_tokens`
        (a missing `output_tokens` then means that the text decides), `max_tokens`, `tenant`, `slo_class`, `priority`, `deadline_s`,
        `session`, `parent_id` and `think_s` (closed sessions), `prefix_ids`, and the fields of `Sampling`. `duration_s` defaults to
        the last arrival. Raises ValueError with the rule, the value, its row and the next step.
        """
        checked = trace_frame.canonical(frame)
        last = float(checked["arrival_s"].iloc[-1]) if len(checked) else 0.0
        span = last if duration_s is None else float(duration_s)
        require(math.isfinite(span) and span >= last, f"duration_s must reach the last arrival, {last:g} s", duration_s, "Leave it out.")
        return cls(checked, name, span)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        columns: Mapping[str, str] | None = None,
        *,
        units: Mapping[str, str] | None = None,
        format: str | None = None,
        drop_empty: bool = False,
        name: str | None = None,
    ) -> "Trace":
        """A trace from a CSV, JSONL or parquet file, in a known format or with its columns named.

        `columns` maps our names to the file's: `{"arrival_s": "Timestamp", "prompt_tokens": "in", "output_tokens": "out"}`; what is not
        named is left out and noted, ids are numbered if they are not. `units` says in what a time column counts ("s", "ms", "us",
        "ns", "min", "h"; dates need none). Times then start at the first arrival, and rows are sorted by it. `drop_empty` leaves out
        requests of 0 tokens. Raises FileNotFoundError and ValueError; `traces.validate` lists all that is wrong with a file.
        """
        from workbench.traces.io import read

        return read(path, format=format, drop_empty=drop_empty, name=name, columns=columns, units=units)

    def export(self, path: str | Path, format: Literal["vllm", "sglang", "loquetier"], *, prompts: str | Path | None = None) -> str:
        """Write the trace for another system's load generator; the command line that replays it, by `traces.export.export`."""
        from workbench.traces.export import export

        return export(self, path, format, prompts)

    # ---- what it holds

    def __len__(self) -> int:
        return len(self._frame)

    @property
    def frame(self) -> pd.DataFrame:
        """A copy of the requests as a frame, one row a request, in order of arrival."""
        return self._frame.copy()

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests in order of arrival. Raises ValueError if the trace has no lengths: they are never invented."""
        if not self.has_lengths:
            lacking = "prompt and output lengths" if "prompt_tokens" not in self._frame else "output lengths"
            raise ValueError(
                f"requests need token counts, got a trace without {lacking}: {self.name!r}. "
                "Draw them with .with_lengths(source, seed=), e.g. .with_lengths('azure-conv', seed=0), or add the columns."
            )
        return trace_ops.requests_of(self._frame)

    @cached_property
    def checksum(self) -> str:
        """16 hex digits of the requests' content."""
        return trace_frame.content_checksum(self._frame)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    @property
    def has_lengths(self) -> bool:
        has_prompt = any(name in self._frame for name in ("prompt_tokens", "prompt", "prompt_token_ids"))
        has_content = any(name in self._frame for name in ("prompt", "prompt_token_ids"))
        return len(self) == 0 or (has_prompt and (has_content or "output_tokens" in self._frame))

    @property
    def is_closed(self) -> bool:
        """Whether some request waits for another one's end (a closed loop) instead of arriving at its own time."""
        return "parent_id" in self._frame and bool(self._frame["parent_id"].notna().any())

    @property
    def rate(self) -> float:
        """Mean requests per second over `duration_s`; infinite when everything arrives at once."""
        return len(self) / self.duration_s if self.duration_s > 0 else math.inf

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that requests name, in order of first use."""
        return tuple(self._frame["adapter"].dropna().unique())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What would mislead in a replay of this trace, each with its remedy."""
        times = self._frame["arrival_s"].to_numpy()
        gaps = np.diff(times)
        if len(gaps) < 10 or not (gaps > 0).any():
            return ()
        ties = gaps == 0
        tied = float(np.mean(np.append(ties, [False]) | np.append([False], ties)))
        tick = round(float(gaps[~ties].min()), 1)
        if tied < 0.1 or tick < 0.5:
            return ()
        return (f"{tied:.0%} of the arrivals tie: the clock ticks every {tick:g} s. Spread them with .jitter({tick:.1f}, seed=).",)

    def __repr__(self) -> str:
        span = "all at once" if self.duration_s == 0 else f"in {self.duration_s:,.0f} s, {self.rate:.2f}/s"
        loop = "closed loop" if self.is_closed else "open loop"
        count = len(self.adapters)
        adapters = "no adapters" if count == 0 else f"{count} adapter{'s' if count > 1 else ''}"
        lengths = [] if self.has_lengths else ["no lengths"]
        redrawn = [f"redrawn: {', '.join(self.redrawn)}"] if self.redrawn else []
        parts = [f"{len(self):,} requests {span}", loop, adapters, *lengths, *redrawn, *self.notes, *self.warnings]
        return f"Trace({self.name!r}: {'; '.join(parts)})"

    def validate(self) -> "Trace":
        """Check every rule of the frame again, and that the lengths are there; returns the trace itself."""
        trace_frame.canonical(self._frame)
        _ = self.requests
        return self

    # ---- which requests

    def slice(self, start_s: float, end_s: float | None = None) -> "Trace":
        """The requests that arrive in [start_s, end_s), at times from `start_s` on; `end_s=None` keeps everything after `start_s`."""
        end = math.inf if end_s is None else end_s
        require(0 <= start_s < end, "slice must have 0 <= start_s < end_s", (start_s, end_s))
        covers = start_s <= self.duration_s if end_s is None else start_s < self.duration_s or self.duration_s == 0
        require(covers, f"start_s must lie within the trace's {self.duration_s:g} s", start_s)
        times = self._frame["arrival_s"]
        kept, cut = trace_ops.kept(self._frame, ((times >= start_s) & (times < end)).to_numpy())
        span = min(end, self.duration_s) - start_s
        stop = f"{end_s:g}" if end_s is not None and end_s < self.duration_s else "end"
        notes = () if start_s == 0 and stop == "end" else (f"slice {start_s:g}-{stop} s",)
        return self._at(kept, kept["arrival_s"].to_numpy() - start_s, span, notes=(*notes, *cut))

    def head(self, n: int) -> "Trace":
        """The first `n` requests (all of them if there are fewer); the span ends where the next request would arrive."""
        require(n >= 0, "n must be at least 0", n)
        if n >= len(self):
            return self
        times = self._frame["arrival_s"]
        kept = self._frame.iloc[:n].reset_index(drop=True)
        return replace(self, _frame=kept, duration_s=float(times.to_numpy()[n]), notes=(*self.notes, f"first {n:,} requests"))

    def then(self, other: "Trace") -> "Trace":
        """This trace, and `other` after this one's `duration_s`. Ids that occur in both get a prefix in `other`."""
        return self._joined(other, self.duration_s, self.duration_s + other.duration_s)

    def merge(self, other: "Trace") -> "Trace":
        """Both traces on one clock, each at its own times. Ids that occur in both get a prefix in `other`."""
        return self._joined(other, 0.0, max(self.duration_s, other.duration_s))

    def scale(self, *, rate: float, how: Literal["compress", "thin", "superpose"], seed: int | None = None) -> "Trace":
        """The trace at another mean rate (requests per second); how it gets there changes results, so it has no default.

        "compress": the same requests, all times multiplied; bursts get denser. "thin": a random subset at the original times (needs
        `seed`, and a lower rate). "superpose": the trace plus copies of itself rotated by random offsets (needs `seed`, and a higher
        rate); bursts get no denser, the load smoother.
        """
        require(how in ("compress", "thin", "superpose"), 'how must be "compress", "thin" or "superpose"', how)
        require(math.isfinite(rate) and rate > 0, "rate must be above 0 requests per second", rate)
        require(len(self) > 0 and self.duration_s > 0, "scale needs a trace with a rate", f"{len(self)} requests in {self.duration_s:g} s")
        if how == "compress":
            factor = self.rate / rate
            times = self._frame["arrival_s"].to_numpy() * factor
            return self._at(self._frame, times, self.duration_s * factor, notes=(f"compressed to {rate:g}/s",))
        require(seed is not None, f'how="{how}" draws at random and needs a seed', seed, "Pass seed=0, or the seed of the run.")
        assert seed is not None
        if how == "thin":
            require(rate <= self.rate, f'how="thin" needs a rate of at most the trace\'s {self.rate:.4g}/s', rate, 'Use how="superpose".')
            mask = trace_ops.thinned(self._frame, round(rate * self.duration_s), seed)
            kept, cut = trace_ops.kept(self._frame, mask)
            return self.derived(kept, "arrivals", f"thinned to {rate:g}/s", *cut)
        require(rate >= self.rate, f'how="superpose" needs a rate of at least the trace\'s {self.rate:.4g}/s', rate, 'Use how="thin".')
        frame = trace_ops.superposed(self._frame, round(rate * self.duration_s), self.duration_s, seed)
        span = max(self.duration_s, float(frame["arrival_s"].to_numpy().max()))
        return replace(self.derived(frame, "arrivals", f"superposed to {rate:g}/s"), duration_s=span)

    # ---- what a request is

    def with_lengths(self, source: Any, *, seed: int, clip: tuple[int | None, int | None] | None = None) -> "Trace":
        """Prompt and output lengths drawn from another source, in pairs (with replacement), so that their dependence is kept.

        `source` is a name (`traces.names(kind="lengths")`), a Trace, or a frame with `prompt_tokens` and `output_tokens`. `clip` gives the
        largest prompt and the largest output (None: no bound); how many were cut stands in `notes`, as the source does.
        """
        from workbench.traces import lengths

        for name in ("prompt", "prompt_token_ids"):
            require(name not in self._frame, f"with_lengths needs a trace without {name}", self.name, f"Drop the column {name}.")
        pairs, label = lengths(source)
        pick = generator("lengths", seed).integers(0, len(pairs), len(self))
        drawn = pairs.iloc[pick].reset_index(drop=True)
        note = f"lengths: {label}"
        for name, limit in zip(("prompt_tokens", "output_tokens"), clip or (None, None), strict=True):
            if limit is None:
                continue
            require(limit >= 1, f"clip of {name} must be at least 1", limit)
            over = int((drawn[name] > limit).sum())
            drawn[name] = drawn[name].clip(upper=limit)
            note += f", {name} clipped at {limit:,} ({over:,} of {len(self):,} cut)"
        frame = self._frame.assign(
            prompt_tokens=drawn["prompt_tokens"].astype("int64"), output_tokens=drawn["output_tokens"].astype("int64")
        )
        kept = tuple(n for n in self.notes if not n.startswith("lengths: "))
        return replace(self, notes=kept).derived(trace_frame.canonical(frame), "lengths", note)

    def jitter(self, width_s: float, *, seed: int) -> "Trace":
        """Every arrival later by a uniform draw from [0, width_s): for clocks that tick, whose ties would look like bursts.

        Requests of one closed session move together.
        """
        require(math.isfinite(width_s) and width_s > 0, "width_s must be above 0 seconds", width_s)
        shift = generator("jitter", seed).uniform(0, width_s, len(self))[trace_ops.session_roots(self._frame)]
        times = self._frame["arrival_s"].to_numpy() + shift
        span = max(self.duration_s, float(times.max(initial=0)))
        return self._at(self._frame, times, span, "arrivals", notes=(f"arrivals spread over {width_s:g} s",))

    def assign_adapters(
        self, adapters: int | Sequence[str], *, popularity: "Popularity", seed: int | None = None, prefix: str = "adapter-"
    ) -> "Trace":
        """Every request gets an adapter: `adapters` are names, most popular first, or a count (`adapter-0`, `adapter-1`, ...).

        `popularity` is one of `traces.zipf(s)`, `uniform()`, `geometric(ratio)`, `s_lora_power(alpha)`, `round_robin()`,
        `per_phase(ends_s)`, `clients()`. Raises ValueError without a seed if the popularity draws at random.
        """
        names = [f"{prefix}{i}" for i in range(adapters)] if isinstance(adapters, int) else list(adapters)
        require(not isinstance(adapters, str), "adapters must be a count or a sequence of names", adapters, f"Write [{adapters!r}].")
        require(len(names) > 0, "adapters must name at least one adapter", adapters)
        require(len(set(names)) == len(names), "adapter names must be distinct", names)
        if popularity.is_random and seed is None:
            raise ValueError(f"{popularity!r} draws at random and needs a seed, got None. Pass seed=0, or the seed of the run.")
        rng = generator("adapters", seed if seed is not None else 0)
        chosen = pd.Series(popularity.assign(self._frame, names, rng), dtype=object)
        kept = tuple(n for n in self.notes if not n.startswith("adapters: "))
        note = f"adapters: {len(names)} by {popularity!r}"
        frame = self._frame.assign(adapter=chosen)
        return replace(self, notes=kept).derived(frame, "adapters" if popularity.is_random else None, note)

    def assign_classes(self, shares: Mapping[str, float], *, seed: int) -> "Trace":
        """Every request gets an SLO class, drawn by shares that sum to 1: `{"chat": 0.1, "batch": 0.9}`. Raises ValueError for others."""
        require(len(shares) > 0 and min(shares.values()) >= 0, "shares must be at least 0", dict(shares))
        require(abs(sum(shares.values()) - 1) < 1e-9, "shares must sum to 1", sum(shares.values()))
        drawn = generator("classes", seed).choice(len(shares), len(self), p=list(shares.values()))
        chosen = pd.Series([list(shares)[i] for i in drawn], dtype=object)
        note = "classes: " + ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        kept = tuple(n for n in self.notes if not n.startswith("classes: "))
        return replace(self, notes=kept).derived(
            trace_frame.canonical(self._frame.assign(slo_class=chosen)), "classes" if len(shares) > 1 else None, note
        )

    def with_sampling(
        self, *, temperature: float = 0.0, top_p: float = 1.0, top_k: int | None = None, repetition_penalty: float = 1.0, seed: int = 0
    ) -> "Trace":
        """The same sampling options for every request, with a seed of its own for each (from `seed` and the request id)."""
        Sampling(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
        seeds = [int(generator("sampling", seed, name).integers(0, 2**31)) for name in self._frame["request_id"]]
        frame = self._frame.assign(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seeds)
        if top_k is not None:
            frame["top_k"] = top_k
        elif "top_k" in frame:
            frame = frame.drop(columns="top_k")
        greedy = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        return self.derived(trace_frame.canonical(frame), None, f"sampling: {greedy}, top-p {top_p:g}")

    def closed_sessions(self, think_s: float) -> "Trace":
        """A closed loop: within a `session`, each request arrives `think_s` after the one before it ends."""
        require(think_s >= 0, "think_s must be at least 0", think_s)
        require("session" in self._frame, "closed_sessions needs the column session", list(self._frame.columns), "Add it.")
        last: dict[str, str] = {}
        parents: list[str | None] = []
        for request_id, session in zip(self._frame["request_id"], self._frame["session"], strict=True):
            parents.append(last.get(session) if session is not None else None)
            if session is not None:
                last[session] = request_id
        frame = self._frame.assign(parent_id=pd.Series(parents, dtype=object), think_s=think_s)
        return self.derived(trace_frame.canonical(frame), None, f"closed sessions, think time {think_s:g} s")

    # ---- how it is done

    def derived(self, frame: pd.DataFrame, redrawn: str | None, *notes: str) -> "Trace":
        """This trace with another canonical frame, and what was done to it in `redrawn` and `notes`."""
        return replace(
            self, _frame=frame, redrawn=_union(self.redrawn, (redrawn,) if redrawn else ()), notes=_union(self.notes, tuple(notes))
        )

    def _at(
        self, frame: pd.DataFrame, times: np.ndarray, span: float, redrawn: str | None = None, *, notes: tuple[str, ...] = ()
    ) -> "Trace":
        """`frame` with its arrivals moved to `times` (deadlines move along), sorted."""
        return replace(self.derived(trace_ops.moved(frame, times), redrawn, *notes), duration_s=span)

    def _joined(self, other: "Trace", shift_s: float, span: float) -> "Trace":
        if len(self) and len(other):
            lengths = [trace.has_lengths for trace in (self, other)]
            require(all(lengths) or not any(lengths), "both traces must have lengths, or neither", lengths, "Call .with_lengths first.")
        later = trace_ops.moved(other._frame, other._frame["arrival_s"].to_numpy() + shift_s)
        ids, prefix = set(self._frame["request_id"]), 2
        if not ids.isdisjoint(later["request_id"]):
            while any(f"{prefix}/{name}" in ids for name in later["request_id"]):
                prefix += 1
            later = trace_ops.renamed(later, lambda name: f"{prefix}/{name}")
        joined = pd.concat([f for f in (self._frame, later) if len(f)] or [self._frame], ignore_index=True)
        joined = trace_frame.canonical(joined.sort_values("arrival_s", kind="stable", ignore_index=True))
        name = self.name if self.name == other.name else f"{self.name}+{other.name}"
        return Trace(joined, name, span, _union(self.redrawn, other.redrawn), _union(self.notes, other.notes))


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
