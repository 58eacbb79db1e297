"""A comparison runs every policy on the same traces, in fresh copies, and tells what its numbers come from."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import pytest

import workbench as wb
from workbench.experiments.compare import Comparison, run_order, window_of
from workbench.testing import FixedCost, fixed_info

SLOS = wb.SLO(ttft_s=0.2, itl_s=0.05)


@dataclass
class Fcfs:
    """Serve in order of arrival, and count the calls: state that must not leak."""

    chunk: int = 64
    calls: int = 0

    def __call__(self, view, plan) -> None:
        self.calls += 1
        plan.decode(view.running)
        plan.prefill(view.waiting, self.chunk)
        if not view.waiting:
            for job in view.jobs:
                plan.train(job)


def serve_only(view, plan) -> None:
    plan.decode(view.running)
    plan.prefill(view.waiting)


def trace(seed: int) -> wb.Trace:
    rows = pd.DataFrame({"request_id": [f"r{i}" for i in range(12)], "prompt_tokens": 24, "output_tokens": 6})
    rows["arrival_s"] = [0.05 * i + 0.001 * seed * i for i in range(12)]
    rows["adapter"] = [("a", "b", None)[i % 3] for i in range(12)]
    return wb.Trace.from_frame(rows)


def job() -> wb.FinetuneJob:
    return wb.FinetuneJob(adapter="t", data=wb.RandomTokens(examples=8, tokens=32), epochs=100)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return run([Fcfs(), serve_only])


def run(policies: list[Callable], **more) -> Comparison:
    options = {"trace": trace, "executor": FixedCost(), "jobs": [job()], "slo": SLOS, "seeds": range(2), "planning": 0.0}
    return wb.compare(policies, **(options | {"progress": False} | more))


def test_every_policy_runs_on_every_seed_and_keeps_its_place(comparison):
    assert comparison.labels == ("Fcfs(chunk=64, calls=0)", "serve_only")
    assert list(comparison.replays) == [(label, seed) for seed in (0, 1) for label in comparison.labels]
    assert list(comparison.table().index) == list(comparison.labels)


def test_policies_of_one_seed_see_the_same_requests_and_another_seed_others(comparison):
    arrivals = {key: tuple(r.arrival_s for r in run.trace_requests) for key, run in comparison.replays.items()}
    first, second = comparison.labels
    assert arrivals[first, 0] == arrivals[second, 0] != arrivals[first, 1] == arrivals[second, 1]


def test_a_policys_state_does_not_leak_into_the_next_run():
    policy = Fcfs()
    result = run([policy], trace=trace(0))
    frames = [result.replays["Fcfs(chunk=64, calls=0)", seed].events for seed in (0, 1)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert policy.calls == 0


def test_table_equals_the_summaries(comparison):
    table = comparison.table()
    for label in comparison.labels:
        values = [comparison.replays[label, seed].summary() for seed in (0, 1)]
        for name in ("attainment", "goodput_per_s", "finetune_tokens_per_s", "ttft_p99_s"):
            numbers = [value[name] for value in values]
            assert table.loc[label, name] == pytest.approx(sum(numbers) / 2)
            if f"{name} ±" in table:
                assert table.loc[label, f"{name} ±"] == pytest.approx(abs(numbers[0] - numbers[1]) / 2)
    assert table.loc["serve_only", "finetune_tokens_per_s"] == 0 < table.iloc[0]["finetune_tokens_per_s"]
    assert "attainment_tpot" not in table  # no such target


def test_tokens_count_in_the_same_window_for_every_policy(comparison):
    for (_, seed), result in comparison.replays.items():
        assert result.measure == window_of(trace(seed))


def test_table_by_adapter_splits_all_requests(comparison):
    table = comparison.table(by="adapter")
    assert set(table.index.get_level_values("adapter")) == {"a", "b", "(base)"}
    assert (table.groupby("policy")["requests"].sum() == 24).all()
    with pytest.raises(ValueError, match="got 'adaptr'. Did you mean 'adapter'"):
        comparison.table(by="adaptr")


def test_order_turns_round_with_every_seed_when_interleaved():
    keys = run_order(("A", "B"), (0, 1, 2), interleave=True)
    assert "".join(label for label, _ in keys) == "ABBAAB"
    assert "".join(label for label, _ in run_order(("A", "B"), (0, 1), interleave=False)) == "ABAB"


def test_a_real_executor_is_interleaved_and_a_simulated_one_is_not(comparison):
    real = run([Fcfs(), serve_only], executor=FixedCost(info=replace(fixed_info(), simulated=False)))
    assert [label for label, _ in real.order] == [*comparison.labels, *comparison.labels[::-1]]
    assert "measured on" in real.caption
    assert [label for label, _ in comparison.order] == [*comparison.labels, *comparison.labels]
    assert "simulated by" in comparison.caption


def test_caption_says_n_seeds_and_what_was_redrawn(comparison):
    assert "n = 12 requests a run, 2 seeds" in comparison.caption
    assert "redrawn: nothing" in comparison.caption  # FixedCost has no residuals, and this trace names nothing


def test_a_fixed_trace_says_that_only_the_executors_noise_is_redrawn():
    assert run([serve_only], trace=trace(0)).redrawn == ()

    def drawn(seed: int) -> wb.Trace:
        return wb.traces.poisson(rate=4.0, duration_s=2.0, seed=seed).with_lengths("azure-conv", seed=seed, clip=(32, 4))

    result = run([serve_only], trace=drawn)
    assert result.redrawn == drawn(0).redrawn
    assert {"arrivals", "lengths"} <= set(result.redrawn)


def test_saved_comparisons_load_with_the_same_table(comparison, tmp_path):
    loaded = Comparison.load(comparison.save(tmp_path / "c"))
    pd.testing.assert_frame_equal(loaded.table(), comparison.table())
    assert loaded.caption == comparison.caption
    assert loaded.order == comparison.order
    with pytest.raises(FileNotFoundError, match=r"must hold comparison\.json"):
        Comparison.load(tmp_path)


@pytest.mark.parametrize(
    ("policies", "more", "message"),
    [
        ([], {}, "at least one policy"),
        ([serve_only], {"seeds": []}, "at least one seed"),
        ([Fcfs(), Fcfs()], {}, "must differ in their repr"),
    ],
)
def test_a_comparison_of_nothing_or_of_equal_labels_is_an_error(policies, more, message):
    with pytest.raises(ValueError, match=message):
        run(policies, **more)
