"""Fine-tune data as an engine or a latency model consumes it, and the token ids of prompts. Torch-free.

A job's documents are packed once, its rows shuffled once per epoch, and a micro-batch is the next `batch_size` rows of that stream.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from workbench.checkpoint import readable
from workbench.config import FinetuneJob
from workbench.core import MicroBatch, Request
from workbench.examples import Document, encoder_of
from workbench.seeds import generator

PREFIX_TOKENS = 512  # tokens that one entry of `Request.prefix_ids` stands for: Mooncake's block size
JOB_FILE = "job.json"
DATA_FILE = "data.safetensors"
Row = tuple[Document, ...]


@dataclass(frozen=True)
class PreparedJob:
    """A job's data as rows of documents, and the order in which micro-batches visit them. Implements `core.JobShape`.

    `rows` and `evaluation_rows` hold the packed documents (one a row unless `pack`). With `epochs` the last micro-batch and the last
    window may be short; with `steps` every one is full and the data repeats. `first_micro_batch` is above 0 after a resume.
    """

    rows: tuple[Row, ...]
    evaluation_rows: tuple[Row, ...]
    batch_size: int
    accumulation: int
    seed: int
    steps: int | None
    epochs: int | None
    evaluate_every: int | None
    first_micro_batch: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)
    _micro_batches: dict[int, MicroBatch] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def num_rows(self) -> int:
        """Rows that the whole job trains on, over all epochs."""
        if self.steps is not None:
            return self.steps * self.accumulation * self.batch_size
        assert self.epochs is not None
        return self.epochs * len(self.rows)

    @cached_property
    def num_micro_batches(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def documents(self, index: int) -> list[Document]:
        """The documents of micro-batch `index`, in packed order. Raises IndexError beyond the job's end."""
        self._check(index)
        first = index * self.batch_size
        last = min(first + self.batch_size, self.num_rows)
        return [document for i in range(first, last) for document in self._row(i)]

    def evaluation_documents(self, index: int) -> list[Document]:
        """The documents of evaluation micro-batch `index`, in the order of the held-out data."""
        chosen = self.evaluation_rows[index * self.batch_size : (index + 1) * self.batch_size]
        if index < 0 or not chosen:
            raise IndexError(f"evaluation micro-batch must lie in 0..{len(self.evaluation()) - 1}, got {index}")
        return [document for row in chosen for document in row]

    def micro_batch(self, index: int) -> MicroBatch:
        """Sizes of micro-batch `index`: token count of each document, labelled tokens, and its window's labelled tokens."""
        self._check(index)
        if index not in self._micro_batches:
            start = index - index % self.accumulation
            window = range(start, min(start + self.accumulation, self.num_micro_batches))
            sizes = [self._sizes(i) for i in window]
            total = sum(labelled for _, labelled in sizes)
            for i, (documents, labelled) in zip(window, sizes, strict=True):
                self._micro_batches[i] = MicroBatch(documents, labelled, ends_window=i == window[-1], window_labelled=total)
        return self._micro_batches[index]

    def evaluation(self) -> Sequence[MicroBatch]:
        """The held-out set as micro-batches of `batch_size` rows; one window, normalised by all its labelled tokens."""
        return self._evaluation

    def evaluates_after(self, index: int) -> bool:
        """True at the end of a window whose optimiser step is a multiple of `evaluate_every`, and after the last micro-batch."""
        self._check(index)
        if not self.evaluation_rows or not self.micro_batch(index).ends_window:
            return False
        step = index // self.accumulation + 1
        return index == self.num_micro_batches - 1 or (self.evaluate_every is not None and step % self.evaluate_every == 0)

    @cached_property
    def _evaluation(self) -> tuple[MicroBatch, ...]:
        count = -(-len(self.evaluation_rows) // self.batch_size)
        batches = [self.evaluation_documents(i) for i in range(count)]
        total = sum(d.labelled for documents in batches for d in documents)
        return tuple(
            MicroBatch(tuple(len(d) for d in documents), sum(d.labelled for d in documents), i == count - 1, total)
            for i, documents in enumerate(batches)
        )

    @cached_property
    def _row_sizes(self) -> list[tuple[tuple[int, ...], int]]:
        """(token counts, labelled tokens) of each row."""
        return [(tuple(len(d) for d in row), sum(d.labelled for d in row)) for row in self.rows]

    def _sizes(self, index: int) -> tuple[tuple[int, ...], int]:
        sizes, first = self._row_sizes, index * self.batch_size
        chosen = [sizes[self._position(i)] for i in range(first, min(first + self.batch_size, self.num_rows))]
        return tuple([length for lengths, _ in chosen for length in lengths]), sum([labelled for _, labelled in chosen])

    def _row(self, index: int) -> Row:
        return self.rows[self._position(index)]

    def _position(self, index: int) -> int:
        """Which row stands at place `index` of the stream of epochs."""
        epoch, place = divmod(index, len(self.rows))
        if epoch not in self._orders:
            self._orders[epoch] = generator("epoch", self.seed, epoch).permutation(len(self.rows)).tolist()
        return self._orders[epoch][place]

    def _check(self, index: int) -> None:
        if not 0 <= index < self.num_micro_batches:
            raise IndexError(f"micro-batch must lie in 0..{self.num_micro_batches - 1}, got {index}")


def prepare(
    job: FinetuneJob, *, tokenizer: Callable[..., Any] | None = None, vocab_size: int, eos_token_id: int | None = None
) -> PreparedJob:
    """The job's data as token ids, ready to train on; a job from a checkpoint reads them there.

    Text ends with `eos_token_id` (chat messages end as their template ends them). Raises ValueError for empty data, text without a
    tokenizer, and the first example that cannot be used (too long, malformed, nothing to learn), naming it; FileNotFoundError.
    """
    if job.checkpoint is not None:
        documents, held_out, done = _load(job.checkpoint, vocab_size)
    else:
        encoder = encoder_of(job, tokenizer, vocab_size, eos_token_id)
        documents = encoder.documents(job.data, "data")
        held_out = encoder.documents(job.evaluation, "evaluation") if job.evaluation is not None else []
        done = 0
    rows = _packed if job.pack else _one_a_row
    prepared = PreparedJob(
        rows=rows(documents, job.max_tokens),
        evaluation_rows=rows(held_out, job.max_tokens),
        batch_size=job.batch_size,
        accumulation=job.accumulation,
        seed=job.seed,
        steps=job.steps,
        epochs=job.epochs,
        evaluate_every=job.evaluate_every,
        first_micro_batch=done,
    )
    if done > prepared.num_micro_batches:
        raise ValueError(f"micro_batches_done must be at most {prepared.num_micro_batches} (the job's length), got {done}. Raise steps.")
    return prepared


def _one_a_row(documents: Sequence[Document], max_tokens: int) -> tuple[Row, ...]:
    return tuple((document,) for document in documents)


def _packed(documents: Sequence[Document], max_tokens: int) -> tuple[Row, ...]:
    """Documents in their own order, each row filled until the next one does not fit in `max_tokens`."""
    rows: list[list[Document]] = []
    room = 0
    for document in documents:
        if not rows or len(document) > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(document)
        room -= len(document)
    return tuple(tuple(row) for row in rows)


def save_prepared(folder: str | Path, job: FinetuneJob, prepared: PreparedJob, *, micro_batches_done: int | None = None) -> None:
    """Write the job and its token ids into `folder` (`job.json`, `data.safetensors`), so that it resumes without its original files.

    `micro_batches_done` counts committed micro-batches; None keeps where `prepared` began.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, rows in (("train", prepared.rows), ("evaluation", prepared.evaluation_rows)):
        documents = [document for row in rows for document in row]
        tensors[f"{name}.lengths"] = np.array([len(d) for d in documents], dtype=np.int64)
        tensors[f"{name}.token_ids"] = np.array([t for d in documents for t in d.token_ids], dtype=np.int64)
        tensors[f"{name}.has_label"] = np.array([label is not None for d in documents for label in d.labels], dtype=np.uint8)
    save_file(tensors, folder / DATA_FILE)
    values = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.name not in ("data", "evaluation", "checkpoint")}
    done = prepared.first_micro_batch if micro_batches_done is None else micro_batches_done
    record = {"format": 1, "micro_batches_done": done, "has_evaluation": bool(prepared.evaluation_rows), "job": values}
    (folder / JOB_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def job_from_checkpoint(folder: str | Path) -> FinetuneJob:
    """The job that `save_prepared` wrote, with `checkpoint=folder`. Raises FileNotFoundError without one, ValueError for a damaged one."""
    folder = Path(folder)
    record = _record(folder)
    known = {f.name for f in dataclasses.fields(FinetuneJob)}
    for name in record["job"]:
        if name not in known:
            raise ValueError(
                f"{folder / JOB_FILE}: a field must be one of FinetuneJob's, got {name!r}. Read it with the version that wrote it."
            )
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record["job"].items()}
    data = folder / DATA_FILE
    return FinetuneJob(**values, data=data, evaluation=data if record["has_evaluation"] else None, checkpoint=folder)


def _record(folder: Path) -> dict[str, Any]:
    path = readable(folder) / JOB_FILE
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint folder must hold {JOB_FILE}, got {str(folder)!r}. Pass the folder given to checkpoint().")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1 or record["micro_batches_done"] < 0 or not isinstance(record["job"], dict):
            raise ValueError(f"format {record['format']}, micro_batches_done {record['micro_batches_done']}")
        record["has_evaluation"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be a job record of format 1, got {error}. Write the checkpoint again.") from error
    return record


def _load(folder: Path, vocab_size: int) -> tuple[list[Document], list[Document], int]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    done = _record(folder)["micro_batches_done"]
    path = readable(folder) / DATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint folder must hold {DATA_FILE}, got {str(folder)!r}. Pass the folder given to checkpoint().")
    try:
        tensors = load_file(path)
        sets = [_documents(tensors, name) for name in ("train", "evaluation")]
    except (SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: must hold a checkpoint's documents, got {error}. Write the checkpoint again.") from error
    largest = max((int(tensors[f"{name}.token_ids"].max(initial=0)) for name in ("train", "evaluation")), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: token ids must be below the model's vocabulary of {vocab_size}, got {largest}. Load the model it was for."
        )
    return sets[0], sets[1], done


def _documents(tensors: dict[str, np.ndarray], name: str) -> list[Document]:
    ends = np.cumsum(tensors[f"{name}.lengths"])
    documents = []
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False):
        ids = tensors[f"{name}.token_ids"][start:end].tolist()
        has_label = tensors[f"{name}.has_label"][start:end].tolist()
        documents.append(Document.of(ids, [False, *map(bool, has_label[:-1])]))
    return documents


def prompt_token_ids(request: Request, *, vocab_size: int, tokenizer: Callable[..., Any] | None = None) -> tuple[int, ...]:
    """The prompt's token ids: as given, or its text tokenised, or else `prompt_tokens` ids that depend on `request_id` alone.

    Drawn ids lie in [min(1000, vocab_size // 2), vocab_size), above where special tokens usually are. Equal entries of `prefix_ids`
    give equal runs of `PREFIX_TOKENS` leading tokens. Raises ValueError for text without a tokenizer and for ids beyond the vocabulary.
    """
    if request.prompt_token_ids is not None:
        for token in request.prompt_token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{request.request_id}: prompt token ids must lie in 0..{vocab_size - 1} (the vocabulary), got {token}.")
        return tuple(request.prompt_token_ids)
    if request.prompt is not None:
        if tokenizer is None:
            raise ValueError(
                f"{request.request_id}: a text prompt needs a tokenizer, got a model without one. "
                "Load a model directory that has tokenizer.json, or give prompt_token_ids."
            )
        return tuple(tokenizer(request.prompt)["input_ids"])
    low = min(1000, vocab_size // 2)
    needed = -(-request.prompt_tokens // PREFIX_TOKENS)
    parts = [generator("prefix", prefix).integers(low, vocab_size, PREFIX_TOKENS) for prefix in request.prefix_ids[:needed]]
    rest = request.prompt_tokens - PREFIX_TOKENS * len(parts)
    if rest > 0:
        parts.append(generator("prompt", request.request_id).integers(low, vocab_size, rest))
    return tuple(np.concatenate(parts)[: request.prompt_tokens].tolist()) if parts else ()
