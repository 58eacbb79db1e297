"""`compare`: the same traces under several policies, run so that the difference is the policy's.

Every policy sees the same trace of a seed (a paired comparison), in a fresh copy of itself. On a real executor the order of policies
turns round with every seed (A B B A ...), so that a drift of the machine does not favour one of them.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import metrics
from workbench.config import SLO, FinetuneJob, did_you_mean, require
from workbench.policy import policy_label

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
GROUPS = ("adapter", "tenant", "slo_class", "outcome")


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

    @property
    def executor(self) -> Any:
        return next(iter(self.replays.values())).executor

    @property
    def slo(self) -> metrics.SLOs:
        return next(iter(self.replays.values())).slo

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: policy, seed and every number of `metrics.summary`, policies in the order given."""
        return pd.DataFrame(
            [
                {"policy": label, "seed": seed} | dict(self.replays[label, seed].summary())
                for label in self.labels
                for seed in self.seeds
                if (label, seed) in self.replays
            ]
        )

    def table(self, by: str = "policy", columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Results by policy, seed, or a column of the requests (`adapter`, `tenant`, `slo_class`, `outcome`).

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
    def events(self) -> pd.DataFrame:
        """The event rows of all runs, with `policy` and `seed`."""
        return self._frames("events")

    @property
    def steps(self) -> pd.DataFrame:
        """The step rows of all runs, with `policy` and `seed`."""
        return self._frames("steps")

    @property
    def caption(self) -> str:
        """What a figure of this comparison has to say: n, seeds and what they redraw, executor, device, simulated or not, window."""
        runs, info = self.runs, self.executor
        low, high = int(runs["requests"].min()), int(runs["requests"].max())
        n = f"{low}" if low == high else f"{low}–{high}"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"
        drawn = f" (redrawn: {', '.join(self.redrawn) or 'nothing'}; bars and bands: range)" if len(self.seeds) > 1 else ""
        window = f"{runs['measure_start_s'].min():.0f}–{runs['measure_end_s'].max():.0f} s"
        how = f"simulated by {info.name} fitted on" if info.simulated else f"measured on {info.name},"
        flag = "; saturated" if runs["saturated"].any() else ""
        text = f"{self.trace_name}: n = {n} requests a run, {seeds}{drawn}, window {window}{flag}; {how} {info.device}"
        return "; ".join([text, *self.notes])

    def plot(self) -> Any:
        """SLO attainment and throughput by policy, beside each other; returns the matplotlib figure."""
        from workbench import plots

        return plots.overview(self.runs, caption=self.caption, slo=self.slo)

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format=lambda v: f"{v:.4g}")

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

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """What `save` wrote. Raises FileNotFoundError without a comparison there."""
        from workbench.replay_result import load_replay

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


def compare(
    policies: Sequence[Callable[..., None]],
    *,
    trace: Any,
    executor: Any,
    jobs: Sequence[FinetuneJob] = (),
    slo: SLO | Mapping[str, SLO] | None = None,
    seeds: Iterable[int] = range(1),
    planning: str | float = "measured",
    measure: tuple[float, float] | None = None,
    lengths: Any = "max",
    until: Any = None,
    interleave: bool | None = None,
    progress: bool = True,
) -> Comparison:
    """Replay the trace under every policy and seed; `trace` is a Trace, or a function seed -> Trace that redraws it.

    `measure` is the window in which tokens count, the same for all policies: (0, the trace's last arrival) unless given, so that a
    policy gains nothing by a longer drain. `planning`, `lengths` and `until` are `replay`'s. `interleave` turns the order of policies
    round with every seed; None: on real executors. Policies keep their order and are deep-copied for each run. Ctrl-C ends the
    comparison with the runs done so far.
    Raises ValueError for no policy, no seed, or two policies with one label.
    """
    labels, seeds = tuple(policy_label(p) for p in policies), tuple(seeds)
    require(len(labels) > 0, "policies must name at least one policy", policies)
    require(len(seeds) > 0, "seeds must hold at least one seed", seeds)
    require(len(set(labels)) == len(labels), "policies must differ in their repr", list(labels), "Change a field, or the class's name.")
    simulated = executor.info.simulated
    order = run_order(labels, seeds, interleave=not simulated if interleave is None else interleave)
    of_label = dict(zip(labels, policies, strict=True))
    traces = {seed: trace(seed) if callable(trace) else trace for seed in seeds}
    options = {"executor": executor, "jobs": jobs, "slo": slo, "planning": planning, "lengths": lengths, "until": until}
    replays = _run_all(order, of_label, traces, measure, options, progress)
    first = traces[seeds[0]]
    redrawn = tuple(getattr(first, "redrawn", ())) if callable(trace) else ()
    return Comparison(
        labels=labels,
        seeds=seeds,
        replays=replays,
        trace_name=getattr(first, "name", "trace"),
        redrawn=(*redrawn, *(getattr(executor, "redrawn", ()) if simulated else ("the machine's own noise",))),
        notes=tuple(getattr(first, "notes", ())),
        order=tuple(key for key in order if key in replays),
    )


def run_order(labels: Sequence[str], seeds: Sequence[int], *, interleave: bool) -> tuple[tuple[str, int], ...]:
    """(label, seed) in the order of running: A B, or with `interleave` A B for the first seed, B A for the second, and so on."""
    turn = [labels if not (interleave and i % 2) else labels[::-1] for i in range(len(seeds))]
    return tuple((label, seed) for seed, order in zip(seeds, turn, strict=True) for label in order)


def _run_all(
    order: Sequence[tuple[str, int]],
    policies: Mapping[str, Any],
    traces: Mapping[int, Any],
    measure: tuple[float, float] | None,
    options: Mapping[str, Any],
    progress: bool,
) -> dict[tuple[str, int], Any]:
    from tqdm.auto import tqdm

    from workbench.replay import replay

    replays: dict[tuple[str, int], Any] = {}
    with tqdm(order, disable=not progress, desc="replays", leave=False) as bar:
        for label, seed in bar:
            bar.set_postfix_str(f"{label}, seed {seed}"[:60])
            policy, trace = copy.deepcopy(policies[label]), traces[seed]
            result = replay(trace, policy=policy, seed=seed, measure=measure or window_of(trace), **options)
            replays[label, seed] = result
            if result.interrupted:
                break
    return replays


def window_of(trace: Any) -> tuple[float, float] | None:
    """(0, last arrival) of a trace; None, the whole replay, for one whose requests all arrive at once."""
    last = float(trace.frame["arrival_s"].max()) if len(trace) else 0.0
    return (0.0, last) if last > 0 else None
