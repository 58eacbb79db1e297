"""Measured launches: what the tuner keeps, the file that travels, and what a GPU without a file gets."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import bench, tune, tuned
from kernels import plan as planning
from kernels.candidates import splits, variants
from kernels.launch import Launch, ShapeClass
from kernels.plan import OPS, default_launch, overridden, plan
from kernels.tune import MARGIN, Tuner
from kernels.tune_problems import GROUPS, Instance, Problem, problems
from kernels.tuned import Entry, Gpu, TunedPlan

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability="9.0", processors=132)
SIZES = {"rows": 16, "length": 4096, "programs": 30, "itemsize": 2, "rank": 8}
SHAPE = ShapeClass.of("shrink", **SIZES)


def launch_of(op="shrink", **changes):
    return plan(op, **(SIZES | {"processors": 132} | changes))


def problem(name="p", wrong=lambda launch: False, breaks=lambda launch: False, **changes):
    """An op that asks for one launch and remembers it in `ran`; wrong launches give another result."""
    ran = []

    def prepare():
        def outputs():
            launch = launch_of(**changes)
            ran.append(launch)
            if breaks(launch):
                raise RuntimeError("out of resource: shared memory")
            return [torch.full((4,), 2.0 if wrong(launch) else 1.0)]

        return Instance(run=outputs, outputs=outputs, reference=lambda: [torch.ones(4)])

    made = Problem(op="fake", name=name, prepare=prepare, num_bytes=1e9)
    return made, ran


def tuner_of(time_of, **options):
    def timer(instances):
        instances[0].run()
        return time_of(ran[-1])

    ran = options.pop("ran")
    return Tuner(gpu=H100, versions={"torch": "t", "triton": "r"}, commit="c", timer=timer, say=lambda line: None, **options)


def tuned_with(time_of, seconds=math.inf, **options):
    made, ran = problem(**options)
    tuner = tuner_of(time_of, ran=ran)
    left = tuner.tune([made], seconds, lambda plan: None)
    return tuner, left


def test_the_fastest_launch_is_kept_with_its_time_beside_the_defaults_and_the_next_best():
    tuner, left = tuned_with(lambda launch: 100.0 + abs(launch.block - 128) + 10 * abs(launch.splits - 8) + launch.num_warps)
    entry = tuner.chosen[SHAPE]
    assert not left and (entry.launch.block, entry.launch.splits, entry.launch.num_warps) == (128, 8, 2)
    assert entry.default == default_launch("shrink", processors=132, **SIZES)
    assert entry.time_us == 102.0 and entry.default_us > entry.runner_up_us > entry.time_us
    assert entry.candidates > 10 and entry.error == 0


def test_a_gain_within_the_noise_keeps_the_default():
    default = default_launch("shrink", processors=132, **SIZES)
    tuner, _ = tuned_with(lambda launch: 100.0 if launch == default else 100.0 * (1 - 0.9 * MARGIN))
    assert tuner.chosen[SHAPE].launch == default


def test_a_wrong_launch_is_never_timed_and_never_wins():
    timed = []
    tuner, _ = tuned_with(lambda launch: timed.append(launch) or 1000.0 / launch.block, wrong=lambda launch: launch.block == 512)
    assert tuner.chosen[SHAPE].launch.block == 256 and timed and all(launch.block != 512 for launch in timed)


def test_a_launch_that_the_gpu_cannot_run_is_left_out():
    tuner, _ = tuned_with(lambda launch: 1000.0 / launch.block, breaks=lambda launch: launch.block > 128 and launch.num_warps != 4)
    assert tuner.chosen[SHAPE].launch.block == 512 and tuner.chosen[SHAPE].launch.num_warps == 4


def test_an_op_that_is_wrong_before_anything_was_tuned_gets_no_entry():
    tuner, _ = tuned_with(lambda launch: 1.0, wrong=lambda launch: True)
    assert not tuner.chosen


def test_a_launch_that_is_wrong_on_a_later_problem_goes_back_to_the_default():
    default = default_launch("shrink", processors=132, **SIZES)
    first, ran = problem()
    tuner = tuner_of(lambda launch: 1000.0 / launch.block, ran=ran)
    tuner.tune([first], math.inf, lambda plan: None)
    assert tuner.chosen[SHAPE].launch != default
    second, _ = problem(wrong=lambda launch: launch != default)
    tuner.tune([second], math.inf, lambda plan: None)
    assert SHAPE not in tuner.chosen and SHAPE in tuner.refused


def test_the_budget_ends_the_run_and_names_what_was_not_reached():
    now = [0.0]
    made, ran = problem()
    other, _ = problem("other")

    def time_of(launch):
        now[0] += 10.0
        return 1.0

    tuner = tuner_of(time_of, ran=ran, clock=lambda: now[0])
    saved = []
    assert tuner.tune([made, other], 25.0, saved.append) == ["fake other"]
    assert tuner.chosen[SHAPE].candidates == 3 and len(saved) == 1


def test_equal_times_give_equal_plans():
    first, second = (tuned_with(lambda launch: 5.0 + launch.num_warps % 3)[0].plan for _ in range(2))
    assert first == second


# ---- the file


launches = st.builds(
    Launch,
    block=st.sampled_from([16, 64, 4096]),
    block_rank=st.sampled_from([16, 64]),
    splits=st.sampled_from([1, 8]),
    repeats=st.integers(1, 5),
    num_warps=st.sampled_from([1, 16]),
    num_stages=st.integers(1, 5),
)
shapes = st.builds(
    lambda op, **sizes: ShapeClass.of(op, **sizes),
    st.sampled_from(OPS),
    rows=st.sampled_from([16, 128]),
    length=st.integers(1, 20000),
    programs=st.integers(0, 20000),
    itemsize=st.sampled_from([2, 4]),
    rank=st.integers(1, 256),
    head_size=st.sampled_from([0, 128]),
)


def entry(shape=SHAPE, launch=Launch(block=64), **changes):
    values = {"time_us": 1.5, "default": Launch(block=32), "default_us": 2.5, "runner_up": None, "runner_up_us": None, "error": 1e-3}
    return Entry(**(values | {"shape": shape, "launch": launch, "candidates": 3, "problem": "p", "commit": "c", "date": "d"} | changes))


def plan_of(*entries, gpu=H100):
    return TunedPlan(gpu=gpu, versions={"torch": "t"}, entries=entries)


@given(found=st.dictionaries(shapes, launches, max_size=5))
def test_a_plan_survives_its_file(found, tmp_path_factory):
    entries = [entry(shape, launch, runner_up=launch, runner_up_us=3.0) for shape, launch in sorted(found.items())]
    made = plan_of(*entries)
    path = made.save(tmp_path_factory.mktemp("plans"))
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert TunedPlan.load(path) == made
    assert all(tuned.find(H100, path.parent).launch(shape) == launch for shape, launch in found.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace('"format": 1', '"format": 7'),
        lambda text: text.replace('"block": 64', '"block": 65'),
        lambda text: text.replace('"num_warps"', '"num_wraps"'),
        lambda text: text.replace('"entries"', '"entrys"'),
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"entries": 2 * json.loads(text)["entries"]}),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it_and_the_next_step(damage, tmp_path):
    path = plan_of(entry()).save(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"(?s)a plan file must hold .*nvidia-h100-80gb-hbm3.json. Write it again with `python -m kernels"):
        tuned.find(H100, tmp_path)


def test_every_plan_that_ships_loads():
    for path in tuned.FOLDER.glob("*.json"):
        assert TunedPlan.load(path).gpu.file_name == path.name


# ---- which plan a GPU gets


@pytest.fixture
def a_gpu(monkeypatch):
    """A CUDA device as far as choosing launches goes."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(tuned, "_plans", {})
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    planning._settled.cache_clear()
    yield torch.device("cuda")
    planning._settled.cache_clear()


def test_a_measured_launch_comes_before_the_default_and_for_the_cpu_there_is_none(a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    plan_of(entry()).save(tmp_path)
    default = default_launch("shrink", processors=132, **SIZES)
    assert launch_of(device=a_gpu) == Launch(block=64) != default
    assert launch_of(device=torch.device("cpu")) == launch_of() == default
    # half or twice as many programs take it too, four times do not; another rank does not
    assert launch_of(device=a_gpu, programs=64).block == launch_of(device=a_gpu, programs=16).block == 64
    assert launch_of(device=a_gpu, programs=128).block == launch_of(device=a_gpu, rank=16).block == default.block


def test_the_default_beside_a_measurement_is_the_heuristics_even_where_a_plan_is_in_force(a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    plan_of(entry()).save(tmp_path)
    tuner, _ = tuned_with(lambda launch: 1.0, device=a_gpu)
    assert launch_of(device=a_gpu).block == 64 and tuner.chosen[SHAPE].default == default_launch("shrink", processors=132, **SIZES)


def test_choices_stay_while_the_process_lives_whatever_becomes_of_the_file(a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    path = plan_of(entry()).save(tmp_path)
    first = launch_of(device=a_gpu)
    path.unlink()
    planning._settled.cache_clear()
    assert launch_of(device=a_gpu) == first == Launch(block=64)


def test_an_unknown_gpu_gets_the_default_and_one_line_that_says_how_to_tune(a_gpu, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    plan_of(entry(), gpu=Gpu(name="NVIDIA A100", capability="8.0", processors=108)).save(tmp_path)
    with caplog.at_level(logging.INFO):
        for rows in (16, 32):
            assert launch_of(device=a_gpu, rows=rows) == default_launch("shrink", processors=132, **(SIZES | {"rows": rows}))
    (record,) = caplog.records
    assert H100.name in record.getMessage() and "python -m kernels.tune --into kernels/plans" in record.getMessage()


def test_a_gpu_of_the_same_architecture_and_size_lends_its_plan_and_the_log_says_so(a_gpu, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    plan_of(entry(), gpu=replace(H100, name="NVIDIA H200")).save(tmp_path)
    assert launch_of(device=a_gpu).block == 64
    assert "measured on a NVIDIA H200" in caplog.text


def test_the_variable_names_another_folder_or_no_plan_at_all(a_gpu, monkeypatch, tmp_path):
    plan_of(entry()).save(tmp_path)
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    assert tuned.of_device(a_gpu) == plan_of(entry())
    for value, error in (("default", None), (str(tmp_path / "none"), ValueError)):
        monkeypatch.setattr(tuned, "_plans", {})
        monkeypatch.setenv(tuned.VARIABLE, value)
        if error is None:
            assert tuned.of_device(a_gpu) is None
        else:
            with pytest.raises(error, match="must be a folder of plan files"):
                tuned.of_device(a_gpu)


# ---- candidates and problems


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rows", "rank"), [(16, 8), (32, 64), (128, 256)])
def test_every_op_has_candidates_that_are_launches_and_begin_with_the_default(op, rows, rank):
    sizes = SIZES | {"rows": rows, "rank": rank, "head_size": 128}
    shape, default = ShapeClass.of(op, **sizes), default_launch(op, processors=132, **sizes)
    found = variants(shape, default)
    assert found[0] == default and len(found) == len(set(found)) >= 3
    assert all(launch.splits == default.splits for launch in found)
    parts = splits(shape, default, 132)
    assert (op not in ("shrink", "shrink_backward", "attention")) == (not parts)
    assert all(part.splits == default.splits or part.splits * part.block <= shape.length for part in parts)


def test_an_unknown_op_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="op must be one of shrink, .*, got 'shrnk'"):
        launch_of("shrnk")


def test_problems_cover_every_op_and_decode_comes_first():
    found = list(problems("cpu"))
    assert {p.op for p in found} == set(tune.OPS) and len({(p.op, p.name) for p in found}) == len(found)
    assert all("T=64" in p.name for p in found[: len(GROUPS)]) and all(p.num_bytes > 0 for p in found)


def test_without_cuda_the_tuner_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_command_writes_the_file_and_a_second_run_goes_on_from_there(a_gpu, monkeypatch, tmp_path, capsys):
    made, ran = problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "provenance", lambda: {"commit": "abc"})
    monkeypatch.setattr(tune, "problems", lambda: [made])
    times = []

    def timer(instances):
        instances[0].run()
        times.append(1000.0 / ran[-1].block)
        return times[-1]

    monkeypatch.setattr(tune, "Tuner", lambda **options: Tuner(**options, timer=timer))
    assert tune.main(["--into", str(tmp_path)]) == 0
    (kept,) = TunedPlan.load(tmp_path / H100.file_name).entries
    assert kept.launch.block == 512 and kept.commit == "abc" and times
    times.clear()
    assert tune.main(["--into", str(tmp_path)]) == 0 and not times
    assert tune.main(["--into", str(tmp_path), "--again"]) == 0 and times
    assert "0 of 1 problems not reached" in capsys.readouterr().out


def test_an_override_ends_with_its_block():
    with overridden(lambda shape, default: replace(default, block=32)):
        assert launch_of().block == 32
    assert launch_of() == default_launch("shrink", processors=132, **SIZES)
