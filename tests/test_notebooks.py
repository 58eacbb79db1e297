"""Every notebook runs from a fresh kernel, and what is committed of it is not half-stale."""

import os
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 600
MAX_CELL_LINES = 15
MAX_MEDIAN_LINES = 5
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file: Path):
    # Not above: it builds 38 parsers of web addresses (2.5 s), which every worker would do to collect these tests.
    import nbformat

    return nbformat.read(file, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def num_lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_there_is_a_notebook_for_each_question():
    questions = ("tour", "policies", "capacity", "latency_model", "fleets", "why_did_it_miss", "your_own_trace")
    assert [file.stem for file in NOTEBOOKS] == [f"{number:02d}_{name}" for number, name in enumerate(questions)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in NOTEBOOKS if f"`{file.name}` |" not in readme] == [], "README's list of notebooks names each"


@pytest.mark.notebook
@each_notebook
def test_notebook_runs_from_a_fresh_kernel(file, request, tmp_path):
    from nbclient import NotebookClient

    notebook = read(file)
    if any("../.cache/" in cell.source for cell in code_cells(notebook)):
        request.getfixturevalue("adapter_dirs")
    # Its own folder for history and settings: nothing of the person at this machine may help it along.
    environment = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(file.parent)}})
    client.execute(env=environment)
    for cell in code_cells(notebook):
        texts = [out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stderr"]
        assert not any("Traceback" in text or "Warning" in text for text in texts), "".join(texts)
    simulates = any("LatencyModel.load" in cell.source for cell in code_cells(notebook))
    assert not simulates or any("simulated" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")


@each_notebook
def test_committed_outputs_are_complete_or_stripped(file):
    cells = code_cells(read(file))
    counts = [cell.execution_count for cell in cells]
    if any(cell.outputs for cell in cells) or any(count is not None for count in counts):
        assert counts == list(range(1, len(cells) + 1)), f"outputs must come from one run of a fresh kernel, got cells numbered {counts}"
        assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)


@each_notebook
def test_cells_are_short_except_a_policy(file):
    lengths = {cell.source: num_lines(cell) for cell in code_cells(read(file))}
    assert statistics.median(lengths.values()) <= MAX_MEDIAN_LINES
    too_long = [source for source, length in lengths.items() if length > MAX_CELL_LINES and "view, plan" not in source]
    assert not too_long, f"a cell of more than {MAX_CELL_LINES} lines belongs into a module:\n{too_long[0]}"


@each_notebook
def test_prose_comes_before_code(file):
    cells = read(file).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# "), "a notebook begins with its title and question"
    assert "?" in cells[0].source, "the question comes first"
