"""CUDA graphs of mixed steps: everything from the embedding to the logits is one launch, whatever rows the step packs.

A graph is recorded for a bucket of tokens, of sequences and of documents, for steps with and without prompts, and with and without rows
that a backward will need. Which row belongs to whom, where its keys and values lie and which adapter it has is read from one staged
buffer that all graphs share; padding rows write to a KV block of nobody's, padding sequences and documents have no rows. A host that is
interrupted between two launches of a step stretches the step; a host that launches once does not.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels.layout import SegmentLayout, Tile, few_tiles, tile_height
from workbench.runtime.inputs import TOKEN_BUCKETS, Documents, PackedStep, StepInputs, padded_tiles, token_bucket
from workbench.runtime.recording import Recorder, Replayable
from workbench.runtime.staging import Staging

if TYPE_CHECKING:
    from workbench.runtime.forward import Runner

FEW_SEQUENCES = 32
TAIL_TOKENS = 1536  # on an H100, adapters in the weights' tails lose a millisecond at 1,024 rows and gain three at 2,048
FEW_DOCUMENTS = 8


@dataclass(frozen=True, slots=True)
class MixedKey:
    """What a recorded step depends on: its buckets (0 documents: no fine-tune or evaluate rows), whether some sequence may have several
    rows, whether rows are kept for a backward, and the adapter table's `facts` (None: no row has an adapter).
    """

    tokens: int
    sequences: int
    documents: int
    prefills: bool
    keeps: bool
    tiles: int
    facts: tuple[tuple[bool, int, int], ...] | None


@dataclass(frozen=True, slots=True)
class MixedOutput:
    """What a recorded step leaves until the next one: the last layer's output behind the final norm [T, H], logits [samples, V] and their
    argmax [samples], and the staged `labelled` rows and `labels`, in the order of the step's spans.
    """

    hidden: Tensor
    logits: Tensor
    greedy: Tensor
    labelled: Tensor
    labels: Tensor


def sequence_bucket(sequences: int, max_requests: int) -> int:
    """0, few, or as many as there may be."""
    return next(bucket for bucket in (0, min(FEW_SEQUENCES, max_requests), max_requests) if bucket >= sequences)


def document_bucket(documents: int) -> int:
    """0, or the least power of 8 that holds so many."""
    bucket = FEW_DOCUMENTS if documents else 0
    while bucket < documents:
        bucket *= 8
    return bucket


class MixedGraphs:
    """Records a step at the first batch of its kind and replays it from then on."""

    def __init__(self, runner: "Runner", max_tokens: int, max_requests: int, max_model_len: int) -> None:
        dims, device, dtype, pool = runner.fused.dims, runner.device, runner.fused.embed.dtype, runner.pool
        self.runner, self.max_tokens, self.max_requests, self.max_model_len = runner, max_tokens, max_requests, max_model_len
        self.recorded: dict[MixedKey, Replayable] = {}
        self.recorder = Recorder(device)
        fields = mixed_fields(max_tokens, max_requests, -(-max_model_len // pool.block_tokens))
        if runner.tails is not None:
            fields["chosen"] = (runner.tails.shape, torch.int32)
        self.staging = Staging(fields, device)
        self.hidden = torch.zeros((max_tokens, dims.hidden), device=device, dtype=dtype)
        self.logits = torch.zeros((max_requests, dims.vocab_size), device=device, dtype=dtype)
        self.greedy = torch.zeros(max_requests, device=device, dtype=torch.int64)

    def run(self, step: PackedStep) -> MixedOutput | None:
        """The step's outputs; None where no graph can run it: more tokens or sequences than a step may have, and fp32 fine-tune rows, whose
        attention reads the documents' bounds on the host.
        """
        bucket = token_bucket(step.num_tokens, self.max_tokens)
        reads_on_host = bool(step.train) and self.hidden.dtype == torch.float32 and self.recorder.device.type == "cuda"
        if bucket is None or len(step.queries) > self.max_requests or reads_on_host:
            return None
        tiles, _, num_tiles = padded_tiles(step.entries, bucket)
        key = self.key(step, bucket, num_tiles)
        recorded = self._find(key)
        write_step(self.staging.host, step, tiles, bucket, self.runner.pool.num_blocks * self.runner.pool.block_tokens)
        if self._uses_tails(key):
            self.staging.host["chosen"][:] = self._chosen(step)
        self.staging.upload()
        recorded.replay()
        there, samples, labels = self.staging.device, len(step.samples), sum(len(span.labels) for span in step.train)
        outputs = (self.hidden[: step.num_tokens], self.logits[:samples], self.greedy[:samples])
        return MixedOutput(*outputs, there["labelled"][:labels], there["labels"][:labels])

    def key(self, step: PackedStep, bucket: int, num_tiles: int) -> MixedKey:
        """The graph that runs a step of this bucket."""
        return MixedKey(
            tokens=bucket,
            sequences=sequence_bucket(len(step.queries), self.max_requests),
            documents=document_bucket(sum(len(span.queries) for span in step.train)),
            # decodes have graphs of their own: none are recorded here for the last tokens of prompts alone
            prefills=max(step.queries, default=0) > 1 or not step.train,
            keeps=step.keeps,
            tiles=num_tiles,
            facts=self.runner.table.facts if step.slots else None,
        )

    def _uses_tails(self, key: MixedKey) -> bool:
        # rows that are kept get the widest adapters within SwiGLU: tails gain nothing there
        return self.runner.tails is not None and key.facts is not None and not key.keeps and key.tokens >= TAIL_TOKENS

    def _chosen(self, step: PackedStep) -> np.ndarray:
        """Whose adapters go into the weights' tails."""
        rows: Counter[int] = Counter()
        for entry, count in step.entries:
            if entry is not None:
                rows[entry] += count
        assert self.runner.tails is not None
        return self.runner.tails.choose(rows, self.runner.table.largest_rank)

    def recordings(self, *, has_adapters: bool, trains: bool) -> list[Callable[[], object]]:
        """What records every bucket for steps of few runs of one adapter and few documents, one call each, so that no step pays for it."""
        facts = self.runner.table.facts if has_adapters else None
        sequences = sorted({sequence_bucket(n, self.max_requests) for n in (0, 1, self.max_requests)})
        kinds = [(0, True, n, fewer) for fewer, n in pairwise(sequences)]  # documents, prefills, sequences, and the bucket below those
        if trains:
            kinds += [(FEW_DOCUMENTS, prefills, n, fewer) for fewer, n in pairwise(sequences) for prefills in (False, True)]
            kinds.append((FEW_DOCUMENTS, False, 0, 0))
        buckets = (*(b for b in TOKEN_BUCKETS if b < self.max_tokens), self.max_tokens)
        return [
            partial(self._find, MixedKey(bucket, n, documents, prefills, documents > 0, few_tiles(bucket), facts))
            for bucket in buckets
            for documents, prefills, n, fewer in kinds
            if bucket > fewer
        ]

    def _find(self, key: MixedKey) -> Replayable:
        if key not in self.recorded:
            self.recorded[key] = self._record(key)
        return self.recorded[key]

    def _record(self, key: MixedKey) -> Replayable:
        run = partial(self._forward, key, self._inputs(key))
        write_step(self.staging.host, PackedStep(), [], key.tokens, self.runner.pool.num_blocks * self.runner.pool.block_tokens)
        if self._uses_tails(key):
            self.staging.host["chosen"][:] = -1
        self.staging.upload()  # padding rows alone: they leave no trace
        self.recorder.warm_up(run)
        return self.recorder.record(run)

    @torch.no_grad()
    def _forward(self, key: MixedKey, inputs: StepInputs) -> None:
        if inputs.chosen is not None:
            assert self.runner.tails is not None
            self.runner.tails.fill_(inputs.chosen)
        self.hidden[: key.tokens] = self.runner.layers(inputs)
        if key.sequences:
            logits = self.logits[: key.sequences]
            torch.mm(self.hidden[inputs.samples], self.runner.fused.lm_head.T, out=logits)
            torch.argmax(logits, dim=-1, out=self.greedy[: key.sequences])

    def _inputs(self, key: MixedKey) -> StepInputs:
        """Inputs that read the staged arrays."""
        there, tokens, n = self.staging.device, key.tokens, key.sequences
        layout = SegmentLayout.build(
            [(None if key.facts is None else 0, tokens)], self.recorder.device, block_rows=tile_height(tokens), num_tiles=key.tiles
        )
        documents = None
        if key.documents:
            bounds = (there["document_bounds"][: key.documents + 1], there["key_starts"][: key.documents + 1])
            documents = Documents(*bounds, there["key_lens"][: key.documents], max_q=tokens, max_k=self.runner.arena_rows)
        return StepInputs(
            token_ids=there["token_ids"][:tokens],
            positions=there["positions"][:tokens],
            places=there["places"][:tokens],
            layout=replace(layout, tiles=there["tiles"][: key.tiles]),
            documents=documents,
            keeps=key.keeps,
            block_tables=there["block_tables"][:n],
            cu_seqlens_q=there["cu_seqlens_q"][: n + 1],
            context_lens=there["context_lens"][:n],
            max_seqlen_q=tokens if key.prefills else 1,
            max_context=self.max_model_len,
            samples=there["samples"][:n],
            chosen=there["chosen"] if self._uses_tails(key) else None,
        )


def mixed_fields(tokens: int, sequences: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a step of at most `tokens` rows of at most `sequences` sequences with at most `width` blocks each stages."""
    rows = {name: ((tokens,), torch.int64) for name in ("token_ids", "positions", "places", "labelled", "labels")}
    bounds = {name: ((document_bucket(tokens) + 1,), torch.int32) for name in ("document_bounds", "key_starts", "key_lens")}
    return (
        rows
        | bounds
        | {
            "samples": ((sequences,), torch.int64),
            "context_lens": ((sequences,), torch.int32),
            "cu_seqlens_q": ((sequences + 1,), torch.int32),
            "tiles": ((tokens, 4), torch.int32),
            "block_tables": ((sequences, width), torch.int32),
        }
    )


def write_step(host: Mapping[str, np.ndarray], step: PackedStep, tiles: list[Tile], bucket: int, nowhere: int) -> None:
    """Stage a step's rows and tiles, padded to `bucket` rows: token 0 at position 0, whose key and value go to the place `nowhere`."""

    def put(name: str, values: object, count: int, padding: int, end: int | None = None) -> None:
        host[name][:count] = values
        host[name][count:end] = padding

    rows = step.num_tokens
    put("token_ids", step.token_ids, rows, 0, bucket)
    put("positions", step.positions, rows, 0, bucket)
    put("places", step.places, rows, nowhere, bucket)
    if tiles:
        host["tiles"][: len(tiles)] = tiles
    host["tiles"][len(tiles) :] = 0
    for name, values in (
        ("labelled", [row for span in step.train for row in span.labelled]),
        ("labels", [label for span in step.train for label in span.labels]),
    ):
        host[name][: len(values)] = values
    queries = [n for span in step.train for n in span.queries]
    num_train = step.num_train_rows
    put("document_bounds", list(accumulate(queries, initial=0)), len(queries) + 1, num_train)
    put("key_starts", [n for span in step.train for n in span.key_starts], len(queries), 0)
    put("key_lens", [n for span in step.train for n in span.keys], len(queries), 0)
    put("cu_seqlens_q", list(accumulate(step.queries, initial=num_train)), len(step.queries) + 1, rows)
    put("context_lens", step.contexts, len(step.contexts), 0)
    put("samples", step.samples, len(step.samples), 0)
    host["block_tables"][: len(step.tables), : step.tables.shape[1]] = step.tables
