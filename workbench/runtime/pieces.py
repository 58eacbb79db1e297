"""CUDA graphs of mixed steps: everything between two attentions is one launch, attention itself is launched as it comes.

A step of T rows runs in buffers of the least bucket that holds T. Attention depends on who attends to whom, so it stays outside; what
lies between depends on the rows' number alone: their tokens, positions, places and adapters are read from buffers. The idea is vLLM's
piecewise CUDA graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.layout import SegmentLayout
from workbench.runtime.inputs import TOKEN_BUCKETS, LayerRows, StepInputs, padded_layout

if TYPE_CHECKING:
    from workbench.runtime.forward import Runner


@dataclass(frozen=True, slots=True)
class PieceKey:
    """What recorded pieces depend on. `facts` are the adapter table's, or None where no row has an adapter."""

    tokens: int
    block_rows: int
    tiles: int
    trains: bool
    keeps: bool
    facts: tuple[tuple[bool, int, int], ...] | None


@dataclass(slots=True)
class _Recorded:
    graphs: list[torch.cuda.CUDAGraph]
    rows: LayerRows


class PieceGraphs:
    """Records the pieces of a step's layers at the first step of their kind and replays them from then on. Not used outside CUDA."""

    def __init__(self, runner: "Runner", max_tokens: int) -> None:
        dims, device, dtype = runner.fused.dims, runner.device, runner.fused.embed.dtype
        self.runner, self.max_tokens = runner, max_tokens
        self.recorded: dict[PieceKey, _Recorded] = {}
        self.memory = None
        self.x = torch.zeros((max_tokens, dims.hidden), device=device, dtype=dtype)
        self.qkv = torch.zeros((max_tokens, (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim), device=device, dtype=dtype)
        self.o = torch.zeros((max_tokens, dims.num_heads, dims.head_dim), device=device, dtype=dtype)
        self.h = torch.zeros((max_tokens, dims.hidden), device=device, dtype=dtype)

    def layers(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """The last layer's output [T, H] and its norm, of a step whose layout was padded by `padded_layout`; valid until the next step."""
        tokens, dims = inputs.num_tokens, self.runner.fused.dims
        found = self._find(self.key(inputs))
        rows, pool = found.rows, self.runner.pool
        for into, values, padding in (
            (rows.token_ids, inputs.token_ids, 0),
            (rows.positions, inputs.positions, 0),
            (rows.places, inputs.places, pool.num_blocks * pool.block_tokens),
        ):
            into[:tokens] = values
            into[tokens:] = padding
        rows.layout.copy_(inputs.layout)
        attend = self.runner.attention(inputs)
        q = self.qkv[:tokens].view(tokens, -1, dims.head_dim)[:, : dims.num_heads]
        found.graphs[0].replay()
        for layer in range(dims.num_layers):
            with self.runner.parts("attention"):
                attend(layer, q, self.o[:tokens])
            found.graphs[layer + 1].replay()
        return self.x[:tokens], self.h[:tokens]

    def key(self, inputs: StepInputs) -> PieceKey:
        """The pieces that a step runs through."""
        layout = inputs.layout
        facts = self.runner.table.facts if layout.runs else None
        return PieceKey(layout.num_rows, layout.block_rows, layout.num_tiles, bool(inputs.num_train_rows), inputs.keeps, facts)

    def recordings(self, *, has_adapters: bool, keeps: bool) -> list[Callable[[], object]]:
        """What records every bucket for steps of few runs, one call each, so that no step pays for it."""
        device, buckets = self.runner.device, [b for b in TOKEN_BUCKETS if b < self.max_tokens]
        calls: list[Callable[[], object]] = []
        for bucket in (*buckets, self.max_tokens):
            layout = padded_layout([(0 if has_adapters else None, bucket)], bucket, device)
            facts = self.runner.table.facts if has_adapters else None
            for trains in (False, True)[: 1 + keeps]:
                calls.append(partial(self._find, PieceKey(bucket, layout.block_rows, layout.num_tiles, trains, trains, facts)))
        return calls

    def _find(self, key: PieceKey) -> _Recorded:
        if key not in self.recorded:
            self.recorded[key] = self._record(key)
        return self.recorded[key]

    @torch.no_grad()
    def _record(self, key: PieceKey) -> _Recorded:
        pool, device, layers = self.runner.pool, self.runner.device, self.runner.fused.dims.num_layers
        ids = torch.zeros(key.tokens, dtype=torch.int64, device=device)
        entry = None if key.facts is None else 0
        layout = SegmentLayout.build([(entry, key.tokens)], device, block_rows=key.block_rows, num_tiles=key.tiles)
        layout = replace(layout, tiles=layout.tiles.clone())
        nobodys = torch.full_like(ids, pool.num_blocks * pool.block_tokens)
        rows = LayerRows(ids, torch.zeros_like(ids), nobodys, layout, key.trains, key.keeps)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles what is not compiled yet; padding rows leave no trace
            for piece in range(layers + 1):
                self._piece(piece, rows)
        torch.cuda.current_stream(device).wait_stream(stream)
        graphs: list[torch.cuda.CUDAGraph] = []
        for piece in range(layers + 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.memory):
                self._piece(piece, rows)
            self.memory = self.memory or graph.pool()
            graphs.append(graph)
        return _Recorded(graphs, rows)

    def _piece(self, piece: int, rows: LayerRows) -> None:
        """From one attention to the next; from the embedding to the first, and from the last to the final norm."""
        runner, tokens = self.runner, rows.token_ids.shape[0]
        x = self.x[:tokens]
        if piece == 0:
            embedded, h = runner.embed(rows)
            x.copy_(embedded)
        else:
            h = runner.after_attention(piece - 1, x, self.o[:tokens], rows)
        if piece < runner.fused.dims.num_layers:
            runner.before_attention(piece, x, h, rows, out=self.qkv[:tokens])
        else:
            runner.keep_last(x, rows)
            self.h[:tokens] = h
