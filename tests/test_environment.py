"""environment.yml, pyproject.toml and constraints.txt say the same thing."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Tried together; a change here is a change of what the README says was tested.
TRIED = {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.17.0", "jupyterlab": "4.6.6", "ipywidgets": "8.1.9"}
RANGES = {
    "torch": ">=2.11,<2.14",
    "triton": ">=3.6,<3.8",
    "transformers": ">=5.17,<6",
    "jupyterlab": ">=4.4,<5",
    "ipywidgets": ">=8.1,<9",
    "ipympl": ">=0.9.8,<0.11",
}
# Import names that differ from the distribution's name.
DISTRIBUTIONS = {"yaml": "pyyaml"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    lines = project()["dependencies"] if extra is None else project()["optional-dependencies"][extra]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in found), (
        "constraints.txt holds exact pins and comments only"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in found)}


def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def pip_lines() -> list[str]:
    return next(entry["pip"] for entry in environment()["dependencies"] if isinstance(entry, dict))


def test_environment_yml_installs_the_project_with_its_constraints_and_nothing_else():
    conda = [entry for entry in environment()["dependencies"] if isinstance(entry, str)]
    assert [re.split(r"[<>=]", entry)[0] for entry in conda] == ["python", "pip"]
    assert pip_lines() == ["-c constraints.txt", "-e .[dev]"]


def test_environment_yml_names_no_python_that_the_project_refuses():
    line = next(entry for entry in environment()["dependencies"] if isinstance(entry, str) and entry.startswith("python"))
    allowed, required = SpecifierSet(line.removeprefix("python")), SpecifierSet(project()["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert set(allowed.filter(minors)) <= set(required.filter(minors))
    assert "3.11" in allowed


@pytest.mark.parametrize("extra", [None, "dev"])
def test_every_dependency_is_pinned_to_a_version_in_its_range(extra):
    pinned = pins()
    for name, requirement in requirements(extra).items():
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{name}: the pin {pinned[name]} lies outside {requirement.specifier}"


def test_the_pins_and_ranges_are_the_ones_that_were_tried_together():
    assert {name: pins()[name] for name in TRIED} == TRIED
    ranges = requirements()
    assert {name: ranges[name].specifier for name in RANGES} == {name: SpecifierSet(value) for name, value in RANGES.items()}


def test_what_is_installed_here_lies_in_the_declared_ranges():
    from importlib.metadata import PackageNotFoundError, version

    for name, requirement in (requirements() | requirements("dev")).items():
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # a machine that brings its own torch installs only what it needs
        assert requirement.specifier.contains(found, prereleases=True), f"{name} {found} lies outside {requirement.specifier}"


def test_make_env_installs_what_environment_yml_says():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make", "-n", "env", "VENV=.no-such-venv"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make_env.sh " + " ".join(pip_lines()) in shown


def imported_packages(folder: str) -> set[str]:
    names = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    neighbours = [file.stem for place in ("scripts", "tests") for file in (ROOT / place).glob("*.py")]
    own = {"workbench", "kernels", "tests", *neighbours}
    return {canonicalize_name(DISTRIBUTIONS.get(n, n)) for n in names - own if n not in sys.stdlib_module_names}


@pytest.mark.parametrize("folder", ["workbench", "kernels"])
def test_every_import_of_the_packages_is_a_declared_dependency(folder):
    optional = set(requirements("dev")) if folder == "kernels" else set()  # kernels.testing checks shapes with beartype
    assert imported_packages(folder) - set(requirements()) - optional - {"ipython"} == set()


def test_every_import_of_the_tests_and_scripts_is_a_declared_dependency():
    comes_along = {"packaging", "nbformat", "ipython", "traitlets", "jupyter-client"}  # of pytest, nbclient and ipywidgets
    assert (imported_packages("tests") | imported_packages("scripts")) - set(requirements()) - set(
        requirements("dev")
    ) - comes_along == set()
