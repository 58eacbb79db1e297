"""Which runs a sweep has, and what each of them needs."""

import dataclasses
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.config import did_you_mean, require
from workbench.experiments.compare import run_order
from workbench.experiments.content_key import code_version, content_key
from workbench.policy import policy_label

RUN_ARGUMENTS = ("trace", "executor", "jobs", "slo", "planning", "lengths", "measure", "until", "overlap", "evict")
CALLED = ("trace", "executor", "jobs", "slo")
TAKEN = ("run", "policy", "policy_name", "seed", "cached", "error")


@dataclass(frozen=True)
class Run:
    """One run to make: its place in the sweep, and what a worker needs for it."""

    key: str
    columns: Mapping[str, Any]
    policy: Any
    arguments: Mapping[str, Any]
    seed: int
    checksum: str


def variants_of(policies: Sequence[Any], parameters: Mapping[str, Sequence[Any]]) -> list[tuple[str, str, dict[str, Any], Any]]:
    """(label, name, parameters, policy) of every policy with every value of the parameters that it has."""
    require(len(policies) > 0, "policies must name at least one policy", policies)
    used: set[str] = set()
    out = []
    for policy in policies:
        fields = (
            {f.name for f in dataclasses.fields(policy)} if dataclasses.is_dataclass(policy) and not isinstance(policy, type) else set()
        )
        mine = {name: list(values) for name, values in parameters.items() if name in fields}
        used |= mine.keys()
        name = getattr(policy, "__name__", None) or type(policy).__name__
        for values in itertools.product(*mine.values()):
            given = dict(zip(mine, values, strict=True))
            variant: Any = dataclasses.replace(policy, **given) if given else policy  # type: ignore[type-var]
            out.append((policy_label(variant), name, given, variant))
    known = sorted({f.name for p in policies if dataclasses.is_dataclass(p) for f in dataclasses.fields(p)})
    for name in parameters:
        if name not in used:
            raise ValueError(f"parameters must be fields of a policy, got {name!r}. {did_you_mean(name, known)}")
    labels = [label for label, *_ in out]
    require(len(set(labels)) == len(labels), "policies must differ in their repr", labels, "Change a field, or the class's name.")
    return out


class SweepPlan:
    """Which runs a sweep has, and what each needs. Traces and executors are made once per combination of the axes that they take."""

    def __init__(
        self,
        variants: Sequence[tuple[str, str, dict[str, Any], Any]],
        arguments: dict[str, Any],
        axes: dict[str, Any],
        seeds: tuple[int, ...],
        *,
        keyed: bool,
    ) -> None:
        require(len(seeds) > 0, "seeds must hold at least one seed", seeds)
        require(len(set(seeds)) == len(seeds), "seeds must differ", seeds)
        self.variants, self.arguments, self.seeds, self.keyed = variants, arguments, seeds, keyed
        self.values = {name: list(v.items() if isinstance(v, Mapping) else ((_word(x), x) for x in v)) for name, v in axes.items()}
        self.made: dict[Any, Any] = {}
        self.keys: dict[int, str] = {}
        self._check_axes()
        self.parameter_names = tuple(dict.fromkeys(name for _, _, given, _ in variants for name in given))
        self.axes_names = (*self.parameter_names, *axes)
        twice = [name for name in self.parameter_names if name in axes or name in TAKEN]
        require(
            not twice, "a parameter must have a name of its own among axes and columns", twice, "Rename the policy's field or the axis."
        )

    def _check_axes(self) -> None:
        takers = set(RUN_ARGUMENTS)
        for name in CALLED:
            for value in [self.arguments[name], *(x for _, x in self.values.get(name, ()))]:
                takers |= set(_parameters_of(name, value))
        for name, values in self.values.items():
            require(len(values) > 0, f"axis {name!r} must have at least one value", values)
            labels = [label for label, _ in values]
            require(len(set(labels)) == len(labels), f"the values of axis {name!r} must differ", labels, "Give labels: {'label': value}.")
            if name in TAKEN or name not in takers:
                raise ValueError(
                    f"an axis must be taken by trace, executor, jobs or slo, got {name!r}. {did_you_mean(name, sorted(takers))}"
                )

    @property
    def is_real(self) -> bool:
        """Whether some executor really runs steps, so that runs must not disturb one another. (Asked after `runs`.)"""
        return any(not made.info.simulated for (name, *_), made in self.made.items() if name == "executor")

    def make(self, name: str, values: Mapping[str, Any]) -> Any:
        """The trace, executor, jobs or slo of a combination of axes."""
        value = values.get(name, self.arguments[name])
        taken = _parameters_of(name, value)
        lacking = [p for p, is_needed in taken.items() if is_needed and p not in values]
        require(
            not lacking, f"{name} must take parameters that are axes or the seed; it also takes", lacking, "Give axes= values for them."
        )
        given = {p: values[p] for p in taken if p in values}
        key = (name, id(value), *sorted((p, id(v) if not isinstance(v, (int, float, str)) else v) for p, v in given.items()))
        if key not in self.made:
            self.made[key] = value(**given) if _is_factory(name, value) else value
        return self.made[key]

    def runs(self) -> list[Run]:
        """Every run: by cell, then by seed, the order of policies turning with every seed."""
        names, runs = list(self.values), []
        turns = run_order([label for label, *_ in self.variants], self.seeds, interleave=True)
        of_label: dict[str, Any] = {label: rest for label, *rest in self.variants}
        redrawn: list[str] = []
        notes: list[str] = []
        for cell in itertools.product(*self.values.values()):
            shown = dict(zip(names, (label for label, _ in cell), strict=True))
            for label, seed in turns:
                name, given, policy = of_label[label]
                values = dict(zip(names, (v for _, v in cell), strict=True)) | {"seed": seed}
                arguments = {n: self.make(n, values) if n in CALLED else values.get(n, self.arguments[n]) for n in self.arguments}
                trace, executor = arguments["trace"], arguments["executor"]
                if "seed" in _parameters_of("trace", values.get("trace", self.arguments["trace"])):
                    redrawn += getattr(trace, "redrawn", ())
                redrawn += getattr(executor, "redrawn", ()) if executor.info.simulated else ("the machine's own noise",)
                notes += getattr(trace, "notes", ())
                columns = {"policy": label, "policy_name": name, **dict.fromkeys(self.parameter_names), **given, **shown, "seed": seed}
                checksum = getattr(trace, "checksum", "")
                key = self.key(policy, arguments, seed, checksum, trace) if self.keyed else f"run-{len(runs):06d}"
                runs.append(Run(key, columns, policy, arguments, seed, checksum))
        self.redrawn, self.notes = tuple(dict.fromkeys(redrawn)), tuple(dict.fromkeys(notes))
        return runs

    def key(self, policy: Any, arguments: Mapping[str, Any], seed: int, checksum: str, trace: Any) -> str:
        """Content of everything that decides the run, the policy's code among it; parts that many runs share are hashed once."""
        parts = {name: self.shared(value) for name, value in arguments.items() if name != "trace"}
        return content_key(checksum or tuple(trace), self.shared(policy), parts, seed, code_version())

    def shared(self, value: Any) -> str:
        if id(value) not in self.keys:
            self.keys[id(value)] = content_key(value)
        return self.keys[id(value)]


def _is_factory(name: str, value: Any) -> bool:
    """Whether a trace, executor, jobs or slo is made for each cell. An executor may be callable itself; it is known by its step."""
    return callable(value) and not (name == "executor" and hasattr(value, "step") and not isinstance(value, type))


def _parameters_of(name: str, value: Any) -> dict[str, bool]:
    """The parameters of a factory, and whether each must be given."""
    if not _is_factory(name, value):
        return {}
    found = inspect.signature(value).parameters.values()
    return {p.name: p.default is p.empty for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _word(value: Any) -> Any:
    """An axis value as a cell of the frame: itself where it is a number or a word, else its label."""
    return value if isinstance(value, (bool, int, float, str)) or value is None else policy_label(value)
