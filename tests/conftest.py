"""What every test shares: one thread, fixed seeds, and where the real model and the trained adapters lie."""

import os

# Before anything imports torch or numpy: two test workers that fight over two cores were measured ten times slower.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import gc
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ("topics", "numpy", "code")
# A shell that starts the tests in the background makes them deaf to Ctrl-C, which some of them send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose single tests take long: they go first, so that no worker is left alone with one at the end.
SLOW_FIRST = ("test_notebooks.py", "test_mutations.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW_FIRST.index(item.path.name) if item.path.name in SLOW_FIRST else len(SLOW_FIRST))


def pytest_collection_finish() -> None:
    # What is imported by now stays; a full garbage collection of it takes 0.3 s, and some tests ask for one.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the legacy generator is what is being pinned)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


def missing(what: str, target: str) -> None:
    """Skip a test that lacks something which `make {target}` makes; in CI that is a failure."""
    sentence = f"{what} is not there. Run `make {target}`."
    if os.environ.get("CI") == "true":
        pytest.fail(sentence)
    pytest.skip(sentence)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The converted SmolLM2-135M-Instruct."""
    folder = Path(os.environ.get("LOQUETIER_MODEL") or ROOT / ".cache" / "smollm2-135m-instruct")
    if not (folder / "config.json").is_file():
        missing("The small real model", "model")
    return folder


@pytest.fixture(scope="session")
def adapter_dirs(model_dir: Path) -> dict[str, Path]:
    """The tour's three trained adapters by name."""
    folder = ROOT / ".cache" / "adapters"
    if not (folder / "provenance.json").is_file():
        missing("The set of trained adapters", "adapters")
    return {name: folder / name for name in ADAPTERS}


@pytest.fixture(scope="session")
def with_torch() -> Iterator[ForkServer]:
    """Processes that have imported torch, and nothing that looks for a package named `kernels`."""
    with ForkServer("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "pandas") as server:
        yield server


@pytest.fixture(scope="session")
def with_peft() -> Iterator[ForkServer]:
    """Processes that have imported everything heavy that the project stands on."""
    with ForkServer("peft", "transformers.models.llama.modeling_llama", "pandas", "hypothesis.strategies") as server:
        yield server
