"""The virtual clock tells the truth: ten minutes of trace on the wall clock of a real GPU, against the same on the virtual clock."""

import json
import os
from pathlib import Path

import pytest
import torch

import workbench as wb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.wall_clock,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MINUTES = float(os.environ.get("LOQUETIER_WALL_MINUTES", "10"))


def quantiles(replay: wb.Replay) -> dict[str, float]:
    ttft, gaps = replay.requests["ttft_s"], wb.metrics.token_gaps(replay.events)["itl_s"]
    return {f"{name}_p{q}_s": float(values.quantile(q / 100)) for name, values in (("ttft", ttft), ("itl", gaps)) for q in (50, 90)}


def test_wall_clock_and_virtual_clock_agree_on_ten_minutes_of_trace():
    config = wb.EngineConfig(max_model_len=2048, max_batch_tokens=2048, activation_tokens=4096, max_requests=32)
    engine = wb.Engine.random("llama3-8b", adapters=4, rank=8, device="cuda", config=config)
    day = wb.traces.load("burstgpt-day29").jitter(1.0, seed=0).with_lengths("azure-conv", seed=0, clip=(1024, 64))
    day = day.assign_adapters(4, popularity=wb.zipf(1.0), seed=0).slice(0, 60 * MINUTES).scale(rate=0.25, how="thin", seed=0)
    policy, slo = wb.policies.FCFS(), wb.SLO(ttft_s=0.2, itl_s=0.045)
    wb.replay(day, executor=engine, policy=policy, slo=slo, progress=False)  # compiles for every shape that will occur; not counted
    virtual = wb.replay(day, executor=engine, policy=policy, slo=slo, progress=False)
    wall = wb.replay(day, executor=engine, policy=policy, slo=slo, clock="wall", progress=False)
    found = {name: quantiles(r) | {"attainment": r.summary()["attainment"]} for name, r in (("virtual", virtual), ("wall", wall))}
    found["requests"], found["device"] = len(day), torch.cuda.get_device_name()
    print(json.dumps(found, indent=1))
    if folder := os.environ.get("LOQUETIER_RESULTS"):
        Path(folder, "wall_clock.json").write_text(json.dumps(found, indent=1) + "\n")
    assert wall.steps["end_s"].iloc[-1] >= 60 * MINUTES * 0.95, "the wall clock really ran"
    assert abs(found["wall"]["attainment"] - found["virtual"]["attainment"]) <= 0.02
    for name, value in quantiles(virtual).items():
        assert found["wall"][name] == pytest.approx(value, rel=0.10), name
