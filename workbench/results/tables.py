"""Who got what: requests by SLO class, tenant, priority or adapter, fine-tune jobs, and how fairly they were served.

Everything is computed from the rows of a replay, within its window (or `measure`): requests that arrived in it, followed to their end.
Times in seconds on the replay clock.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.config import FinetuneJob, did_you_mean
from workbench.core import ENDS, JobShape, Predictor
from workbench.features import Work, causal_pairs
from workbench.results import metrics

By = Literal["slo_class", "tenant", "priority", "adapter"]
GROUPINGS = ("slo_class", "tenant", "priority", "adapter")
BASE = "(base)"  # requests without an adapter, as a group


def requests_by(
    replay: Any,
    by: By,
    *,
    slo: metrics.SLOs = None,
    measure: tuple[float, float] | None = None,
    predictor: Predictor | None = None,
) -> pd.DataFrame:
    """One row per group of requests: outcomes, attainment, latencies, throughput, deadlines and slowdown.

    `attainment_*` are nan for a target that the group's SLO does not have; percentiles are the ceil(q n)-th smallest. `deadlines` counts
    requests with a deadline of their own, `deadline_share` those of them that finished by it, `tardiness_*_s` = max(0, end - deadline) of
    those that finished. `progress` is the mean over requests of service units (prompt + 2 x output tokens) per second of e2e_s, 0 if not
    finished; `relative_slowdown` the best group's progress over this one's. `slowdown_mean` = e2e_s / seconds alone on the device, which a
    `predictor` (the replay's own, unless it was loaded from a folder) has to tell: nan without one.
    Raises ValueError for another grouping.
    """
    requests, (start, end) = _window(replay, by, slo, measure)
    predictor = predictor or replay.predictor
    requests["alone_s"] = np.nan if predictor is None else _alone(requests, predictor)
    requests["slowdown"] = requests["e2e_s"] / requests["alone_s"]
    gaps = metrics.token_gaps(replay.events)
    gaps = gaps.set_index("request_id")["itl_s"]
    rows = {}
    for group, of_group in requests.groupby(by, sort=True):
        rows[group] = _row(of_group, gaps[gaps.index.isin(of_group.index)].to_numpy(), slo or replay.slo, end - start)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis(by)
    if len(frame):
        with np.errstate(divide="ignore", invalid="ignore"):
            frame["relative_slowdown"] = frame["progress"].max() / frame["progress"]
    return frame


def fairness(replay: Any, by: By = "tenant", *, slo: metrics.SLOs = None, measure: tuple[float, float] | None = None) -> pd.Series:
    """Jain's index over groups of requests, by slowdown and by throughput, and the worst group's slowdown over the best one's.

    By slowdown means by `progress` (see `requests_by`): it does not mistake few requests for unfair service, as throughput does.
    """
    requests, _ = _window(replay, by, slo, measure)
    progress = requests.groupby(by)["progress"].mean()
    tokens = requests.groupby(by)["output_tokens"].sum()
    worst = float(progress.max() / progress.min()) if len(progress) and progress.min() > 0 else np.nan
    return pd.Series(
        {
            "groups": len(progress),
            "jain_slowdown": metrics.jain(progress.to_numpy()),
            "jain_throughput": metrics.jain(tokens.to_numpy()),
            "worst_over_best": worst,
        }
    )


def _window(replay: Any, by: str, slo: metrics.SLOs, measure: tuple[float, float] | None) -> tuple[pd.DataFrame, tuple[float, float]]:
    """The requests that arrived in the window, with their `progress`, and the window."""
    if by not in GROUPINGS:
        raise ValueError(f"by must be a column that requests are grouped by, got {by!r}. {did_you_mean(by, GROUPINGS)}")
    start, end = metrics.window(replay.measure if measure is None else measure, replay.events, replay.steps)
    requests = replay.requests if slo is None else metrics.request_frame(replay.trace_requests, replay.events, slo)
    requests = requests[requests["arrival_s"].between(start, end)].copy()
    requests["adapter"] = requests["adapter"].fillna(BASE)
    requests["progress"] = metrics.progress(requests)
    return requests, (start, end)


def _row(requests: pd.DataFrame, gaps: np.ndarray, slo: metrics.SLOs, span_s: float) -> dict[str, Any]:
    def quantile(values: Any, q: float) -> float:
        return metrics.quantile_interval(values, q).value

    asked = {
        name: any(getattr(metrics.slo_of(slo, c), f"{name}_s") is not None for c in set(requests["slo_class"])) for name in metrics.TARGETS
    }
    row: dict[str, Any] = {"requests": len(requests)}
    row |= {name: int((requests["outcome"] == name).sum()) for name in (*ENDS, "unfinished")}
    row["attainment"] = float(requests["met"].mean()) if any(asked.values()) else np.nan
    row |= {f"attainment_{n}": float(requests[f"met_{n}"].mean()) if asked[n] else np.nan for n in metrics.TARGETS}
    row["goodput_per_s"] = float(requests["met"].sum()) / span_s if span_s > 0 else np.nan
    row["output_tokens"] = int(requests["output_tokens"].sum())
    row["queue_mean_s"] = float(requests["queue_s"].mean())
    for name in ("ttft", "tpot", "e2e"):
        row |= {f"{name}_p{p}_s": quantile(requests[f"{name}_s"], p / 100) for p in metrics.PERCENTILES}
    row |= {f"itl_p{p}_s": quantile(gaps, p / 100) for p in metrics.PERCENTILES}
    row["preemptions"] = requests["preemptions"].sum(skipna=False)
    due = requests["deadline_s"].notna()
    late = requests["tardiness_s"]
    row["deadlines"] = int(due.sum())
    row["deadline_share"] = float((late[due] == 0).mean()) if due.any() else np.nan
    row |= {"tardiness_mean_s": float(late.mean()), "tardiness_max_s": float(late.max())}
    row["slowdown_mean"] = float(requests["slowdown"].mean())
    row["progress"] = float(requests["progress"].mean())
    return row


def _alone(requests: pd.DataFrame, predictor: Predictor) -> np.ndarray:
    """Predicted seconds of each request alone on the device: its prompt in one step, then its decodes at their mean context."""
    columns = (requests[n].to_numpy() for n in ("prompt_tokens", "output_tokens", "adapter"))
    return np.array([_request_alone(predictor, int(p), int(o), a != BASE) for p, o, a in zip(*columns, strict=True)])


def _request_alone(predictor: Predictor, prompt: int, output: int, has_adapter: bool) -> float:
    work = Work()
    v = work.values
    v[2], v[5], v[7], v[8], v[9] = prompt, prompt * (prompt + 1) // 2, 1, 1, has_adapter
    seconds = predictor.predict(work)
    if output > 1:
        work = Work()
        v = work.values
        v[3], v[6], v[7], v[8], v[9] = 1, prompt + output / 2, 1, 1, has_adapter
        seconds += (output - 1) * predictor.predict(work)
    return seconds


def job_table(replay: Any, *, predictor: Predictor | None = None) -> pd.DataFrame:
    """One row per fine-tune job: when it came, began and ended, its deadline, and what it got. Indexed by job_id.

    `started_s` is when its first step began, `queue_s` = start - arrival, `completion_s` = end - arrival (job completion time), nan unless
    it finished. `tardiness_s` = max(0, end - deadline_s), nan without a deadline; for a job that has not finished it runs to the end of
    the replay, a lower bound. `met_deadline`: whether it finished by then (NA without a deadline). `tokens_per_s` are committed tokens
    over the job's presence. `alone_s` are the predicted seconds of its committed micro-batches alone on the device, evaluation left out,
    and `slowdown` its presence over those; nan without a predictor (`predictor`, or the replay's own), and before its first commit.
    """
    predictor = predictor or replay.predictor
    _, end = metrics.window(None, replay.events, replay.steps)
    frame, rows = replay.jobs, []
    first_step = replay.work.groupby("owner")["step"].min()
    begun = (replay.steps["start_s"] + replay.steps["plan_s"]).set_axis(replay.steps["step"].to_numpy())
    for job in replay.finetune_jobs:
        seen = frame.loc[job.id]
        started = begun[first_step[job.id]] if job.id in first_step.index else np.nan
        is_finished = seen["outcome"] == "finished"
        ended = seen["ended_s"] if np.isfinite(seen["ended_s"]) else end
        presence = max(0.0, ended - seen["arrival_s"])
        alone = np.nan if predictor is None else _job_alone(replay, job, predictor)
        deadline = np.nan if job.deadline_s is None else job.deadline_s
        rows.append(
            {
                "job_id": job.id,
                "adapter": job.adapter,
                "tenant": job.tenant,
                "priority": job.priority,
                "weight": job.weight,
                "arrival_s": seen["arrival_s"],
                "started_s": started,
                "ended_s": seen["ended_s"],
                "outcome": seen["outcome"],
                "queue_s": started - seen["arrival_s"],
                "completion_s": presence if is_finished else np.nan,
                "deadline_s": deadline,
                "met_deadline": pd.NA if job.deadline_s is None else bool(is_finished and ended <= deadline),
                "tardiness_s": np.nan if job.deadline_s is None else max(0.0, ended - deadline),
                "committed_tokens": seen["committed_tokens"],
                "optimizer_steps": seen["optimizer_steps"],
                "tokens_per_s": seen["committed_tokens"] / presence if presence else np.nan,
                "alone_s": alone,
                "slowdown": presence / alone if alone > 0 else np.nan,
            }
        )
    columns = ["job_id", "adapter", "tenant", "priority", "weight", "arrival_s", "started_s", "ended_s", "outcome", "queue_s"]
    columns += ["completion_s", "deadline_s", "met_deadline", "tardiness_s", "committed_tokens", "optimizer_steps", "tokens_per_s"]
    columns += ["alone_s", "slowdown"]
    return pd.DataFrame(rows, columns=columns).astype({"met_deadline": "boolean"}).set_index("job_id")


def _job_alone(replay: Any, job: FinetuneJob, predictor: Predictor) -> float:
    """Predicted seconds of the micro-batches that the job committed: each one's forward in full steps, then its backward in one."""
    shape: JobShape = replay.tape.shapes[job.id]
    events, info = replay.events, replay.executor
    num = int(((events["kind"] == "committed") & (events["owner"] == job.id)).sum())
    known: dict[tuple[tuple[int, ...], bool], float] = {}
    total = 0.0
    for index in range(shape.first_micro_batch, shape.first_micro_batch + num):
        micro_batch = shape.micro_batch(index)
        key = (micro_batch.documents, micro_batch.ends_window)
        if key not in known:
            known[key] = _micro_batch_alone(*key, info.max_batch_tokens, info.num_layers, predictor.predict)
        total += known[key]
    return total


def _micro_batch_alone(
    documents: tuple[int, ...], ends_window: bool, max_tokens: int, layers: int, predict: Callable[[Work], float]
) -> float:
    tokens, seconds = sum(documents), 0.0
    for start in range(0, tokens, max_tokens):
        work = Work()
        v = work.values
        v[0] = min(max_tokens, tokens - start)
        v[4], v[9] = causal_pairs(documents, start, int(v[0])), 1
        seconds += predict(work)
    work = Work()
    v = work.values
    v[10], v[11], v[12], v[13] = tokens * layers, causal_pairs(documents, 0, tokens) * layers, layers, ends_window
    v[16] = 1
    return seconds + predict(work)
