"""The rows of a replay on disk while it runs, so that its memory does not grow with its steps and tokens."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.core import Predictor
from workbench.loop.history import History
from workbench.results.facts import facts_of_history
from workbench.results.frames import EVENT_COLUMNS, STEP_COLUMNS, WORK_COLUMNS, column, sorted_by_time, text_as_objects
from workbench.results.tally import Tally

MAX_ROWS = 200_000
"""So many rows are kept before they are written."""

COLUMNS = {"events": EVENT_COLUMNS, "steps": STEP_COLUMNS, "work": WORK_COLUMNS}
_TYPES = {"object": pa.string(), "int64": pa.int64(), "bool": pa.bool_(), "float64": pa.float64()}


class Stream:
    """Writes `events.parquet`, `steps.parquet` and `work.parquet` into `folder`, which is made, part by part.

    Of its rows only what `conservation` checks at the end is kept, summed up. Raises ValueError for a folder that holds such files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tally: Tally | None = None
        self.num_steps = 0
        self._writers: dict[str, pq.ParquetWriter] = {}
        there = [name for name in COLUMNS if (self.folder / f"{name}.parquet").exists()]
        if there:
            raise ValueError(
                f"events must be a folder without the rows of another replay, got {str(self.folder)!r}, which holds {there[0]}.parquet. "
                "Remove it, or name another folder."
            )

    def open(self) -> None:
        """Make the folder and its files. Raises OSError where that cannot be done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, columns in COLUMNS.items():
            schema = pa.schema([(c, _TYPES[str(column(c, []).dtype)]) for c in columns])
            self._writers[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", schema, compression="zstd")

    @property
    def is_open(self) -> bool:
        return bool(self._writers)

    def is_due(self, history: History) -> bool:
        return history.size >= MAX_ROWS

    def take(self, history: History, predictor: Predictor | None, num_layers: int, names: pd.Index) -> None:
        """Write what there is in the history and let it forget that. `names` are the ids of all requests."""
        self.tally = self.tally or Tally(names)
        facts = facts_of_history(history, names)
        self.tally.add_rows(facts)
        self.tally.add_steps(facts)
        frames = {"events": history.events_frame(), "steps": history.steps_frame(predictor, num_layers), "work": history.work_frame()}
        for name, frame in frames.items():
            writer = self._writers[name]
            writer.write_table(pa.Table.from_pandas(frame, schema=writer.schema, preserve_index=False))
        self.num_steps = history.num_steps
        history.forget()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def frame(self, name: str) -> pd.DataFrame:
        """One of the frames, read as a whole."""
        frame = text_as_objects(pd.read_parquet(self.folder / f"{name}.parquet"))
        return sorted_by_time(frame) if name == "events" else frame

    def __getitem__(self, name: str) -> Any:
        if name not in COLUMNS:
            raise ValueError(
                f"a replay whose rows were written to {str(self.folder)!r} as it ran keeps no {name}. Run it without events= to keep them."
            )
        return self.frame(name)
