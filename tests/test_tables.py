"""Tables of classes, tenants, priorities and jobs, worked out by hand on an executor of fixed costs."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.policies import FCFS, FinetuneOnly
from workbench.testing import FixedCost, fixed_info

PLAIN = {"context_s": 0.0, "load_s": 0.0}
PREFILL_S, DECODE_S = 0.004 + 20 * 4e-5, 0.004 + 2e-4


def one(name, arrival_s, output=1, **more):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=20, output_tokens=output, max_tokens=50, **more)


def run(trace, policy=None, made=None, **options):
    return wb.replay(trace, executor=made or FixedCost(**PLAIN), policy=policy or FCFS(), planning=0.0, progress=False, **options)


TRACE = [
    one("a", 0.0, 3, slo_class="gold", tenant="x", priority=2, deadline_s=0.05),
    one("b", 1.0, 1, slo_class="gold", tenant="y", deadline_s=1.001),
    one("c", 2.0, 5, tenant="x", adapter="a"),
]
SLOS = {"gold": wb.SLO(ttft_s=0.0045), "": wb.SLO(itl_s=0.01)}


def test_rows_by_class_are_those_worked_out_by_hand():
    table = run(TRACE, slo=SLOS).by_class()
    gold, rest = table.loc["gold"], table.loc[""]
    assert (gold["requests"], rest["requests"], gold["finished"]) == (2, 1, 2)
    assert gold["attainment"] == 0 and gold["attainment_ttft"] == 0 and np.isnan(gold["attainment_itl"])
    assert rest["attainment"] == 1 and rest["attainment_itl"] == 1 and np.isnan(rest["attainment_ttft"])
    assert gold["ttft_p50_s"] == pytest.approx(PREFILL_S) and rest["itl_p99_s"] == pytest.approx(DECODE_S)
    assert rest["e2e_p99_s"] == pytest.approx(PREFILL_S + 4 * DECODE_S) and rest["output_tokens"] == 5
    # a ends long before 0.05 s, b at 1 s and a prefill, 3.8 ms after its deadline
    assert gold["deadlines"] == 2 and gold["deadline_share"] == 0.5 and rest["deadlines"] == 0 and np.isnan(rest["deadline_share"])
    assert gold["tardiness_max_s"] == pytest.approx(PREFILL_S - 0.001) and gold["tardiness_mean_s"] == pytest.approx(
        (PREFILL_S - 0.001) / 2
    )


def test_alone_on_the_device_the_slowdown_is_one_and_beside_others_it_is_what_they_cost():
    lonely = run(TRACE).by_tenant()
    assert lonely["slowdown_mean"].tolist() == pytest.approx([1.0, 1.0])
    # two requests of 20 tokens prefill in one step of 4 + 1.6 ms and end with it
    together = run([one("a", 0.0, tenant="x"), one("b", 0.0, tenant="y")]).by_tenant()
    assert together["slowdown_mean"].tolist() == pytest.approx([(0.004 + 40 * 4e-5) / PREFILL_S] * 2)


def test_relative_slowdown_and_jain_tell_the_tenant_that_waits():
    class OneFirst:
        """Serves tenant x to its end, then the others."""

        def __call__(self, view, plan):
            plan.decode(view.running)
            first = [r for r in view.waiting if r.tenant == "x"]
            plan.prefill(first or ([] if view.running else view.waiting))

    trace = [one(f"{t}{i}", 0.0, 5, tenant=t) for t in "xy" for i in range(3)]
    unfair, fair = run(trace, OneFirst()), run(trace)
    table = unfair.by_tenant()
    assert table.loc["x", "relative_slowdown"] == 1 and table.loc["y", "relative_slowdown"] == pytest.approx(
        table.loc["y", "e2e_p50_s"] / table.loc["x", "e2e_p50_s"]
    )
    assert unfair.fairness()["jain_throughput"] == 1, "both got as many tokens in the end"
    assert unfair.fairness()["jain_slowdown"] < 0.95 < fair.fairness()["jain_slowdown"] == pytest.approx(1.0)
    assert unfair.fairness()["worst_over_best"] == pytest.approx(table["relative_slowdown"].max())


def test_other_groupings_windows_and_targets_need_no_rerun():
    result = run(TRACE, slo=SLOS)
    assert result.by_priority()["requests"].to_dict() == {0: 2, 2: 1}
    assert result.by_adapter()["requests"].to_dict() == {"(base)": 2, "a": 1}
    assert result.by_class(measure=(0.5, 3.0))["requests"].to_dict() == {"": 1, "gold": 1}
    assert result.by_class(slo=wb.SLO(ttft_s=1.0))["attainment"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="Did you mean 'tenant'"):
        result.fairness("tenants")


def test_a_request_that_did_not_finish_missed_its_deadline_and_has_no_tardiness():
    def rejects(view, plan):
        for r in view.waiting:
            plan.reject(r, "no")

    row = run([one("a", 0.0, deadline_s=9.0)], rejects).by_class().loc[""]
    assert row["deadline_share"] == 0 and np.isnan(row["tardiness_mean_s"]) and row["progress"] == 0


def test_tables_of_a_saved_replay_are_the_same_but_for_what_a_predictor_has_to_tell(tmp_path):
    result = run(TRACE, slo=SLOS, jobs=[job("t")], until="jobs", policy=TrainFirst())
    again = wb.load_replay(result.save(tmp_path / "saved"))
    predictor = FixedCost(**PLAIN)
    pd.testing.assert_frame_equal(again.by_class(predictor=predictor), result.by_class())
    pd.testing.assert_frame_equal(again.job_table(predictor=predictor), result.job_table())
    assert again.by_class()["slowdown_mean"].isna().all() and again.job_table()["slowdown"].isna().all()


# jobs

FORWARD_S, BACKWARD_S = 0.004 + 128 * 5e-5, 0.004 + 128 * 4 * 2e-5


def job(adapter, **more):
    return FinetuneJob(**{"adapter": adapter, "data": RandomTokens(examples=4, tokens=64), "steps": 3, "batch_size": 2} | more)


@dataclass
class TrainFirst:
    """Trains the job of the highest priority, one verb a step."""

    def __call__(self, view, plan):
        if view.jobs:
            plan.train(max(view.jobs, key=lambda j: (j.priority, j.id)))
        else:
            FCFS()(view, plan)


def test_job_times_tardiness_and_slowdown_are_those_worked_out_by_hand():
    """Each job takes three forwards and three backwards; "first" goes first, so "second" begins when it is done."""
    jobs = [
        job("first", priority=1, tenant="x", deadline_s=0.05, weight=2.0),
        job("second", tenant="y", deadline_s=10.0, arrival_s=0.01),
        job("third", priority=-1),
    ]
    alone = 3 * (FORWARD_S + BACKWARD_S)
    table = run([], TrainFirst(), jobs=jobs, until="jobs").job_table()
    first, second, third = (table.loc[f"job:{name}"] for name in ("first", "second", "third"))
    assert table["alone_s"].tolist() == pytest.approx([alone] * 3)
    assert first["completion_s"] == pytest.approx(alone) and first["slowdown"] == pytest.approx(1.0) and first["queue_s"] == 0
    assert second["completion_s"] == pytest.approx(2 * alone - 0.01) and second["slowdown"] == pytest.approx((2 * alone - 0.01) / alone)
    assert first["tardiness_s"] == pytest.approx(alone - 0.05) and not first["met_deadline"]
    assert second["tardiness_s"] == 0 and second["met_deadline"]
    assert np.isnan(third["tardiness_s"]) and third["met_deadline"] is pd.NA and third["slowdown"] == pytest.approx(3.0)
    assert (table["committed_tokens"] == 3 * 128).all() and first["tokens_per_s"] == pytest.approx(3 * 128 / alone)
    assert (first["tenant"], first["weight"], first["priority"]) == ("x", 2.0, 1)


def test_a_job_that_has_not_finished_is_late_so_far_and_counts_what_it_committed():
    end = 2.2 * (FORWARD_S + BACKWARD_S)
    result = run([], TrainFirst(), jobs=[job("t", steps=50, deadline_s=0.01)], until=end)
    row = result.job_table().loc["job:t"]
    last = max(result.steps["end_s"].max(), result.events["time_s"].max())
    assert row["outcome"] == "unfinished" and np.isnan(row["completion_s"]) and not row["met_deadline"]
    assert row["tardiness_s"] == pytest.approx(last - 0.01) and row["committed_tokens"] in (2 * 128, 3 * 128)
    assert row["alone_s"] == pytest.approx(row["committed_tokens"] / 128 * (FORWARD_S + BACKWARD_S))


def test_a_micro_batch_longer_than_a_step_is_alone_in_as_many_steps_as_it_needs():
    made = FixedCost(info=fixed_info(max_batch_tokens=48), **PLAIN)
    row = run([], TrainFirst(), made, jobs=[job("t")], until="jobs").job_table().loc["job:t"]
    assert row["slowdown"] == pytest.approx(1.0) and row["alone_s"] == pytest.approx(3 * (FORWARD_S + 2 * 0.004 + BACKWARD_S))


def test_the_summary_tells_jobs_and_their_fairness():
    jobs = [job("first", priority=1, deadline_s=0.05), job("second", deadline_s=10.0)]
    row = run([], TrainFirst(), jobs=jobs, until="jobs").summary()
    assert row["jobs_finished"] == 2 and row["job_deadline_share"] == 0.5
    # equal tokens, the second in twice the time: (1 + 1/2)^2 / (2 (1 + 1/4))
    assert row["jain_jobs"] == pytest.approx(0.9)
    weighted = [job("first", priority=1, weight=2.0), job("second", weight=1.0)]
    assert run([], TrainFirst(), jobs=weighted, until="jobs").summary()["jain_jobs"] == pytest.approx(1.0)
    none = run(TRACE).summary()
    assert none["jobs_finished"] == 0 and np.isnan(none["jain_jobs"]) and np.isnan(none["job_deadline_share"])


def test_a_comparison_has_the_job_tables_of_all_runs_and_groups_by_priority():
    rows = {"request_id": ["a", "b"], "arrival_s": [0.0, 0.2], "prompt_tokens": 20, "output_tokens": 2, "priority": [0, 1]}
    result = wb.compare(
        [TrainFirst(), FinetuneOnly()],
        trace=wb.Trace.from_frame(pd.DataFrame(rows)),
        executor=FixedCost(**PLAIN),
        jobs=[job("t")],
        planning=0.0,
        until="jobs",
        progress=False,
    )
    assert result.jobs.groupby("policy")["completion_s"].size().to_dict() == {"FinetuneOnly()": 1, "TrainFirst()": 1}
    assert result.table("priority").loc["TrainFirst()"]["requests"].to_dict() == {0: 1, 1: 1}
