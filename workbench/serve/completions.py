"""OpenAI's completions and chat completions: a request body as a `Request`, generated tokens as a response or its chunks.

Source of the form: the OpenAI API reference, and vLLM's extensions to it (`top_k`, `repetition_penalty`, `ignore_eos`, `min_tokens`,
`return_token_ids`, `stream_options.continuous_usage_stats`, an adapter's name as the model). What is not understood is refused.
"""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from workbench.config import did_you_mean
from workbench.core import Request, Sampling

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API; a chat ends where its context does
BOTH = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stream", "stream_options"),
    *("ignore_eos", "min_tokens", "return_token_ids", "user", "priority"),
)
OWN = {True: ("messages", "max_completion_tokens"), False: ("prompt",)}
# Others may be sent with the value that does nothing.
INERT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logprobs": (False,),
    "stop": ([],),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
}


class BadRequest(ValueError):
    """A request body that is refused; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Model:
    """What requests are read against: the base's name, its adapters' names, and the tokenizer if there is one."""

    name: str
    adapters: Collection[str]
    tokenizer: Any
    vocab_size: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True)
class Ask:
    """One request body, understood."""

    request: Request
    model: str
    is_chat: bool
    is_streamed: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool


def read_ask(body: bytes, *, is_chat: bool, request_id: str, model: Model) -> Ask:
    """A request body as an `Ask`. Raises BadRequest with what is wrong and what to send instead."""
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body must be JSON, got text that does not parse ({error})") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(fields).__name__}")
    fields = {name: value for name, value in fields.items() if value is not None}
    known = (*BOTH, *OWN[is_chat])
    for name, value in fields.items():
        if name not in known and not any(value == inert and type(value) is type(inert) for inert in INERT.get(name, ())):
            raise BadRequest(f"{name} is not supported here, got {value!r}. {did_you_mean(name, known)}")
    ids = _chat_ids(fields, model) if is_chat else _prompt_ids(fields, model)
    name = _field(fields, "model", str, model.name)
    if name != model.name and name not in model.adapters:
        raise BadRequest(f"model must be served here, got {name!r}. {did_you_mean(name, [model.name, *model.adapters])}", 404)
    options = _field(fields, "stream_options", dict, {})
    return Ask(
        request=_request(fields, ids, request_id, None if name == model.name else name, is_chat=is_chat),
        model=name,
        is_chat=is_chat,
        is_streamed=_field(fields, "stream", bool, False),
        include_usage=_field(options, "include_usage", bool, False),
        continuous_usage=_field(options, "continuous_usage_stats", bool, False),
        return_token_ids=_field(fields, "return_token_ids", bool, False),
    )


def _field(fields: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = fields.get(name, default)
    is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if value is default or is_number or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise BadRequest(f"{name} must be of type {kind.__name__}, got {value!r}")


def _request(fields: Mapping[str, Any], ids: tuple[int, ...], request_id: str, adapter: str | None, *, is_chat: bool) -> Request:
    most = _field(fields, "max_tokens", int, None)
    if is_chat:
        most = _field(fields, "max_completion_tokens", int, most)
    elif most is None:
        most = DEFAULT_MAX_TOKENS
    ignores_eos, least = _field(fields, "ignore_eos", bool, False), _field(fields, "min_tokens", int, 0)
    if ignores_eos and most is None:
        raise BadRequest("ignore_eos needs max_tokens, got none. Send max_tokens.")
    if least > 0 and not ignores_eos:
        raise BadRequest(f"min_tokens is supported with ignore_eos only, got {least}. Send ignore_eos and max_tokens.")
    if most is not None and not 1 <= max(1, least) <= most:
        raise BadRequest(f"max_tokens must be at least 1 and at least min_tokens, got {most} (min_tokens {least})")
    top_k = _field(fields, "top_k", int, None)
    try:
        sampling = Sampling(
            temperature=float(_field(fields, "temperature", float, 1.0)),
            top_p=float(_field(fields, "top_p", float, 1.0)),
            top_k=None if top_k in (-1, 0) else top_k,
            repetition_penalty=float(_field(fields, "repetition_penalty", float, 1.0)),
            seed=_field(fields, "seed", int, 0),
        )
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return Request(
        request_id=request_id,
        arrival_s=0.0,
        prompt_tokens=len(ids),
        output_tokens=most if ignores_eos else None,
        adapter=adapter,
        max_tokens=most,
        prompt_token_ids=ids,
        tenant=_field(fields, "user", str, ""),
        priority=_field(fields, "priority", int, 0),
        sampling=sampling,
    )


def _prompt_ids(fields: Mapping[str, Any], model: Model) -> tuple[int, ...]:
    if "prompt" not in fields:
        raise BadRequest("prompt must be given, got none. Send text or token ids.")
    prompt = fields["prompt"]
    if isinstance(prompt, list) and prompt and not _is_ids(prompt):
        if len(prompt) > 1:
            raise BadRequest(f"one prompt a request is served here, got {len(prompt)}. Send one request for each.")
        prompt = prompt[0]
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise BadRequest("a text prompt needs a tokenizer, got a model without one. Send a list of token ids.")
        prompt = model.tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, list) or not prompt or not _is_ids(prompt):
        raise BadRequest("prompt must be text or a list of token ids, neither empty")
    wrong = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise BadRequest(f"token ids must lie in 0..{model.vocab_size - 1} (the vocabulary), got {wrong}")
    return tuple(prompt)


def _is_ids(values: list[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in values)


def _chat_ids(fields: Mapping[str, Any], model: Model) -> tuple[int, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadRequest("messages must be a list of {'role', 'content'}, at least one")
    if model.tokenizer is None or not getattr(model.tokenizer, "chat_template", None):
        raise BadRequest("chat needs a tokenizer with a chat template, got a model without one. Use /v1/completions.")
    try:
        text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model's own program: whatever it raises is about these messages
        raise BadRequest(f"the messages must fit the model's chat template, got: {error}") from error
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


class Answer:
    """What one request has got so far, and how that looks in OpenAI's form. Without a tokenizer the text stays empty."""

    def __init__(self, ask: Ask, model: Model) -> None:
        self.ask, self.model = ask, model
        self.created = int(time.time())
        self.token_ids: list[int] = []
        self._sent = ""
        self._decoder = None if model.tokenizer is None else DecodeStream(skip_special_tokens=True)

    def chunks(self, tokens: list[int], *, is_finished: bool) -> list[dict[str, Any]]:
        """One chunk a token, the last with the reason for the end if `is_finished`."""
        out = []
        for position, token in enumerate(tokens, start=1):
            self.token_ids.append(token)
            is_last = is_finished and position == len(tokens)
            chunk = self._envelope([self._choice(self._text_of(token, is_last), [token], self.finish_reason if is_last else None, "delta")])
            if self.ask.continuous_usage:
                chunk["usage"] = self.usage
            out.append(chunk)
        return out

    def final_chunk(self) -> dict[str, Any]:
        """The chunk without choices that `include_usage` asks for."""
        return self._envelope([]) | {"usage": self.usage}

    def whole(self, tokens: list[int]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        self.token_ids = list(tokens)
        tokenizer = self.model.tokenizer
        text = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
        return self._envelope([self._choice(text, tokens, self.finish_reason, "message")]) | {"usage": self.usage}

    @property
    def finish_reason(self) -> str:
        """ "stop" after an end-of-sequence token of a request that heeds it, else "length"."""
        ends = self.ask.request.output_tokens is None and bool(self.token_ids) and self.token_ids[-1] in self.model.eos_token_ids
        return "stop" if ends else "length"

    @property
    def usage(self) -> dict[str, int]:
        prompt, done = self.ask.request.prompt_tokens, len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}

    def _text_of(self, token: int, is_last: bool) -> str:
        """The text that this token completes; bytes of a character that is not whole yet wait for the next one, or the end."""
        if self._decoder is None:
            return ""
        text = self._decoder.step(self.model.tokenizer.backend_tokenizer, token) or ""
        if is_last:
            whole = self.model.tokenizer.decode(self.token_ids, skip_special_tokens=True)
            if whole.startswith(self._sent + text):
                text = whole[len(self._sent) :]
        self._sent += text
        return text

    def _choice(self, text: str, tokens: list[int], reason: str | None, place: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self.ask.is_chat:
            choice[place] = {"content": text} if place == "delta" and len(self.token_ids) > 1 else {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return choice | ({"token_ids": tokens} if self.ask.return_token_ids else {})

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        is_streamed, is_chat = self.ask.is_streamed, self.ask.is_chat
        kind = ("chat.completion.chunk" if is_streamed else "chat.completion") if is_chat else "text_completion"
        head = {"id": self.ask.request.request_id, "object": kind, "created": self.created, "model": self.ask.model}
        return head | {"choices": choices}
