"""The whole-engine bench on a tiny model: rows, checks before numbers, targets, README's table."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import workbench as wb
from workbench.bench import __main__ as cli
from workbench.bench import (
    check,
    contest,
    decode,
    finetune,
    fleet_replaying,
    floors,
    long_contest,
    machine,
    modelling,
    replaying,
    rows,
    session,
    table,
    targets,
    unified,
)
from workbench.bench.kept import load_all
from workbench.bench.session import Session
from workbench.latency.whole_replays import ReplayErrors

ROOT = Path(__file__).resolve().parents[1]
H100 = "NVIDIA H100 80GB HBM3"


def row(**changes) -> rows.Row:
    values = dict.fromkeys(rows.COLUMNS, "") | dict.fromkeys(
        ("p20", "p80", "floor", "ratio", "must", "stretch", "num_bytes", "flops", "sm_clock_mhz", "temperature_c")
    )
    values |= dict(workload="w1", cell="4 x r8, B=16", system=rows.OURS, metric="step", unit="ms", p50=7.5, n=20, correct=True)
    values |= dict(shape="llama3-8b", device=H100, commit="abc", dirty=False, date="2026-01-01T00:00:00Z", seed=0)
    return rows.Row(**(values | changes))


def frame_of(tmp_path, *made: rows.Row) -> pd.DataFrame:
    for one in made:
        rows.append(tmp_path / "rows", one)
    return rows.read(tmp_path / "rows")


def verdict(frame: pd.DataFrame, cell: str = "4 x r8, B=16", metric: str = "step") -> check.Verdict:
    return next(v for v in check.judge(frame) if (v.target.cell, v.target.metric) == (cell, metric))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Session:
    made = Session(shape="tiny-llama", into=tmp_path_factory.mktemp("bench"), device="cpu")
    made.start("w1", 60.0)
    return made


# ---- rows, targets, verdicts


def test_rows_come_back_as_they_were_written(tmp_path):
    made = [row(p20=7.25, p80=7.75, n=3), row(workload="w2", note='a "note", with a comma', device="CPU")]
    frame = frame_of(tmp_path, *made)
    back = [rows.Row(**{k: None if v is None or v != v else v for k, v in r.items()}) for r in frame.to_dict("records")]
    assert back == made


def test_a_file_with_other_columns_is_not_appended_to(tmp_path):
    (tmp_path / "w1.csv").write_text("workload,cell\n")
    with pytest.raises(ValueError, match="columns of this version"):
        rows.append(tmp_path, row())


def test_reading_a_folder_without_rows_says_how_to_make_some(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m workbench\.bench"):
        rows.read(tmp_path)


def test_time_over_floor_is_at_least_one_for_times_and_for_rates():
    assert rows.over_floor("ms", 8.0, 4.0) == 2.0
    assert rows.over_floor("tokens/s", 50.0, 100.0) == 2.0
    assert rows.over_floor("ms", 8.0, None) is None


def test_quantiles_of_few_values_claim_no_spread():
    assert rows.quantiles([3.0]) == (None, 3.0, None)
    assert rows.quantiles(range(11)) == (2, 5, 8)


def test_a_target_is_met_missed_or_missing_by_its_newest_row(tmp_path):
    assert verdict(frame_of(tmp_path, row(cell="elsewhere"))).state == "MISSING"
    assert verdict(frame_of(tmp_path, row(p50=8.1))).state == "MISSED"
    assert verdict(frame_of(tmp_path, row(p50=8.0, date="2026-01-02T00:00:00Z"))).state == "met"
    assert verdict(frame_of(tmp_path, row(p50=6.5, date="2026-01-03T00:00:00Z"))).state == "stretch reached"


def test_a_rate_is_met_from_its_must_upwards(tmp_path):
    rate = row(workload="w2", cell="4 adapters", metric="output", unit="tokens/s", p50=4299.0)
    assert verdict(frame_of(tmp_path, rate), "4 adapters", "output").state == "MISSED"
    assert verdict(frame_of(tmp_path, replace(rate, p50=4300.0)), "4 adapters", "output").state == "met"


@pytest.mark.parametrize("change", [{"device": "CPU"}, {"shape": "tiny-llama"}, {"system": "PEFT"}, {"correct": False}])
def test_rows_of_other_devices_shapes_and_systems_meet_no_target(tmp_path, change):
    assert verdict(frame_of(tmp_path, row(**change))).state == "MISSING"


def test_a_failed_check_takes_back_the_numbers_before_it(tmp_path):
    failed = row(cell=rows.CORRECTNESS, metric="error over tolerance", correct=False, date="2026-01-02T00:00:00Z")
    assert verdict(frame_of(tmp_path, row(), failed)).state == "MISSING"
    assert verdict(frame_of(tmp_path, row(date="2026-01-03T00:00:00Z"))).state == "met"


def test_check_prints_every_target_and_exits_1_unless_all_are_met(tmp_path, capsys):
    w2 = row(workload="w2", cell="4 adapters", metric="output", unit="tokens/s", p50=5000.0)
    frame_of(tmp_path, w2)
    assert cli.main(["--check", str(tmp_path / "rows"), "w2"]) == 0
    assert "1 of 1 met" in capsys.readouterr().out
    assert cli.main(["--check", str(tmp_path / "rows")]) == 1
    out = capsys.readouterr().out
    assert all(t.cell in out for t in targets.TARGETS) and f"{len(targets.TARGETS) - 1} missing" in out


def test_targets_are_named_once_and_stretches_are_harder_than_musts():
    names = [(t.workload, t.cell, t.metric) for t in targets.TARGETS]
    assert len(set(names)) == len(names)
    assert all(t.is_met(t.stretch) for t in targets.TARGETS if t.stretch is not None)
    assert all(t.is_met(t.must) for t in targets.TARGETS)


def test_the_bench_offers_every_cell_that_has_a_target():
    sizes = session.GPU_SIZES
    offered = {f"{name}, B={batch}" for name in decode.SETS for batch in sizes.batches}
    offered |= {f"{a} x r8, {k} -> {n}, T={t}" for a, k, n, t in sizes.lora}
    asked = {t.cell for t in targets.TARGETS if t.workload == "w5" or t.metric == "step"}
    assert asked <= offered


# ---- floors


@pytest.fixture(scope="module")
def llama_dims():
    from workbench.runtime.shapes import config
    from workbench.runtime.weights import Dims

    return Dims.of(config("llama3-8b"))


def test_the_floors_of_decode_and_fine_tuning_are_those_of_the_targets(llama_dims):
    class Half:
        itemsize = 2

    class FakeEngine:
        class fused:
            dims = llama_dims

        dtype = Half

    rates = machine.rates(H100)
    assert rates is not None and machine.rates("NVIDIA A100") is None
    for batch, expected in ((1, 5.01), (16, 5.38), (64, 6.45), (256, 10.73)):
        floor = 1e3 * floors.decode_bytes(FakeEngine, (8,) * 4, batch, 512) / rates[0]  # type: ignore[arg-type]
        assert floor == pytest.approx(expected, rel=0.01)
    assert rates[1] / floors.finetune_flops_per_token(llama_dims, 8, 1024) == pytest.approx(22966, rel=0.001)


def test_the_time_that_a_host_takes_away_is_what_the_kernel_counts_as_steal(tmp_path):
    file = tmp_path / "stat"
    file.write_text("cpu  11 12 13 14 15 16 17 250 19 20\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    assert machine.stolen_s(file) == 250 / os.sysconf("SC_CLK_TCK")
    file.write_text("cpu  11 12 13 14\n")
    assert math.isnan(machine.stolen_s(file)) and math.isnan(machine.stolen_s(tmp_path / "none"))


# ---- sessions: time and cells


def test_no_cell_is_begun_after_its_time_and_the_cell_is_named(tmp_path, capsys):
    made = Session(shape="tiny-llama", into=tmp_path, seconds=1e-9)
    made.start("w1", 60.0)
    time.sleep(0.001)
    assert not made.wants("4 x r8, B=1")
    assert made.skipped == ["w1 4 x r8, B=1"] and "Raise --seconds" in capsys.readouterr().out


def test_only_keeps_the_cells_that_it_names(tmp_path):
    made = Session(shape="tiny-llama", into=tmp_path, only=["B=16", "no LoRA, B=1"])
    made.start("w1", 60.0)
    assert [made.wants(c) for c in ("4 x r8, B=16", "4 x r8, B=64", "no LoRA, B=1")] == [True, False, True]


def test_a_cell_that_does_not_exist_is_an_error_that_lists_them(tmp_path, capsys):
    assert cli.main(["w5", "--shape", "tiny-llama", "--into", str(tmp_path), "--only", "B=17"]) == 2
    assert "4 x r8, 64 -> 64, T=16" in capsys.readouterr().err


def test_an_unknown_workload_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["w9"])
    assert "w1, w2, w3, w4, w5, w6, contest, model, replay" in capsys.readouterr().err


# ---- workloads on the CPU


def metrics_of(made: Session, first: int = 0) -> set[tuple[str, str, str]]:
    return {(r.cell, r.system, r.metric) for r in made.rows[first:]}


def run(made: Session, name: str, only: tuple[str, ...] = ()) -> set[tuple[str, str, str]]:
    """Run a workload of the shared session; what it recorded."""
    module = cli.import_module(f"workbench.bench.{cli.MODULES[name]}")
    made.only, first = only, len(made.rows)
    made.start(name, 30.0)
    assert module.run(made)
    of = made.rows[first:]
    assert of[0].cell == rows.CORRECTNESS and of[0].correct and of[0].p50 < 0.5, "the check comes first, with room"
    assert all(r.must is None and r.floor is None and r.device == "CPU" for r in of), "nothing is claimed of a CPU"
    assert all(math.isfinite(r.p50) for r in of)
    return metrics_of(made, first + 1)


def test_decode_writes_steps_and_what_lora_rows_and_mixed_ranks_cost(tiny):
    found = run(tiny, "w1", ("no LoRA", "4 x r8, B=1", "r8 + r24"))
    assert {(f"{name}, B={b}", rows.OURS, "step") for name in ("no LoRA", "4 x r8") for b in (1, 16)} <= found
    assert ("no LoRA row beside 4 x r8, B=16", rows.OURS, "over no adapters") in found
    assert ("r8 + r24 + r32 + r64, B=16", rows.OURS, "over 4 x r32") in found
    assert tiny.engine.adapters == {}


def test_offline_and_online_write_throughput_and_percentiles(tiny):
    assert run(tiny, "w2", ("4 adapters",)) == {("4 adapters", rows.OURS, "output")}
    found = run(tiny, "w3", ("20 req/s", "10 req/s, 12"))
    for cell in ("20 req/s", "20 req/s, 12 requests", "10 req/s, 12 requests"):
        assert {(cell, rows.OURS, f"{name} p{p}") for name in ("TTFT", "TPOT") for p in (50, 99)} <= found
    assert tiny.rows[-1].n == 12


def test_whole_replays_are_compared_with_the_models_and_the_worst_error_has_the_target(tiny, monkeypatch):
    monkeypatch.setattr(modelling, "LOADS", (12,))
    found = run(tiny, "model", ("BurstGPT, 12 req/s, LatencyBudget", "BurstGPT, 12 req/s, SLOSlack"))
    assert {(modelling.WORST, rows.OURS, f"error of {metric}") for metric in modelling.METRICS} <= found
    both = [r for r in tiny.rows if r.metric == "error of finetune_tokens_per_s"]
    assert len(both) == 3 and both[2].p50 == max(both[0].p50, both[1].p50)


def test_a_profile_is_judged_and_kept_replays_give_the_same_rows_without_the_engine(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(modelling, "LOADS", (12,))
    profile = tiny.engine.calibrate(seconds=0.2, progress=False).perturb(1.0)
    monkeypatch.setattr(tiny, "profile", wb.LatencyModel.load(profile.save(tmp_path / "slow")))
    monkeypatch.setattr(tiny, "replays", tmp_path / "kept")
    run(tiny, "model", ("BurstGPT, 12 req/s, ServeFirst",))
    monkeypatch.setattr(wb.Engine, "random", lambda *_, **__: pytest.fail("no engine is needed"))
    made = {}
    fast = profile.perturb(-0.4).save(tmp_path / "fast")
    for name, model in (("again", tmp_path / "slow"), ("kept model", tmp_path / "kept" / "model"), ("fast", fast)):
        assert cli.main(["model", "--from", str(tmp_path / "kept"), "--profile", str(model), "--into", str(tmp_path / name)]) == 0
        made[name] = ReplayErrors.read(tmp_path / name / modelling.PREDICTIONS_FILE)
    there = ReplayErrors.read(tiny.into / modelling.PREDICTIONS_FILE)
    assert made["again"] == made["kept model"] == there != made["fast"], "policies predicted with the profile, and it was judged"
    assert {(p.trace, p.load, p.device) for p in there.predictions} == {("BurstGPT", 12.0, "CPU")}
    written = rows.read(tmp_path / "again")
    assert set(written["shape"]) == {"tiny-llama"} and modelling.WORST in set(written["cell"])
    shipped = wb.LatencyModel.load(tmp_path / "kept" / "model").with_replays(made["again"])
    assert "1 replays on CPU" in str(shipped.info.model_error.on("attainment"))
    capsys.readouterr()


def test_no_replay_is_begun_that_cannot_end_in_the_time_left(tmp_path, capsys):
    made = Session(shape="tiny-llama", into=tmp_path, seconds=100.0)
    made.start("model", 60.0)
    assert made.wants("short", 50.0) and not made.wants("long", 200.0)
    assert made.skipped == ["model long"] and "it needs 200 s, 100 s are left" in capsys.readouterr().out


def test_a_profile_of_another_device_is_refused_before_anything_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "profile", wb.LatencyModel.load("h100-llama3-8b"))
    monkeypatch.setattr(modelling, "_measured", lambda *_: pytest.fail("measured"))
    tiny.start("model", 30.0)
    with pytest.raises(ValueError, match="the profile must be of the device of the replays, CPU"):
        modelling.run(tiny)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["w1", "--profile", "h100-llama3-8b"], "--profile is of the workloads w6, contest, model"),
        (["w6", "--replays", "kept"], "--replays is of the workload model or contest"),
        (["contest", "--from", "kept"], "--from is of the workload model alone"),
        (["model", "--from", "kept", "--replays", "other"], "takes no --replays"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(given)
    assert message in capsys.readouterr().err


def test_fine_tuning_and_unified_write_rates_and_attainment(tiny, monkeypatch):
    monkeypatch.setattr(unified, "OTHERS", ())
    assert run(tiny, "w4") == {
        ("2 x 16", rows.OURS, "fine-tune"),
        ("two adapters, 1 x 16 each", rows.OURS, "fine-tune"),
        ("8 x 16", rows.OURS, "fine-tune"),
        ("2 x 16, backward in slices of 1 layer", rows.OURS, "over the uncut pass"),
    }
    found = run(tiny, "w6", ("10 req/s",))
    assert {("10 req/s, gaps 45 ms", rows.OURS, m) for m in ("attainment", "fine-tune")} <= found
    assert tiny.engine.adapters == {}


def test_a_contest_without_tuned_policies_says_how_to_tune_them(tiny):
    with pytest.raises(FileNotFoundError, match="python -m workbench.bench tune"):
        long_contest.run(wb.LatencyModel.load("h100-llama3-8b"), tiny.into / "nowhere")
    with pytest.raises(FileNotFoundError, match="python -m workbench.bench tune"):
        contest.run(Session(shape="tiny-llama", into=tiny.into / "nowhere"))


def test_the_contest_measures_policy_21_beside_the_tuned_ones_and_keeps_the_replays(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "replays", tmp_path)
    rivals = [{"policy": "LatencyBudget", "parameters": {"budget_s": 0.02}}, {"policy": "TemporalSharing", "parameters": {"every": 8}}]
    made = [
        {"share": 0.7, "attainment": 1.0, "finetune_tokens_per_s": 9.0 - i, "saturated": False} | rival for i, rival in enumerate(rivals)
    ]
    (tiny.into / contest.FILE).write_text(json.dumps({"capacity": 8.0, "rows": made}))
    found = run(tiny, "contest", ("70%",))
    cell = "70% of capacity"
    systems = [rows.OURS, *(f"{rows.OURS}, {name}" for name in ("SLOSlack", "LatencyBudget", "TemporalSharing"))]
    assert {(cell, system, "attainment") for system in systems} <= found
    assert {(cell, rows.OURS, "fine-tuning kept"), (cell, rows.OURS, "p99 of the requests' p99 gaps")} <= found
    assert tiny.engine.adapters == {}
    kept = load_all([tmp_path])
    assert len(kept) == 5 and {type(one.policy).__name__ for one in kept} == {"SLOSlack", "LatencyBudget", "TemporalSharing"}
    assert all(one.fitted is not None for one in kept), "what they predicted with"


def test_the_bytes_of_the_arena_are_those_of_all_its_tensors():
    import torch

    from workbench.runtime.kv_cache import Arena, Kept

    kept = Kept(torch.zeros(2), torch.zeros(3), torch.zeros(4))
    arena = Arena(x=torch.zeros(5), k=torch.zeros(6), v=torch.zeros(7), grad=torch.zeros(8), kept=kept)
    assert finetune.num_bytes_of(arena) == 4 * (2 + 3 + 4 + 5 + 6 + 7 + 8)
    assert finetune.num_bytes_of(replace(arena, kept=None)) == 4 * (5 + 6 + 7 + 8)


def test_kernels_stand_beside_the_loop_and_the_base_gemm(tiny):
    cell = "4 x r8, 64 -> 128, T=2048"
    found = run(tiny, "w5", (cell,))
    assert {(cell, rows.OURS, m) for m in ("addition", "backward", "over the base GEMM", "backward over forward")} <= found
    assert {(cell, "torch loop", "addition"), (cell, "base GEMM", "GEMM"), (cell, "base GEMM + LoRA", "GEMM and addition")} <= found


def test_peft_decodes_and_trains_on_the_same_weights(tiny):
    from workbench.bench import peft

    tiny.only, first = ("4 x r8, B=16", "two adapters"), len(tiny.rows)
    for name in ("w1", "w4"):
        tiny.start(name, 30.0)
        peft.run(tiny, name)
    assert metrics_of(tiny, first) == {("4 x r8, B=16", "PEFT", "step"), ("two adapters, 1 x 16 each", "PEFT", "fine-tune")}


def test_the_replay_is_timed_under_a_policy_at_every_step_and_under_one_that_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(replaying, "PROBE_REQUESTS", 4)
    monkeypatch.setattr(fleet_replaying, "NUM_REPLICAS", 2)
    whole = replaying.timed_replay
    monkeypatch.setattr(replaying, "timed_replay", lambda *given: whole(*given[:-1], min(given[-1], 8)))
    made = Session(shape="", into=tmp_path, seconds=600.0)
    made.start("replay", 600.0)
    assert replaying.run(made)
    cells = ["1 replica, a policy at every step", "1 replica, repeat()", "1 replica, repeat(), no fine-tuning", "8 replicas, repeat()"]
    assert [r.cell for r in made.rows] == cells
    assert all(r.p50 > 0 and r.device.startswith("CPU (") for r in made.rows)
    assert all(r.must is not None for r in made.rows if r.cell != cells[2])


# ---- no check, no number


def test_a_wrong_adapter_writes_no_number(tmp_path, monkeypatch, capsys):
    view = wb.Engine.view
    monkeypatch.setattr(wb.Engine, "view", lambda self, name=None: view(self))
    assert cli.main(["w1", "w2", "--shape", "tiny-llama", "--into", str(tmp_path)]) == 1
    frame = rows.read(tmp_path)
    assert set(frame["cell"]) == {rows.CORRECTNESS} and not frame["correct"].any()
    assert "CHECK FAILED" in capsys.readouterr().out


def test_wrong_gradients_write_no_number(tmp_path, monkeypatch):
    from workbench.runtime.jobs import JobHandle

    right = JobHandle.gradients.fget
    monkeypatch.setattr(JobHandle, "gradients", property(lambda self: {k: (a, 1.01 * b) for k, (a, b) in right(self).items()}))
    assert cli.main(["w4", "--shape", "tiny-llama", "--into", str(tmp_path)]) == 1
    assert set(rows.read(tmp_path)["cell"]) == {rows.CORRECTNESS}


def test_a_nan_fails_a_check(tmp_path):
    made = Session(shape="tiny-llama", into=tmp_path, device="cpu")
    made.start("w1", 1.0)
    assert not made.check({"fine": (0.0, 1.0), "not a number": (float("nan"), 1.0)})


def test_an_assumed_context_decodes_the_token_of_a_computed_one(tiny):
    from workbench.runtime.driver import Driver

    tiny.rows_with_keys = 0  # other workloads have written into the pool since
    decode.compute_keys(tiny, 4)
    requests = decode._requests(tiny, 4, (None,))
    with Driver(tiny.engine, seed=tiny.seed) as driver:
        decode.assume_context(driver, tiny, 4, (None,))
        driver.decode([r.request_id for r in requests])
        assumed = driver.step().tokens
    with Driver(tiny.engine, seed=tiny.seed) as driver:
        for request in requests:
            driver.add(request)
            driver.prefill(request.request_id)
        assert driver.step().tokens == assumed


# ---- README


def test_readme_has_the_table_of_the_shipped_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    frame = rows.read(ROOT / "benchmarks")
    assert table.updated(text, frame) == text, "Run python -m workbench.bench table benchmarks."
    assert table.full(frame) == (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), "Run the same command."


def test_the_table_names_value_floor_must_device_date_and_commit_and_baselines_below(tmp_path):
    ours, theirs = row(ratio=1.39, p20=7.4, p80=7.6), row(system="PEFT", p50=244.0)
    lines = table.markdown(frame_of(tmp_path, theirs, ours, row(device="CPU", p50=1.0))).splitlines()
    assert lines[2] == (
        "| Decode, steady state (W1) | 4 x r8, B=16 | workbench | step 7.5 ms (7.4 to 7.6) | 1.39 | ≤ 8: met | 10 | "
        "NVIDIA H100 80GB HBM3, 2026-01-01, abc |"
    )
    assert lines[3].startswith("|  | 4 x r8, B=16 | PEFT | step 244 ms |") and len(lines) == 4
    assert table.markdown(frame_of(tmp_path, theirs, ours), only_targets=True).splitlines() == lines[:3]


@pytest.mark.parametrize(("p50", "shown"), [(8.0002, "8.0002"), (8.004, "8.004"), (8.0, "8"), (7.997, "7.997"), (8.01, "8.01")])
def test_a_missed_value_never_looks_like_its_target(tmp_path, p50, shown):
    line = table.markdown(frame_of(tmp_path, row(p50=p50))).splitlines()[2]
    assert f"| step {shown} ms |" in line
    assert ("**missed**" in line) == (p50 > 8)


def test_the_table_command_writes_between_the_markers_only(tmp_path):
    frame_of(tmp_path, row())
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    assert cli.main(["table", str(tmp_path / "rows"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "4 x r8, B=16" in text
    with pytest.raises(ValueError, match="markers"):
        table.updated("no block", rows.read(tmp_path / "rows"))
