"""Several replicas on one engine: each has a range of its KV blocks, slots and arena rows, and all share weights, adapters and graphs.

A part is an executor whose ledger counts from 0; the batch that the engine gets has the range's first block, slot and row added. No memory
is taken beyond the engine's, and a step costs what it costs on an engine of its own: the replicas run one after another, each on the
whole device, and the virtual clock lays their steps beside one another.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from workbench.config import FinetuneJob, require
from workbench.core import AdapterInfo, Batch, Command, ExecutorInfo, JobShape, Predictor, Request, StepResult

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine
    from workbench.runtime.engine_adapters import Version


@dataclass
class _Shared:
    """What the parts of one engine know in common: who began, whose version is whose, and commands that nobody has fetched."""

    engine: "Engine"
    parts: list["EnginePart"] = field(default_factory=list)
    shapes: Mapping[str, JobShape] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    publisher: dict["Version", int] = field(default_factory=dict)

    def keep(self) -> None:
        """Keep in host memory every version that a part may load."""
        self.engine.shared_versions = {(i.name, i.version) for part in self.parts for i in part.adapter_infos.values()}

    def fetch(self) -> None:
        """Hand every command to every part: only the one that has its job obeys."""
        for command in self.engine.poll():
            for part in self.parts:
                part.commands.append(command)


class EnginePart:
    """One replica: an executor over a range of the engine's blocks, slots and rows. Made by `Engine.replicas`."""

    def __init__(self, shared: _Shared, number: int, num: int) -> None:
        self.shared, self.number = shared, number
        whole = shared.engine.info
        self.info: ExecutorInfo = replace(
            whole,
            num_blocks=whole.num_blocks // num,
            num_slots=whole.num_slots // num,
            max_batch_adapters=min(whole.max_batch_adapters, whole.num_slots // num),
            activation_tokens=whole.activation_tokens // num,
        )
        self.adapter_infos: dict[str, AdapterInfo] = {}
        self.commands: deque[Command] = deque()

    @property
    def engine(self) -> "Engine":
        """The engine that it is a part of."""
        return self.shared.engine

    @property
    def predictor(self) -> Predictor | None:
        return self.shared.engine.predictor

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, JobShape]:
        """The first part begins the engine's replay, with the jobs of all; the others join it."""
        shared = self.shared
        if not shared.begun:
            shared.shapes = shared.engine.begin(jobs, seed=seed)
            shared.publisher.clear()
        shared.begun.add(self.number)
        self.adapter_infos = dict(shared.engine.adapter_infos)
        self.commands.clear()
        shared.keep()
        return {job.id: shared.shapes[job.id] for job in jobs}

    def admissible(self, request: Request) -> Request:
        return self.shared.engine.admissible(request)

    def step(self, batch: Batch) -> StepResult:
        """Run the batch on the engine. Raises what its step raises; then nothing has changed."""
        info = self.info
        block, slot, row = (self.number * size for size in (info.num_blocks, info.num_slots, info.activation_tokens))
        moved = replace(
            batch,
            segments=tuple(
                replace(s, blocks=tuple(b + block for b in s.blocks), rows=None if s.rows is None else s.rows + row) for s in batch.segments
            ),
            backwards=tuple(replace(b, rows=b.rows + row) for b in batch.backwards),
            loads=tuple(replace(load, slot=load.slot + slot) for load in batch.loads),
        )
        result = self.shared.engine.step(moved)
        for name, version in result.published.items():
            self.shared.publisher[name, version] = self.number
        return result

    def poll(self) -> Sequence[Command]:
        """Commands to jobs here. What another part's job has published is not there before it was carried over (`adopt`)."""
        self.shared.fetch()
        infos = self.shared.engine.adapter_infos
        for name, info in infos.items():
            if self.shared.publisher.get((name, info.version), self.number) == self.number:
                self.adapter_infos[name] = info
        for name in [name for name in self.adapter_infos if name not in infos]:
            del self.adapter_infos[name]
        self.shared.keep()
        commands = list(self.commands)
        self.commands.clear()
        return commands

    def adopt(self, info: AdapterInfo, source: object) -> None:
        """Serve what another part, or another engine, has published."""
        if getattr(source, "engine", source) is not self.engine:
            self.engine.adopt(info, source)
            info = self.engine.adapter_infos[info.name]
        self.adapter_infos[info.name] = info
        self.shared.keep()

    def end(self) -> None:
        """The last part to end ends the engine's replay."""
        self.shared.begun.discard(self.number)
        if not self.shared.begun:
            self.shared.engine.shared_versions = set()
            self.shared.engine.end()


def partition(engine: "Engine", num: int) -> list[EnginePart]:
    """`num` parts of an engine. Raises ValueError where a part would have no slot or no block."""
    info = engine.info
    require(num >= 1, "num must be at least 1", num)
    for name, size in (("num_slots", info.num_slots), ("num_blocks", info.num_blocks)):
        require(size >= num, f"every one of {num} replicas needs a share of {name}", size, f"Raise EngineConfig.{name}.")
    shared = _Shared(engine)
    shared.parts += [EnginePart(shared, number, num) for number in range(num)]
    return shared.parts
