"""Results of runs on disk, by content key: written whole or not at all, and checked when read."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENTRY_FILE = "run.json"
REPLAY_FOLDER = "replay"


@dataclass(frozen=True)
class RunCache:
    """A folder with one folder per run: `run.json` (its row, and checksums) and, where kept, `replay/`. Any number may read and write."""

    folder: Path

    def place(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def read(self, key: str, *, replay: bool) -> dict[str, Any] | None:
        """The row of a run, or None where there is none, or one without the replay that is asked for.

        A damaged entry is warned about and removed, so that the run is made again.
        """
        place = self.place(key)
        if not place.exists():
            return None
        try:
            record = json.loads((place / ENTRY_FILE).read_text(encoding="utf-8"))
            if record["checksum"] != _checksum({k: v for k, v in record.items() if k != "checksum"}):
                raise ValueError("its checksum differs from its content")
            if replay and not record["files"]:
                return None
            for name, expected in record["files"].items() if replay else ():
                if hashlib.sha256((place / REPLAY_FOLDER / name).read_bytes()).hexdigest() != expected:
                    raise ValueError(f"{name} differs from its checksum")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"the cached run {place} is damaged and will be computed again: {error}", UserWarning, stacklevel=4)
            shutil.rmtree(place, ignore_errors=True)
            return None
        return record["row"]

    def write(self, key: str, row: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Keep a run. It appears under its name only once everything is on disk."""
        place = self.place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "format": 1,
            "key": key,
            "row": plain(row),
            "files": {n: hashlib.sha256(b).hexdigest() for n, b in files.items()},
        }
        made = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=place.parent))
        try:
            for name, content in files.items():
                (made / REPLAY_FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
                (made / REPLAY_FOLDER / name).write_bytes(content)
            (made / ENTRY_FILE).write_text(json.dumps(record | {"checksum": _checksum(record)}, indent=1) + "\n", encoding="utf-8")
            if place.exists():
                shutil.rmtree(place)
            os.replace(made, place)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON has it: numpy scalars become Python's."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
