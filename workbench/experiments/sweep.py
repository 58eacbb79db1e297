"""`sweep`: policies x parameters x anything else that a run takes, in parallel, each run once and kept by its content.

A run is one policy on one trace and one executor with one seed. Its key is the content of all of them and of the code that runs it, so
a sweep that is started again, after Ctrl-C, a crash or with one more value, computes only what is missing.
"""

import html
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd

from workbench.config import did_you_mean, require
from workbench.experiments.compare import window_of
from workbench.experiments.content_key import is_installed
from workbench.experiments.differences import label_of, over_seeds
from workbench.experiments.run_cache import REPLAY_FOLDER, RunCache, plain
from workbench.experiments.statistics import RESAMPLES, Difference
from workbench.experiments.sweep_plan import Run, SweepPlan, variants_of
from workbench.model_error import METRICS, labelled, with_error

Result = tuple[str, dict[str, Any], dict[str, bytes]]
"""Of one run: its key, its row, and the files of its replay where they are kept."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs of a sweep.

    `frame`: a row per run; `redrawn` names what its seeds redraw; `policies`: every policy by its label, parameters included;
    `interrupted`: Ctrl-C came before the last. What simulated it, and how wrong that is, stands in `frame.attrs` and so below its figures.
    """

    frame: pd.DataFrame
    axes: tuple[str, ...]
    redrawn: tuple[str, ...]
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    policies: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cache: RunCache | None = field(default=None, repr=False)
    files: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict, repr=False)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The policies' labels, parameters included, in order."""
        return tuple(dict.fromkeys(self.frame["policy"]))

    def replay(self, run: str) -> Any:
        """The replay of a run (its id, from the column `run`). Raises ValueError for another id, or if replays were not kept."""
        from workbench.results.replay import load_replay

        known = self.frame["run"].tolist()
        if run not in known:
            raise ValueError(f"run must be an id of this sweep, got {run!r}. {did_you_mean(run, known)}")
        if self.cache is not None and (folder := self.cache.place(run) / REPLAY_FOLDER).is_dir():
            return load_replay(folder)
        require(run in self.files, "a replay must have been kept", run, "Call sweep(..., replays=True); cached runs are then completed.")
        with tempfile.TemporaryDirectory() as name:
            for file, content in self.files[run].items():
                (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(name) / file).write_bytes(content)
            return load_replay(name)

    def where(self, **values: Any) -> pd.DataFrame:
        """The rows whose axes have these values. Raises ValueError for another column."""
        rows = self.frame
        for name, value in values.items():
            if name not in rows.columns:
                raise ValueError(f"where takes columns of the frame, got {name!r}. {did_you_mean(name, list(rows.columns))}")
            rows = rows[rows[name] == value]
        return rows

    def difference(
        self, a: Any, b: Any, *, metric: str = "attainment", confidence: float = 0.95, resamples: int = RESAMPLES, **where: Any
    ) -> Difference:
        """`Comparison.difference` over seeds, at one cell of the other axes: `difference(a, b, load=2.0)`.

        Raises ValueError if an axis is left open, so that seeds of different cells would be mixed.
        """
        rows = self.where(**where)
        a, b = (label_of(p, self.labels) for p in (a, b))
        pair = rows[rows["policy"].isin([a, b])]
        still_open = [name for name in self.axes if name not in where and pair.groupby("policy")[name].nunique(dropna=False).gt(1).any()]
        require(not still_open, "a difference is at one cell; these axes have several values", still_open, "Name a value for each.")
        return over_seeds(pair, a, b, metric, self.redrawn, confidence, resamples)

    def best(
        self,
        metric: str,
        *,
        by: str | Sequence[str],
        least: bool = False,
        at_least: Mapping[str, float] | None = None,
        **where: Any,
    ) -> pd.DataFrame:
        """For every value of `by`, the policy with the best mean over seeds, and `tried`: among how many settings, runs and seeds.

        Tuning: sweep on one slice with the same number of settings for every policy, then report results of another slice.
        `at_least` bounds other metrics, `{"attainment": 0.99}`: the best is taken among settings whose means reach them, and
        their means are columns. Where no setting does, it is the one that falls short of them least (by the largest relative
        shortfall), and the column `reached` is False.
        """
        by, bounds = [by] if isinstance(by, str) else list(by), dict(at_least or {})
        groups = self.where(**where).groupby([*by, "policy"], sort=False, dropna=False)
        settings = groups[list(dict.fromkeys([metric, *bounds]))].mean().assign(runs=groups.size()).reset_index()
        short = pd.DataFrame({name: (bound - settings[name]).clip(lower=0) / abs(bound or 1.0) for name, bound in bounds.items()})
        settings["_short"] = short.max(axis=1) if bounds else 0.0
        ordered = settings.sort_values(["_short", metric], ascending=[True, least], kind="stable")
        best = ordered.groupby(by, sort=False, dropna=False).first()
        tried = settings.groupby(by, sort=False, dropna=False)["policy"].nunique()
        reached = {"reached": best["_short"] == 0} if bounds else {}
        return best.drop(columns="_short").assign(tried=tried, **reached)

    def bundle(self, folder: str | Path) -> Path:
        """The frame and all replays in a new folder that `python -m workbench.verify` can check. Needs `replays=True`."""
        from workbench.experiments.bundle import bundle_sweep

        return bundle_sweep(self, folder)

    def model_error(self, metric: str = "attainment") -> str:
        """How far the latency models that ran it were from measured replays in a metric, in words; empty where nothing was simulated."""
        return with_error("", self.frame, metric)

    def __repr__(self) -> str:
        text = f"Sweep({len(self.frame)} runs, axes: {', '.join(self.axes) or 'none'}, interrupted={self.interrupted})"
        return f"{text}\nsimulated; {said}" if (said := self.model_error()) else text

    def _repr_html_(self) -> str:
        said = with_error("", self.frame, *(metric for metric in METRICS if metric in self.frame))
        table: str = self.frame._repr_html_()  # type: ignore[operator]
        return f"{table}<p>Simulated; {html.escape(said)}.</p>" if said else table


def sweep(
    policies: Sequence[Any],
    *,
    trace: Any,
    executor: Any,
    planning: str | float,
    jobs: Any = (),
    slo: Any = None,
    seeds: Iterable[int] = range(1),
    parameters: Mapping[str, Sequence[Any]] | None = None,
    axes: Mapping[str, Sequence[Any] | Mapping[str, Any]] | None = None,
    measure: tuple[float, float] | None = None,
    lengths: Any = "max",
    until: Any = None,
    overlap: bool = False,
    evict: Any = None,
    cache: str | Path | None = None,
    replays: bool = False,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Replay every combination of policy, `parameters`, `axes` and seed.

    `parameters` maps fields of policies to values; a policy that has such a field is run with each. `axes` maps names to values (or to
    labels with values). An axis named like an argument of a run (`trace`, `executor`, `jobs`, `slo`, `planning`, `lengths`, `measure`,
    `until`, `overlap`, `evict`) is that argument; any other is passed, like `seed`, to whichever of trace, executor, jobs and slo is a
    function with a parameter of that name: `trace=lambda seed, load, adapters: ...`, `executor=lambda max_requests: ...`.

    Runs go through joblib: `n_jobs=-1` uses every core of this machine (loky), and inside `joblib.parallel_config(backend="dask")` the same
    call uses a dask cluster, of which workers may die. Real executors are run here, one at a time, the order of policies turning with
    every seed. `planning` must be given: measured times depend on what runs beside. `cache` is a folder for results by content; with
    `replays` the whole replays are kept too. A run that fails becomes a row with `error`, and a warning; it is not kept. Ctrl-C gives
    the runs so far.
    Raises ValueError for an axis that nothing takes, a parameter that no policy has, or equal labels.
    """
    options = {"planning": planning, "lengths": lengths, "measure": measure, "until": until, "overlap": overlap, "evict": evict}
    arguments = {"trace": trace, "executor": executor, "jobs": jobs, "slo": slo} | options
    plan = SweepPlan(variants_of(policies, parameters or {}), arguments, dict(axes or {}), tuple(seeds), keyed=cache is not None)
    store = None if cache is None else RunCache(Path(cache))
    runs = plan.runs()
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        found = store.read(run.key, replay=replays) if store is not None else None
        if found is not None:
            rows[run.key] = {"cached": True, "error": None, **found}
    missing = list({run.key: run for run in runs if run.key not in rows}.values())
    files: dict[str, dict[str, bytes]] = {}
    interrupted = False
    results = _serial(missing, replays) if plan.is_real else _parallel(missing, replays, n_jobs)
    try:
        with _bar(len(missing), len(rows), progress) as bar:
            for key, row, kept in results:
                bar.update()
                if row.get("interrupted"):
                    interrupted = True
                    break
                rows[key] = {"cached": False} | row
                if store is not None and row["error"] is None:
                    store.write(key, {k: v for k, v in row.items() if k != "error"}, kept)
                elif kept:
                    files[key] = kept
    except KeyboardInterrupt:
        interrupted = True
    finally:
        results.close()
    frame = pd.DataFrame([{"run": r.key, **r.columns, **rows[r.key]} for r in runs if r.key in rows])
    labelled(frame, [r.arguments["executor"].info for r in runs if r.key in rows])
    _warn_of_errors(frame)
    return Sweep(
        frame=frame,
        axes=plan.axes_names,
        redrawn=plan.redrawn,
        notes=plan.notes,
        interrupted=interrupted,
        policies={label: policy for label, _, _, policy in plan.variants},
        cache=store,
        files=files,
    )


def _serial(runs: Sequence[Run], replays: bool) -> Generator[Result, None, None]:
    for run in runs:
        yield run_one(run, replays)


def _parallel(runs: Sequence[Run], replays: bool, n_jobs: int | None) -> Generator[Result, None, None]:
    """Results as they come."""
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.parallel import get_active_backend

    if not runs:
        return
    backend, wanted = get_active_backend()[0], cast(int, n_jobs)
    shares_memory = effective_n_jobs(wanted) > 1 and getattr(backend, "supports_sharedmem", False)
    require(
        not shares_memory, "runs need processes of their own, for an executor is no thread's alone", type(backend).__name__, 'Use "loky".'
    )
    # joblib's annotations know neither generators nor a batch size in numbers
    work: Any = Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)  # type: ignore[arg-type]
    results = work(delayed(run_shipped)(_Shipped(run), replays) for run in runs)
    try:
        yield from results
    finally:
        results.close()


class _Shipped:
    """A run that is pickled only if it leaves this process.

    Unpickling a notebook's class where it lives would tie its methods to copies of their globals. No weak reference to this can be
    made, so that joblib does not scatter it over a cluster, where it would be lost with a worker.
    """

    __slots__ = ("run",)

    def __init__(self, run: Run) -> None:
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return _unshipped, (pickled(self.run),)


def _unshipped(payload: bytes) -> _Shipped:
    import cloudpickle

    return _Shipped(cloudpickle.loads(payload))


def pickled(run: Run) -> bytes:
    """A run for another process. Classes from notebooks and from the user's own files travel whole: a worker may lack the file."""
    import cloudpickle

    names = {type(v).__module__ for v in (run.policy, run.arguments["executor"])} | {getattr(run.policy, "__module__", "__main__")}
    own = [sys.modules[name] for name in names if name in sys.modules and name != "__main__" and not is_installed(name)]
    own = [module for module in own if not module.__name__.startswith("workbench.")]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(run)
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def run_shipped(shipped: _Shipped, replays: bool) -> Result:
    """`run_one`, here or in a worker."""
    return run_one(shipped.run, replays)


def run_one(run: Run, replays: bool) -> Result:
    """Key, row (the summary, or an error) and the files of the replay, where they are kept."""
    from workbench.replay import ReplayError, replay

    arguments = dict(run.arguments)
    trace = arguments.pop("trace")
    arguments["measure"] = arguments["measure"] or window_of(trace)
    try:
        result = replay(trace, policy=run.policy, seed=run.seed, progress=False, **arguments)
    except ReplayError as error:
        return run.key, {"error": str(error)}, {}
    row = {"error": None} | plain(dict(result.summary()))
    if not replays or result.interrupted:
        return run.key, row, {}
    with tempfile.TemporaryDirectory() as name:
        result.save(name)
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        return run.key, row, {file.relative_to(name).as_posix(): file.read_bytes() for file in files}


def _bar(num: int, num_cached: int, progress: bool) -> Any:
    """A bar with the runs left and the time that they will take."""
    from tqdm.auto import tqdm

    return tqdm(total=num, disable=not progress, desc=f"sweep ({num_cached} cached)", unit="run", leave=False, smoothing=0.1)


def _warn_of_errors(frame: pd.DataFrame) -> None:
    if "error" not in frame.columns or not frame["error"].notna().any():
        return
    wrong = frame[frame["error"].notna()]
    warnings.warn(
        f"{len(wrong)} of {len(frame)} runs failed; the first ({wrong['policy'].iloc[0]}): {wrong['error'].iloc[0]}", stacklevel=3
    )
