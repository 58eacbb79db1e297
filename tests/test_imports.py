"""What may be imported where, and that our `kernels` folder and Hugging Face's `kernels` distribution get along."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = ("core", "config", "features", "data", "traces", "policy", "policies", "loop.ledger", "replay", "latency", "fleet")
TORCH_FREE += ("results.metrics", "experiments.compare", "server.replay")
HEAVY = ("torch", "transformers", "peft", "triton", "matplotlib", "IPython", "ipywidgets", "httpx", "tornado", "tokenizers")
# pandas and pyarrow are most of it; the rest is a margin for a busy machine.
MAX_IMPORT_CPU_S = 4.0

FAKE_KERNELS = '''
"""Stands for Hugging Face's distribution of the same name."""
__version__ = "VERSION"


class LayerRepository:
    def __init__(self, *args, **kwargs): ...

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated


def get_kernel(name, **kwargs):
    raise RuntimeError("no hub here")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return LayerRepository
'''


def modules_after(statement: str) -> tuple[set[str], float]:
    """Top-level modules loaded by a statement in a fresh interpreter, and the CPU seconds that it took."""
    code = f"import time; t = time.process_time(); {statement}; used = time.process_time() - t\nimport sys, json\n"
    code += "print(json.dumps([sorted({m.split('.')[0] for m in sys.modules}), used]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, seconds = json.loads(done.stdout.splitlines()[-1])
    return set(names), seconds


def test_a_policy_study_starts_without_torch_and_fast():
    statement = "import workbench as wb; " + "; ".join(f"import workbench.{name}" for name in TORCH_FREE)
    names, seconds = modules_after(statement)
    assert names.isdisjoint(HEAVY), f"loaded for nothing: {sorted(names & set(HEAVY))}"
    assert seconds < MAX_IMPORT_CPU_S


@pytest.mark.parametrize("module", ["core", "policies", "latency", "traces"])
def test_each_module_alone_is_torch_free(module):
    names, _ = modules_after(f"import workbench.{module}")
    assert names.isdisjoint(HEAVY)


def test_importing_kernels_loads_nothing_heavy():
    names, _ = modules_after("import kernels")
    assert names.isdisjoint((*HEAVY, "numpy"))


def imports_of(file: Path, *, anywhere: bool) -> set[str]:
    """Dotted names that a file imports: everywhere in it, or at module level only (`if TYPE_CHECKING` left out)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if anywhere else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_kernels_never_imports_workbench():
    for file in (ROOT / "kernels").rglob("*.py"):
        assert "workbench" not in roots(imports_of(file, anywhere=True)), file.name


def test_kernels_init_has_no_version_and_imports_nothing():
    # transformers takes a module named `kernels` with a `__version__` for the distribution of that name.
    file = ROOT / "kernels" / "__init__.py"
    assert imports_of(file, anywhere=True) == set()
    assert "__version__" not in file.read_text(encoding="utf-8")


def test_only_widgets_and_plots_import_plotting_and_notebook_packages():
    drawing = {"matplotlib", "ipywidgets", "IPython", "ipympl", "anywidget", "plotly"}
    for file in (ROOT / "workbench").rglob("*.py"):
        if {"plots", "widgets"} & set(file.relative_to(ROOT).parts):
            continue
        assert roots(imports_of(file, anywhere=True)).isdisjoint(drawing), file.name


def test_torch_stays_inside_runtime_and_widgets_at_module_level():
    for file in (ROOT / "workbench").rglob("*.py"):
        if "runtime" in file.relative_to(ROOT).parts:
            continue
        assert roots(imports_of(file, anywhere=False)).isdisjoint({"torch", "transformers", "peft", "kernels"}), file.name


@pytest.fixture(scope="module")
def fake_distribution(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    version = "0.16.1"  # one that transformers 5.17 uses where it finds it
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(FAKE_KERNELS.replace("VERSION", version), encoding="utf-8")
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n", encoding="utf-8")
    (info / "top_level.txt").write_text("kernels\n", encoding="utf-8")
    (info / "RECORD").write_text("", encoding="utf-8")
    return folder


# The lazy parts too: transformers' models, where it looks for the distribution, and our engine, where we need our own folder.
BOTH = (
    "import transformers.models.llama.modeling_llama; print('transformers works')",
    "import workbench; workbench.Engine; print('workbench works')",
)


@pytest.mark.parametrize(
    ("distribution", "order"),
    [("absent", "workbench first")] + [(d, o) for d in ("after ours", "before ours") for o in ("transformers first", "workbench first")],
)
def test_transformers_and_workbench_import_together_or_say_why_not(order, distribution, fake_distribution, tmp_path, with_torch):
    path = {"absent": (ROOT,), "after ours": (ROOT, fake_distribution), "before ours": (fake_distribution, ROOT)}[distribution]
    statements = BOTH if order == "transformers first" else BOTH[::-1]
    done = with_torch.run("\n".join(statements), path=path, cwd=tmp_path)
    if distribution != "absent" and done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError") and "pip uninstall kernels" in last, done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "transformers works" in done.stdout and "workbench works" in done.stdout


def test_a_forked_process_has_imported_nothing_that_looks_for_kernels_and_tells_how_it_ended(with_torch, tmp_path):
    code = "import sys; print(sorted({'workbench', 'kernels', 'tests', 'transformers', 'peft'} & set(sys.modules)), 'torch' in sys.modules)"
    assert with_torch.run(code, path=(), cwd=tmp_path).stdout == "[] True\n"
    assert with_torch.run("raise SystemExit(3)", path=(), cwd=tmp_path).returncode == 3
    failed = with_torch.run("import no_such_module", path=(), cwd=tmp_path)
    assert failed.returncode == 1 and failed.stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")
