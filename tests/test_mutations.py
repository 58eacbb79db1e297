"""Each defect of the released Loquetier has a test here that turns red when the defect is put into our code."""

import ast
from pathlib import Path

import pytest

from tests.mutations.harness import ROOT, apply, copy_tree, run_test
from tests.mutations.table import MUTATIONS, Mutation

NUM_DEFECTS = 12
each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)

PASSING = "def test_it():\n    import example\n    assert example.double(2) == 4\n"
EXAMPLE = Mutation(
    defect=0,
    claim="Two times two is four.",
    file="example.py",
    old="2 * x",
    new="3 * x",
    test="test_example.py::test_it",
)


@pytest.mark.mutation
@each_mutation
def test_the_defect_turns_its_test_red(mutation, tmp_path, with_peft):
    tree = copy_tree(tmp_path)
    apply(mutation, tree)
    outcome = run_test(mutation.test, tree, with_peft)
    assert outcome.failed, f"{mutation.test} must fail once {mutation.file} is broken ({mutation.claim})\n{outcome.output}"


def test_every_defect_of_the_release_has_a_mutation():
    assert {mutation.defect for mutation in MUTATIONS} == set(range(1, NUM_DEFECTS + 1))


@each_mutation
def test_the_named_test_is_there(mutation):
    # A test that is there and red only when mutated: that it is green otherwise is what the rest of the suite shows.
    file, name = mutation.test.split("::")[0], mutation.test.split("::")[-1].split("[")[0]
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.fixture
def small_tree(tmp_path) -> Path:
    (tmp_path / "example.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    (tmp_path / "test_example.py").write_text(PASSING, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", encoding="utf-8")
    return tmp_path


def test_harness_sees_green_before_and_red_after_a_mutation(small_tree, with_peft):
    assert run_test(EXAMPLE.test, small_tree, with_peft).passed
    apply(EXAMPLE, small_tree)
    assert run_test(EXAMPLE.test, small_tree, with_peft).failed


def test_harness_runs_the_copy_and_not_the_checkout(small_tree, with_peft):
    where = "import {0}; assert {0}.__file__.startswith({1!r})\n"
    for name in ("workbench", "kernels"):
        (small_tree / name).mkdir()
        (small_tree / name / "__init__.py").touch()
    lines = "".join("    " + where.format(name, str(small_tree)) for name in ("workbench", "kernels"))
    (small_tree / "test_example.py").write_text("def test_it():\n" + lines, encoding="utf-8")
    outcome = run_test(EXAMPLE.test, small_tree, with_peft)
    assert outcome.passed, outcome.output


@pytest.mark.parametrize("broken", ["def test_it(:\n", "def test_it(no_such_fixture): ...\n", "def test_other(): ...\n"])
def test_harness_does_not_take_an_error_for_a_red_test(small_tree, broken, with_peft):
    (small_tree / "test_example.py").write_text(broken, encoding="utf-8")
    outcome = run_test(EXAMPLE.test, small_tree, with_peft)
    assert not outcome.failed and not outcome.passed


def test_a_mutation_that_no_longer_applies_is_an_error(small_tree):
    apply(EXAMPLE, small_tree)
    with pytest.raises(ValueError, match="exactly once, got 0 times"):
        apply(EXAMPLE, small_tree)
