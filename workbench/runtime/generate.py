"""Text in, text out, and likelihoods: the engine without a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.config import require
from workbench.core import Request, Sampling, Segment
from workbench.data import Document
from workbench.runtime.block_tables import BlockTables
from workbench.runtime.inputs import pack

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt became. `text` is None without a tokenizer; `finish_reason` is "stop" (end of sequence) or "length"."""

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str


def generate(
    engine: "Engine", prompts: Sequence[str | Sequence[int]], adapter: str | None, max_tokens: int, sampling: Mapping[str, Any]
) -> list[Completion]:
    """Complete `prompts` in one replay under FCFS; generation ends at the end-of-sequence token or at `max_tokens`."""
    from workbench.policies import FCFS
    from workbench.replay import replay

    require(max_tokens >= 1, "max_tokens must be at least 1", max_tokens)
    requests = [
        Request(
            request_id=f"prompt-{i}",
            arrival_s=0.0,
            prompt_tokens=1 if isinstance(prompt, str) else len(prompt),
            output_tokens=None,
            adapter=adapter,
            max_tokens=max_tokens,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else tuple(prompt),
            sampling=Sampling(**sampling),
        )
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.admissible(request)
    with engine.uncalibrated():
        result = replay(requests, executor=engine, policy=FCFS(), progress=False)
    completions = []
    for request in requests:
        ids = result.outputs[request.request_id]
        stopped = bool(ids) and ids[-1] in engine.info.eos_token_ids
        text = None if engine.tokenizer is None else engine.tokenizer.decode(ids, skip_special_tokens=True)
        completions.append(Completion(ids, text, "stop" if stopped else "length"))
    return completions


def nll(engine: "Engine", texts: Sequence[str] | Sequence[Sequence[int]], adapter: str | None) -> float:
    """Mean negative log-likelihood, nats a token, over all tokens of `texts` but each one's first.

    Raises ValueError for an empty text, RuntimeError while a replay is running.
    """
    with engine.lock:
        if engine.is_running:
            raise RuntimeError("nll needs the engine to be idle, got a running replay. Call it before or after.")
        documents = [_document(engine, text) for text in texts]
        require(len(documents) > 0, "texts must not be empty", 0)
        capacity = engine.info.activation_tokens
        longest = max(len(d.token_ids) for d in documents)
        require(longest <= capacity, f"a text must have at most activation_tokens = {capacity} tokens", longest, "Split the text.")
        total, count = 0.0, 0
        with engine.borrowed_entry(adapter) as entry:
            for group in _groups(documents, capacity):
                loss, labelled = _evaluate(engine, group, entry)
                total, count = total + loss, count + labelled
        return total / count


def _document(engine: "Engine", text: str | Sequence[int]) -> Document:
    if isinstance(text, str):
        require(engine.tokenizer is not None, "text needs a tokenizer", engine.name, "Pass token ids.")
        ids = tuple(engine.tokenizer(text)["input_ids"])
    else:
        ids = tuple(text)
    require(len(ids) >= 2, "a text must have at least 2 tokens (a label needs a successor)", len(ids))
    return Document(token_ids=ids, labels=(*ids[1:], None))


def _groups(documents: Sequence[Document], capacity: int) -> list[list[Document]]:
    groups: list[list[Document]] = [[]]
    for document in documents:
        if groups[-1] and sum(len(d.token_ids) for d in groups[-1]) + len(document.token_ids) > capacity:
            groups.append([])
        groups[-1].append(document)
    return groups


def _evaluate(engine: "Engine", documents: list[Document], entry: int | None) -> tuple[float, int]:
    from workbench.core import Batch

    runner = engine.runner
    engine.allocate_arena()
    lengths = tuple(len(d.token_ids) for d in documents)
    segment = Segment("evaluate", "nll", None, 0, 0, sum(lengths), micro_batch=0, rows=0, documents=lengths)
    step = pack(
        Batch(0, (segment,)),
        sequences={},
        slot_of={},
        tables=BlockTables(1, 1),
        documents_of=lambda s: documents,
        entry_of=lambda s: entry,
        scale_of=lambda s: 1.0,
        block_tokens=engine.config.block_tokens,
    )
    loss, labelled = runner.forward(step, {}).eval_losses["nll"]
    return float(loss), labelled
