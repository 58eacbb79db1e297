"""Trace files as canonical columns: our own CSV, JSONL and parquet, and the formats in which others publish theirs.

| format | columns or keys | source |
| --- | --- | --- |
| workbench | those of `Trace.from_frame` | `trace.frame.to_parquet(path)` |
| burstgpt | Timestamp, Model, Request tokens, Response tokens (Session ID) | HPMLL/BurstGPT |
| azure | TIMESTAMP, ContextTokens, GeneratedTokens | AzurePublicDataset, LLM inference 2023 and 2024 |
| mooncake | timestamp (ms), input_length, output_length, hash_ids (512 tokens) | kvcache-ai/Mooncake |
| qwen-bailian | chat_id, parent_chat_id, timestamp, input_length, output_length, hash_ids (16) | alibaba-edu/qwen-bailian |
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (pandas types a column as a union of everything that a frame can give)

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from workbench.config import did_you_mean, require
from workbench.data import PREFIX_TOKENS
from workbench.traces.frame import TEXTS
from workbench.traces.mapping import mapped
from workbench.traces.trace import Trace

TRACES_DIR = Path(os.environ.get("LOQUETIER_TRACES") or Path(__file__).resolve().parents[2] / "traces")
FORMATS = ("workbench", "burstgpt", "azure", "mooncake", "qwen-bailian")
QWEN_BLOCK_TOKENS = 16
Read = tuple[pd.DataFrame, tuple[str, ...]]


def shipped(file: str) -> Path:
    """The path of a shipped data file. Raises FileNotFoundError that says where the folder is looked for."""
    path = TRACES_DIR / file
    if not path.is_file():
        raise FileNotFoundError(
            f"the shipped traces must lie in {str(TRACES_DIR)!r}, got no {file!r} there. "
            "Install from a clone (pip install -e .), or set LOQUETIER_TRACES to the clone's folder traces/."
        )
    return path


def read(
    path: str | Path,
    *,
    format: str | None = None,
    drop_empty: bool = False,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
) -> Trace:
    """A trace from a file, its times rebased to the first arrival (our own format: as given).

    `format` is told from the columns if None; `columns` (our name -> the file's) and `units` are for any other table, see
    `traces.mapping.mapped`. Rows with zero prompt or output tokens (failed requests in BurstGPT's logs) are an error
    unless `drop_empty=True`, which notes how many it dropped. Raises FileNotFoundError, and ValueError for an unknown format or a
    value that breaks a trace's rules.
    """
    path = Path(path)
    frame, notes = frame_of(path, format=format, columns=columns, units=units)
    if drop_empty:
        counts = [pd.to_numeric(frame[c], errors="coerce") for c in ("prompt_tokens", "output_tokens") if c in frame]
        empty = pd.concat([c == 0 for c in counts], axis=1).any(axis=1) if counts else pd.Series(False, index=frame.index)
        frame = frame[~empty]
        notes = (*notes, f"{int(empty.sum()):,} requests with 0 tokens dropped") if empty.any() else notes
    try:
        trace = Trace.from_frame(frame, name=name or path.stem)
    except ValueError as error:
        hint = " Or pass drop_empty=True to leave such requests out." if "must be at least 1, got 0 " in str(error) else ""
        raise ValueError(f"{path.name}: {error}{hint}") from error
    return trace.derived(trace._frame, None, *notes) if notes else trace


def frame_of(
    path: Path, *, format: str | None = None, columns: Mapping[str, str] | None = None, units: Mapping[str, str] | None = None
) -> Read:
    """(the file's requests in our columns, not checked yet; notes on what was done)."""
    if not path.is_file():
        raise FileNotFoundError(f"a trace must be a shipped name or an existing file, got {str(path)!r}. See traces.names().")
    if columns is not None:
        require(format is None, "format and columns exclude each other", format, "Leave one out.")
        texts = [source for name, source in columns.items() if name == "request_id" or name in TEXTS]
        return mapped(_table(path, texts), columns, units)
    require(units is None, "units go with columns", units, "Pass columns= too.")
    table = _table(path)
    kind = format or _detect(table, path)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}. {did_you_mean(kind, FORMATS)}")
    return {
        "workbench": _workbench,
        "burstgpt": _burstgpt,
        "azure": _azure,
        "mooncake": _mooncake,
        "qwen-bailian": _qwen_bailian,
    }[kind](table)


def _table(path: Path, text_columns: Sequence[str] = ()) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return pd.read_parquet(path)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    if suffix not in (".csv", ".txt", ".gz"):
        raise ValueError(f"a trace file must end in .csv, .csv.gz, .jsonl or .parquet, got {path.name!r}. Convert or rename it.")
    try:
        # Ids and names stay text: "007" is not 7, and a missing adapter must not turn the others into floats.
        texts = dict.fromkeys(
            ("request_id", "adapter", "tenant", "slo_class", "session", "parent_id", "prompt", "Session ID", *text_columns), str
        )
        table = pd.read_csv(path, dtype=texts)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name}: must be a CSV file with a header line, got one that does not parse ({error}). Repair it."
        ) from error
    for column in ("prefix_ids", "prompt_token_ids"):
        if column in table:
            table[column] = [_id_list(cell, path, column, row) for row, cell in enumerate(table[column])]
    return table


def _id_list(cell: object, path: Path, column: str, row: int) -> list[int] | None:
    """A CSV cell such as "[1, 2]" or "(1, 2)" as a list."""
    if not isinstance(cell, str):
        return None
    try:
        return [int(part) for part in cell.strip("[]() ").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{path.name}: {column} must be a list of integers, got {cell!r:.80} in row {row}. Write [1, 2, 3].") from error


def _jsonl(path: Path) -> pd.DataFrame:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path.name} line {number}: must be one JSON object, got {line[:60]!r} ({error}). Repair the line."
                ) from error
            require(isinstance(row, dict), f"{path.name} line {number} must be one JSON object", row, "Repair the line.")
            rows.append(row)
    return pd.DataFrame(rows)


def _detect(table: pd.DataFrame, path: Path) -> str:
    signatures = {
        "workbench": {"arrival_s"},
        "burstgpt": {"Timestamp", "Request tokens", "Response tokens"},
        "azure": {"TIMESTAMP", "ContextTokens", "GeneratedTokens"},
        "qwen-bailian": {"chat_id", "timestamp", "input_length", "output_length"},
        "mooncake": {"timestamp", "input_length", "output_length"},
    }
    for kind, needed in signatures.items():
        if needed <= set(table.columns):
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(needed))}" for kind, needed in signatures.items())
    raise ValueError(
        f"{path.name}: a trace's columns must be those of a known format ({known}), got {list(table.columns)}. "
        "Rename them, or pass columns={'arrival_s': ..., ...}."
    )


def _column(table: pd.DataFrame, name: str, kind: str) -> pd.Series:
    if name not in table:
        raise ValueError(f"format {kind!r} must have the column {name!r}, got {list(table.columns)}. Pass another format=.")
    return table[name]


def _rebased(times: pd.Series, scale: float = 1.0) -> pd.Series:
    """Seconds since the first arrival; what is not a number stays as it is, for the trace's own check to name."""
    numbers = pd.to_numeric(times, errors="coerce")
    if numbers.isna().any():
        return times
    # Rounded to a nanosecond: subtraction leaves digits that the file never had.
    return ((numbers - numbers.min()) * scale).round(9)


def _basic(table: pd.DataFrame, times: pd.Series, prompt: str, output: str, kind: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "request_id": [str(i) for i in range(len(table))],
            "arrival_s": times,
            "prompt_tokens": _column(table, prompt, kind),
            "output_tokens": _column(table, output, kind),
        }
    )


def _workbench(table: pd.DataFrame) -> Read:
    if "request_id" not in table:
        table = table.assign(request_id=[str(i) for i in range(len(table))])
    if "prefix_hash_ids" in table:
        table = table.rename(columns={"prefix_hash_ids": "prefix_ids"})
    return table, ()


def _burstgpt(table: pd.DataFrame) -> Read:
    times = _rebased(_column(table, "Timestamp", "burstgpt"))
    frame = _basic(table, times, "Request tokens", "Response tokens", "burstgpt")
    if "Model" in table:
        frame["tenant"] = table["Model"]
    if "Session ID" in table:
        frame["session"] = table["Session ID"]
    return frame, ()


def _azure(table: pd.DataFrame) -> Read:
    stamps = _column(table, "TIMESTAMP", "azure")
    parsed = pd.to_datetime(stamps, format="ISO8601", utc=True, errors="coerce")
    if parsed.isna().any():
        row = int(parsed.isna().to_numpy().argmax())
        raise ValueError(f"TIMESTAMP must be a date and time, got {stamps.iloc[row]!r} in row {row}. Repair the row.")
    times = (parsed - parsed.min()).dt.total_seconds()
    return _basic(table, times, "ContextTokens", "GeneratedTokens", "azure"), ()


def _mooncake(table: pd.DataFrame) -> Read:
    frame = _basic(table, _rebased(_column(table, "timestamp", "mooncake"), 1e-3), "input_length", "output_length", "mooncake")
    if "hash_ids" in table:
        frame["prefix_ids"] = table["hash_ids"]
    return frame, ()


def _qwen_bailian(table: pd.DataFrame) -> Read:
    """Each session's turns keep their own times (an open loop; `closed_sessions` closes it)."""
    times = _rebased(_column(table, "timestamp", "qwen-bailian"))
    frame = _basic(table, times, "input_length", "output_length", "qwen-bailian")
    chats = [str(chat) for chat in _column(table, "chat_id", "qwen-bailian").tolist()]
    parents = [str(chat) for chat in _column(table, "parent_chat_id", "qwen-bailian").tolist()]
    roots: dict[str, str] = {}
    for chat, parent in zip(chats, parents, strict=True):
        roots[chat] = chat if parent == "-1" else roots.get(parent, parent)
    frame["request_id"] = chats
    frame["session"] = [roots[chat] for chat in chats]
    if "type" in table:
        frame["slo_class"] = table["type"]
    if "hash_ids" not in table:
        return frame, ()
    frame["prefix_ids"] = [_grouped(blocks) for blocks in table["hash_ids"]]
    return frame, (f"prefix blocks of {QWEN_BLOCK_TOKENS} tokens grouped into {PREFIX_TOKENS}",)


def _grouped(blocks: Sequence[int]) -> tuple[int, ...]:
    """Ids of runs of 512 tokens from ids of 16-token blocks; equal exactly when everything up to their end is."""
    size = PREFIX_TOKENS // QWEN_BLOCK_TOKENS
    groups, before = [], b""
    for start in range(0, len(blocks), size):
        before = hashlib.blake2b(before + repr([int(b) for b in blocks[start : start + size]]).encode(), digest_size=7).digest()
        groups.append(int.from_bytes(before, "little"))
    return tuple(groups)
