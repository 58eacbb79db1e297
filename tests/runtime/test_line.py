"""The whole line on the real engine: trace, ledger, policy, batches, results; and what other executors make of the same."""

import pandas as pd
import pytest
import torch

import workbench as wb
from tests.runtime.references import SMALL, VOCAB, job, make_adapter, make_base, rows_of
from workbench.config import EngineConfig

SLO = wb.SLO(ttft_s=5.0, itl_s=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", "smollm2")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {f"adapter-{i}": make_adapter(folder / str(i), base, rank=3 + i, seed=i) for i in range(2)}


@pytest.fixture(scope="module")
def engine(base, adapters):
    return wb.Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)


@pytest.fixture(scope="module")
def model(engine):
    return engine.calibrate(max_steps=40, seconds=1.0)


def trace(n=14, rate=40.0, seed=0, longest=10, **sampling):
    made = wb.traces.poisson(rate=rate, duration_s=n / rate, seed=seed).with_lengths("w3-5rps", seed=seed, clip=(40, longest))
    made = made.assign_adapters(2, popularity=wb.zipf(1.0), seed=seed)
    return made.with_sampling(**sampling) if sampling else made


def tuned(**options):
    return job("mine", steps=2, accumulation=1, **options)


def assert_equal_frames(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first, second, check_exact=True)


@pytest.mark.parametrize(
    "policy", [wb.policies.LoquetierStatic(steps=2), wb.policies.ServeFirst(step_s=0.004), wb.policies.FCFS()], ids=repr
)
def test_recorded_durations_of_an_engine_give_identical_frames(engine, model, policy):
    jobs = [tuned(evaluation=rows_of(12, 2, 5), evaluate_every=1)]
    measured = wb.replay(trace(), executor=engine, policy=policy, jobs=jobs, slo=SLO)
    again = wb.replay(trace(), executor=wb.Recorded(measured, predictor=model), policy=policy, jobs=jobs, slo=SLO)
    assert_equal_frames(measured.events, again.events)
    assert measured.outputs == again.outputs and measured.outputs
    assert measured.summary() == pytest.approx(again.summary(), nan_ok=True)


@pytest.mark.parametrize("policy", [wb.policies.LoquetierScalable(), wb.policies.ServeFirst(step_s=0.004)], ids=repr)
def test_a_fitted_model_replays_the_same_seed_identically_and_so_does_its_recording(model, policy):
    runs = [wb.replay(trace(60), executor=model, policy=policy, jobs=[tuned()], slo=SLO, seed=s, planning=0.0001) for s in (1, 1, 2)]
    assert_equal_frames(runs[0].events, runs[1].events)
    assert not runs[0].events["time_s"].equals(runs[2].events["time_s"]), "another seed must draw other residuals"
    recorded = wb.replay(trace(60), executor=wb.Recorded(runs[0], predictor=model), policy=policy, jobs=[tuned()], slo=SLO, seed=1)
    assert_equal_frames(runs[0].events, recorded.events)


def test_the_policy_cannot_change_the_tokens_in_fp32(engine):
    drawn = trace(temperature=0.9, top_p=0.8, repetition_penalty=1.1)
    outputs = [
        wb.replay(drawn, executor=engine, policy=policy, jobs=jobs).outputs
        for policy, jobs in (
            (wb.policies.FCFS(), []),
            (wb.policies.FCFS(budget_tokens=17), []),
            (wb.policies.LoquetierStatic(2), [tuned()]),
        )
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tokens for tokens in outputs[0].values()}) > 5
    assert wb.replay(drawn, executor=engine, policy=wb.policies.FCFS(), seed=1).outputs != outputs[0]


def test_preempted_requests_generate_the_same_tokens_and_no_block_is_leaked(base, adapters):
    outputs = []
    for blocks in (64, 6):
        config = EngineConfig(**(SMALL.__dict__ | dict(num_blocks=blocks)))
        engine = wb.Engine.from_pretrained(base, adapters=adapters, device="cpu", config=config)
        with engine.uncalibrated():
            result = wb.replay(trace(8, rate=400.0, longest=24), executor=engine, policy=wb.policies.FCFS())
        outputs.append(result.outputs)
        preemptions = result.events["kind"].eq("preempted").sum()
        assert (preemptions > 0) == (blocks == 6)
        assert not engine._sequences and not engine._slots
    assert outputs[0] == outputs[1]


def test_requests_after_a_jobs_end_are_served_by_what_it_trained(engine):
    times = pd.DataFrame(
        {"request_id": ["before", "after"], "arrival_s": [0.0, 60.0], "prompt_tokens": 8, "output_tokens": 3, "adapter": "mine"}
    )
    result = wb.replay(
        wb.Trace.from_frame(times),
        executor=engine,
        policy=wb.policies.LoquetierStatic(1),
        jobs=[tuned(learning_rate=0.05)],
        until="jobs",
    )
    version = result.work[result.work["kind"] == "prefill"].set_index("owner")["version"]
    published = result.events[result.events["kind"] == "published"]
    assert len(published) == 1
    assert version["after"] == published["value"].iloc[0] == version["before"] + 1
    losses = result.events[result.events["kind"] == "loss"]["value"]
    assert len(losses) == 2 and losses.notna().all()


@pytest.mark.parametrize("boundary", [1, 3])
def test_a_checkpointed_job_resumes_in_another_replay_bit_for_bit(base, tmp_path, boundary):
    config = EngineConfig(**(SMALL.__dict__ | dict(deterministic=True)))
    j = job("mine", steps=3, accumulation=2, schedule="cosine", dropout=0.1)
    engine = wb.Engine.from_pretrained(base, device="cpu", config=config)

    def train(view, plan):
        for view_job in view.jobs:
            plan.train(view_job)

    def train_until_the_boundary(view, plan):
        if engine.jobs["mine"].micro_batches_done == boundary and not (tmp_path / "saved").exists():
            engine.jobs["mine"].checkpoint(tmp_path / "saved")
            engine.jobs["mine"].stop()
        train(view, plan)

    with engine.uncalibrated():
        wb.replay([], executor=engine, policy=train, jobs=[j], until="jobs")
        whole = {key: [t.clone() for t in pair] for key, pair in engine.jobs["mine"].weights.tensors.items()}
        stopped = wb.replay([], executor=engine, policy=train_until_the_boundary, jobs=[j], until="jobs")
        assert stopped.jobs["outcome"].iloc[0] == "stopped"
        wb.replay([], executor=engine, policy=train, jobs=[wb.FinetuneJob.from_checkpoint(tmp_path / "saved")], until="jobs")
    for key, pair in engine.jobs["mine"].weights.tensors.items():
        assert all(torch.equal(found, expected) for found, expected in zip(pair, whole[key], strict=True))


def test_pausing_a_job_stops_its_work_and_resuming_goes_on(engine):
    seen = []

    def policy(view, plan):
        seen.append([j.phase for j in view.jobs])
        if view.step == 1:
            engine.jobs["mine"].pause()
        if view.step == 4:
            engine.jobs["mine"].resume()
        plan.decode(view.running)
        plan.prefill(view.waiting, 4)
        for view_job in view.jobs:
            plan.train(view_job)

    result = wb.replay(trace(6), executor=engine, policy=policy, jobs=[tuned()])
    kinds = list(result.events["kind"])
    assert kinds.index("job_paused") < kinds.index("job_resumed")
    paused = [i for i, phases in enumerate(seen) if "paused" in phases]
    trained = result.work[result.work["kind"].isin(["finetune", "backward"])]["step"]
    assert paused and not trained.isin(range(paused[0], paused[-1] + 1)).any() and (trained > paused[-1]).any()


def test_generate_stops_at_the_end_of_sequence_or_the_limit(engine):
    prompts = [[5, 6, 7 + i] for i in range(6)]
    found = engine.generate(prompts, adapter="adapter-0", max_tokens=9)
    greedy = engine.generate(prompts[0:1], adapter="adapter-0", max_tokens=9)[0]
    assert found[0] == greedy and len(found) == 6
    for completion in found:
        stops = [t in engine.info.eos_token_ids for t in completion.token_ids]
        assert completion.finish_reason == ("stop" if stops[-1] else "length") and not any(stops[:-1])
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 9


def test_peft_runs_the_same_trace_and_generates_the_same_greedy_tokens(base, adapters, engine):
    baseline = wb.PeftBaseline.from_pretrained(
        base, adapters=adapters, device="cpu", config=EngineConfig(max_model_len=192, activation_tokens=512)
    )
    policy = wb.policies.PeftSequential(batch_size=4)
    theirs = wb.replay(trace(8), executor=baseline, policy=policy, jobs=[tuned()], slo=SLO)
    ours = wb.replay(trace(8), executor=engine, policy=wb.policies.FCFS())
    assert (theirs.requests["outcome"] == "finished").all()
    assert theirs.outputs == ours.outputs
    assert theirs.jobs["committed_tokens"].sum() > 0


def test_a_saved_replay_recomputes_its_metrics_without_a_rerun(engine, tmp_path):
    result = wb.replay(trace(6), executor=engine, policy=wb.policies.FCFS(), jobs=[tuned()], slo=SLO)
    result.save(tmp_path / "run")
    loaded = wb.load_replay(tmp_path / "run")
    assert loaded.summary() == pytest.approx(result.summary(), nan_ok=True)
    assert loaded.provenance == result.provenance and loaded.provenance.versions["torch"]
    strict = wb.metrics.summary(loaded, slo=wb.SLO(ttft_s=1e-9))
    assert strict["attainment"] == 0.0


def test_planning_time_and_committed_tokens_are_in_the_books(engine):
    static, asked = wb.policies.LoquetierStatic(1), []

    def policy(view, plan):
        asked.append(view.step)
        static(view, plan)

    result = wb.replay(trace(6), executor=engine, policy=policy, jobs=[tuned()], until="jobs")
    steps = result.steps
    was_asked = steps["step"].isin(asked)  # the others are repetitions, for which nobody planned
    assert was_asked.sum() > 5 and (steps["plan_s"][was_asked] > 0).all() and (steps["plan_s"][~was_asked] == 0).all()
    assert (steps["duration_s"] > 0).all()
    committed = result.events[result.events["kind"] == "committed"]["value"].sum()
    expected = sum(result.finetune_jobs[0].data and engine._states["job:mine"].prepared.micro_batch(i).tokens for i in range(2))
    assert committed == expected == result.jobs["committed_tokens"].sum()
    assert VOCAB > max(max(tokens) for tokens in result.outputs.values())
