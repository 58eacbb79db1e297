"""What a replay must remember, beside its frames, to be played again exactly: see `recorded.Recorded`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from workbench.core import AdapterInfo, Command, JobShape, MicroBatch


@dataclass
class Tape:
    """Everything that came into the serving loop from outside.

    `plan_times_s` holds the planning time of every call of the policy, `commands` and `adapters` what each poll (counted from 0)
    brought: a command, or an adapter's new info (None: unloaded). `refusals` maps request id to the executor's reason.
    """

    plan_times_s: list[float] = field(default_factory=list)
    commands: list[tuple[int, Command]] = field(default_factory=list)
    adapters: list[tuple[int, str, AdapterInfo | None]] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    shapes: Mapping[str, JobShape] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """The tape as JSON values."""
        return {
            "plan_times_s": self.plan_times_s,
            "commands": [[poll, *command] for poll, command in self.commands],
            "adapters": [[poll, name, None if info is None else asdict(info)] for poll, name, info in self.adapters],
            "refusals": self.refusals,
            "shapes": {owner: _shape_record(shape) for owner, shape in self.shapes.items()},
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Tape":
        return cls(
            plan_times_s=record["plan_times_s"],
            commands=[(poll, (verb, owner)) for poll, verb, owner in record["commands"]],
            adapters=[(poll, name, None if info is None else AdapterInfo(**info)) for poll, name, info in record["adapters"]],
            refusals=record["refusals"],
            shapes={owner: _shape_of(shape) for owner, shape in record["shapes"].items()},
        )


@dataclass(frozen=True)
class RecordedShape:
    """A job's sizes as they were: `kinds` are the distinct micro-batches, `order` says which one each index is."""

    kinds: Sequence[MicroBatch]
    order: Sequence[int]
    evaluated: frozenset[int]
    held_out: Sequence[MicroBatch]
    first_micro_batch: int

    @property
    def num_micro_batches(self) -> int:
        return len(self.order)

    def micro_batch(self, index: int) -> MicroBatch:
        return self.kinds[self.order[index]]

    def evaluation(self) -> Sequence[MicroBatch]:
        return self.held_out

    def evaluates_after(self, index: int) -> bool:
        return index in self.evaluated


def _shape_record(shape: JobShape) -> dict[str, Any]:
    kinds: dict[MicroBatch, int] = {}
    indices = range(shape.num_micro_batches)
    order = [kinds.setdefault(shape.micro_batch(i), len(kinds)) for i in indices]
    return {
        "kinds": [asdict(m) for m in kinds],
        "order": order,
        "evaluated": [i for i in indices if shape.evaluates_after(i)],
        "held_out": [asdict(m) for m in shape.evaluation()],
        "first_micro_batch": shape.first_micro_batch,
    }


def _shape_of(record: dict[str, Any]) -> RecordedShape:
    def micro_batches(rows: list[dict[str, Any]]) -> list[MicroBatch]:
        return [MicroBatch(tuple(r["documents"]), r["labelled"], r["ends_window"], r["window_labelled"]) for r in rows]

    return RecordedShape(
        micro_batches(record["kinds"]),
        record["order"],
        frozenset(record["evaluated"]),
        micro_batches(record["held_out"]),
        record["first_micro_batch"],
    )
