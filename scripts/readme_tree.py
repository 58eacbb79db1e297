"""Write the tree in README.md: a line per file, which is the first sentence of the file itself. `make format` runs it."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(## The tree\n+```\n).*?(```)", re.DOTALL)
TOP = {
    "environment.yml": "the one list of what is installed",
    "pyproject.toml": "the dependencies' ranges, and the settings of pytest, ruff and pyright",
    "constraints.txt": "versions that work together",
    "Makefile": "the commands above",
    "typings/pandas/": "a stub that lets the type check pass over frames",
    "CITATION.cff": "how to cite the software, and the paper whose ideas it implements",
    "docs/method.md": "traps of scheduling experiments, what is done about each, and the tests that show it",
    ".ci/run": "continuous integration: make test, make check, make browser",
}
FOLDERS = {
    "workbench/": "what the packages below share, and the interfaces that users write against: torch-free",
    "workbench/bench/": "the whole-engine bench: workload -> rows -> check, table, plot",
    "workbench/experiments/": "runs against runs: compare, sweep, search, their statistics, cache and bundles",
    "workbench/fleet/": "several replicas under one clock, and the routers between them",
    "workbench/latency/": "an executor that predicts, fitted to an engine's steps",
    "workbench/loop/": "what the serving loop is made of: ledger, plan, views, memory, history",
    "workbench/plots/": "one function per figure: a frame in, matplotlib Axes out",
    "workbench/policies/": "the shipped policies",
    "workbench/results/": "what a replay leaves, every number made of it, and what must be conserved",
    "workbench/runtime/": "models, adapters and the engine: everything that needs torch",
    "workbench/serve/": "the engine behind OpenAI's HTTP interface",
    "workbench/server/": "the load generator against another OpenAI-compatible server",
    "workbench/traces/": "requests with arrival times: shipped, read, checked, made, fitted, exported",
    "workbench/widgets/": "what moves in a notebook",
    "kernels/": "one file per fused operator: equation, reference, Triton kernels, autograd, public op",
    "benchmarks/": "the bench's rows, one CSV a workload: every number with GPU, versions, commit and date",
    "scripts/": "what the Makefile calls",
    "notebooks/": "numbered; the question first, the answer last",
    "traces/": "real request traces with source, licence, schema and checksum (its README)",
    "tests/": "mirrors the tree; tests/gpu needs CUDA, tests/browser a Chromium, tests/mutations breaks the code on purpose",
}
WIDTH = 28


def first_sentence(file: Path) -> str:
    """The docstring's first sentence, on one line and without its final period."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?: |$)", paragraph)[0]


def title(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ") if cells else ""


def line(depth: int, name: str, what: str) -> str:
    return f"{'  ' * depth + name:<{WIDTH}} {what}".rstrip()


def folder_lines(folder: str) -> list[str]:
    """A folder, its modules (an `__init__.py` only where it says something) and its folders among FOLDERS."""
    depth, here = folder.count("/") - 1, ROOT / folder
    lines = [line(depth, here.name + "/", FOLDERS[folder])]
    if folder not in ("tests/", "traces/"):
        described = [(file.name, first_sentence(file)) for file in sorted(here.glob("*.py"))]
        described += [(file.name, title(file)) for file in sorted(here.glob("*.ipynb"))]
        lines += [line(depth + 1, name, what) for name, what in described if what]
    for inner in FOLDERS:
        if inner != folder and (ROOT / inner).parent == here:
            lines += folder_lines(inner)
    return lines


def tree() -> str:
    lines = [line(0, name, what) for name, what in TOP.items()]
    for folder in FOLDERS:
        if folder.count("/") == 1:
            lines += folder_lines(folder)
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README's text with the tree as it is now. Raises ValueError without a section to put it into."""
    if not BLOCK.search(readme):
        raise ValueError("README.md must have a section `## The tree` with a code block, got none. Add an empty one.")
    return BLOCK.sub(lambda found: found.group(1) + tree() + found.group(2), readme)


def main() -> None:
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
