"""A fleet of two engines on two GPUs of one process: the tokens of one GPU, and really side by side on the wall clock."""

import json
import time
from dataclasses import replace

import pytest
import torch

import workbench as wb
from kernels import counters
from workbench.fleet.routers import RoundRobin

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

# Steps of several milliseconds: those of a smaller model are as short as the host's own work, which two replicas of one process share.
SHAPE, PROFILE, DEVICES = "llama3-8b", "h100-llama3-8b", ("cuda:0", "cuda:1")
CONFIG = wb.EngineConfig(
    max_model_len=512, max_batch_tokens=256, max_requests=8, num_blocks=512, num_slots=4, max_jobs=1, activation_tokens=512
)


@pytest.fixture(scope="module")
def engines():
    begin = time.perf_counter()
    made = [wb.Engine.random(SHAPE, adapters=2, rank=8, device=device, config=CONFIG) for device in DEVICES]
    for engine in made:
        engine.predictor = wb.LatencyModel.load(PROFILE)  # one for both, so that they plan alike
        engine.warm_up()
    print(f"two engines made in {time.perf_counter() - begin:.1f} s")
    assert torch.cuda.current_device() == 0
    return made


def requests_at(arrivals, output_tokens, adapters=(None, "adapter-0", "adapter-1")):
    """Requests whose prompts, outputs and adapters take turns, so that each of two replicas gets some of every kind."""
    return [
        wb.Request(
            request_id=f"r{i}",
            arrival_s=float(at),
            prompt_tokens=60 + 13 * i % 160,
            output_tokens=output_tokens[i // 2 % len(output_tokens)],
            adapter=adapters[i // 2 % len(adapters)],
        )
        for i, at in enumerate(arrivals)
    ]


def fleet(executor, replicas=None, **options):
    return wb.Fleet(executor, replicas, router=RoundRobin(), **options)


def run(trace, executor, policy=None, **options):
    return wb.replay(trace, executor=executor, policy=policy or wb.policies.FCFS(), progress=False, **options)


def test_two_gpus_give_each_request_the_tokens_and_each_job_the_losses_of_one(engines):
    for ours, theirs in zip(engines[0].base.parameters(), engines[1].base.parameters(), strict=True):
        assert torch.equal(ours[:4].cpu(), theirs[:4].cpu())
    rows = wb.RandomTokens(examples=4, tokens=64)
    job = wb.FinetuneJob(adapter="mine", data=rows, batch_size=2, steps=2, max_tokens=64, learning_rate=1e-3)
    drawn = wb.Sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.1)
    # all are there at the start: what is planned then depends on no duration, and each replica runs equal batches on any device
    trace = [replace(r, sampling=drawn) if i % 4 < 2 else r for i, r in enumerate(requests_at([0.0] * 12, (24,)))]
    options = {"policy": wb.policies.ServeFirst(step_s=1.0), "jobs": [job], "planning": 0.0, "until": "jobs"}
    counters.calls.clear()
    found = {
        name: run(trace, fleet(*executors, placement={job.id: 1}), **options)
        for name, executors in {"one": (engines[0], 2), "two": (engines,), "swapped": (engines[::-1],)}.items()
    }
    assert counters.references_on("cuda") == {}
    losses = {name: result.events.query("kind == 'loss'")["value"].tolist() for name, result in found.items()}
    print(json.dumps({"losses": losses, "requests": len(trace), "steps": {name: len(r.steps) for name, r in found.items()}}))
    for name in ("two", "swapped"):
        assert found[name].outputs == found["one"].outputs and len(found[name].outputs) == len(trace), name
        assert losses[name] == pytest.approx(losses["one"], rel=0.01) and len(losses[name]) > 0, name
    assert torch.cuda.current_device() == 0


def figures(replay):
    requests, summary = replay.requests, replay.summary()
    return {f"{name}_p50_ms": 1000 * float(requests[f"{name}_s"].median()) for name in ("ttft", "tpot")} | {
        "attainment": float(summary["attainment"]),
        "makespan_s": float(replay.steps["end_s"].max()),
        "busy_s": float(replay.steps["duration_s"].sum()),
    }


def test_two_gpus_side_by_side_on_the_wall_clock_agree_with_the_virtual_clock(engines):
    arrivals = wb.traces.poisson(rate=20.0, duration_s=6.0, seed=0).frame["arrival_s"]
    trace = requests_at(arrivals, (4, 32))
    slo = wb.SLO(ttft_s=0.5, e2e_s=0.12)  # half of the requests are far below, half far above: none is met or missed by chance
    for clock in ("virtual", "wall"):  # what is compiled or made at the first use is not counted
        run(trace[:16], fleet(engines), clock=clock)
    found, took_s = {}, {}
    for name, requests in (("arriving", trace), ("burst", requests_at([0.0] * 32, (64,)))):
        for clock in ("virtual", "wall"):
            begin = time.perf_counter()
            found[name, clock] = figures(run(requests, fleet(engines), slo=slo, clock=clock))
            took_s[name, clock] = time.perf_counter() - begin
    printed = {" ".join(key): values | {"took_s": took_s[key]} for key, values in found.items()}
    print(json.dumps({"device": torch.cuda.get_device_name(), "requests": len(trace)} | printed, indent=1))
    virtual, wall = found["arriving", "virtual"], found["arriving", "wall"]
    assert wall["attainment"] == pytest.approx(virtual["attainment"], abs=0.02)
    for name in ("ttft_p50_ms", "tpot_p50_ms"):
        assert wall[name] == pytest.approx(virtual[name], rel=0.10), name
    virtual, wall = found["burst", "virtual"], found["burst", "wall"]
    assert wall["makespan_s"] == pytest.approx(virtual["makespan_s"], rel=0.15)
    assert wall["makespan_s"] < 0.65 * wall["busy_s"], "the two really ran at the same time"
    assert took_s["burst", "wall"] >= wall["makespan_s"]
