"""What a fleet's replay leaves: the replay of each replica, and their rows together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.config import SLO, FinetuneJob
from workbench.core import ExecutorInfo, Request, StepResult
from workbench.loop.tape import Tape
from workbench.model_error import of_fleet
from workbench.results.replay import RECORD_FILE, Replay, job_of, job_record, load_replay, read_requests, write_requests


class FleetReplay(Replay):
    """One policy on one trace and a fleet.

    `replicas` are replays of their own, each with the requests and jobs that came to it, conserving what a replay conserves:
    `Recorded(result.replicas[0])` plays one again. `events`, `steps` and `work` are theirs together with a column `replica`; steps are
    numbered through, in the order in which they begin. `requests` has the column `replica` too. `executor` holds the limits of replica 0.
    """

    def __init__(
        self, replicas: Sequence[Replay], *, requests: Sequence[Request], jobs: Sequence[FinetuneJob], executor: ExecutorInfo, router: str
    ) -> None:
        self.replicas, self.history = tuple(replicas), {}
        first = self.replicas[0]
        resolved = {r.request_id: r for part in self.replicas for r in part.trace_requests}
        self.trace_requests = tuple(resolved.get(r.request_id, r) for r in requests)
        self.finetune_jobs = tuple(jobs)
        self.executor = executor
        self.provenance = first.provenance
        self.settings = first.settings | {"replicas": len(self.replicas), "router": router}
        self.tape = Tape(
            refusals={name: reason for part in self.replicas for name, reason in part.tape.refusals.items()}, shapes=first.tape.shapes
        )
        self.predictor = first.predictor
        self.slo: SLO | Mapping[str, SLO] | None = first.slo
        self.measure = first.measure
        self.interrupted, self.error = first.interrupted, first.error
        self.outputs = {name: tokens for part in self.replicas for name, tokens in part.outputs.items()}

    @cached_property
    def _order(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The number of every replica's steps among all steps, and the places of all steps, one replica after another, in that order."""
        start = np.concatenate([part.steps["start_s"].to_numpy(float) for part in self.replicas])
        places = np.argsort(start, kind="stable")
        number = np.empty(len(places), np.int64)
        number[places] = np.arange(len(places))
        ends = np.cumsum([len(part.steps) for part in self.replicas])
        return np.split(number, ends[:-1]), places

    def _renumbered(self, frame: pd.DataFrame, replica: int) -> pd.DataFrame:
        """A replica's rows with the fleet's step numbers; what happened after its last step stands after the last of all."""
        numbers, places = self._order
        table = np.append(numbers[replica], len(places))
        step = frame["step"].to_numpy()
        return frame.assign(step=table[np.minimum(step, len(table) - 1)], replica=replica)

    def _merged(self, name: str) -> pd.DataFrame:
        parts = [self._renumbered(getattr(part, name), k) for k, part in enumerate(self.replicas)]
        # an empty frame has no types to give
        filled = [part for part in parts if len(part)] or parts[:1]
        return pd.concat(filled, ignore_index=True)

    @cached_property
    def events(self) -> pd.DataFrame:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All replicas' events by time."""
        return self._merged("events").sort_values("time_s", kind="stable", ignore_index=True)

    @cached_property
    def steps(self) -> pd.DataFrame:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All replicas' steps by start; those of different replicas overlap."""
        return self._merged("steps").sort_values("step", ignore_index=True)

    @cached_property
    def work(self) -> pd.DataFrame:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The work of all steps, in their order."""
        return self._merged("work").sort_values("step", kind="stable", ignore_index=True)

    @cached_property
    def results(self) -> tuple[StepResult, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The results of all steps, in their order."""
        results = [result for part in self.replicas for result in part.results]
        return tuple([results[place] for place in self._order[1]])

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The digests of all steps' batches, as their replicas had them, in the order of the steps."""
        digests = [digest for part in self.replicas for digest in part.digests]
        return tuple([digests[place] for place in self._order[1]])

    @property
    def num_steps(self) -> int:
        return sum(part.num_steps for part in self.replicas)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per arrived request, by `metrics.request_frame`, and the replica that it was given to."""
        of = {r.request_id: k for k, part in enumerate(self.replicas) for r in part.trace_requests}
        frame = super().requests
        return frame.assign(replica=[of[name] for name in frame.index])

    @cached_property
    def by_replica(self) -> pd.DataFrame:
        """One row per replica: its requests, tokens, jobs, adapter loads, and how busy it was, by `fleet.metrics.by_replica`."""
        from workbench.fleet.metrics import by_replica

        return by_replica(self.replicas, self.measure)

    def _brief(self) -> str:
        return f"Fleet{super()._brief()[:-1]}, router={self.settings['router']})"

    def save(self, folder: str | Path) -> Path:
        """Write every replica's replay into a folder of its own, and `replay.json` beside them; `load_replay` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(self.replicas):
            part.save(folder / f"replica-{number}")
        write_requests(folder, self.trace_requests)
        record = {
            "format": 1,
            "replicas": len(self.replicas),
            "router": self.settings["router"],
            "name": self.executor.name,
            "simulated": self.executor.simulated,
            "jobs": [job_record(job) for job in self.finetune_jobs],
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: Path, record: Mapping[str, Any]) -> "FleetReplay":
        """What `save` wrote, for `load_replay`."""
        parts = [load_replay(folder / f"replica-{number}") for number in range(record["replicas"])]
        error = of_fleet([part.executor for part in parts])
        executor = replace(parts[0].executor, name=record["name"], simulated=record["simulated"], model_error=error)
        jobs = [job_of(job) for job in record["jobs"]]
        return cls(parts, requests=read_requests(folder), jobs=jobs, executor=executor, router=record["router"])
