"""Runs interpreted.py where Triton interprets: the variable is read when a kernel is decorated, so it needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")
ROOT = Path(__file__).resolve().parents[2]


def test_triton_sources_equal_the_references_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        str(Path(__file__).parent / "interpreted.py"),
    ]
    if not _has_xdist():
        command.remove("-n"), command.remove("0")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def _has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None
