"""A checkpoint that is overwritten: whatever is cut short, the old one or the new one can be read."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.runtime.references import SMALL, job, shake
from workbench import checkpoint
from workbench.config import FinetuneJob
from workbench.runtime import jobs
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine


class Crash(BaseException):
    """The process is gone: nothing after it runs."""


def crash(*args, **options):
    raise Crash


# Where the process dies, and whether what can be read then is the old checkpoint.
POINTS = {
    "before the first file": ("save_prepared", True),
    "between two files": ("save_file", True),
    "before the disk has them": ("fsync", True),
    "before the first rename": ("rename", True),
    "between the renames": ("second rename", True),
    "before the old one is removed": ("rmtree", False),
}


def dies(patch, where):
    original = Path.rename
    if where == "second rename":
        patch.setattr(Path, "rename", lambda self, target: crash() if self.name.endswith(".part") else original(self, target))
    elif where == "rename":
        patch.setattr(Path, "rename", crash)
    elif where == "fsync":
        patch.setattr(os, "fsync", crash)
    elif where != "rmtree":
        patch.setattr(jobs, where, crash)
    # The dead clean up nothing.
    patch.setattr(shutil, "rmtree", crash if where == "rmtree" else lambda *args, **options: None)


@pytest.fixture(scope="module")
def engine(base):
    return Engine.from_pretrained(base, device="cpu", config=SMALL)


def train(driver, job_id):
    driver.finetune(job_id)
    driver.step()
    driver.backward(job_id)
    driver.step()


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_while_a_checkpoint_is_overwritten_leaves_one_that_resumes(engine, point, monkeypatch, tmp_path):
    where, is_old = POINTS[point]
    j, folder, masters = job("mine"), tmp_path / "saved", []
    with Driver(engine, [j]) as driver:
        shake(engine, j.id)
        handle = engine.jobs["mine"]
        for saves in range(2):
            train(driver, j.id)
            masters.append([p.clone() for p in engine._states[j.id].params])
            with monkeypatch.context() as patch:
                if saves:
                    dies(patch, where)
                    with pytest.raises(Crash):
                        handle.checkpoint(folder)
                else:
                    handle.checkpoint(folder)
    done = 1 if is_old else 2
    resumed = FinetuneJob.from_checkpoint(folder)
    with Driver(engine, [resumed]) as driver:
        state = engine._states[resumed.id]
        assert state.micro_batches_done == done
        assert all(torch.equal(p, q) for p, q in zip(state.params, masters[done - 1], strict=True))
        # The next checkpoint finds what the crash left, and leaves nothing beside.
        train(driver, resumed.id)
        engine.jobs["mine"].checkpoint(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(jobs.FILES)
    with Driver(engine, [FinetuneJob.from_checkpoint(folder)]):
        assert engine._states[j.id].micro_batches_done == done + 1


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"must hold nothing but job.json, since it is replaced as a whole, got \['notes.txt'\]. Name another"
    ):
        with checkpoint.replaced(tmp_path, ["job.json"]):
            pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_error_in_the_middle_leaves_the_old_folder_and_nothing_beside(tmp_path):
    folder = tmp_path / "saved"
    for text in ("old", None):
        try:
            with checkpoint.replaced(folder, ["a"]) as new:
                (new / "a").write_text("new" if text is None else text)
                assert text, "cut short"
        except AssertionError:
            pass
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["saved"]
