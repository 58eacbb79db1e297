"""A folder of files that is replaced as a whole: whatever happens in the middle, the old one or the new one can be read. Torch-free.

The new folder is written beside the old one, brought to the disk, and renamed. Between the two renames that this takes (a folder cannot
be renamed onto another) the old one stands under its other name, where `readable` finds it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workbench.config import require


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def readable(folder: str | Path) -> Path:
    """`folder`, or where its last complete content stands if replacing it was cut short."""
    folder = Path(folder)
    before = _beside(folder.resolve(), "before")
    return before if not folder.exists() and before.exists() else folder


@contextmanager
def replaced(folder: str | Path, files: Sequence[str]) -> Iterator[Path]:
    """A new folder to write `files` into; without an error in the block it takes the place of `folder`, as a whole.

    Raises ValueError where `folder` holds anything but these files: they would be gone.
    """
    folder = Path(folder).resolve()
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in files) if folder.exists() else []
    require(
        not strangers, f"{folder} must hold nothing but {', '.join(files)}, since it is replaced as a whole", strangers[:3], "Name another."
    )
    part, before = _beside(folder, "part"), _beside(folder, "before")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        yield part
        for path in (*part.iterdir(), part):
            _sync(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():
        if before.exists():  # of a replacement that was cut short after its second rename
            shutil.rmtree(before)
        folder.rename(before)
    part.rename(folder)
    _sync(folder.parent)
    if before.exists():
        shutil.rmtree(before)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder to do it with
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
