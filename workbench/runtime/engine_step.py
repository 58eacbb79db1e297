"""The engine's part that runs a step: from a batch to what it computed, committed or rolled back."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from workbench.config import EngineConfig
from workbench.core import Batch, Segment, StepResult
from workbench.data import Document, prompt_token_ids
from workbench.runtime.backward import BackwardPass
from workbench.runtime.backward_graphs import BackwardGraphs, RecordedPass
from workbench.runtime.block_tables import BlockTables
from workbench.runtime.engine_adapters import EngineAdapters, KnownSequence, Version
from workbench.runtime.finetune import TrainState
from workbench.runtime.forward import BackwardOutput, ForwardOutput, Runner
from workbench.runtime.graphs import ROW_BUCKETS, DecodeBatch, DecodeGraphs
from workbench.runtime.guards import deterministic_algorithms, elapsed_s, mark, uninterrupted
from workbench.runtime.inputs import PackedStep, pack, train_span
from workbench.runtime.memory import MemoryReport
from workbench.runtime.packed import PackedTensors
from workbench.runtime.sampling import request_seed, sample


class OutOfMemory(MemoryError):
    """The device ran out of memory inside a step; the step was rolled back."""


@dataclass(slots=True)
class _Undo:
    """What a step changed before it could fail."""

    admitted: list[str] = field(default_factory=list)
    slots: dict[int, Version | None] = field(default_factory=dict)


class EngineStep(EngineAdapters):
    """A part of `Engine`: one step as a transaction over the sequences, slots and jobs of the running replay."""

    config: EngineConfig
    tokenizer: Any
    memory: MemoryReport
    runner: Runner
    _graphs: DecodeGraphs | None
    _backward_graphs: BackwardGraphs | None
    _tables: BlockTables
    _seed: int

    def __init__(self) -> None:
        super().__init__()
        self._slots: dict[int, Version] = {}
        self._sequences: dict[str, KnownSequence] = {}
        self._states: dict[str, TrainState] = {}
        self._trainers: dict[str, BackwardPass | RecordedPass] = {}
        self._late_interrupts: list[bool] = []
        self._last_sampled: tuple[Sequence[Segment], torch.Tensor] = ([], torch.empty(0, 0))

    def step(self, batch: Batch) -> StepResult:
        """Run one batch. Raises OutOfMemory (and anything else that went wrong) with the engine as it was before the call."""
        with self.lock:
            undo = _Undo()
            try:
                with deterministic_algorithms(self.config.deterministic):
                    return self._step(batch, undo)
            except torch.OutOfMemoryError as error:
                self._roll_back(undo)
                raise OutOfMemory(
                    f"a step of {batch.num_tokens} tokens must fit the device's memory, got: {error}. {self.memory.advice(error)}"
                ) from error
            except BaseException:
                self._roll_back(undo)
                raise

    # ---- one step

    def _step(self, batch: Batch, undo: _Undo) -> StepResult:
        started = time.perf_counter()
        events, part = mark(self.device), self.runner.parts
        with part("admit"):
            self._admit(batch, undo)
        with part("load adapters"):
            self._load(batch, undo)
        with part("forward"):
            forward = self._forward(batch) if batch.segments else None
        with part("sample"):
            tokens = self._sample(forward) if forward is not None else {}
        should_stop = self.runner.stopper(started, batch.stop_after_s)
        with part("backward"):
            backwards = [self.runner.backward(work, self._trainer(work), should_stop) for work in batch.backwards]
        with part("losses"):
            losses, eval_losses = self._losses(forward)
        room = self._room_to_publish(backwards)
        with part("commit"), uninterrupted(self._late_interrupts):
            published = self._commit(batch, tokens, backwards, room)
            undo.admitted.clear()
            undo.slots.clear()
            gpu_s = elapsed_s(events)
        duration_s = time.perf_counter() - started
        return StepResult(
            duration_s=duration_s,
            gpu_s=gpu_s,
            host_s=max(0.0, duration_s - gpu_s),
            tokens=tokens,
            layers_done={b.work.owner: b.layers_done for b in backwards},
            stopped_early=any(b.layers_done < b.work.num_layers for b in backwards),
            losses=losses,
            eval_losses=eval_losses,
            published=published,
        )

    def _forward(self, batch: Batch) -> ForwardOutput:
        if self._graphs is None or len(batch.segments) > ROW_BUCKETS[-1] or any(s.kind != "decode" for s in batch.segments):
            with self.runner.parts("pack"):
                packed = self._pack(batch)
            self._table.wait(packed.slots)  # not before: the copies of a load and the packing overlap
            return self.runner.forward(packed, self._dropout_states())
        slot_of = {version: slot for slot, version in self._slots.items()}
        segments = batch.segments
        known = [self._sequences[s.owner] for s in segments]
        assert all([s.start + 1 == len(k.tokens) for s, k in zip(segments, known, strict=True)]), "a decode takes its sequence's last token"
        rows = DecodeBatch(
            token_ids=[k.tokens[-1] for k in known],
            positions=[s.start for s in segments],
            tables=self._tables.gather([self._tables.show(k.row, s.blocks) for s, k in zip(segments, known, strict=True)]),
            entries=[None if s.adapter is None else slot_of[s.adapter, s.version] for s in segments],
        )
        self._table.wait({entry for entry in rows.entries if entry is not None})
        logits, greedy = self._graphs.run(rows)
        return ForwardOutput(logits, None, list(segments), greedy)

    def _admit(self, batch: Batch, undo: _Undo) -> None:
        for request in batch.admitted:
            ids = prompt_token_ids(request, vocab_size=self.fused.dims.vocab_size, tokenizer=self.tokenizer)
            seed = request_seed(self._seed, request.sampling.seed, request.request_id)
            self._sequences[request.request_id] = KnownSequence(request, list(ids), seed, self._tables.take())
            undo.admitted.append(request.request_id)

    def _forget(self, owner: str) -> None:
        sequence = self._sequences.pop(owner, None)
        if sequence is not None:
            self._tables.give(sequence.row)

    def _load(self, batch: Batch, undo: _Undo) -> None:
        for load in batch.loads:
            undo.slots.setdefault(load.slot, self._slots.get(load.slot))
            self._fill(load.slot, (load.adapter, load.version))

    def _fill(self, slot: int, version: Version) -> None:
        self._slots.pop(slot, None)
        self._table.load(slot, self._versions[version])
        self._slots[slot] = version

    def _pack(self, batch: Batch) -> PackedStep:
        dropout = self._dropout_states()

        def entry_of(s: Segment) -> int | None:
            return None if s.kind == "finetune" and s.owner in dropout else self._states[s.owner].entry

        def scale_of(s: Segment) -> float:
            assert s.micro_batch is not None
            if s.kind == "evaluate":
                return 1.0
            return 1.0 / max(1, self._states[s.owner].prepared.micro_batch(s.micro_batch).window_labelled)

        return pack(
            batch,
            sequences=self._sequences,
            slot_of={version: slot for slot, version in self._slots.items()},
            tables=self._tables,
            documents_of=self._documents,
            entry_of=entry_of,
            scale_of=scale_of,
            block_tokens=self.config.block_tokens,
        )

    def _documents(self, segment: Segment) -> list[Document]:
        prepared = self._states[segment.owner].prepared
        assert segment.micro_batch is not None
        return prepared.documents(segment.micro_batch) if segment.kind == "finetune" else prepared.evaluation_documents(segment.micro_batch)

    def _dropout_states(self) -> dict[str, TrainState]:
        return {job_id: state for job_id, state in self._states.items() if state.job.dropout > 0}

    def _sample(self, forward: ForwardOutput) -> dict[str, int]:
        """One token for every segment that samples; the only copy from the device that a step waits for."""
        self._last_sampled = (forward.sampled, forward.logits)
        if not forward.sampled:
            return {}
        sequences = [self._sequences[s.owner] for s in forward.sampled]
        if all(s.request.sampling.is_greedy for s in sequences):
            chosen = forward.logits.argmax(-1) if forward.greedy is None else forward.greedy
        else:
            chosen = sample(
                forward.logits,
                [s.request.sampling for s in sequences],
                seeds=[s.seed for s in sequences],
                positions=[len(s.tokens) for s in sequences],
                histories=[s.tokens for s in sequences],
            )
        return {segment.owner: token for segment, token in zip(forward.sampled, chosen.tolist(), strict=True)}

    def _trainer(self, work: Any) -> BackwardPass | RecordedPass:
        """The backward of the job's micro-batch, made at its first slice and kept until the last; recorded where a graph can run it."""
        state, layers = self._states[work.owner], self.fused.dims.num_layers
        if work.top_layer == layers:
            segment = Segment("finetune", work.owner, work.adapter, 0, 0, work.tokens, micro_batch=work.micro_batch, rows=work.rows)
            span, _, positions = train_span(segment, self._documents(segment), first=0, scale=1.0)
            places = torch.tensor(positions, device=self.device)
            bounds = torch.tensor([0, *accumulate(span.queries)], dtype=torch.int32, device=self.device)
            runner, recorded = self.runner, None
            assert runner.arena is not None
            if self._backward_graphs is not None:
                recorded = self._backward_graphs.begin(state, span, bounds, places, runner.arena)
            if recorded is None:
                recorded = BackwardPass(self.fused, self._table, state, span, bounds, runner.cos[places], runner.sin[places])
            self._trainers[work.owner] = recorded
        expected = layers if work.top_layer == layers else state.layers_left
        assert work.top_layer == expected, f"{work.owner}: the backward stands at layer {expected}, the batch says {work.top_layer}"
        return self._trainers[work.owner]

    def _losses(self, forward: ForwardOutput | None) -> tuple[dict[str, tuple[float, int]], dict[str, tuple[float, int]]]:
        if forward is None:
            return {}, {}
        losses, eval_losses = (
            {owner: (float(total), count) for owner, (total, count) in found.items()} for found in (forward.losses, forward.eval_losses)
        )
        return losses, eval_losses

    # ---- commit and roll back

    def _publishes(self, done: BackwardOutput) -> bool:
        """Whether the commit of this slice ends with a new version of the job's adapter."""
        state = self._states[done.work.owner]
        if done.layers_done == 0 or done.layers_done < done.work.top_layer:
            return False
        ends = state.micro_batches_done + 1 == state.prepared.num_micro_batches
        return (state.job.publish == "step" and done.work.ends_window) or (state.job.publish == "end" and ends)

    def _room_to_publish(self, backwards: Iterable[BackwardOutput]) -> dict[str, PackedTensors]:
        """The memory of every version that the commit will publish: it is taken before the optimiser steps, so that none can fail after."""
        owners = [done.work.owner for done in backwards if self._publishes(done)]
        return {owner: self._table.reserve(self._states[owner].compute, staged=True) for owner in owners}

    def _commit(
        self, batch: Batch, tokens: Mapping[str, int], backwards: Iterable[BackwardOutput], room: Mapping[str, PackedTensors]
    ) -> dict[str, int]:
        published: dict[str, int] = {}
        for request_id, token in tokens.items():
            self._sequences[request_id].tokens.append(token)
        for segment in batch.segments:
            if segment.kind in ("prefill", "decode") and segment.adapter is not None:
                self._sequences[segment.owner].pinned = (segment.adapter, segment.version)
            elif segment.kind == "finetune" and segment.start == 0:
                self._states[segment.owner].discard_pending()
        for done in backwards:
            self._commit_backward(done)
            if done.work.owner in room:
                state = self._states[done.work.owner]
                published[state.job.adapter] = self.publish(state, room[done.work.owner])
        for owner in batch.released:
            self._forget(owner)
            if self._trainers.pop(owner, None) is not None:
                self._states[owner].discard_pending()
        if batch.released or published:
            self._forget_unused()
        return published

    def _commit_backward(self, done: BackwardOutput) -> None:
        work, state, arena = done.work, self._states[done.work.owner], self.runner.arena
        assert arena is not None
        state.pending |= done.gradients
        state.layers_left = work.top_layer - done.layers_done
        if done.layers_done == 0:
            return
        if state.layers_left:
            assert done.grad is not None
            self._trainers[work.owner].keep(state.layers_left, done.grad, arena)
            return
        self._trainers.pop(work.owner, None)
        state.commit_micro_batch(work.ends_window)

    def _roll_back(self, undo: _Undo) -> None:
        for request_id in undo.admitted:
            self._forget(request_id)
        for slot, version in undo.slots.items():
            self._slots.pop(slot, None)
            self._table.clear(slot)
            if version is not None:
                self._table.defer(slot, self._versions[version])
                self._slots[slot] = version
