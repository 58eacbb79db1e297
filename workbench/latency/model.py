"""`LatencyModel`: an executor that predicts the duration of a batch from steps that an engine measured.

It runs the same serving loop, policies and ledger as an engine, in microseconds a step and without a GPU. A policy sees what such a step
usually lasts (`predict`); the clock advances by that times a recorded residual, so that what a policy predicts is not what happens.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, replace
from datetime import UTC, datetime
from operator import add, mul
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import data, features
from workbench.config import FinetuneJob, UnknownAdapterError, did_you_mean, require
from workbench.core import BUCKETS, AdapterInfo, Batch, Command, ExecutorInfo, Predictor, Request, StepResult, resolved
from workbench.features import INDEX, NAMES, Work
from workbench.latency.costs import MANY, CostModel, perturbed
from workbench.latency.fit import ErrorReport, check_executor, error_report, fit_costs, held_out_mask, is_outside, spread_out, step_arrays
from workbench.latency.residuals import Residuals, Stream, class_of
from workbench.latency.stalls import Stalls, StallStream
from workbench.latency.terms import Padding
from workbench.latency.whole_replays import REPLAYS_FILE, ReplayErrors
from workbench.loop.tiers import AdapterSpec, check_tiers, infos_of

PROFILES = Path(__file__).parents[2] / "profiles"
MODEL_FILE, STEPS_FILE = "model.json", "steps.parquet"
FORMAT = 2
DEFAULT_RANK = 8
STEPS_OF_A_REPLAY = 300  # of hundreds to thousands, which have no more to say about a few costs
ANY_VOCABULARY = 1_000_000  # only sizes matter here: without a tokenizer no token id is refused for its value


class LatencyModel:
    """Predicts what a batch costs on the device whose steps it was fitted to. Make one with `fit` or `load`.

    `adapters`: the adapters that requests may name (names, or the infos of an engine); None accepts every name, at rank 8. `info` holds
    the limits that the ledger accounts against: an engine's own, or others by `with_limits`. `tokenizer` is needed only for jobs
    whose data is text and not yet token ids, and for text prompts to find their prefixes in the cache. `replays` holds whole replays of
    an engine beside this model's, where anyone made them (`with_replays`): their errors are said beside every simulated result.
    """

    redrawn = ("residuals",)  # what differs from seed to seed on one trace

    def __init__(
        self,
        costs: CostModel,
        steps: pd.DataFrame,
        *,
        info: ExecutorInfo,
        report: ErrorReport,
        provenance: Mapping[str, Any],
        adapters: Mapping[str, AdapterInfo | AdapterSpec] | Iterable[str] | None = None,
        vocab_size: int | None = None,
        tokenizer: Callable[..., Any] | None = None,
        noise: float = 0.0,
        seen: CostModel | None = None,
        replays: ReplayErrors | None = None,
        stalls: Stalls | None = None,
        residuals: Residuals | None = None,
    ) -> None:
        """`residuals`: those of these steps by these costs, where they are known already."""
        self.costs, self.report, self.provenance = costs, report, dict(provenance)
        self._extra_noise, self._seen, self.stalls = noise, seen, stalls
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or (len(tokenizer) if isinstance(tokenizer, Sized) else ANY_VOCABULARY)
        devices = sorted({p.device for p in replays.predictions} - {info.device}) if replays is not None else []
        require(not devices, f"replays must be measured on the model's device, {info.device}", devices)
        self.replays = replays
        said = (replays or ReplayErrors(())).brief(report.mape, self.provenance.get("changed", ()))
        self._info = replace(info, simulated=True, model_error=said)
        self._steps = steps
        values, duration = step_arrays(steps)
        self._largest = values.max(axis=0)
        self._noise = residuals or Residuals(values, duration / costs.predict_all(values) - 1.0)
        loads = values[:, INDEX["loads"]].sum()
        self._bytes = int(values[:, INDEX["load_bytes"]].sum() / loads) if loads else 0
        self._open = adapters is None
        self._declared = _infos(adapters or {}, self._bytes)
        self._adapters = dict(self._declared)
        self._prepared: dict[int, tuple[FinetuneJob, data.PreparedJob]] = {}
        self._jobs: dict[str, tuple[FinetuneJob, data.PreparedJob]] = {}
        self._draw: Stream | None = None
        self._stall: StallStream | None = None

    # Making one

    @classmethod
    def fit(
        cls,
        steps: Any,
        *,
        info: ExecutorInfo | None = None,
        adapters: Mapping[str, AdapterInfo] | Iterable[str] | None = None,
        vocab_size: int | None = None,
        tokenizer: Callable[..., Any] | None = None,
        commit: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "LatencyModel":
        """Fit to measured steps: a replay on an engine, its `.steps` frame, or a list of either.

        `report` holds the error on steps that were held out (one block of ten in five); the costs are then fitted to all of them.
        `provenance`: where the steps come from, if not from this machine now. What the executor pads to is taken from its limits.
        Raises ValueError without `info` (a replay brings its own), with too few steps, and with simulated ones.
        """
        first = steps[0] if isinstance(steps, Sequence) and len(steps) else steps
        info = info or getattr(first, "executor", None)
        if info is None:
            raise ValueError("a latency model needs the executor's limits, got a frame of steps alone. Pass info=engine.info.")
        require(not info.simulated, "steps must be measured by an engine, not simulated", info.name)
        values, duration = step_arrays(steps)
        held = held_out_mask(len(duration))
        judged = held if held.any() else np.ones(len(duration), bool)
        padding = Padding.of(info)
        part = fit_costs(values[~held], duration[~held], padding)
        report = error_report(part, values[judged], duration[judged], values[~held].max(axis=0), held_out=bool(held.any()))
        frame = pd.DataFrame(values, columns=list(NAMES)).assign(duration_s=duration)
        return cls(
            fit_costs(values, duration, padding),
            frame,
            info=replace(info, name=f"LatencyModel({info.name})"),
            report=report,
            provenance=_provenance(info, len(duration), commit) if provenance is None else provenance,
            adapters=adapters,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )

    @classmethod
    def load(cls, name_or_path: str | Path, *, tokenizer: Callable[..., Any] | None = None) -> "LatencyModel":
        """A saved model: a folder, or the name of a profile that ships in `profiles/`. Raises FileNotFoundError with what there is."""
        folder = Path(name_or_path)
        if not (folder / MODEL_FILE).is_file():
            folder = PROFILES / str(name_or_path)
        if not (folder / MODEL_FILE).is_file():
            known = sorted(p.parent.name for p in PROFILES.glob(f"*/{MODEL_FILE}"))
            raise FileNotFoundError(
                f"no latency model in the folder or profile {str(name_or_path)!r}. {did_you_mean(str(name_or_path), known)} "
                "Or fit one: LatencyModel.fit(replay)."
            )
        record = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            raise ValueError(
                f"{folder / MODEL_FILE}: format must be {FORMAT}, got {record.get('format')!r}. Measure it again (engine.calibrate() and "
                "save; scripts/measure_profile.py for a profile), or fit its own steps again: scripts/refit_profile.py."
            )
        info = ExecutorInfo(**_sets(record["info"]))
        report = record["report"] | {"by_class": {name: tuple(v) for name, v in record["report"]["by_class"].items()}}
        adapters, padding = _adapters(record), Padding.of(info)
        return cls(
            CostModel.of_terms(record["costs"], padding),
            pd.read_parquet(folder / STEPS_FILE),
            info=info,
            report=ErrorReport(**report),
            provenance=record["provenance"],
            adapters=adapters,
            vocab_size=record["vocab_size"],
            tokenizer=tokenizer,
            noise=record.get("noise", 0.0),
            seen=None if record.get("seen_costs") is None else CostModel.of_terms(record["seen_costs"], padding),
            stalls=None if record.get("stalls") is None else Stalls(**record["stalls"] | {"seconds": tuple(record["stalls"]["seconds"])}),
            replays=ReplayErrors.read(folder / REPLAYS_FILE) if (folder / REPLAYS_FILE).is_file() else None,
        )

    def save(self, folder: str | Path) -> Path:
        """Write `model.json` (costs, limits, error, provenance) and `steps.parquet` (the measured steps) into `folder`.

        And `replays.csv` (whole replays, measured and simulated), where there are any; an older one is removed where there are none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        info = asdict(self._info) | {"can": sorted(self._info.can), "eos_token_ids": sorted(self._info.eos_token_ids)}
        del info["model_error"]  # made again from the replays
        record = {
            "format": FORMAT,
            "costs": self.costs.by_term(),
            "info": info,
            "report": asdict(self.report),
            "adapters": None if self._open else {name: asdict(v) for name, v in self._declared.items()},
            "vocab_size": self.vocab_size,
            "provenance": self.provenance,
            "noise": self._extra_noise,
            "seen_costs": None if self._seen is None else self._seen.by_term(),
            "stalls": None if self.stalls is None else asdict(self.stalls),
        }
        (folder / MODEL_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._steps.to_parquet(folder / STEPS_FILE, compression="zstd")
        if self.replays is None:
            (folder / REPLAYS_FILE).unlink(missing_ok=True)
        else:
            self.replays.save(folder / REPLAYS_FILE)
        return folder

    def refit(self, replays: Iterable[Any], *, most: int = STEPS_OF_A_REPLAY) -> "LatencyModel":
        """Fitted anew, to its own steps and to those of measured replays: of each at most `most`, spread evenly over its time.

        A calibration has a few steps of every size, one after another as they come; a replay has hundreds of the sizes that a policy makes
        under load. Limits, adapters and stalls stay. Errors over whole replays are dropped: they were another fit's, and of replays that
        this one has seen no error says anything. The provenance counts them under "refitted_to", by policy and commit.
        Raises ValueError for a perturbed model, for simulated replays and for those of another device or padding.
        """
        replays = list(replays)
        require("perturbed" not in self.provenance, "a model must be as fitted to be fitted anew", self._info.name, "Perturb it later.")
        require(len(replays) > 0, "a refit needs at least one measured replay", len(replays))
        for measured in replays:
            check_executor(self._info, measured.executor)
        frames = [self._steps, *(spread_out(one.steps, most) for one in replays)]
        seen = Counter(f"{one.policy} at {one.provenance.commit}" for one in replays) + Counter(self.provenance.get("refitted_to", {}))
        made = {"steps": sum(map(len, frames)), "refitted_to": dict(seen)}
        refitted = LatencyModel.fit(
            frames,
            info=replace(self._info, simulated=False, name=self.provenance.get("executor", self._info.name)),
            adapters=None if self._open else self._declared,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            provenance={name: value for name, value in self.provenance.items() if name != "changed"} | made,
        )
        return refitted if self.stalls is None else refitted._changed(refitted.costs.by_term(), stalls=self.stalls)

    def with_replays(self, measured: Any, simulated: Any = None, *, date: str | None = None) -> "LatencyModel":
        """This model with its errors over whole replays, said from now on beside every result that it simulates, instead of earlier ones.

        `measured` and `simulated` are replays of the same requests, policies, jobs, seeds and targets on an engine and on this model: two
        Replays, two Comparisons, or two lists of Replays in the same order; or one `ReplayErrors`. The fit should not have seen them.
        `date`: when they were measured. Raises ValueError where the two differ in anything but the executor.
        """
        if isinstance(measured, ReplayErrors):
            require(simulated is None, "ReplayErrors hold what was simulated already", type(simulated).__name__)
            errors = measured
        else:
            require(simulated is not None, "measured replays need simulated ones beside them", simulated, "Replay them on this model.")
            errors = ReplayErrors.of(measured, simulated, date=date)
        provenance = {name: value for name, value in self.provenance.items() if name != "changed"}
        return self._changed(self.costs.by_term(), replays=errors, provenance=provenance)

    def with_limits(self, **changes: Any) -> "LatencyModel":
        """The same costs under other limits, e.g. `with_limits(max_requests=64, num_blocks=4096)`: fields of `ExecutorInfo`.

        Raises ValueError for what an executor pads to: costs were measured at it.
        """
        for name in BUCKETS:
            own = getattr(self._info, name)
            require(
                changes.get(name, own) == own, f"{name} must be as they were when the steps were measured", changes.get(name), "Fit again."
            )
        info = replace(self._info, **changes)
        provenance = self.provenance if info == self._info else self._since("limits")
        return self._changed(self.costs.by_term(), info=info, provenance=provenance)

    def with_adapters(
        self,
        adapters: Mapping[str, AdapterSpec | AdapterInfo],
        *,
        host_bytes: int | None = None,
        read_s: float = 0.0,
        read_s_per_byte: float = 0.0,
        load_s: float | None = None,
        load_s_per_byte: float | None = None,
    ) -> "LatencyModel":
        """The same device serving these adapters, which need no files: `{"adapter-0": AdapterSpec(8, 42_000_000, "disk"), ...}`.

        `host_bytes` bounds those in host memory (None: all fit); the others are read from disk in `read_s` + bytes * `read_s_per_byte`,
        declared or from `tiers.fit_reads`. A load from host memory costs what the fit says, or what `load_s` and `load_s_per_byte`
        declare. Raises ValueError where the adapters do not fit their tiers, or a read would take no time.
        """
        found = infos_of(adapters)
        info = replace(self._info, host_bytes=host_bytes, read_s=read_s, read_s_per_byte=read_s_per_byte)
        for name, value in {"host_bytes": host_bytes, "read_s": read_s, "read_s_per_byte": read_s_per_byte}.items():
            require(value is None or value >= 0, f"{name} must be at least 0", value)
        check_tiers(found, info)
        costs = self.costs.by_term()
        costs |= {name: c for name, c in (("loads", load_s), ("load_bytes", load_s_per_byte)) if c is not None}
        return self._changed(costs, info=info, adapters=found, provenance=self._since("adapters"))

    def perturb(
        self,
        bias: float = 0.0,
        *,
        scale: Mapping[str, float] | None = None,
        shift_s: Mapping[str, float] | None = None,
        noise: float = 0.0,
        hidden: bool = False,
    ) -> "LatencyModel":
        """Another device, for the sensitivity of a conclusion to the model's error: rerun it at plus and minus `report.bias`.

        Every step is longer by the share `bias` (0.03: 3 %; negative: shorter), residuals as they were. `scale` multiplies the cost of
        single terms (those of `model.costs.table()`) or of all buckets of padded work ({"backward layer": 1.2}), `shift_s` adds seconds to
        every step that holds a kind of work ("step" for any, "finetune", "evaluate", "prefill", "decode", "backward"), `noise` adds
        independent relative noise of that standard deviation to each step. `hidden`: policies go on predicting with the model as it was, so
        that they err by what was changed.
        An axis of a sweep: `axes={"executor": {"as fitted": model, "+3 %": model.perturb(0.03)}}`. Raises ValueError for an unknown term
        or kind, and for a change that would make a cost negative.
        """
        require(bias > -1, "bias must be above -1", bias)
        require(noise >= 0, "noise must be at least 0", noise)
        changes = {"bias": bias, "scale": dict(scale or {}), "shift_s": dict(shift_s or {}), "noise": noise, "hidden": hidden}
        changes = {name: value for name, value in changes.items() if value}
        costs = perturbed(self.costs.by_term(), bias, scale or {}, shift_s or {})
        seen = (self._seen or self.costs).by_term()
        if not hidden:  # on top of what was hidden before
            seen = perturbed(seen, bias, scale or {}, shift_s or {})
        label = f" {bias:+.1%}" if bias else ""
        label += "".join(f" {name}={value}" for name, value in changes.items() if name != "bias")
        return self._changed(
            costs,
            info=replace(self._info, name=self._info.name + label),
            provenance=(self._since("costs (perturbed)") if changes else self.provenance)
            | {"perturbed": [*self.provenance.get("perturbed", ()), changes]},
            noise=(self._extra_noise**2 + noise**2) ** 0.5,
            seen=CostModel.of_terms(seen, self.costs.padding) if hidden or self._seen is not None else None,
        )

    def with_stalls(self, stalls: Stalls | None) -> "LatencyModel":
        """The same device, standing still now and then in the midst of a step, as measured replays show it (`Stalls.of(replays)`).

        Policies predict without them. What a calibration recorded of stalls stays among the residuals. None takes them off.
        """
        return self._changed(self.costs.by_term(), stalls=stalls, provenance=self._since("stalls"))

    def _since(self, what: str) -> dict[str, Any]:
        """The provenance, after a change to what its replays were judged with."""
        return self.provenance | {"changed": list(dict.fromkeys([*self.provenance.get("changed", ()), what]))}

    def _changed(self, costs: Mapping[str, float], **changes: Any) -> "LatencyModel":
        """This model with other costs by term (residuals stay as they are, relative), and other arguments."""
        model, steps, is_same = CostModel.of_terms(costs, self.costs.padding), self._steps, costs == self.costs.by_term()
        if not is_same:
            values = steps[list(NAMES)].to_numpy(float)
            steps = steps.assign(duration_s=steps["duration_s"] * (model.predict_all(values) / self.costs.predict_all(values)))
        arguments: dict[str, Any] = {
            "info": self._info,
            "report": self.report,
            "provenance": self.provenance,
            "adapters": None if self._open else self._declared,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "noise": self._extra_noise,
            "seen": self._seen,
            "replays": self.replays,
            "stalls": self.stalls,
            "residuals": self._noise if is_same else None,
        }
        return LatencyModel(model, steps, **(arguments | changes))

    def replicas(self, num: int) -> "Sequence[LatencyModel]":
        """`num` devices of this kind for a `Fleet`: the same costs and limits, and no state in common."""
        return [copy.copy(self) for _ in range(num)]

    def __repr__(self) -> str:
        whole = "whole replays: not measured" if self.replays is None else str(self.replays)
        stalls = "" if self.stalls is None else f"{self.stalls}\n"
        return f"{self._info.name} on {self._info.device}, {len(self._steps)} steps\n{self.report}\n{stalls}{whole}"

    def identity(self) -> str:
        """What its predictions depend on, as 32 hex digits: costs, the recorded steps, limits, adapters, vocabulary."""
        from workbench.experiments.content_key import content_key

        steps = self._steps[[*NAMES, "duration_s"]].to_numpy(float)
        tokenizer = None if self.tokenizer is None else (type(self.tokenizer).__name__, str(getattr(self.tokenizer, "name_or_path", "")))
        adapters = None if self._open else self._declared
        seen = None if self._seen is None else self._seen.costs
        info = replace(self._info, model_error=None)
        sampled = self._extra_noise, seen, self.stalls
        return content_key(self.costs.costs, steps, info, adapters, self._bytes, self.vocab_size, tokenizer, *sampled)

    # Predicting

    @property
    def predictor(self) -> Predictor:
        """What policies predict with: this model, but for a hidden perturbation."""
        return self if self._seen is None else _Seen(self._seen)

    def predict(self, work: Work) -> float:
        """Usual duration in seconds of a step that does `work`, reading adapters from disk included."""
        return self.costs.predict(work) + work.read_s

    @property
    def steps(self) -> pd.DataFrame:
        """The measured steps that it was fitted to, with their features and `predicted_s`."""
        return self._steps.assign(predicted_s=self.costs.predict_all(self._steps[list(NAMES)].to_numpy(float)))

    @property
    def held_out(self) -> pd.DataFrame:
        """The steps that `report` judges, with `predicted_s` by a fit to all the others; no rows if there were too few to hold out."""
        held = held_out_mask(len(self._steps))
        if not held.any():
            return self._steps[held].assign(predicted_s=0.0)
        values, duration = step_arrays(self._steps)
        costs = fit_costs(values[~held], duration[~held], self.costs.padding)
        return self._steps[held].assign(predicted_s=costs.predict_all(values[held]))

    def error(self, steps: Any) -> ErrorReport:
        """Its error on other measured steps: a replay on an engine, a steps frame, or a list of either."""
        values, duration = step_arrays(steps)
        return error_report(self.costs, values, duration, self._largest)

    def outside_share(self, steps: Any) -> float:
        """The share of a replay's steps that lie outside the fitted range, where this model extrapolates."""
        values, _ = step_arrays(steps)
        return float(is_outside(values, self._largest).mean()) if len(values) else 0.0

    # Executor

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    @property
    def adapter_infos(self) -> Mapping[str, AdapterInfo]:
        return self._adapters

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, data.PreparedJob]:
        """Start a replay: job sizes, fresh adapter versions, residuals drawn from `seed`."""
        self._adapters = dict(self._declared)
        self._jobs = {job.id: (job, self._prepare(job)) for job in jobs}
        require(len(self._jobs) == len(jobs), "every job needs an id of its own", [job.id for job in jobs], "Give job_id=.")
        self._draw = self._noise.stream(seed, self._extra_noise)
        self._stall = None if self.stalls is None else self.stalls.stream(seed)
        return {job_id: prepared for job_id, (_, prepared) in self._jobs.items()}

    def _prepare(self, job: FinetuneJob) -> data.PreparedJob:
        # Keyed by identity: data may be a list, and many replays of one job should not tokenise it each time.
        if id(job) not in self._prepared:
            self._prepared[id(job)] = (job, data.prepare(job, tokenizer=self.tokenizer, vocab_size=self.vocab_size))
        return self._prepared[id(job)][1]

    def admissible(self, request: Request) -> Request:
        """The request with `prompt_tokens` and `max_tokens` resolved; registers an unknown adapter unless `adapters` was given.

        Raises ValueError for an unknown adapter, an empty prompt, one beyond the context, and one that the KV pool could never hold.
        """
        info, name = self._info, request.request_id
        if request.adapter is not None and request.adapter not in self._adapters:
            if not self._open:
                raise UnknownAdapterError(
                    f"{name}: unknown adapter {request.adapter!r}. {did_you_mean(request.adapter, list(self._adapters))} "
                    "More adapters need no files: declare them with LatencyModel.with_adapters."
                )
            self._adapters |= _infos([request.adapter], self._bytes)
        prompt, ids = request.prompt_tokens, request.prompt_token_ids
        if ids is not None or (request.prompt is not None and self.tokenizer is not None):
            ids = data.prompt_token_ids(request, vocab_size=self.vocab_size, tokenizer=self.tokenizer)
            prompt = len(ids)
        if prompt < 1:
            require(False, f"{name}: a prompt must have at least 1 token", prompt)
        room = info.max_model_len - prompt
        if room < 1:
            require(False, f"{name}: a prompt must be shorter than the context of {info.max_model_len} tokens", prompt)
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        wanted = max_tokens if request.output_tokens is None else min(request.output_tokens, max_tokens)
        blocks = -(-(prompt + wanted) // info.block_tokens)
        if blocks > info.num_blocks:
            rule = f"{name}: a request must fit the KV pool of {info.num_blocks} blocks of {info.block_tokens} tokens"
            require(False, rule, blocks, "Raise num_blocks.")
        return resolved(request, prompt, ids, max_tokens)

    def step(self, batch: Batch) -> StepResult:
        """Predicted duration with a recorded residual on it; the backward stops early where `stop_after_s` says so."""
        if self._draw is None:
            raise RuntimeError("step() needs begin() first: pass the model as executor= to replay().")
        work = features.of_batch(batch)
        result = self.simulate(work, batch)
        if isinstance(result, StepResult):
            return result
        return StepResult(duration_s=result, gpu_s=result, layers_done={b.owner: b.num_layers for b in batch.backwards})

    def simulate(self, work: Work, batch: Batch, predicted_s: float | None = None) -> StepResult | float:
        """`step` for a batch whose work is summed up already: its prefill and decode rows are not read and may lack.

        `predicted_s`: what `predict` says, if it was asked. A number is the duration of a step that did what was planned, with nothing else
        to report.
        """
        if self._draw is None:
            raise RuntimeError("simulate() needs begin() first: pass the model as executor= to replay().")
        factor = self._draw(class_of(work))
        duration = factor * (self.predict(work) if predicted_s is None else predicted_s)
        is_late = batch.stop_after_s is not None and duration > batch.stop_after_s
        if not is_late and not any([b.ends_window and b.is_last for b in batch.backwards]):
            return duration if self._stall is None else duration + self._stall(duration)
        planned = done = {b.owner: b.num_layers for b in batch.backwards}
        if is_late:
            work, done = self._cut(work, batch, factor)
            duration = factor * self.predict(work)
        if self._stall is not None:
            duration += self._stall(duration)
        return StepResult(
            duration_s=duration, gpu_s=duration, layers_done=done, stopped_early=done != planned, published=self._commit(batch, done)
        )

    def preview(self, work: Work, num_steps: int, first: int = 0) -> tuple[Sequence[float], Sequence[float]]:
        """Durations of the next steps, as policies predict them and as drawn, if each decodes the rows of `work`, which are all there is.

        Exactly what `predictor` and `simulate` would give step by step, without the `first` ones; arrays or lists. Nothing is drawn for
        good before `skip` says how many were made.
        """
        if self._draw is None:
            raise RuntimeError("preview() needs begin() first: pass the model as executor= to replay().")
        means = self.costs.predict_decodes(work, num_steps, first)
        factors = self._draw.preview(class_of(work), num_steps, first)
        drawn: Any = factors * means if num_steps >= MANY else list(map(mul, factors.tolist(), means))
        if self._stall is not None:
            more = self._stall.preview(drawn if isinstance(drawn, list) else drawn.tolist(), first)
            if more:
                drawn = drawn + np.array(more) if num_steps >= MANY else list(map(add, drawn, more))
        return means if self._seen is None else self._seen.predict_decodes(work, num_steps, first), drawn

    def skip(self, num_steps: int) -> None:
        """So many of the steps of the last `preview` were made."""
        assert self._draw is not None
        self._draw.skip(num_steps)
        if self._stall is not None:
            self._stall.skip(num_steps)

    def _cut(self, work: Work, batch: Batch, factor: float) -> tuple[Work, dict[str, int]]:
        """What is really done when the backward stops at the first layer boundary after `stop_after_s`, and the layers done."""
        assert batch.stop_after_s is not None
        done = {b.owner: 0 for b in batch.backwards}
        kept = work.copy()
        kept.drop_backwards()
        ran = kept
        for backward in batch.backwards:
            for layers in range(backward.num_layers):
                if factor * self.predict(ran) >= batch.stop_after_s:
                    return ran, done
                ran = kept.copy()
                ran.add_backward(replace(backward, num_layers=layers + 1))
                done[backward.owner] = layers + 1
            kept = ran
        return ran, done

    def _commit(self, batch: Batch, done: Mapping[str, int]) -> dict[str, int]:
        """Which adapters this step publishes, as an engine would: after each optimiser step, or after the job's last one."""
        published: dict[str, int] = {}
        for backward in batch.backwards:
            if not (backward.is_last and backward.ends_window and done[backward.owner] == backward.num_layers):
                continue
            job, prepared = self._jobs[backward.owner]
            last = backward.micro_batch == prepared.num_micro_batches - 1
            if job.publish == "step" or (job.publish == "end" and last):
                published |= self._publish(job)
        return published

    def _publish(self, job: FinetuneJob) -> dict[str, int]:
        old = self._adapters.get(job.adapter)
        size = old.bytes * job.rank // old.rank if old else self._bytes
        info = AdapterInfo(name=job.adapter, version=old.version + 1 if old else 1, rank=job.rank, bytes=size)
        self._adapters[job.adapter] = info
        return {job.adapter: info.version}

    def adopt(self, info: AdapterInfo, source: object) -> None:
        """Serve an adapter, or a new version of one, that another replica has."""
        old = self._adapters.get(info.name)
        self._adapters[info.name] = replace(info, version=max(info.version, old.version + 1)) if old else info

    def poll(self) -> Sequence[Command]:
        """No commands: a simulated job has no user beside it."""
        return ()

    def end(self) -> None:
        self._draw = None
        self._jobs = {}


class _Seen:
    """Predicts with the costs that policies are to believe."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs

    def predict(self, work: Work) -> float:
        """Usual duration in seconds of a step that does `work`."""
        return self.costs.predict(work) + work.read_s


def _sets(info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `ExecutorInfo` from JSON, which has lists."""
    return dict(info) | {name: frozenset(info[name]) for name in ("can", "eos_token_ids")}


def _adapters(record: Mapping[str, Any]) -> dict[str, AdapterInfo] | None:
    """The declared adapters of a saved model; None: every name."""
    return None if record["adapters"] is None else {name: AdapterInfo(**v) for name, v in record["adapters"].items()}


def _infos(adapters: Mapping[str, AdapterInfo | AdapterSpec] | Iterable[str], size_bytes: int) -> dict[str, AdapterInfo]:
    if isinstance(adapters, Mapping):
        return infos_of(adapters)
    return {name: AdapterInfo(name=name, version=1, rank=DEFAULT_RANK, bytes=size_bytes) for name in adapters}


def _provenance(info: ExecutorInfo, num_steps: int, commit: str | None) -> dict[str, Any]:
    """Where the fit comes from."""
    from workbench.results.replay import commit_of_code, versions_of_code

    versions = dict(versions_of_code())
    commit = commit_of_code() if commit is None else commit
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": info.device, "executor": info.name, "steps": num_steps, "versions": versions, "commit": commit, "date": date}
