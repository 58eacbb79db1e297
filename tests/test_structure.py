"""The tree is what the README says, and files keep to the house rules that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import readme_tree  # noqa: E402  (scripts are no package)

README = ROOT / "README.md"
SOURCES = [file for folder in ("workbench", "kernels", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_readme_has_the_tree_as_it_is():
    text = README.read_text(encoding="utf-8")
    assert readme_tree.updated(text) == text, "README's tree is older than the files. Run `make format`."


def test_readme_shows_no_picture_and_links_to_no_file_that_is_not_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


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


def test_no_option_is_looked_up_by_a_name_that_may_be_spelled_wrong():
    for file in SOURCES:
        assert not re.search(r"\bkw(arg)?s\.(get|pop)\(", file.read_text(encoding="utf-8")), f"{file.name}: name the parameter instead"


def test_nothing_committed_is_larger_than_it_needs_to_be():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert [file.name for file in files if file.exists() and file.stat().st_size > 4 * 2**20] == []
