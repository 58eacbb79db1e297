"""The tuner on a real GPU: every candidate of a few problems runs, is checked and timed, and the file takes effect."""

import math

import pytest
import torch

from kernels import bench, tuned
from kernels.tune import Tuner
from kernels.tune_problems import activation, attention, gated_lora, lora_backward, lora_forward, norm
from kernels.tuned import Gpu, TunedPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_candidates_run_are_right_and_are_timed(tmp_path):
    gpu = Gpu.of(torch.device("cuda"))
    lines: list[str] = []
    tuner = Tuner(gpu=gpu, versions={}, commit="test", say=lines.append)
    found = [norm(64, 4096, "cuda"), activation(64, 14336, "cuda"), attention(16, 1, 600, 2048, "cuda")]
    found += [lora_forward("gate_up", 4, 8, 64, "cuda"), lora_forward("o", 4, 64, 64, "cuda"), lora_backward("o", 1, 8, 2048, "cuda")]
    found += [gated_lora(1, 8, 512, "cuda")]
    assert tuner.tune(found, math.inf, lambda plan: plan.save(tmp_path)) == []
    plan = TunedPlan.load(tmp_path / gpu.file_name)
    ops = {entry.shape.op for entry in plan.entries}
    assert ops >= {
        "rms_norm",
        "swiglu",
        "attention",
        "shrink",
        "lora_swiglu",
        "expand",
        "shrink_backward",
        "expand_dx",
        "outer_da",
        "outer_db",
    }
    for entry in plan.entries:
        assert 0 < entry.time_us <= entry.default_us and entry.error < bench.TOLERANCE
    assert not any("WRONG" in line for line in lines), lines
    assert tuned.find(gpu, tmp_path) == plan
