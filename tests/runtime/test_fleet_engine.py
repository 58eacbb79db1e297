"""Fleets that are executed: parts of one engine, and engines side by side, on a tiny model in fp32."""

import pandas as pd
import pytest
import torch

import workbench as wb
from tests.runtime.references import SMALL, job, make_adapter, make_base
from workbench.fleet.routers import RoundRobin
from workbench.replay import ReplayError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", "smollm2")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {f"adapter-{i}": make_adapter(folder / str(i), base, rank=3 + i, seed=i) for i in range(2)}


@pytest.fixture(scope="module")
def engines(base, adapters):
    made = [wb.Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL) for _ in range(2)]
    made[1].predictor = made[0].calibrate(max_steps=30, seconds=0.5)
    return made


def trace(n=14, rate=200.0, seed=0):
    made = wb.traces.poisson(rate=rate, duration_s=n / rate, seed=seed).with_lengths("w3-5rps", seed=seed, clip=(40, 10))
    return made.assign_adapters(2, popularity=wb.zipf(1.0), seed=seed).with_sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.1)


def tuned(name="mine", **options):
    return job(name, steps=2, accumulation=1, **options)


def test_each_request_gets_the_tokens_of_a_single_engine_from_parts_of_one_and_from_two_side_by_side(engines):
    options = {"policy": wb.policies.ServeFirst(step_s=1.0), "jobs": [tuned()], "planning": 0.0, "until": "jobs"}
    alone = wb.replay(trace(), executor=engines[0], **options)
    learned = engines[0].adapter_weights("mine")
    for fleet in (wb.Fleet(engines[0], 2, router=RoundRobin()), wb.Fleet(engines, router=RoundRobin(), placement={"job:mine": 1})):
        result = wb.replay(trace(), executor=fleet, **options)
        assert result.outputs == alone.outputs and len(alone.outputs) == len(trace())
        assert (result.by_replica["requests"] > 0).all() and result.jobs["outcome"].eq("finished").all()
        served = engines[0] if fleet.executor is engines[0] else engines[1]
        for key, (a, b, _) in served.adapter_weights("mine").items():
            torch.testing.assert_close((a, b), learned[key][:2], rtol=1e-4, atol=1e-5)


def test_engines_side_by_side_on_the_wall_clock_give_each_request_the_tokens_of_one(engines):
    options = {"policy": wb.policies.ServeFirst(step_s=1.0), "jobs": [tuned()], "until": "jobs"}
    alone = wb.replay(trace(), executor=engines[0], **options)
    result = wb.replay(trace(), executor=wb.Fleet(engines, router=RoundRobin(), placement={"job:mine": 1}), clock="wall", **options)
    assert result.outputs == alone.outputs and (result.by_replica["requests"] > 0).all()
    assert result.jobs["outcome"].eq("finished").all()
    assert not any(engine.is_running for engine in engines)


def test_parts_of_one_engine_are_refused_on_the_wall_clock(engines):
    with pytest.raises(ValueError, match=r"clock='wall' needs an engine of its own for every replica.*Use clock='virtual', or Fleet\(\["):
        wb.replay(trace(), executor=wb.Fleet(engines[0], 2), policy=wb.policies.FCFS(), clock="wall")


def test_parts_keep_to_their_own_blocks_slots_and_rows(engines):
    seen = {0: [], 1: []}
    engine, parts = engines[0], wb.Fleet(engines[0], 2).open()
    step = engine.step
    of_owner = {}
    try:
        engine.step = lambda batch: seen[of_owner[(batch.segments or batch.backwards)[0].owner]].append(batch) or step(batch)
        for k, part in enumerate(parts):
            begin = part.step
            part.step = lambda batch, k=k, begin=begin: of_owner.update({s.owner: k for s in batch.segments}) or begin(batch)
        jobs = [tuned("mine"), tuned("yours")]
        wb.replay(trace(), executor=wb.Fleet(parts, router=RoundRobin()), policy=wb.policies.ServeFirst(1.0), jobs=jobs, planning=0.0)
    finally:
        del engine.step
    num_blocks, num_slots, num_rows = engine.info.num_blocks // 2, engine.info.num_slots // 2, engine.info.activation_tokens // 2
    assert parts[0].info.num_blocks == num_blocks and seen[0] and seen[1]
    for k, batches in seen.items():
        assert {b // num_blocks for batch in batches for s in batch.segments for b in s.blocks} == {k}
        assert {load.slot // num_slots for batch in batches for load in batch.loads} == {k}
        assert {s.rows // num_rows for batch in batches for s in batch.segments if s.rows is not None} == {k}


def test_a_published_version_reaches_the_other_part_when_it_has_been_carried_there(engines):
    versions = {}
    for migration_s in (0.0, 1e9):
        requests = [
            wb.Request(request_id=f"r{i}", arrival_s=i * 0.004, prompt_tokens=5, output_tokens=2, adapter="mine") for i in range(60)
        ]
        fleet = wb.Fleet(engines[0], 2, migration_s=migration_s)
        split = wb.StaticSplit(training=1)
        result = wb.replay(requests, executor=fleet, policy=split, jobs=[tuned(publish="step")], planning=0.0, until="requests")
        assert set(result.work.query("kind == 'prefill'")["replica"]) == {0}
        published = result.events.query("kind == 'published'")["value"]
        versions[migration_s] = sorted(set(result.work.query("kind == 'prefill'")["version"]))
        assert (versions[migration_s][-1] in set(published)) == (migration_s == 0.0)
    assert len(versions[1e9]) == 1, "without a copy the version of the start is served"
    assert len(versions[0.0]) >= 2


def test_a_version_goes_from_one_engine_to_another_bit_for_bit(engines):
    first, second = engines
    requests = [wb.Request(request_id=f"r{i}", arrival_s=i * 0.004, prompt_tokens=5, output_tokens=2, adapter="mine") for i in range(60)]
    fleet = wb.Fleet([first, second], migration_s=0.0)
    wb.replay(requests, executor=fleet, policy=wb.StaticSplit(training=1), jobs=[tuned(publish="step")], planning=0.0, until="jobs")
    ours, theirs = first.adapter_weights("mine"), second.adapter_weights("mine")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key][i], theirs[key][i]) for key in ours for i in (0, 1))
    assert any(b.abs().sum() > 0 for _, b, _ in ours.values()), "B begins at zero: it is the trained one"


def test_a_recorded_fleet_gives_identical_frames(engines):
    options = {"policy": wb.policies.ServeFirst(step_s=1.0), "jobs": [tuned()]}
    measured = wb.replay(trace(), executor=wb.Fleet(engines[0], 2), **options)
    recorded = [wb.Recorded(part, predictor=engines[0].predictor) for part in measured.replicas]
    again = wb.replay(trace(), executor=wb.Fleet(recorded), **options)
    for name in ("events", "steps", "work", "requests"):
        pd.testing.assert_frame_equal(getattr(measured, name), getattr(again, name), check_exact=True)
    assert again.outputs == measured.outputs


def test_a_step_that_fails_on_one_part_ends_all_and_the_engine_serves_again(engines):
    engine = engines[0]

    def policy(view, plan):
        if view.replica == 1 and view.step == 2:
            raise ValueError("not this step")
        wb.policies.FCFS()(view, plan)
        plan.repeat(0)  # a policy that is not asked at step 2 fails at none

    with pytest.raises(ReplayError, match=r"replica 1: policy policy failed: ValueError: not this step"):
        wb.replay(trace(), executor=wb.Fleet(engine, 2, router=RoundRobin()), policy=policy, planning=0.0)
    assert not engine.is_running
    assert len(wb.replay(trace(4), executor=engine, policy=wb.policies.FCFS()).outputs) > 0


def test_a_pause_reaches_the_replica_that_has_the_job(engines):
    engine = engines[0]

    def policy(view, plan):
        if view.step == 1 and view.replica == 1:
            engine.jobs["mine"].pause()
        wb.policies.ServeFirst(step_s=1.0)(view, plan)

    result = wb.replay(trace(), executor=wb.Fleet(engine, 2, placement={"job:mine": 1}), policy=policy, jobs=[tuned()], planning=0.0)
    assert result.events.query("kind == 'job_paused'")["replica"].tolist() == [1]


def test_an_engine_with_fewer_slots_than_replicas_is_refused(engines):
    with pytest.raises(ValueError, match="every one of 5 replicas needs a share of num_slots, got 4. Raise EngineConfig.num_slots."):
        wb.Fleet(engines[0], 5).open()
