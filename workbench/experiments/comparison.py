"""`Comparison`: the replays of several policies on the same traces, as tables, figures, differences and files."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from workbench.config import did_you_mean, require
from workbench.experiments.statistics import RESAMPLES, Difference
from workbench.model_error import HEADLINE as JUDGED
from workbench.model_error import METRICS, MetricError, error_of, errors_said, how, labelled
from workbench.results import metrics

COMPARISON_FILE = "comparison.json"
HEADLINE = (
    "requests",
    "attainment",
    "attainment_ttft",
    "attainment_tpot",
    "attainment_itl",
    "attainment_e2e",
    "goodput_per_s",
    "finetune_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "itl_p50_s",
    "itl_p99_s",
    "jain_slowdown",
    "preemptions",
    "rejected",
    "adapter_loads",
    "saturated",
)
FEW_REQUESTS = 1000  # below it, fewer than ten requests lie beyond a p99
GROUPS = ("adapter", "tenant", "slo_class", "priority", "outcome")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The replays of one `compare`: `replays[label, seed]`, and what is common to them.

    `redrawn` names what differs from seed to seed (arrivals, lengths, adapters, residuals); `order` is the order of the runs.
    """

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    replays: Mapping[tuple[str, int], Any] = field(repr=False)
    trace_name: str
    redrawn: tuple[str, ...]
    notes: tuple[str, ...] = ()
    order: tuple[tuple[str, int], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, replays: Mapping[str, Any]) -> "Comparison":
        """Replays that were made one by one, side by side: of an engine, a model, a server. By label a Replay, or one for each seed.

        Raises ValueError for labels with different numbers of replays, or replays of different traces (a pair must have seen the same).
        """
        rows = {label: tuple(given) if isinstance(given, Sequence) else (given,) for label, given in replays.items()}
        sizes = {label: len(row) for label, row in rows.items()}
        require(len(set(sizes.values())) == 1 and min(sizes.values()) > 0, "every label must have as many replays as the others", sizes)
        columns = list(zip(*rows.values(), strict=True))
        for column in columns:
            checksums = {
                label: one.provenance.trace_checksum for label, one in zip(rows, column, strict=True) if hasattr(one, "provenance")
            }
            require(len(set(checksums.values())) <= 1, "replays of one seed must be of the same trace", checksums)
        settings = [getattr(one, "settings", {}) for column in columns for one in column]
        return cls(
            labels=tuple(rows),
            seeds=tuple(range(len(columns))),
            replays={(label, seed): one for label, row in rows.items() for seed, one in enumerate(row)},
            trace_name=next((s["trace"] for s in settings if "trace" in s), "trace"),
            redrawn=tuple(dict.fromkeys(n for s in settings for n in s.get("redrawn", ()))) if len(columns) > 1 else (),
            notes=tuple(dict.fromkeys(note for s in settings for note in s.get("notes", ()))),
        )

    @property
    def executor(self) -> Any:
        return next(iter(self.replays.values())).executor

    @property
    def slo(self) -> metrics.SLOs:
        return next(iter(self.replays.values())).slo

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: policy, seed and every number of `metrics.summary`, policies in the order given."""
        rows = [{"policy": label, "seed": seed} | dict(self.replays[label, seed].summary()) for label, seed in self._keys()]
        return labelled(pd.DataFrame(rows), self._executors())

    def model_error(self, metric: str = "attainment") -> MetricError | None:
        """How far the latency model was from measured replays in a metric of `runs`; printed, a sentence. None of measured results.

        Of executors that differ, the first (the caption has all of them).
        """
        return error_of(self.executor, metric)

    def _executors(self) -> list[Any]:
        return [self.replays[key].executor for key in self._keys()]

    def table(self, by: str = "policy", columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Results by policy, seed, or a column of the requests (`adapter`, `tenant`, `slo_class`, `priority`, `outcome`).

        By policy: the mean over seeds, and beside each number that varies half the range over seeds (`... ±`). Targets that the SLO
        does not have are left out. Raises ValueError for another `by`.
        """
        if by in GROUPS:
            return self._by_requests(by)
        if by not in ("policy", "seed"):
            raise ValueError(f"by must be a grouping of the results, got {by!r}. {did_you_mean(by, ('policy', 'seed', *GROUPS))}")
        runs = self.runs
        names = [c for c in (columns or HEADLINE) if c in runs.columns and (columns or not runs[c].isna().all())]
        if by == "seed":
            return runs.set_index(["policy", "seed"])[names]
        groups = runs.astype({"saturated": float}).groupby("policy", sort=False)[names]
        mean, spread = groups.mean(), (groups.max() - groups.min()) / 2
        out = {}
        for name in names:
            out[name] = mean[name]
            if len(self.seeds) > 1 and spread[name].max() > 0:
                out[f"{name} ±"] = spread[name]
        return pd.DataFrame(out)

    def _by_requests(self, by: str) -> pd.DataFrame:
        window = self.runs[["policy", "seed", "measure_start_s", "measure_end_s"]]
        requests = self.requests.merge(window, on=["policy", "seed"])
        requests = requests[requests["arrival_s"].between(requests["measure_start_s"], requests["measure_end_s"])].copy()
        requests[by] = requests[by].fillna("(base)") if by == "adapter" else requests[by]
        groups = requests.groupby(["policy", by], sort=False)
        return pd.DataFrame(
            {
                "requests": groups.size(),
                "attainment": groups["met"].mean(),
                "ttft_p50_s": groups["ttft_s"].quantile(0.5, interpolation="higher"),
                "ttft_p99_s": groups["ttft_s"].quantile(0.99, interpolation="higher"),
                "itl_max_s": groups["itl_max_s"].max(),
                "output_tokens": groups["output_tokens"].sum(),
            }
        )

    def _frames(self, name: str) -> pd.DataFrame:
        frames = [getattr(self.replays[key], name).assign(policy=key[0], seed=key[1]) for key in self._keys()]
        return pd.concat(frames, ignore_index=name != "requests")

    def _keys(self) -> list[tuple[str, int]]:
        return [(label, seed) for label in self.labels for seed in self.seeds if (label, seed) in self.replays]

    @property
    def requests(self) -> pd.DataFrame:
        """The request rows of all runs, with `policy` and `seed`."""
        return self._frames("requests").reset_index()

    @property
    def jobs(self) -> pd.DataFrame:
        """The job tables of all runs (`Replay.job_table`), with `policy` and `seed`."""
        frames = [self.replays[key].job_table().reset_index().assign(policy=key[0], seed=key[1]) for key in self._keys()]
        return pd.concat(frames, ignore_index=True)

    @property
    def events(self) -> pd.DataFrame:
        """The event rows of all runs, with `policy` and `seed`."""
        return self._frames("events")

    @property
    def steps(self) -> pd.DataFrame:
        """The step rows of all runs, with `policy` and `seed`."""
        return self._frames("steps")

    @property
    def caption(self) -> str:
        """What a figure of this comparison has to say: n, seeds and what they redraw, window, executor, device.

        And of simulated results the model's errors on attainment and throughput.
        """
        runs = self.runs
        low, high = int(runs["requests"].min()), int(runs["requests"].max())
        n = f"{low}" if low == high else f"{low}–{high}"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"
        drawn = f" (redrawn: {', '.join(self.redrawn) or 'nothing'}; bars and bands: range)" if len(self.seeds) > 1 else ""
        start_s, end_s = runs["measure_start_s"].min(), runs["measure_end_s"].max()
        window = "–".join(f"{s:.0f}" if s >= 10 else f"{s:.2g}" for s in (start_s, end_s)) + " s"
        firsts = {label: self.replays[label, seed].executor for label, seed in reversed(self._keys())}
        hows = {label: how(firsts[label], *JUDGED) for label in self.labels if label in firsts}
        said = "; ".join(f"{label}: {text}" for label, text in hows.items()) if len(set(hows.values())) > 1 else next(iter(hows.values()))
        flag = "; saturated" if runs["saturated"].any() else ""
        text = f"{self.trace_name}: n = {n} requests a run, {seeds}{drawn}, window {window}{flag}; {said}"
        return "; ".join([text, *self.notes])

    def plot(self) -> Any:
        """SLO attainment and throughput by policy, beside each other; returns the matplotlib figure."""
        from workbench import plots

        return plots.overview(self.runs, caption=self.caption, slo=self.slo)

    def difference(
        self,
        a: Any,
        b: Any,
        *,
        metric: str = "attainment",
        over: Literal["seeds", "blocks"] = "seeds",
        block_s: float | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
    ) -> Difference:
        """`metric` of policy `a` less that of `b` (policies, or their labels), with an interval; printed, it is a sentence.

        Paired, since both saw the same traces. "seeds": the mean over seeds of the difference (`statistics.mean_interval`). "blocks":
        stretches of `block_s` seconds on average of the window are redrawn, the same for both (stationary bootstrap; None: a length
        from the differences' own correlation), which needs one seed only and speaks for this trace alone.
        Raises ValueError with one seed and over="seeds", where the seeds redraw nothing, or for an unknown policy or metric.
        """
        from workbench.experiments.differences import difference

        return difference(self, a, b, metric, over, block_s, confidence, resamples)

    def differences(
        self,
        primary: tuple[Any, Any],
        *,
        metric: str = "attainment",
        rest: Sequence[tuple[Any, ...]] | None = None,
        over: Literal["seeds", "blocks"] = "seeds",
        confidence: float = 0.95,
    ) -> pd.DataFrame:
        """The primary difference (a, b), named before looking, and the rest with p-values adjusted by Holm (`p_adjusted`).

        `rest` holds pairs (a, b), or (a, b, metric); None: every other policy against `b`. Intervals are not adjusted.
        """
        from workbench.experiments.differences import differences

        return differences(self, primary, metric, rest, over, confidence)

    def _repr_html_(self) -> str:
        """The table, with the percentiles greyed that rest on fewer than ten requests."""
        table = self.table()
        few = (table["requests"] < FEW_REQUESTS) if "requests" in table else pd.Series(False, index=table.index)

        def grey(column: pd.Series) -> list[str]:
            is_tail = "_p99_" in str(column.name)
            return ["color: #999999" if is_tail and few[i] else "" for i in column.index]

        styled = table.style.format("{:.4g}").apply(grey)
        notes = [f"Greyed: a p99 of fewer than {FEW_REQUESTS:,} requests rests on fewer than ten of them."] if few.any() else []
        shown = [metric for metric in METRICS if metric in table]
        notes += [f"Simulated; {said}."] if (said := errors_said(self._executors(), *shown)) else []
        return styled.set_caption(html.escape(" ".join(notes))).to_html() if notes else styled.to_html()

    def __repr__(self) -> str:
        text = f"Comparison({', '.join(self.labels)} on {self.trace_name}, {len(self.replays)} replays)"
        said = errors_said(self._executors(), "attainment")
        return f"{text}\nsimulated; {said}" if said else text

    def save(self, folder: str | Path) -> Path:
        """Every replay with its own provenance in a folder of its own, and `comparison.json` beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        for number, (label, seed) in enumerate(self.order or self._keys()):
            self.replays[label, seed].save(folder / f"run-{number:03d}")
            runs.append({"policy": label, "seed": seed, "folder": f"run-{number:03d}"})
        provenance = [getattr(self.replays[key], "provenance", None) for key in self._keys()][:1]
        record = {
            "format": 1,
            "labels": self.labels,
            "seeds": self.seeds,
            "trace_name": self.trace_name,
            "redrawn": self.redrawn,
            "notes": self.notes,
            "runs": runs,
            "provenance": [asdict(p) | {"versions": dict(p.versions)} for p in provenance if p is not None],
        }
        (folder / COMPARISON_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return folder

    def bundle(self, folder: str | Path, *, differences: Sequence[Difference] = ()) -> Path:
        """Rows, tables, `differences` and checksums in a new folder: `python -m workbench.verify folder` makes every table again."""
        from workbench.experiments.bundle import bundle_comparison

        return bundle_comparison(self, folder, differences)

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """What `save` wrote. Raises FileNotFoundError without a comparison there."""
        from workbench.results.replay import load_replay

        folder = Path(folder)
        if not (folder / COMPARISON_FILE).is_file():
            raise FileNotFoundError(
                f"a comparison folder must hold {COMPARISON_FILE}, got {str(folder)!r}. Pass the folder given to save()."
            )
        record = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
        order = tuple((run["policy"], run["seed"]) for run in record["runs"])
        replays = {key: load_replay(folder / run["folder"]) for key, run in zip(order, record["runs"], strict=True)}
        values = {name: tuple(record[name]) for name in ("labels", "seeds", "redrawn", "notes")}
        return cls(replays=replays, trace_name=record["trace_name"], order=order, **values)
