"""Measured replays that are kept with all that it takes to simulate them again, later and on a machine without the device."""

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from workbench import policies
from workbench.config import FinetuneJob, RandomTokens, require
from workbench.core import BUCKETS, ExecutorInfo
from workbench.latency import LatencyModel, Stalls
from workbench.latency.fit import check_executor
from workbench.latency.whole_replays import Prediction, ReplayErrors
from workbench.replay import replay
from workbench.results.replay import Replay, load_replay

KEPT_FILE = "kept.json"
FITTED = "model"  # the folder of the model that policies predicted with, beside the replays of one run
SIMULATED = 5  # seeds of the residuals: one replay's p99 is a draw
NO_LIMITS = ("name", "device", "simulated", "model_error", *BUCKETS)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One policy on one cell, measured on a model shape at `date` (ISO 8601); `load` in requests/s. Beside it one job on random tokens.

    `fitted` is the folder of the model that the policy predicted with, of a replay that was loaded from beside it; `source` what
    `source_of` the policy was when it was kept, "" where nobody noted it.
    """

    trace: str
    load: float
    policy: Any
    job: FinetuneJob
    shape: str
    date: str
    replay: Replay
    fitted: Path | None = None
    source: str = ""

    @property
    def is_of_other_code(self) -> bool:
        """Whether the policy's class was written otherwise when this was measured: simulated again, it is today's."""
        return self.source not in ("", source_of(self.policy))

    @property
    def cell(self) -> str:
        return cell_name(self.trace, self.load)

    @property
    def name(self) -> str:
        return f"{self.cell}, {type(self.policy).__name__}"

    def save(self, folder: Path) -> Path:
        """Write it into a folder of its own below `folder`."""
        place = self.replay.save(folder / re.sub(r"[^a-z0-9]+", "-", self.name.lower()))
        assert isinstance(self.job.data, RandomTokens)
        record = {
            "format": 1,
            "trace": self.trace,
            "load": self.load,
            "policy": {
                "name": type(self.policy).__name__,
                "source": source_of(self.policy),
                # what it noted on the way is no parameter
                "fields": {f.name: getattr(self.policy, f.name) for f in fields(self.policy) if f.init and f.repr},
            },
            "data": asdict(self.job.data),
            "shape": self.shape,
            "date": self.date,
        }
        (place / KEPT_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return place

    @classmethod
    def load_from(cls, place: Path) -> "Kept":
        """What `save` wrote."""
        record = json.loads((place / KEPT_FILE).read_text(encoding="utf-8"))
        require(
            record["format"] == 1, f"{place / KEPT_FILE}: format must be 1", record["format"], "Read it with the version that wrote it."
        )
        measured = load_replay(place)
        policy = getattr(policies, record["policy"]["name"])(**record["policy"]["fields"])
        job = replace(measured.finetune_jobs[0], data=RandomTokens(**record["data"]))
        rest = {name: record[name] for name in ("trace", "load", "shape", "date")}
        fitted = place.parent / FITTED
        source = record["policy"].get("source", "")
        return cls(policy=policy, job=job, replay=measured, fitted=fitted if fitted.is_dir() else None, source=source, **rest)

    def simulated(self, model: LatencyModel, seed: int | None = None) -> Replay:
        """The same requests, policy, job and seed on a latency model under the limits and adapters of the measurement.

        `seed` draws other residuals. Planning costs its measured mean. Raises ValueError for a model of another device or depth.
        """
        measured = self.replay
        executor: Any = under(model, measured)
        return replay(
            measured.trace_requests,
            executor=executor,
            policy=self.policy,
            jobs=[self.job],
            slo=measured.slo,
            seed=measured.seed if seed is None else seed,
            planning=float(measured.steps["plan_s"].mean()),
            measure=measured.measure,
            progress=False,
        )

    def predictions(self, model: LatencyModel) -> tuple[Prediction, ...]:
        """What was measured and what the model makes of it in the mean over SIMULATED seeds, metric by metric."""
        first = self.replay.seed
        found = ReplayErrors.of(self.replay, self.simulated(model), date=self.date)
        rows = [self.simulated(model, seed).summary() for seed in range(first + 1, first + SIMULATED)]
        return tuple(
            replace(p, trace=self.trace, load=self.load, simulated=fmean([p.simulated, *(float(row[p.metric]) for row in rows)]))
            for p in found.predictions
        )


def source_of(policy: Any) -> str:
    """16 hex digits of the text of the policy's class: the same for every Python version, as a `content_key`, of its bytecode, is not."""
    return hashlib.blake2b(inspect.getsource(type(policy)).encode(), digest_size=8).hexdigest()


def under(model: LatencyModel, measured: Replay) -> LatencyModel:
    """The model with the limits and the adapters that a replay was measured with."""
    info = measured.executor
    check_executor(model.info, info)
    limits = {f.name: getattr(info, f.name) for f in fields(ExecutorInfo) if f.name not in NO_LIMITS}
    adapters = {name: found for poll, name, found in measured.tape.adapters if poll == 0 and found is not None}
    return model.with_limits(**limits).with_adapters(adapters)


def stalls_of(kept: Sequence[Kept]) -> Stalls:
    """How the steps of these replays were delayed, and where that was seen."""
    cells, commits = sorted({one.cell for one in kept}), sorted({one.replay.provenance.commit for one in kept})
    devices, days = sorted({one.replay.executor.device for one in kept}), sorted({one.date[:10] for one in kept})
    source = f"{len(kept)} replays ({'; '.join(cells)}) on {', '.join(devices)}, {', '.join(days)}, commit {', '.join(commits)}"
    return Stalls.of([one.replay for one in kept], source=source)


def cell_name(trace: str, load: float) -> str:
    return f"{trace}, {load:g} req/s"


def load_all(folders: Sequence[Path]) -> Sequence[Kept]:
    """Every kept replay below these folders, at any depth. Raises FileNotFoundError for one without any."""
    found = []
    for folder in folders:
        files = sorted(folder.rglob(KEPT_FILE))
        if not files:
            raise FileNotFoundError(
                f"{folder} must hold kept replays (NAME/{KEPT_FILE}), got none. "
                f"Keep some: python -m workbench.bench model --replays {folder}."
            )
        found += [Kept.load_from(file.parent) for file in files]
    return found
