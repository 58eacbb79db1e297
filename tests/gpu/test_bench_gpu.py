"""The bench's own CUDA paths on a small model: checks in bf16, graph timing, memory, clocks."""

import pytest
import torch

from workbench.bench import __main__ as cli
from workbench.bench import rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_workloads_pass_their_checks_in_bf16_and_write_rows_of_this_gpu(tmp_path):
    cells = ["4 x r8, B=16", "2 x 1024", "4 x r8, 4096 -> 4096, T=64"]
    assert cli.main(["w1", "w4", "w5", "--shape", "smollm2-135m", "--into", str(tmp_path), "--seconds", "90", "--only", *cells]) == 0
    frame = rows.read(tmp_path)
    assert set(frame["device"]) == {torch.cuda.get_device_name()} and frame["correct"].all()
    measured = set(zip(frame["workload"], frame["metric"], strict=True))
    assert {("w1", "step"), ("w4", "fine-tune"), ("w4", "peak memory"), ("w4", "over the uncut pass"), ("w5", "addition")} <= measured
    assert (frame.loc[frame["metric"] == "peak memory", "p50"] > 0).all()
