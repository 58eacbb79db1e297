"""Apply a mutation to a temporary copy of the tree and run the named test there."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import ForkServer
from tests.mutations.table import Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("workbench", "kernels", "tests", "scripts", "pyproject.toml")
LINKED = ("traces", "notebooks", ".cache", "README.md")
RUN_PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
# anyio (which comes with transformers) and hypothesis are there before pytest could rewrite their assertions.
ALREADY_IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
PYTEST_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--color=no", "-W", ALREADY_IMPORTED)


@dataclass(frozen=True)
class Outcome:
    """What pytest said: `failed` only when the test itself ran and failed, not when it could not be collected or set up."""

    failed: bool
    passed: bool
    output: str


def copy_tree(to: Path) -> Path:
    """The sources as copies, with the byte code that is there (Python goes by a source's size and time), the data as links."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
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
    # Within the same second the same size would pass for the same source.
    for stale in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        stale.unlink()
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def run_test(test: str, tree: Path, server: ForkServer) -> Outcome:
    """Run one test (all its parameters) in the copy, in a process that has imported nothing of the project.

    The copy lies in front of the path, so that it is never the checkout that the environment was installed from.
    """
    done = server.run(RUN_PYTEST, *PYTEST_OPTIONS, test, path=(tree,), cwd=tree, HYPOTHESIS_DATABASE_FILE=os.devnull)
    output = done.stdout + done.stderr
    closing = re.findall(r"^(?:=+ )?(.*) in [0-9.]+s", done.stdout, re.MULTILINE)
    counts = dict((word, int(n)) for n, word in re.findall(r"(\d+) (failed|passed|error|errors|skipped)", closing[-1] if closing else ""))
    errors = counts.get("error", 0) + counts.get("errors", 0)
    return Outcome(
        failed=done.returncode == 1 and counts.get("failed", 0) > 0 and errors == 0,
        passed=done.returncode == 0 and counts.get("passed", 0) > 0,
        output=output,
    )
