"""CUDA graphs of decode steps: one launch for a batch of decode rows, whatever its adapters.

A graph holds grids and pointers, so each is recorded for a bucket of rows and of context length, and for batches with and without
adapters apart. Inputs are copied into buffers that the graph reads; adapters change in the device table that it reads; padding rows
write to a KV block of nobody's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.runtime.inputs import StepInputs, decode_layout

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CONTEXT_BUCKETS = (512, 2048, 8192, 32768)
Key = tuple[int, int, tuple[tuple[bool, int, int], ...] | None]


def row_bucket(rows: int) -> int | None:
    """The least recorded number of rows that holds `rows`; None beyond the largest."""
    return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), None)


def context_bucket(context: int, max_model_len: int) -> int:
    """The least of CONTEXT_BUCKETS that holds `context`, or else the model's own context: it bounds how far a graph splits its keys."""
    return min(next((bucket for bucket in CONTEXT_BUCKETS if bucket >= context), max_model_len), max_model_len)


@dataclass(slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    logits: Tensor


class DecodeGraphs:
    """Records a graph at the first batch of its kind and replays it from then on. Not used outside CUDA."""

    def __init__(self, runner, max_model_len: int) -> None:
        self.runner, self.max_model_len = runner, max_model_len
        self.recorded: dict[Key, _Recorded] = {}
        self.memory = None

    def logits(self, inputs: StepInputs) -> Tensor:
        """The logits [rows, V] of a batch of decode rows, whose layout was padded to `row_bucket(rows)`."""
        rows = inputs.num_tokens
        bucket = row_bucket(rows)
        assert bucket is not None and inputs.layout.num_rows == bucket
        found = self._find(bucket, context_bucket(inputs.max_context, self.max_model_len), bool(inputs.layout.runs))
        self._copy(found.inputs, inputs)
        found.graph.replay()
        return found.logits[:rows]

    def warm_up(self, max_rows: int, *, has_adapters: bool) -> int:
        """Record every bucket up to `max_rows` now, so that no step pays for it; the number of graphs that there are then."""
        largest = row_bucket(min(max_rows, ROW_BUCKETS[-1]))
        contexts = {context_bucket(bucket, self.max_model_len) for bucket in (*CONTEXT_BUCKETS, self.max_model_len)}
        for bucket in (b for b in ROW_BUCKETS if largest is not None and b <= largest):
            for context in sorted(contexts):
                for with_adapters in (False, True)[: 1 + has_adapters]:
                    self._find(bucket, context, with_adapters)
        return len(self.recorded)

    def _find(self, bucket: int, context: int, has_adapters: bool) -> _Recorded:
        key = self.key(bucket, context, has_adapters)
        if key not in self.recorded:
            self.recorded[key] = self._record(bucket, context, has_adapters)
        return self.recorded[key]

    def key(self, bucket: int, context: int, has_adapters: bool) -> Key:
        """What a recorded graph depends on: another key needs another graph."""
        # A recorded layer launches nothing where no adapter has weights, and is specialised on what the table's ranks have in common;
        # both may differ from layer to layer.
        tables = (table for layer in self.runner.table.tables for table in layer.values())
        return bucket, context, tuple(t.facts for t in tables) if has_adapters else None

    def _empty(self, bucket: int, context: int, has_adapters: bool) -> StepInputs:
        """Inputs of padding rows alone: token 0 at position 0, one key, in the block that is nobody's."""
        device, pool = self.runner.device, self.runner.pool
        width = -(-context // pool.block_tokens)
        long = {"dtype": torch.int64, "device": device}
        short = {"dtype": torch.int32, "device": device}
        return StepInputs(
            token_ids=torch.zeros(bucket, **long),
            positions=torch.zeros(bucket, **long),
            layout=decode_layout([(0, bucket)] if has_adapters else [(None, bucket)], bucket, device),
            train=[],
            num_train_rows=0,
            places=torch.full((bucket,), pool.num_blocks * pool.block_tokens, **long),
            block_tables=torch.full((bucket, width), pool.num_blocks, **short),
            cu_seqlens_q=torch.arange(bucket + 1, **short),
            context_lens=torch.ones(bucket, **short),
            max_seqlen_q=1,
            max_context=context,
            samples=torch.arange(bucket, **long),
            sampled=[],
        )

    def _copy(self, into: StepInputs, inputs: StepInputs) -> None:
        """Put a batch into the graph's buffers, padding rows behind it."""
        rows, width = inputs.num_tokens, min(inputs.block_tables.shape[1], into.block_tables.shape[1])
        pool = self.runner.pool
        for name, padding in (
            ("token_ids", 0),
            ("positions", 0),
            ("places", pool.num_blocks * pool.block_tokens),
            ("context_lens", 1),
        ):
            buffer = getattr(into, name)
            buffer[:rows] = getattr(inputs, name)
            buffer[rows:] = padding
        into.block_tables[:rows, :width] = inputs.block_tables[:, :width]
        into.block_tables[rows:] = pool.num_blocks
        into.layout.copy_(inputs.layout)

    def _record(self, bucket: int, context: int, has_adapters: bool) -> _Recorded:
        inputs = self._empty(bucket, context, has_adapters)
        stream = torch.cuda.Stream(self.runner.device)
        stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(stream):  # compiles what is not compiled yet; padding rows leave no trace
            for _ in range(2):
                self.runner.forward(inputs, {})
        torch.cuda.current_stream(self.runner.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            logits = self.runner.forward(inputs, {}).logits
        self.memory = self.memory or graph.pool()
        return _Recorded(graph, inputs, logits)
