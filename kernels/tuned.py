"""Launches that were measured, one file per kind of GPU: `kernels/plans/<gpu>.json`, written by `python -m kernels.tune`.

A file is read once per process, when a device is first launched on (an engine asks at its start), so that no choice changes while a
process lives. A GPU without a file takes one of the same architecture and size, or else the default launches, and says so once.
LOQUETIER_PLANS names another folder of such files, or is "default" for no measured launch at all.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kernels.launch import Launch, ShapeClass

FOLDER = Path(__file__).parent / "plans"
VARIABLE = "LOQUETIER_PLANS"
FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A kind of GPU: its driver's name for it, compute capability such as "9.0", and number of multiprocessors."""

    name: str
    capability: str
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        """The kind of a CUDA or ROCm device."""
        facts = torch.cuda.get_device_properties(device)
        arch = getattr(facts, "gcnArchName", "") if torch.version.hip else ""
        return cls(name=facts.name, capability=arch or f"{facts.major}.{facts.minor}", processors=facts.multi_processor_count)

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The choice for one class of shapes: its time on `problem` beside the default launch's and the next best's, in microseconds, and the
    largest error of the result against the reference.
    """

    shape: ShapeClass
    launch: Launch
    time_us: float
    default: Launch
    default_us: float
    runner_up: Launch | None
    runner_up_us: float | None
    error: float
    candidates: int
    problem: str
    commit: str
    date: str


@dataclass(frozen=True, kw_only=True)
class TunedPlan:
    """Measured launches of one kind of GPU, and the versions that they were measured with."""

    gpu: Gpu
    versions: Mapping[str, str]
    entries: tuple[Entry, ...] = field(repr=False)

    @cached_property
    def _by_shape(self) -> dict[ShapeClass, Launch]:
        return {entry.shape: entry.launch for entry in self.entries}

    def launch(self, shape: ShapeClass) -> Launch | None:
        """The choice for `shape`, or for half or twice as many programs, or None."""
        for programs in (shape.programs, shape.programs // 2, 2 * shape.programs):
            found = self._by_shape.get(replace(shape, programs=programs))
            if found is not None:
                return found
        return None

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<gpu>.json`, which is replaced as a whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.gpu.file_name
        record = {"format": FORMAT, "gpu": asdict(self.gpu), "versions": dict(self.versions)}
        record["entries"] = [asdict(entry) for entry in sorted(self.entries, key=lambda entry: entry.shape)]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> "TunedPlan":
        """The plan that `save` wrote. Raises ValueError, naming the file and what to do, for one that is damaged or of another format."""
        step = f"Write it again with `python -m kernels.tune --again --into {path.parent}`, or remove it."
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r}")
            entries = tuple(_entry(values) for values in record["entries"])
            found = cls(gpu=Gpu(**record["gpu"]), versions=dict(record["versions"]), entries=entries)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"a plan file must hold launches in format {FORMAT}, got {error!r} in {path}. {step}") from error
        if len(found._by_shape) != len(entries):
            raise ValueError(f"a plan file must hold one launch for each class of shapes, got two for one in {path}. {step}")
        return found


def _entry(values: dict[str, Any]) -> Entry:
    runner_up = values["runner_up"]
    built = {
        "shape": ShapeClass(**values["shape"]),
        "launch": Launch(**values["launch"]),
        "default": Launch(**values["default"]),
        "runner_up": None if runner_up is None else Launch(**runner_up),
    }
    return Entry(**(values | built))


def find(gpu: Gpu, folder: Path) -> TunedPlan | None:
    """The plan for `gpu` among the files of `folder`: its own, or that of a GPU with the same architecture and size; None if neither is
    there. Raises ValueError for a damaged file.
    """
    plans = [TunedPlan.load(path) for path in sorted(folder.glob("*.json"))]
    own = [plan for plan in plans if plan.gpu == gpu]
    alike = [plan for plan in plans if (plan.gpu.capability, plan.gpu.processors) == (gpu.capability, gpu.processors)]
    return next(iter(own + alike), None)


_plans: dict[int, TunedPlan | None] = {}


def of_device(device: torch.device) -> TunedPlan | None:
    """The measured launches for a device, read at the first call; None for the CPU and where nothing was measured, which is logged."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _plans:
        _plans[index] = _chosen(Gpu.of(torch.device("cuda", index)), os.environ.get(VARIABLE, ""))
    return _plans[index]


def _chosen(gpu: Gpu, place: str) -> TunedPlan | None:
    if place == "default":
        log.info("kernel launches are the default ones: %s=default", VARIABLE)
        return None
    folder = Path(place) if place else FOLDER
    if not folder.is_dir() and place:
        raise ValueError(f'{VARIABLE} must be a folder of plan files or "default", got {place!r}')
    found = find(gpu, folder)
    if found is None:
        step = "python -m kernels.tune --into kernels/plans"
        log.warning("no kernel launches were measured on a %s: the default ones are used. Measure them once with `%s`.", gpu.name, step)
    elif found.gpu != gpu:
        log.warning("kernel launches for this %s are those measured on a %s", gpu.name, found.gpu.name)
    return found
