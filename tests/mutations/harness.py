"""Apply a mutation to a temporary copy of the tree and run the named test there."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.table import Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("workbench", "kernels", "tests", "scripts", "pyproject.toml")
LINKED = ("traces", "notebooks", ".cache", "README.md")
# A minute is plenty on an idle machine; a busy one is no reason for a red test.
TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """What pytest said: `failed` only when the test itself ran and failed, not when it could not be collected or set up."""

    failed: bool
    passed: bool
    output: str


def copy_tree(to: Path) -> Path:
    """The sources as copies, the data as links."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy2(source, to / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (to / name).symlink_to(ROOT / name)
    return to


def apply(mutation: Mutation, tree: Path) -> None:
    """Replace the one occurrence of `old`. Raises ValueError if the code has moved on and the mutation no longer applies."""
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.file} must hold the text to mutate exactly once, got {text.count(mutation.old)} times:\n{mutation.old}\n"
            "Update tests/mutations/table.py."
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def run_test(test: str, tree: Path) -> Outcome:
    """Run one test (all its parameters) in the copy, in a fresh interpreter."""
    # PYTHONSAFEPATH and PYTHONPATH: the copy, and never the checkout that the environment was installed from.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HYPOTHESIS_DATABASE_FILE": os.devnull}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--color=no", test]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    output = done.stdout + done.stderr
    closing = re.findall(r"^(?:=+ )?(.*) in [0-9.]+s", done.stdout, re.MULTILINE)
    counts = dict((word, int(n)) for n, word in re.findall(r"(\d+) (failed|passed|error|errors|skipped)", closing[-1] if closing else ""))
    errors = counts.get("error", 0) + counts.get("errors", 0)
    return Outcome(
        failed=done.returncode == 1 and counts.get("failed", 0) > 0 and errors == 0,
        passed=done.returncode == 0 and counts.get("passed", 0) > 0,
        output=output,
    )
