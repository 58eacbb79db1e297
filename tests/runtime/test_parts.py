"""The parts of a step by name, the trace of one step, and bars of long work."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from tests.runtime.references import SMALL, job, request
from workbench.runtime import engine_measuring, parts
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine
from workbench.runtime.parts import Parts


@pytest.fixture(scope="module")
def engine(base, adapters):
    return Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)


def mixed(driver, job_id):
    """A batch with a prefill and a whole micro-batch, forward and backward."""
    driver.add(request("r", 10, "a"))
    driver.prefill("r")
    driver.finetune(job_id)
    driver.backward(job_id)
    return driver.take()


def slices(path):
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]


def test_the_trace_of_a_step_names_its_parts_nested_in_the_step(engine, tmp_path):
    j = job("mine")
    with Driver(engine, [j]) as driver:
        result = engine.trace_step(tmp_path / "new" / "step.json", mixed(driver, j.id))
    assert result is not None and result.tokens and result.layers_done == {j.id: 3}
    found = slices(tmp_path / "new" / "step.json")
    (step,) = [e for e in found if e["name"] == "step 0"]
    for name in ("admit", "load adapters", "pack", "forward", "attention", "logits", "loss", "sample", "backward", "losses", "commit"):
        inside = [e for e in found if e["name"] == name]
        assert inside, name
        assert all(step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"] for e in inside)
    assert sum(e["name"] == "attention" for e in found) == sum(e["name"] == "backward layer" for e in found) == 3
    assert any(e["name"].startswith("aten::") for e in found)


def test_the_next_step_is_traced_whoever_runs_it_and_only_that_one(engine, tmp_path):
    with Driver(engine) as driver:
        for i, path in enumerate((tmp_path / "a.json", None)):
            if path is not None:
                assert engine.trace_step(path) is None and not path.exists()
            driver.add(request(f"r{i}", 10, None))
            driver.prefill(f"r{i}")
            assert driver.step().tokens
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert any(e["name"] == "step 0" for e in slices(tmp_path / "a.json"))


def test_a_traced_step_computes_what_an_untraced_one_does(engine, tmp_path):
    found = []
    for traced in (False, True):
        j = job("mine")
        with Driver(engine, [j]) as driver:
            batch = mixed(driver, j.id)
            result = engine.trace_step(tmp_path / "step.json", batch) if traced else engine.step(batch)
            assert result is not None
            found.append((dict(result.tokens), dict(result.losses), [p.clone() for p in engine._states[j.id].accumulated]))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_a_traced_step_that_fails_is_rolled_back_and_the_next_one_is_not_traced(engine, tmp_path, monkeypatch):
    with Driver(engine) as driver:
        driver.add(request("r", 10, None))
        driver.prefill("r")
        batch = driver.take()
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "forward", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.trace_step(tmp_path / "step.json", batch)
        assert not engine.runner.parts.is_on and not engine._sequences
        assert engine.step(batch).tokens


def test_parts_that_are_off_are_one_object_that_does_nothing(monkeypatch):
    monkeypatch.setattr(parts, "_named", lambda name: pytest.fail("named"))
    monkeypatch.delenv(parts.VARIABLE, raising=False)
    off = Parts()
    assert off("a") is off("b")
    with off("a"):
        pass


@pytest.mark.parametrize("variable", ["0", "1"])
@pytest.mark.parametrize("configured", [False, True])
def test_ranges_are_switched_by_the_configuration_or_the_environment(base, monkeypatch, configured, variable):
    monkeypatch.setenv(parts.VARIABLE, variable)
    engine = Engine.from_pretrained(base, device="cpu", config=replace(SMALL, ranges=configured))
    assert engine.runner.parts.is_on == (configured or variable == "1")


# ---- bars


class Bar:
    """Stands for tqdm."""

    made: ClassVar[list["Bar"]] = []

    def __init__(self, total, what, unit, progress):
        self.total, self.what, self.progress, self.count = total, what, progress, 0
        Bar.made.append(self)

    def update(self, n=1):
        self.count += n

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Recorder:
    """Stands for recorded graphs, of which a CPU has none."""

    def __init__(self, num):
        self.num, self.recorded = num, []

    def recordings(self, *args, **options):
        return [lambda i=i: self.recorded.append(i) for i in range(self.num)]


@pytest.mark.parametrize(
    ("configured", "given", "expected"), [(None, None, None), (False, None, False), (False, True, True), (True, False, False)]
)
def test_recording_graphs_shows_a_bar_of_all_of_them(base, monkeypatch, configured, given, expected):
    engine = Engine.from_pretrained(base, device="cpu", config=replace(SMALL, progress=configured))
    engine._graphs, engine.runner.mixed = Recorder(5), Recorder(2)
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(engine_measuring, "progress_bar", Bar)
    engine.warm_up(progress=given)
    (bar,) = Bar.made
    assert bar.total == bar.count == 7 and bar.progress is expected
    assert engine._graphs.recorded == [0, 1, 2, 3, 4] and engine.runner.mixed.recorded == [0, 1]


@pytest.mark.parametrize("progress", [True, False])
def test_calibration_shows_its_bar_or_none(engine, progress, capsys):
    engine.calibrate(max_steps=6, seconds=0.0, progress=progress)
    assert ("measuring steps" in capsys.readouterr().err) == progress
