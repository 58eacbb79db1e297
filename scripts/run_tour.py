"""Run the tour notebook in a fresh kernel without a browser.

Writes results/tour.html with its figures and results/tour.png (its first one), and prints its result table.
"""

import base64
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "00_tour.ipynb"
OUT = ROOT / "results" / "tour.html"
TIMEOUT_S = 900


def tables(notebook) -> list[str]:
    """Plain-text forms of the cells tagged `result`, or of every cell that shows a frame where none is tagged."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if "result" in cell.metadata.get("tags", [])]
    shown = [out["data"] for cell in tagged or cells for out in cell.outputs if "data" in out]
    return [data["text/plain"] for data in shown if "text/html" in data and "<table" in data["text/html"]]


def first_figure(notebook) -> str | None:
    """The notebook's first figure as base64 PNG: attainment and throughput as measured."""
    outputs = (out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs)
    return next((out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})), None)


def main() -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"Running {NOTEBOOK.relative_to(ROOT)} ({cells} cells, about two minutes on two cores) ...", flush=True)

    def progress(cell, cell_index, **_) -> None:
        print(f"  cell {cell_index + 1}: {cell.source.strip().splitlines()[0][:100]}", flush=True)

    started = time.perf_counter()
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(NOTEBOOK.parent)}}, on_cell_execute=progress)
    client.execute()
    OUT.parent.mkdir(exist_ok=True)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    OUT.write_text(html, encoding="utf-8")
    figure = first_figure(notebook)
    if figure is not None:
        OUT.with_suffix(".png").write_bytes(base64.b64decode(figure))
    found = tables(notebook)
    if not found:
        sys.exit(f"{NOTEBOOK.name} must show a result table, got none. Show a frame in a cell tagged `result`.")
    print("\n\n".join(found))
    print(f"\n{OUT.relative_to(ROOT)} written; the run took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
