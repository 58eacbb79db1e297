"""The tree is what the README says, and files keep to the house rules that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SOURCES = [file for folder in ("workbench", "kernels", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))]


def tree_paths() -> set[str]:
    """Paths of the README's tree block: a folder's line ends with a slash, its entries are indented by two spaces."""
    block = re.search(r"## The tree\n+```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, "README.md must have a section `## The tree` with a code block"
    paths, folders = set(), []
    for line in block.group(1).splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        paths.add("".join(folders) if name.endswith("/") else "".join(folders) + name)
    return paths


def test_readme_has_a_line_for_every_source_file():
    told = tree_paths()
    files = {file.relative_to(ROOT).as_posix() for file in SOURCES if file.name != "__init__.py" or len(file.read_text()) > 200}
    assert files - told == set(), "files without a line in README's tree"


def test_readme_names_no_file_that_is_not_there():
    assert {path for path in tree_paths() if not (ROOT / path).exists()} == set()


def test_readme_names_every_make_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", shown, re.MULTILINE):
        assert f"make {target}" in text, f"make {target} is not in the README"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is_and_shape_annotations_are_evaluated(file):
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    if file.name != "__init__.py":
        assert ast.get_docstring(tree), "a module begins with a sentence on what it is"
    if "jaxtyping" in source:
        assert "from __future__ import annotations" not in source, "shape annotations must be evaluated, so that tests can check them"
    assert not re.search(r"\bTODO(?!\()", source), "a TODO names its trigger: TODO(when ...)"


def functions_with_open_keywords(tree: ast.AST) -> list[str]:
    """Public functions that take **kwargs: an option that is spelled wrong would never apply."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return [node.name for node in nodes if node.args.kwarg is not None and node.args.kwarg.arg in ("kwargs", "kw", "args")]


def test_no_public_function_swallows_unknown_options():
    for file in SOURCES:
        assert functions_with_open_keywords(ast.parse(file.read_text(encoding="utf-8"))) == [], file.name


def test_nothing_committed_is_larger_than_it_needs_to_be():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert [file.name for file in files if file.exists() and file.stat().st_size > 4 * 2**20] == []
