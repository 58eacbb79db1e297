"""The words beside every simulated result: how far its latency model's whole replays were from measured ones, metric by metric.

A `ModelError` travels with the executor's limits (`ExecutorInfo.model_error`) into replays, comparisons and sweeps, and with their frames
(`DataFrame.attrs`) into figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

METRICS: Mapping[str, str] = {
    "attainment": "points",
    "finetune_tokens_per_s": "%",
    "decode_tokens_per_s": "%",
    "ttft_p50_s": "%",
    "ttft_p99_s": "%",
    "tpot_p50_s": "%",
    "tpot_p99_s": "%",
}
"""What whole replays are judged by, and the unit of its error: points of a share, or per cent of what was measured."""

HEADLINE = ("attainment", "finetune_tokens_per_s", "decode_tokens_per_s")  # what a comparison's own figure shows
ATTRIBUTE = "executors"  # of DataFrame.attrs


@dataclass(frozen=True, kw_only=True)
class MetricError:
    """A model's error on one metric over whole replays: simulated less measured, in `unit`; printed, it is a sentence.

    `worst` is the largest absolute error, `mean` the mean of the signed ones: above 0 where the model predicts too much. They rest on
    `replays` of the `tried` replays, those in which the error is defined; both are None where there is none. `step_error` is the mean error
    of single held-out steps, as a share. `changed` names what was changed in the model after it was judged.
    """

    metric: str
    unit: str
    replays: int
    tried: int
    worst: float | None
    mean: float | None
    where: str
    step_error: float | None
    changed: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        return self.replays > 0

    @property
    def amount(self) -> str:
        """The error alone, for a table's cell: "at most 2.1 points, mean -0.4"."""
        if self.worst is None or self.mean is None:
            return "not measured"
        some = "" if self.replays == self.tried else f" in {self.replays} of them"
        return f"at most {self.worst:.1f} {self.unit}, mean {self.mean:+.1f}{some}"

    def __str__(self) -> str:
        return sentence([self])


@dataclass(frozen=True, kw_only=True)
class ModelError:
    """How far a latency model was from what was measured, in brief; `ReplayErrors` has the replays themselves.

    `errors` holds (metric, replays, worst, mean) of every metric whose error is defined in at least one of the `tried` replays.
    """

    errors: tuple[tuple[str, int, float, float], ...] = ()
    tried: int = 0
    where: str = ""
    step_error: float | None = None
    changed: tuple[str, ...] = ()

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "ModelError":
        """From what `dataclasses.asdict` gave, through JSON or not."""
        errors = tuple((str(metric), int(n), float(worst), float(mean)) for metric, n, worst, mean in record["errors"])
        return cls(**{**record, "errors": errors, "changed": tuple(record["changed"])})

    def on(self, metric: str) -> MetricError:
        """The error on one metric; one that was never judged is "not measured"."""
        found = {name: (replays, worst, mean) for name, replays, worst, mean in self.errors}
        replays, worst, mean = found.get(metric, (0, None, None))
        return MetricError(
            metric=metric,
            unit=METRICS.get(metric, "%"),
            replays=replays,
            tried=self.tried,
            worst=worst,
            mean=mean,
            where=self.where,
            step_error=self.step_error,
            changed=self.changed,
        )


UNKNOWN = ModelError()


def sentence(errors: Sequence[MetricError]) -> str:
    """One model's errors on one or several metrics, in words."""
    if not errors:
        return ""
    measured = [e for e in errors if e.is_measured]
    unknown = [e.metric for e in errors if not e.is_measured]
    parts, first = [f"on {e.metric}: {e.amount}" for e in measured], errors[0]
    if parts:
        parts[-1] += f" ({first.tried} replays on {first.where})"
    if unknown:
        step = "" if first.step_error is None else f"; per-step {first.step_error:.1%}".replace("%", " %")
        parts.append(f"on {', '.join(unknown)}: not measured{step}")
    changed = f"; changed since then: {', '.join(first.changed)}" if first.changed else ""
    return f"model error {'; '.join(parts)}{changed}"


def error_of(executor: Any, metric: str) -> MetricError | None:
    """The model's error on `metric` of an executor's results; None where they are measured. `executor`: its `ExecutorInfo`."""
    return (executor.model_error or UNKNOWN).on(metric) if executor.simulated else None


def how(executor: Any, *metrics: str) -> str:
    """How an executor's numbers came about; of simulated ones, the model's error on these metrics."""
    if not executor.simulated:
        return f"measured on {executor.name}, {executor.device}"
    said = sentence([(executor.model_error or UNKNOWN).on(metric) for metric in metrics])
    return "; ".join(filter(None, (f"simulated by {executor.name} fitted on {executor.device}", said)))


def of_fleet(executors: Sequence[Any]) -> ModelError | None:
    """The model error of replicas together: the first one's, judged on a single device."""
    error: ModelError | None = executors[0].model_error
    return error if error is None or len(executors) == 1 else replace(error, changed=(*error.changed, f"{len(executors)} replicas"))


def errors_said(executors: Iterable[Any], *metrics: str) -> str:
    """The model errors of all simulated executors among these, equal ones once; empty where nothing is simulated."""
    names: dict[str, list[str]] = {}
    for executor in executors:
        if executor.simulated:
            said = sentence([(executor.model_error or UNKNOWN).on(metric) for metric in metrics])
            names.setdefault(said, []).append(executor.name)
    if len(names) < 2:
        return next(iter(names), "")
    others = {said: f" and {len(set(of)) - 1} more" if len(set(of)) > 1 else "" for said, of in names.items()}
    return "; ".join(f"{of[0]}{others[said]}: {said}" for said, of in names.items())


def labelled(frame: Any, executors: Iterable[Any]) -> Any:
    """The frame, with what its figures have to say about the executors of its rows in `frame.attrs`."""
    frame.attrs[ATTRIBUTE] = [
        {"name": e.name, "simulated": e.simulated, "model_error": asdict(e.model_error) if e.simulated and e.model_error else None}
        for e in dict.fromkeys(executors)
    ]
    return frame


def with_error(caption: str, frames: Any, *metrics: str) -> str:
    """The caption with the model error on these metrics, as far as it does not say it yet. `frames`: a frame, or several."""
    executors: list[_Labelled] = []
    for frame in frames if isinstance(frames, (list, tuple)) else [frames]:
        executors += [_Labelled(**record) for record in frame.attrs.get(ATTRIBUTE, ())]
    missing = [metric for metric in metrics if not ("model error" in caption and metric in caption)]
    said = errors_said(executors, *missing) if missing else ""
    return "; ".join(filter(None, (caption, said)))


class _Labelled:
    """An executor as a frame remembers it."""

    def __init__(self, name: str, simulated: bool, model_error: Mapping[str, Any] | None) -> None:
        self.name, self.simulated = name, simulated
        self.model_error = None if model_error is None else ModelError.of_record(model_error)
