"""What tests of the engine share: a tiny Llama and two adapters on it, as directories that nobody writes to."""

from pathlib import Path

import pytest

from tests.runtime.references import make_adapter, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", "llama")


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(folder / name, base, rank=rank, seed=seed) for name, rank, seed in (("a", 4, 1), ("b", 9, 2))}
