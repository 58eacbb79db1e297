"""Fine-tune examples: JSONL lines, dicts or token ids become documents of token ids and labels. Torch-free.

Nothing is cut and nothing is skipped: an example that cannot be used is an error that names it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from workbench.config import FinetuneJob, RandomTokens
from workbench.seeds import generator

SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that attend to one another, and where loss is taken.

    `labels[t]` is the token after `t` if predicting it carries loss, else None; the last one is always None.
    """

    token_ids: tuple[int, ...]
    labels: tuple[int | None, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labelled(self) -> int:
        return sum(label is not None for label in self.labels)

    @classmethod
    def of(cls, token_ids: Sequence[int], is_target: Sequence[bool]) -> "Document":
        """A document whose loss is taken on the tokens with `is_target` (the first token has no predecessor to predict it)."""
        following = zip(token_ids[1:], is_target[1:], strict=True)
        labels = tuple(token if target else None for token, target in following)
        return cls(tuple(token_ids), (*labels, None) if token_ids else ())


@dataclass(frozen=True, slots=True)
class Encoder:
    """How one job's examples become documents."""

    tokenizer: Callable[..., Any] | None
    vocab_size: int
    eos_token_id: int | None
    max_tokens: int
    completion_only: bool

    def documents(self, data: Any, what: str) -> list[Document]:
        """Every example of `data` as a document. Raises ValueError for an empty set and for the first example that cannot be used."""
        if isinstance(data, RandomTokens):
            documents = [self._checked(d, f"example {i}") for i, d in enumerate(self._random(data))]
        else:
            documents = [self._checked(self._document(example, where), where) for where, example in examples_of(data, what)]
        if not documents:
            raise ValueError(f"{what} must hold at least one example, got none from {_name(data)}. Add examples, or pass another file.")
        return documents

    def _random(self, data: RandomTokens) -> Iterator[Document]:
        if self.completion_only:
            raise ValueError("completion_only needs prompt/completion or messages examples, got RandomTokens. Set completion_only=False.")
        rng = generator("random tokens", data.seed)
        for _ in range(data.examples):
            ids = rng.integers(0, self.vocab_size, data.tokens).tolist()
            yield Document.of(ids, [True] * len(ids))

    def _document(self, example: Any, where: str) -> Document:
        if isinstance(example, Mapping):
            keys = [k for k in ("text", "completion", "messages") if k in example]
            if len(keys) != 1 or (keys == ["completion"] and "prompt" not in example):
                raise ValueError(f"{where}: an example must be exactly one of {SHAPES}, got the keys {sorted(map(str, example))}.")
            if keys == ["messages"]:
                return self._chat(example["messages"], where)
            for key in ("prompt", "completion") if keys == ["completion"] else ("text",):
                if not isinstance(example[key], str):
                    raise ValueError(f'{where}: "{key}" must be a string, got {example[key]!r}.')
            return self._completion(example, where) if keys == ["completion"] else self._text(example["text"], where)
        if isinstance(example, str) or not isinstance(example, Iterable):
            raise ValueError(f"{where}: an example must be {SHAPES}, or a sequence of token ids, got {example!r:.80}.")
        return self._token_ids(example, where)

    def _token_ids(self, example: Iterable[Any], where: str) -> Document:
        self._needs_completion(where, "token ids")
        ids = list(example)
        for token in ids:
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < self.vocab_size:
                raise ValueError(f"{where}: a token id must be an integer in 0..{self.vocab_size - 1} (the vocabulary), got {token!r}.")
        return Document.of([int(token) for token in ids], [True] * len(ids))

    def _text(self, text: str, where: str) -> Document:
        self._needs_completion(where, '{"text"}')
        ids = self._with_eos(self._tokenize(text, where))
        return Document.of(ids, [True] * len(ids))

    def _completion(self, example: Mapping[str, str], where: str) -> Document:
        # Apart, as at inference, where the prompt's tokens are fixed before the first completion token exists.
        prompt = self._tokenize(example["prompt"], where)
        completion = self._with_eos(self._tokenize(example["completion"], where, add_special_tokens=False))
        return Document.of(prompt + completion, [not self.completion_only] * len(prompt) + [True] * len(completion))

    def _chat(self, messages: Any, where: str) -> Document:
        if not isinstance(messages, Sequence) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError(f'{where}: "messages" must be a non-empty list of {{"role", "content"}} objects, got {messages!r:.80}.')
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(f'{where}: every message needs a string "role" and "content", got {dict(message)!r:.80}.')
        ids, is_target = [], []
        for piece, is_answer in self._turns(messages, where):
            tokens = self._tokenize(piece, where, add_special_tokens=False)
            ids += tokens
            is_target += [is_answer or not self.completion_only] * len(tokens)
        return Document.of(ids, is_target)

    def _turns(self, messages: Sequence[Mapping[str, str]], where: str) -> Iterator[tuple[str, bool]]:
        """The rendered conversation in pieces, each with whether an assistant wrote it."""
        full = self._render(messages, where)
        if not self.completion_only:
            yield full, True
            return
        position = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], where, add_generation_prompt=True)
            after = self._render(messages[: i + 1], where)
            if not (full.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{where}: completion_only needs a chat template that renders a turn the same whatever follows, but message {i} "
                    f"changes. Make one example per assistant turn, or give prompt and completion as text."
                )
            yield full[position : len(before)], False
            yield after[len(before) :], True
            position = len(after)
        yield full[position:], False

    def _render(self, messages: Sequence[Mapping[str, str]], where: str, add_generation_prompt: bool = False) -> str:
        if self.tokenizer is None:
            raise ValueError(self._no_tokenizer(where))
        template = getattr(self.tokenizer, "apply_chat_template", None)
        if template is None or getattr(self.tokenizer, "chat_template", "given") is None:
            raise ValueError(f"{where}: messages need a tokenizer with a chat template, got one without. Use prompt and completion.")
        return template([dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt)

    def _tokenize(self, text: str, where: str, **options: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(self._no_tokenizer(where))
        return list(self.tokenizer(text, **options)["input_ids"])

    def _no_tokenizer(self, where: str) -> str:
        return (
            f"{where}: text needs a tokenizer, got a model without one. "
            "Load a model directory that has tokenizer.json, or pass sequences of token ids as data."
        )

    def _with_eos(self, ids: list[int]) -> list[int]:
        if self.eos_token_id is None or (ids and ids[-1] == self.eos_token_id):
            return ids
        return [*ids, self.eos_token_id]

    def _needs_completion(self, where: str, got: str) -> None:
        if self.completion_only:
            raise ValueError(
                f"{where}: completion_only needs prompt/completion or messages examples, got {got}. Set completion_only=False."
            )

    def _checked(self, document: Document, where: str) -> Document:
        if len(document) > self.max_tokens:
            raise ValueError(
                f"{where}: an example may have at most max_tokens={self.max_tokens} tokens, got {len(document)}. "
                f"Raise the job's max_tokens, or cut the text."
            )
        if document.labelled == 0:
            raise ValueError(
                f"{where}: an example must have at least one token to learn (a token with a predecessor"
                f"{', in a completion' if self.completion_only else ''}), got {len(document)} tokens and none to learn. Remove it."
            )
        if max(document.token_ids) >= self.vocab_size:
            raise ValueError(
                f"{where}: token ids must be below the model's vocabulary of {self.vocab_size}, got {max(document.token_ids)}. "
                "Use the model's own tokenizer."
            )
        return document


def encoder_of(job: FinetuneJob, tokenizer: Callable[..., Any] | None, vocab_size: int, eos_token_id: int | None) -> Encoder:
    return Encoder(tokenizer, vocab_size, eos_token_id, job.max_tokens, job.completion_only)


def examples_of(data: Any, what: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, example) for each example of a JSONL file or a sequence."""
    if isinstance(data, str | Path):
        yield from _jsonl(Path(data))
        return
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"{what} must be a JSONL path, a sequence of examples, token-id sequences or RandomTokens, got {data!r:.80}. "
            "Put a single example in a list."
        )
    for index, example in enumerate(data):
        yield f"example {index}", example


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a JSONL file; blank lines hold no example. Raises FileNotFoundError, and ValueError with the line number."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data must name a JSONL file, got {str(path)!r}, which is not there. Pass its path, or a list of examples."
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                example = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{where}: every line must be one JSON object, got {line[:60]!r} ({error}). Write one object a line, in UTF-8."
                ) from error
            yield where, example


def _name(data: Any) -> str:
    return repr(str(data)) if isinstance(data, str | Path) else f"a {type(data).__name__}"
