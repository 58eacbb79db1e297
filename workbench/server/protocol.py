"""What a load generator says to an OpenAI-compatible server, and what the server's stream of events says back.

Sources of the forms: the OpenAI API reference; vLLM's and SGLang's extensions (`ignore_eos`, `min_tokens`, token ids as a prompt and in
answers, `stream_options.continuous_usage_stats`, an adapter's name as the model); server-sent events as in the HTML standard, 9.2.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workbench.config import require
from workbench.core import Request
from workbench.data import prompt_token_ids

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[str, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
DONE = "[DONE]"
FAILED = ("abort", "error")  # reasons for an end that is none
MAX_REASON = 300


class BrokenStream(Exception):
    """A stream of events that ended as none should: said as the reason on its request."""


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What stands where a replay names its executor: a server that was measured from outside, as it describes itself.

    `name` is the serving software and its version, `device` where it was reached; `models` what it serves (empty where it does not say).
    """

    name: str
    device: str
    url: str
    models: tuple[str, ...]
    version: str | None
    simulated: bool = False
    num_blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """How requests are put: the endpoint, whose lengths count, the vocabulary for prompts that are drawn, and fields of one's own."""

    endpoint: Endpoint
    lengths: Literal["trace", "text"]
    vocab_size: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        json.dumps(dict(self.extra))  # before anything is sent: a TypeError names what JSON has not

    def body(self, request: Request, model: str) -> bytes:
        """The request's JSON body. Raises ValueError for one that cannot be put like this."""
        values: dict[str, Any] = {
            "model": model,
            **self._prompt(request),
            **self._length(request),
            **_sampling(request),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True,
        }
        values |= self.extra
        return json.dumps({name: value for name, value in values.items() if value is not None}).encode()

    def asked_tokens(self, request: Request) -> int | None:
        """The output length that is asked for; None where the text decides."""
        if self.lengths == "text" or request.output_tokens is None:
            return None
        return request.output_tokens if request.max_tokens is None else min(request.output_tokens, request.max_tokens)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that `body` could not put, without drawing its prompt."""
        has_text, has_ids = request.prompt is not None, request.prompt_token_ids is not None
        if self.endpoint == "chat":
            step = 'Give the trace a column prompt, or use endpoint="completions".'
            require(has_text, f"chat needs the text of a prompt, request {request.request_id!r} has none", request.prompt, step)
        elif not has_text and not has_ids:
            step = "Pass vocab_size= of the served model (vocab_size in its config.json)."
            rule = f"request {request.request_id!r} has a length but no prompt, so token ids are drawn: vocab_size must be known"
            require(self.vocab_size is not None, rule, self.vocab_size, step)
        self._length(request)

    def _prompt(self, request: Request) -> dict[str, Any]:
        if self.endpoint == "chat":
            return {"messages": [{"role": "user", "content": request.prompt}]}
        if request.prompt is not None:
            return {"prompt": request.prompt}
        if request.prompt_token_ids is not None:
            return {"prompt": list(request.prompt_token_ids)}
        assert self.vocab_size is not None
        return {"prompt": list(prompt_token_ids(request, vocab_size=self.vocab_size))}

    def _length(self, request: Request) -> dict[str, Any]:
        asked = self.asked_tokens(request)
        if asked is not None:
            return {"max_tokens": asked, "min_tokens": asked, "ignore_eos": True}
        most = request.max_tokens if request.max_tokens is not None else request.output_tokens
        step = "Give the trace a column max_tokens."
        rule = f"request {request.request_id!r} must have max_tokens, or a server cuts its text at a default of its own"
        require(most is not None, rule, most, step)
        return {"max_tokens": most}


def _sampling(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    values: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.temperature > 0:
        values |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": sampling.seed}
    if sampling.repetition_penalty != 1:
        values["repetition_penalty"] = sampling.repetition_penalty
    return values


class EventDecoder:
    """Bytes of a stream to the data of its events. Only line feeds end lines: text may hold any other separator unescaped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, raw: bytes) -> list[str]:
        """The data of every event that is complete now. Raises BrokenStream for bytes that are no UTF-8."""
        *lines, self._rest = (self._rest + raw).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                try:
                    events.append(b"\n".join(self._data).decode())
                except UnicodeDecodeError as error:
                    raise BrokenStream(f"malformed event: {error}") from error
                self._data = []
        return events

    @property
    def is_cut(self) -> bool:
        """Whether an event was begun and not ended."""
        return bool(self._rest.strip() or self._data)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event said. `tokens`: how many it brought, None where the server did not say; usage totals where it did."""

    text: str
    tokens: int | None
    token_ids: tuple[int, ...] | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def read_piece(data: str, before: int | None) -> Piece:
    """One event's data, after `before` tokens by the server's own running count (None: it keeps none, a total at the end is no piece's).

    Raises BrokenStream for an error, or what is no such event.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BrokenStream(f"malformed event: {error}: {shortened(data)}") from error
    if not isinstance(value, dict) or value.get("error"):
        said = message_of(value) if isinstance(value, dict) else shortened(data)
        raise BrokenStream(f"error in the stream: {said}" if isinstance(value, dict) else f"malformed event: {said}")
    choices, usage = value.get("choices"), value.get("usage") or {}
    try:
        if not isinstance(choices, list):
            raise TypeError("no choices")
        choice = choices[0] if choices else {}
        inner = choice.get("delta") or {}
        text = choice.get("text") or inner.get("content") or inner.get("reasoning_content") or inner.get("reasoning") or ""
        ids = choice.get("token_ids")
        prompt, done = (None if usage.get(name) is None else int(usage[name]) for name in ("prompt_tokens", "completion_tokens"))
        tokens = None if done is None or before is None or not choices else max(0, done - before)
        tokens = tokens if ids is None else len(ids)
        return Piece(str(text), tokens, None if ids is None else tuple(map(int, ids)), choice.get("finish_reason"), prompt, done)
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise BrokenStream(f"malformed event: {error}: {shortened(data)}") from error


def message_of(value: Mapping[str, Any]) -> str:
    """The message in an error of OpenAI's form, or the whole of another one."""
    inner = value.get("error", value)
    said = inner.get("message", inner) if isinstance(inner, Mapping) else inner
    return shortened(str(said))


def refusal(status: int, content: bytes) -> str:
    """The reason that an HTTP error gives."""
    try:
        value = json.loads(content)
    except ValueError:
        return f"HTTP {status}: {shortened(content.decode(errors='replace'))}"
    return f"HTTP {status}: {message_of(value) if isinstance(value, Mapping) else shortened(str(value))}"


def shortened(text: str) -> str:
    """Text for a note: of one line, and with its length said where it is cut."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}… ({len(text)} characters)"
