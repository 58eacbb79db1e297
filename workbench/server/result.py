"""`ServerReplay`: what a load generator heard from a server, as a Replay; what no client can see is nan, never a guess."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from workbench.core import Request
from workbench.results import metrics
from workbench.results.frames import rows_to_frame
from workbench.results.replay import Replay
from workbench.server.protocol import Piece, ServerInfo

TEXTS_FILE = "texts.json"
UNSEEN_OF_REQUEST = ("queue_s", "cached_tokens", "preemptions")
UNSEEN = (
    *("steps", "busy_share", "planning_share", "kv_occupancy_mean", "kv_occupancy_max", "attainment_admission_wait", "queue_mean_s"),
    *("preemptions", "optimizer_steps", "finetune_tokens_per_s", "prefill_tokens_per_s", "prefix_hit_share", "jobs_finished"),
    *("adapter_loads", "adapter_load_bytes", "adapter_reads", "adapter_read_bytes", "adapter_evictions"),
)


@dataclass(slots=True)
class Heard:
    """One request as its client saw it. Times in seconds on the replay clock; `due_s` is when it was to be sent."""

    request: Request
    due_s: float
    asked_tokens: int | None
    sent_s: float | None = None
    is_held: bool = False
    pieces: list[tuple[float, int | None]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    end: tuple[str, float, str] | None = None

    def hear(self, piece: Piece, at: float) -> None:
        """Take in what an event said. One that brought no token counts for nothing but its totals."""
        brings = piece.tokens if piece.tokens is not None else None if piece.text else 0
        if brings != 0:
            self.pieces.append((at, brings))
        self.text.append(piece.text)
        self.token_ids += piece.token_ids or ()
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.prompt_tokens = self.prompt_tokens if piece.prompt_tokens is None else piece.prompt_tokens
        self.completion_tokens = self.completion_tokens if piece.completion_tokens is None else piece.completion_tokens

    @property
    def is_counted(self) -> bool:
        """Whether the server said of every piece how many tokens it held."""
        return all(tokens is not None for _, tokens in self.pieces)

    def counts(self) -> list[tuple[float, int]]:
        """(time, tokens) of each piece. A piece of unknown size is one token, but the last brings what the total says beyond that."""
        if self.is_counted or self.completion_tokens is None:
            return [(at, 1 if tokens is None else tokens) for at, tokens in self.pieces]
        pieces = self.pieces[: self.completion_tokens]
        rest = self.completion_tokens - (len(pieces) - 1)
        return [(at, 1) for at, _ in pieces[:-1]] + [(at, rest) for at, _ in pieces[-1:]]

    def rows(self) -> list[tuple[Any, ...]]:
        """Its events: arrived, sent (value: lag in s), token (value: index of the piece's last), merged, and the end."""
        name, adapter, done = self.request.request_id, self.request.adapter, 0
        rows: list[tuple[Any, ...]] = [(self.due_s, 0, "arrived", name, adapter, None, "")]
        if self.sent_s is not None:
            held = "held back by max_connections" if self.is_held else ""
            rows.append((self.sent_s, 0, "sent", name, adapter, self.sent_s - self.due_s, held))
        for at, tokens in self.counts():
            done += tokens
            rows.append((at, 0, "token", name, adapter, float(done), ""))
            if tokens > 1:
                rows.append((at, 0, "merged", name, adapter, float(tokens - 1), ""))
        if self.end is not None:
            kind, at, note = self.end
            rows.append((at, 0, kind, name, adapter, None, note))
        return rows


def notes_of(heard: Sequence[Heard]) -> tuple[str, ...]:
    """What a reader of the numbers has to know of the streams behind them."""
    notes, num = [], len(heard)
    spoke = [h for h in heard if h.pieces]
    merged = sum(any(tokens > 1 for _, tokens in h.counts()) for h in spoke)
    if merged:
        notes.append(f"{merged} of {num} requests got several tokens in one piece: gaps are between pieces")
    untold = sum(not h.is_counted for h in spoke if h.completion_tokens is not None)
    if untold:
        notes.append(f"{untold} of {num} requests: only their total of tokens is known; each piece counts as one, the last as the rest")
    silent = sum(not h.is_counted for h in spoke if h.completion_tokens is None)
    if silent:
        notes.append(f"{silent} of {num} requests: the server reported no usage, a piece of text is counted as one token")
    short = sum(_is_short(h) for h in heard)
    if short:
        notes.append(f"{short} of {num} requests finished with another length than the trace asks for (does the server take ignore_eos?)")
    other = sum(h.prompt_tokens not in (None, h.request.prompt_tokens) and h.request.prompt is None for h in heard)
    if other:
        notes.append(f"{other} of {num} requests: the server counted another prompt length than was sent")
    return tuple(notes)


def _is_short(heard: Heard) -> bool:
    has_finished = heard.end is not None and heard.end[0] == "finished"
    return has_finished and heard.asked_tokens is not None and sum(n for _, n in heard.counts()) != heard.asked_tokens


class ServerReplay(Replay):
    """A trace against a server, in wall-clock time. `texts` is what each request got; `steps`, `work` and `jobs` are empty.

    `requests` has, beside the columns of every replay, sent_s, send_lag_s (sent − intended arrival; latencies count from the intended
    arrival and hold it), pieces (arrivals of text) and reason (why it was rejected or aborted).
    """

    texts: Mapping[str, str] = {}

    @property
    def server(self) -> ServerInfo:
        """The server as it described itself."""
        info: Any = self.executor
        return info

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request that arrived, by `metrics.request_frame`; nan where no client can see."""
        frame = metrics.request_frame(self.trace_requests, self.events, self.slo)
        for name in UNSEEN_OF_REQUEST:
            frame[name] = np.nan
        of_kind = {kind: rows.set_index("owner") for kind, rows in self.events.groupby("kind", observed=True)}
        empty = rows_to_frame([], tuple(self.events.columns)).set_index("owner")
        sent = of_kind.get("sent", empty)
        frame["sent_s"] = sent["time_s"].reindex(frame.index)
        frame["send_lag_s"] = sent["value"].reindex(frame.index)
        frame["pieces"] = of_kind.get("token", empty).groupby(level=0).size().reindex(frame.index, fill_value=0)
        ends = pd.concat([of_kind.get(kind, empty)["note"] for kind in ("rejected", "aborted")])
        frame["reason"] = ends.reindex(frame.index).astype(object).where(lambda notes: notes.notna(), "")
        return frame

    def summary(self) -> dict[str, Any]:
        """The headline numbers, by `metrics.summary`, and the client's lag in seconds; nan for what no client can see."""
        row = {name: np.nan if name in UNSEEN else value for name, value in metrics.summary(self).items()}
        start, end = row["measure_start_s"], row["measure_end_s"]
        lag = self.requests.loc[self.requests["arrival_s"].between(start, end), "send_lag_s"]
        row |= {f"send_lag_p{p}_s": metrics.quantile_interval(lag.to_numpy(float), p / 100).value for p in (50, 99)}
        pause_s = self.settings["client"]["pause_p99_s"]
        return row | {"send_lag_max_s": float(lag.max()), "client_pause_p99_s": np.nan if pause_s is None else pause_s}

    def attribution(self, of: Any = "ttft") -> NoReturn:
        """Not for a server: its steps cannot be seen from outside. Raises ValueError."""
        raise ValueError(f"attribution needs the steps of a replay, got one of a server ({self.server.url}). Use wb.serve(record=True).")

    def save_trace(self, path: str | Path, predicted: Any = None) -> NoReturn:
        """Not for a server: its steps cannot be seen from outside. Raises ValueError."""
        raise ValueError(f"save_trace needs the steps of a replay, got one of a server ({self.server.url}). Use wb.serve(record=True).")

    def save(self, folder: str | Path) -> Path:
        """As `Replay.save`, and the texts beside it."""
        folder = super().save(folder)
        (folder / TEXTS_FILE).write_text(json.dumps(self.texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def loaded(cls, folder: Path, **values: Any) -> "ServerReplay":
        """What `save` wrote, from the values that `load_replay` read."""
        record = values.pop("executor")
        info: Any = ServerInfo(**(record | {"models": tuple(record["models"])}))
        replay = cls(executor=info, **values)
        replay.texts = json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8"))
        return replay

    def __repr__(self) -> str:
        end = f", interrupted={self.interrupted}" if self.interrupted else ""
        outcomes = ", ".join(f"{count} {name}" for name, count in self.requests["outcome"].value_counts().items())
        loop = self.settings.get("loop", "open")
        return f"ServerReplay({self.policy} at {self.server.url}, {len(self.trace_requests)} requests ({loop} loop): {outcomes}{end})"
