"""Training texts with nothing to fetch: three kinds of writing that every installation of Python and numpy brings along.

`topics` is Python's language reference (`pydoc_data.topics`), `numpy` the docstrings of numpy's public names, `code` the source of
Python's standard library. Train and held-out texts never share a document.
"""

import hashlib
import importlib
import inspect
import json
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Documents = Mapping[str, str]
MIN_CHARACTERS = 400
NUMPY_MODULES = (
    "numpy",
    "numpy.char",
    "numpy.fft",
    "numpy.lib.stride_tricks",
    "numpy.linalg",
    "numpy.ma",
    "numpy.polynomial.chebyshev",
    "numpy.polynomial.hermite",
    "numpy.polynomial.legendre",
    "numpy.polynomial.polynomial",
    "numpy.random",
    "numpy.testing",
)
CODE_FOLDERS = (".", "asyncio", "email", "json")


def topics() -> Documents:
    """Python's language reference, one document a topic."""
    return dict(sorted(importlib.import_module("pydoc_data.topics").topics.items()))


def numpy_docstrings() -> Documents:
    """Docstrings of numpy's public functions and classes; the same text under two names counts once."""
    documents: dict[str, str] = {}
    for module_name in NUMPY_MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(n for n in dir(module) if not n.startswith("_")):
            value = getattr(module, name)
            text = inspect.getdoc(value) if callable(value) else None
            if text and "numpy" in f"{getattr(value, '__module__', None)} {type(value).__module__}" and text not in documents.values():
                documents[f"{module_name}.{name}"] = text
    return documents


def standard_library() -> Documents:
    """Source files of Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for folder in CODE_FOLDERS for file in sorted((root / folder).glob("*.py"))]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


KINDS: Mapping[str, Callable[[], Documents]] = {"topics": topics, "numpy": numpy_docstrings, "code": standard_library}


def is_held_out(document: str) -> bool:
    """About one document in six, by its name alone, so that the split is the same on every machine."""
    return hashlib.blake2b(document.encode(), digest_size=1).digest()[0] < 42


def openings(documents: Documents, tokenizer: Callable[..., Any], max_tokens: int) -> list[dict[str, str]]:
    """The opening lines of each document, as many whole lines as fit in `max_tokens`, as rows {"text", "document"}.

    Short documents (under 400 characters) and those that fill less than half of `max_tokens` are left out.
    """
    rows = []
    for name, text in documents.items():
        if len(text) < MIN_CHARACTERS:
            continue
        opening = _opening(text.strip("\n"), tokenizer, max_tokens)
        if 2 * len(tokenizer(opening)["input_ids"]) >= max_tokens:
            rows.append({"text": opening, "document": name})
    # In an order of their own: neighbours in the alphabet resemble one another.
    return sorted(rows, key=lambda row: hashlib.blake2b(row["document"].encode(), digest_size=8, person=b"order").digest())


def _opening(text: str, tokenizer: Callable[..., Any], max_tokens: int) -> str:
    lines = text[: 16 * max_tokens].splitlines(keepends=True)
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer("".join(lines[:middle]))["input_ids"]) <= max_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return "".join(lines[:low])


def write(folder: Path, tokenizer: Callable[..., Any], max_tokens: int) -> dict[str, dict[str, list[str]]]:
    """Write `{kind}.train.jsonl` and `{kind}.heldout.jsonl` into `folder`; returns kind -> split -> texts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, dict[str, list[str]]] = {}
    for kind, read in KINDS.items():
        documents = read()
        for split, wanted in (("train", False), ("heldout", True)):
            rows = openings({n: t for n, t in documents.items() if is_held_out(n) is wanted}, tokenizer, max_tokens)
            _write_rows(folder / f"{kind}.{split}.jsonl", rows)
            texts.setdefault(kind, {})[split] = [row["text"] for row in rows]
    return texts


def _write_rows(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
