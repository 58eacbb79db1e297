"""A bundle verifies itself, and a changed number anywhere in it is found."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import workbench as wb
from workbench.experiments.bundle import BUNDLE_FILE, file_checksums
from workbench.policies import FCFS, ServeFirst
from workbench.testing import FixedCost
from workbench.verify import main, verify

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = pd.DataFrame({"prompt_tokens": [8, 24, 48], "output_tokens": [4, 1, 3]})
SLOS = wb.SLO(ttft_s=0.02, itl_s=0.01)


def trace(seed: int, load: float = 30.0) -> wb.Trace:
    drawn = wb.traces.poisson(rate=load, duration_s=1.0, seed=seed).with_lengths(LENGTHS, seed=seed)
    return drawn.assign_adapters(["a", "b"], popularity=wb.uniform(), seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    job = wb.FinetuneJob(adapter="t", data=wb.RandomTokens(examples=8, tokens=32), epochs=100)
    options = {"trace": trace, "executor": FixedCost(), "jobs": [job], "slo": SLOS, "seeds": range(2), "planning": 0.0, "progress": False}
    result = wb.compare([FCFS(), ServeFirst()], **options)
    a, b = result.labels
    differences = [
        result.difference(a, b, metric="ttft_p50_s"),
        result.difference(a, b, metric="goodput_per_s", over="blocks", resamples=199),
    ]
    return result.bundle(tmp_path_factory.mktemp("bundle") / "b", differences=differences)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def problems(folder: Path) -> dict[str, str]:
    return {check.what: check.problem for check in verify(folder) if check.problem}


def hide(folder: Path) -> None:
    """Write the checksums anew, as a careful cheat would."""
    record = json.loads((folder / BUNDLE_FILE).read_text())
    (folder / BUNDLE_FILE).write_text(json.dumps(record | {"files": file_checksums(folder)}))


def test_an_untouched_bundle_holds_and_says_what_was_checked(made):
    checks = verify(made)
    assert not [c for c in checks if c.problem]
    names = [c.what for c in checks]
    for what in ("table by_policy", "table by_adapter", "table jobs", "table runs", "file README.md"):
        assert what in names
    assert sum(name.startswith("conservation laws") for name in names) == 4
    assert sum(name.startswith("difference") for name in names) == 2


def test_a_changed_cell_of_a_table_is_named_even_if_its_checksum_was_made_anew(folder):
    file = folder / "tables" / "by_policy.csv"
    table = pd.read_csv(file)
    table.loc[1, "attainment"] += 0.01
    table.to_csv(file, index=False)
    assert problems(folder).keys() == {"file tables/by_policy.csv", "table by_policy"}
    hide(folder)
    found = problems(folder)
    assert found.keys() == {"table by_policy"} and found["table by_policy"].startswith("row 1, column attainment: ")


def test_a_changed_row_of_a_replay_is_found_even_if_its_checksum_was_made_anew(folder):
    file = folder / "replays" / "run-001" / "events.parquet"
    events = pd.read_parquet(file)
    last = events.index[events["kind"] == "token"][-1]
    events.loc[last, "time_s"] -= 0.001
    events.to_parquet(file, index=False)
    hide(folder)
    found = problems(folder)
    assert any(name.startswith("table") for name in found)


def test_a_request_made_to_disappear_breaks_a_law(folder):
    file = folder / "replays" / "run-000" / "events.parquet"
    events = pd.read_parquet(file)
    events[events["owner"] != events.loc[events["kind"] == "finished", "owner"].iloc[3]].to_parquet(file, index=False)
    hide(folder)
    assert any(name.startswith("conservation laws") for name in problems(folder))


def test_a_changed_difference_is_found(folder):
    file = folder / "differences.json"
    records = json.loads(file.read_text())
    records[0]["high"] = 0.0
    file.write_text(json.dumps(records))
    hide(folder)
    assert [name for name in problems(folder) if name.startswith("difference ttft_p50_s")]


@pytest.mark.parametrize("damage", ["missing", "extra", "cut"])
def test_missing_added_and_cut_files_are_findings_and_not_tracebacks(damage, folder):
    if damage == "missing":
        (folder / "tables" / "runs.csv").unlink()
    elif damage == "extra":
        (folder / "tables" / "better.csv").write_text("attainment\n1.0\n")
    else:
        file = folder / "replays" / "run-000" / "events.parquet"
        file.write_bytes(file.read_bytes()[:100])
    assert main([str(folder), "--quiet"], show=lambda _: None) == 1
    words = {"missing": "is missing", "extra": "is not part of the bundle", "cut": "differs from its checksum"}
    assert words[damage] in problems(folder).values()


def test_the_command_line_says_so_with_its_exit_status(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verify", str(made)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "workbench" / "verify.py"), run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr().out.splitlines()[-1].endswith("checks hold.")


def test_a_sweep_bundles_its_frame_and_replays(tmp_path):
    options = {"trace": trace, "executor": FixedCost(), "slo": SLOS, "planning": 0.0, "progress": False, "axes": {"load": [10.0, 30.0]}}
    bare = wb.sweep([FCFS()], **options)
    with pytest.raises(ValueError, match="a replay must have been kept"):
        bare.bundle(tmp_path / "bare")
    folder = wb.sweep([FCFS()], **options, replays=True).bundle(tmp_path / "b")
    assert problems(folder) == {}
    file = folder / "tables" / "runs.csv"
    table = pd.read_csv(file)
    table.loc[0, "goodput_per_s"] *= 2
    table.to_csv(file, index=False)
    hide(folder)
    assert list(problems(folder)) == ["table runs"]


def test_a_bundle_never_overwrites_and_verify_wants_one(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a bundle must hold bundle\.json"):
        verify(tmp_path)
    (tmp_path / "something").write_text("")
    with pytest.raises(FileExistsError, match="a bundle needs an empty folder"):
        wb.compare([FCFS()], trace=trace, executor=FixedCost(), planning=0.0, progress=False).bundle(tmp_path)


def test_the_citation_file_names_software_version_and_paper():
    record = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert record["cff-version"] == "1.2.0" and record["type"] == "software" and record["license"] == "Apache-2.0"
    assert f'version = "{record["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert record["references"][0]["identifiers"][0]["value"] == "arXiv:2511.00101"
