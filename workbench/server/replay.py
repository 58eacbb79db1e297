"""`replay_server`: a trace against an OpenAI-compatible server (vLLM, SGLang, ...), streamed, on the wall clock.

Open loop: a request is sent at its own time whatever the server does, and its latency counts from that time, also where the client was
late (no coordinated omission: docs/method.md). How late it was stands beside every result.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from workbench.config import SLO, Provenance, require
from workbench.core import Request
from workbench.loop.checks import check_slo, checked_requests, warn_of_ties
from workbench.loop.tape import Tape
from workbench.results.frames import EVENT_COLUMNS, STEP_COLUMNS, WORK_COLUMNS, rows_to_frame
from workbench.results.replay import commit_of_code, versions_of_code
from workbench.server.load import Load
from workbench.server.protocol import PATHS, Endpoint, Form
from workbench.server.result import Heard, ServerReplay, notes_of


def replay_server(
    trace: Any,
    *,
    url: str,
    api_key: str | None = None,
    model_of: Callable[[str | None], str] | None = None,
    endpoint: Endpoint = "completions",
    lengths: Literal["trace", "text"] = "trace",
    vocab_size: int | None = None,
    timeout_s: float = 600.0,
    max_connections: int | None = None,
    slo: SLO | Mapping[str, SLO] | None = None,
    measure: tuple[float, float] | None = None,
    seed: int = 0,
    label: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_lag_s: float = 0.010,
    progress: bool | None = None,
) -> ServerReplay:
    """Send `trace` (a Trace, or a sequence of Request) to the server at `url`, streamed, and take down what comes back, as a Replay.

    `model_of` gives the model's name for an adapter (None: the base); by default an adapter is a model of its own name, as in vLLM, and
    the base the first model that the server lists. Prompts are the trace's text or token ids, or, with `vocab_size`, the ids that an
    engine of that vocabulary would draw; "chat" needs text. `lengths="trace"` asks for the trace's output lengths by `ignore_eos` and
    `min_tokens`, which vLLM and SGLang know; with "text" the text ends, or `max_tokens` (else the trace's length) does. `extra` fields
    go into every body, None takes one out. Sessions are closed loops: the next turn comes `think_s` after the end of the one before.

    A request that is refused (connection, HTTP status) counts as rejected, one that breaks off, is malformed or has not ended `timeout_s`
    after it was sent as aborted, each with its reason in `requests`; none is sent again. `max_connections` bounds what is in flight;
    what then waits is late by its own schedule, and said. A warning where the client lagged: p99 of sending, or of its own pauses, above
    `max_lag_s`. `seed` and `label` name the run; text is drawn by each request's own `sampling.seed`. Ctrl-C keeps what there is,
    `interrupted`. Raises ConnectionError when no server answers, ValueError for bad input, UnknownAdapterError for a model that the
    server does not list, all before anything is sent.
    """
    requests = checked_requests(trace)
    check_slo(slo, requests)
    require(endpoint in PATHS, f"endpoint must be one of {', '.join(PATHS)}", endpoint)
    require(lengths in ("trace", "text"), "lengths must be 'trace' or 'text'", lengths)
    require(timeout_s > 0, "timeout_s must be above 0 seconds", timeout_s)
    require(max_connections is None or max_connections >= 1, "max_connections must be at least 1, or None for no bound", max_connections)
    require(max_lag_s > 0, "max_lag_s must be above 0 seconds", max_lag_s)
    require(measure is None or 0 <= measure[0] < measure[1], "measure must be (start_s, end_s) with 0 <= start_s < end_s", measure)
    form = Form(endpoint=endpoint, lengths=lengths, vocab_size=vocab_size, extra=dict(extra or {}))
    for request in requests:
        form.check(request)
    warn_of_ties([r for r in requests if r.parent_id is None])
    load = Load(requests, url, api_key, model_of, form, timeout_s, max_connections)
    interrupted = load.run(progress)
    heard = sorted(load.heard.values(), key=lambda h: h.due_s)
    client = _lag_of(heard, load.pauses)
    notes = [*notes_of(heard), *_warn_of_lag(client, max_lag_s, max_connections)]
    settings = {
        "clock": "wall, of the client",
        "endpoint": PATHS[endpoint],
        "lengths": lengths,
        "loop": "closed" if load.children else "open",
        "timeout_s": timeout_s,
        "max_connections": max_connections,
        "extra": sorted(form.extra),
        "client": client,
        "trace": getattr(trace, "name", "requests"),
        "notes": [*getattr(trace, "notes", ()), *notes],
        "redrawn": list(getattr(trace, "redrawn", ())),
    }
    info: Any = load.info
    provenance = Provenance(
        commit=commit_of_code(),
        versions=dict(versions_of_code()) | {"server": info.version or "not reported"},
        device=info.device,
        seed=seed,
        policy=label or info.name,
        trace_checksum=getattr(trace, "checksum", None) or hashlib.blake2b(repr(requests).encode(), digest_size=8).hexdigest(),
    )
    origin = {"executor": info, "provenance": provenance, "settings": settings}
    return _replay(requests, load.heard, heard, origin | {"slo": slo, "measure": measure, "interrupted": interrupted})


def _replay(requests: tuple[Request, ...], by_name: Mapping[str, Heard], heard: list[Heard], rest: Mapping[str, Any]) -> ServerReplay:
    replay = ServerReplay(
        history={
            "events": rows_to_frame([row for h in heard for row in h.rows()], EVENT_COLUMNS),
            "steps": rows_to_frame([], STEP_COLUMNS),
            "work": rows_to_frame([], WORK_COLUMNS),
            "results": (),
            "digests": (),
        },
        outputs={h.request.request_id: tuple(h.token_ids) for h in heard if h.token_ids},
        trace_requests=[_resolved(r, by_name.get(r.request_id)) for r in requests],
        finetune_jobs=(),
        tape=Tape(),
        **rest,
    )
    replay.texts = {h.request.request_id: "".join(h.text) for h in heard if h.pieces}
    return replay


def _resolved(request: Request, heard: Heard | None) -> Request:
    """The request with the prompt length that the server counted, where only text was sent."""
    counted = None if heard is None else heard.prompt_tokens
    return replace(request, prompt_tokens=counted) if request.prompt is not None and counted is not None else request


def _lag_of(heard: list[Heard], pauses: list[float]) -> dict[str, float | int | None]:
    """The client's own lateness in seconds: sending against the schedule, and pauses in which it read nothing."""
    out: dict[str, float | int | None] = {"held": sum(h.is_held for h in heard)}
    lags = [h.sent_s - h.due_s for h in heard if h.sent_s is not None and not h.is_held]
    for name, values in (("send_lag", lags), ("pause", pauses)):
        for p, quantile in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            out[f"{name}_{p}_s"] = float(np.quantile(values, quantile, method="higher")) if values else None
    return out


def _warn_of_lag(client: Mapping[str, Any], max_lag_s: float, max_connections: int | None) -> list[str]:
    notes = []
    for name, what in (("send_lag", "sent requests late"), ("pause", "paused before reading")):
        lag_s = client[f"{name}_p99_s"]
        if lag_s is not None and lag_s > max_lag_s:
            notes.append(f"the client {what}: p99 {lag_s * 1e3:.1f} ms, at most {client[f'{name}_max_s'] * 1e3:.1f} ms")
    if notes:
        warnings.warn(
            f"{'; '.join(notes)} (above max_lag_s = {max_lag_s * 1e3:g} ms), and that is in the latencies: "
            "run the client on idle cores, or send less",
            stacklevel=3,
        )
    if client["held"]:
        notes.append(f"{client['held']} requests were held back by max_connections={max_connections}: that time is in their latencies")
        warnings.warn(notes[-1], stacklevel=3)
    return notes
