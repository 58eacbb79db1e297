"""The bench refuses to print a number that it should not print."""

import json

import pytest
import torch

from kernels import bench


def case(errors: dict[str, float]) -> bench.Case:
    return bench.Case(op="segmented_lora", shape="s", check=lambda: errors, prepare=lambda: lambda: None, num_bytes=3.02e6, flops=0.0)


def test_without_cuda_the_bench_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.5, float("inf"), float("nan")])
def test_a_failing_check_prints_no_number(monkeypatch, capsys, error):
    monkeypatch.setattr(bench, "measure_us", lambda run: pytest.fail("measured before it was right"))
    assert bench.run_case(case({"y": error}), {}) is None
    assert "CHECK FAILED" in capsys.readouterr().out


def test_a_row_holds_floor_ratio_quantiles_and_provenance(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "measure_us", lambda run: (2.0, 3.0, 4.0))
    monkeypatch.setattr(bench, "provenance", lambda: {"gpu": "g", "torch": "t", "triton": "r", "python": "p", "commit": "c"})
    monkeypatch.setattr(bench, "cases", lambda quick: [case({"y": 0.001})])
    assert bench.main(["--json", str(tmp_path / "rows.json")]) == 0
    row = json.loads((tmp_path / "rows.json").read_text())
    assert row["floor_us"] == pytest.approx(1.0)
    assert row["ratio"] == pytest.approx(3.0)
    assert (row["p20_us"], row["p50_us"], row["p80_us"], row["gpu"], row["commit"]) == (2.0, 3.0, 4.0, "g", "c")
    monkeypatch.setattr(bench, "cases", lambda quick: [case({"y": 1.0})])
    assert bench.main([]) == 1
    assert "CHECK FAILED" in capsys.readouterr().out


def test_the_floors_are_those_of_the_targets():
    floors = {c.shape: c.floor_us for c in bench.cases(False) if c.op == "segmented_lora"}
    expected = {"4 x r8, 4096 -> 4096, T=1024": 8.5, "4 x r8, 4096 -> 14336, T=4096": 89, "32 x r8, 4096 -> 4096, T=64": 1.9}
    for shape, floor in expected.items():
        assert floors[shape] == pytest.approx(floor, rel=0.05)


def test_the_calls_of_one_replay_do_not_fit_the_cache_together():
    for made in bench.cases(False):
        assert made.num_copies == bench.MAX_COPIES or made.num_copies * made.num_bytes >= bench.COLD_BYTES, made.shape
        assert made.num_copies >= 2


@pytest.mark.parametrize("op", bench.LORA_OPS)
def test_every_lora_op_and_baseline_is_checked_and_runs(op):
    made = bench.lora_case(op, 4, 64, 96, 40, device="cpu")
    errors = made.check()
    assert errors and bench.passes(errors), errors
    made.prepare()()


def test_the_check_of_the_torch_loop_finds_a_missing_scale(monkeypatch):
    loop = bench.lora_loop_

    def unscaled(y, x, table, layout):
        for place, weights in table.weights.items():
            table.weights[place] = bench.SlotWeights(weights.a, weights.b, 1.1 * weights.scale)
        return loop(y, x, table, layout)

    monkeypatch.setattr(bench, "lora_loop_", unscaled)
    assert not bench.passes(bench.lora_case("lora_loop", 4, 64, 96, 40, device="cpu").check())
