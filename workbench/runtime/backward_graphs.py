"""CUDA graphs of the backward: one launch a layer, for micro-batches padded to a bucket.

Rows beyond the micro-batch hold whatever the arena holds there. Nothing reduces over them: attention ends at the documents' bounds,
weight gradients at the layout's rows, and everything else treats each row alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels.layout import SegmentLayout
from workbench.runtime.backward import BackwardPass, top_gradient
from workbench.runtime.finetune import TrainState
from workbench.runtime.inputs import TrainSpan, token_bucket
from workbench.runtime.kv_cache import Arena
from workbench.runtime.recording import Recorder, Replayable
from workbench.runtime.slots import AdapterTable
from workbench.runtime.weights import FusedWeights

LONGEST = 16_384  # tokens of a micro-batch that graphs are recorded for


@dataclass(frozen=True, slots=True)
class BackwardKey:
    """What the recorded layers of a micro-batch depend on."""

    tokens: int
    documents: int
    arena: int
    rank: int
    targets: tuple[str, ...]
    facts: tuple[tuple[bool, int, int], ...]


@dataclass(slots=True)
class _Kind:
    """The layers of one key: they read the angles, the documents' bounds and the layout; layer i reads grads[i % 2] [tokens, H], and writes
    the other one and what `found` names.
    """

    cos: Tensor
    sin: Tensor
    bounds: Tensor
    layout: SegmentLayout
    grads: tuple[Tensor, Tensor]
    graphs: dict[int, Replayable] = field(default_factory=dict)
    found: dict[int, dict[int, Tensor]] = field(default_factory=dict)


class RecordedPass:
    """The backward of one micro-batch through recorded layers; the same calls as `BackwardPass`.

    Between two slices the gradient stays where the graph left it. A slice of one layer writes elsewhere, so that it can be done again if
    its step fails; before a longer one the gradient is copied to the arena.
    """

    def __init__(self, fused: FusedWeights, kind: _Kind, span: TrainSpan) -> None:
        self.fused, self.kind, self.span = fused, kind, span
        self._held: int | None = None  # layers left below the gradient that the graphs' own buffer holds

    def top(self, arena: Arena) -> Tensor:
        """d loss / d (output of the last layer) [T, H]."""
        self._held = None
        return top_gradient(self.fused, arena, self.span)

    def resume(self, layers_left: int, num_layers: int, arena: Arena) -> Tensor:
        """As `BackwardPass.resume`."""
        kept = arena.grad[self.span.arena : self.span.arena + self.span.tokens]
        if self._held != layers_left:
            return kept
        grad = self._input(layers_left - 1)
        if num_layers > 1:
            kept.copy_(grad)
            self._held = None
        return grad

    def keep(self, layers_left: int, grad: Tensor, arena: Arena) -> None:
        """As `BackwardPass.keep`."""
        self._held = layers_left

    def _input(self, index: int) -> Tensor:
        return self.kind.grads[index % 2][: self.span.tokens]

    def layer(self, index: int, arena: Arena, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """d loss / d (input of layer `index`) [T, H] (None at layer 0), and fp32 gradients by parameter.

        The gradients are valid until a micro-batch at the same arena rows comes to this layer: by then this one has been committed or
        given up.
        """
        here = self._input(index)
        if grad.data_ptr() != here.data_ptr():
            here.copy_(grad)
        self.kind.graphs[index].replay()
        return self._input(index - 1) if index else None, self.kind.found[index]


class BackwardGraphs:
    """Records the layers of a kind of micro-batch at its first backward, or before. Not used outside CUDA."""

    def __init__(self, fused: FusedWeights, table: AdapterTable, cos: Tensor, sin: Tensor) -> None:
        """cos and sin [positions, D]."""
        self.fused, self.table, self.cos, self.sin = fused, table, cos, sin
        self.recorded: dict[BackwardKey, _Kind] = {}
        self.recorder = Recorder(cos.device)
        # By (arena row, rank, targets). What a graph allocates while it is recorded is overwritten by other graphs of the same memory.
        self._gradients: dict[tuple[int, int, tuple[str, ...]], list[Tensor]] = {}

    def begin(self, state: TrainState, span: TrainSpan, bounds: Tensor, positions: Tensor, arena: Arena) -> RecordedPass | None:
        """The backward of a micro-batch whose forward is complete; None where no graph can run it. `bounds` as for `BackwardPass`."""
        key = self.key(state, span.tokens, len(span.queries), span.arena, arena)
        if key is None:
            return None
        kind = self._find(key, state, arena)
        kind.cos[: span.tokens], kind.sin[: span.tokens] = self.cos[positions], self.sin[positions]
        kind.bounds[: bounds.shape[0]] = bounds
        kind.bounds[bounds.shape[0] :] = span.tokens
        kind.layout.resize_(state.entry, span.tokens)
        return RecordedPass(self.fused, kind, span)

    def recordings(self, state: TrainState, arena: Arena) -> list[Callable[[], object]]:
        """What records the kinds of micro-batch that the job has, at the arena's first row, one call each."""
        shapes = {(m.tokens, len(m.documents)) for m in (state.prepared.micro_batch(i) for i in range(state.prepared.num_micro_batches))}
        keys = {self.key(state, tokens, documents, 0, arena) for tokens, documents in shapes}
        found = sorted((key for key in keys if key is not None), key=lambda k: (k.tokens, k.documents))
        return [partial(self._find, key, state, arena) for key in found]

    def key(self, state: TrainState, tokens: int, documents: int, first: int, arena: Arena) -> BackwardKey | None:
        """The kind of a micro-batch at arena row `first`; None for dropout, for fp32 (whose attention reads the bounds on the host), and
        where the bucket reaches beyond the arena.
        """
        bucket = token_bucket(tokens, LONGEST)
        if state.job.dropout or arena.x.dtype == torch.float32 or bucket is None or first + bucket > arena.grad.shape[0]:
            return None
        return BackwardKey(bucket, 1 << (documents - 1).bit_length(), first, state.job.rank, state.job.targets, self.table.facts)

    def _find(self, key: BackwardKey, state: TrainState, arena: Arena) -> _Kind:
        if key not in self.recorded:
            self.recorded[key] = self._record(key, state, arena)
        return self.recorded[key]

    def _record(self, key: BackwardKey, state: TrainState, arena: Arena) -> _Kind:
        device, tokens = self.cos.device, key.tokens
        bounds = torch.full((key.documents + 1,), tokens, dtype=torch.int32, device=device)
        bounds[0] = 0
        span = TrainSpan("", True, 0, 0, tokens, 0, key.arena, [tokens], [0], [tokens], [], [], 1.0)
        cos, sin = self.cos[:1].repeat(tokens, 1), self.sin[:1].repeat(tokens, 1)
        work = BackwardPass(self.fused, self.table, state, span, bounds, cos, sin)
        kind = _Kind(cos, sin, bounds, work.layout, (torch.zeros_like(arena.grad[:tokens]), torch.zeros_like(arena.grad[:tokens])))

        def run(index: int) -> None:
            _, found = work.layer(index, arena, kind.grads[index % 2], out=kind.grads[(index + 1) % 2])
            kind.found[index] = {i: gradients[i] for i in found}
            if found:  # none with EngineConfig(lora="off")
                torch._foreach_copy_(list(kind.found[index].values()), list(found.values()))  # pyright: ignore[reportPrivateImportUsage]

        place = (key.arena, key.rank, key.targets)
        if place not in self._gradients:
            self._gradients[place] = [torch.empty_like(t) for t in state.params]
        gradients = self._gradients[place]
        # the gradient above the layers is in no graph: compiled here, it delays no step
        self.recorder.warm_up(partial(top_gradient, self.fused, arena, span))
        for index in (self.fused.dims.num_layers - 1, 0):
            self.recorder.warm_up(partial(run, index))
        for index in range(self.fused.dims.num_layers):
            kind.graphs[index] = self.recorder.record(partial(run, index))
        return kind
