"""The engine: runs mixed batches for real, on CUDA with the fused kernels or on the CPU with their reference versions.

It is an executor (`workbench.core.Executor`): the ledger decides which block, slot and arena row holds what; the engine holds the
tensors. `step` is a transaction: what it computes becomes visible only once everything in it has succeeded.
"""

import gc
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from workbench.config import EngineConfig, FinetuneJob, UnknownAdapterError, did_you_mean, require
from workbench.core import AdapterInfo, Batch, Command, ExecutorInfo, JobShape, Predictor, Request, Segment, StepResult
from workbench.data import Document, prepare, prompt_token_ids
from workbench.runtime.ablations import TABLES
from workbench.runtime.adapters import MAX_RANK, AdapterWeights, init_adapter, load_peft, random_adapter, save_peft
from workbench.runtime.backward import BackwardPass
from workbench.runtime.backward_graphs import BackwardGraphs, RecordedPass
from workbench.runtime.finetune import TrainState
from workbench.runtime.forward import BackwardOutput, ForwardOutput, Runner
from workbench.runtime.graphs import ROW_BUCKETS, DecodeBatch, DecodeGraphs
from workbench.runtime.inputs import StepInputs, build, token_bucket, train_rows
from workbench.runtime.jobs import JobHandle, restore_state
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.memory import fit, resolve_device, resolve_dtype
from workbench.runtime.packed import PackedTensors, Pairs
from workbench.runtime.pieces import PieceGraphs
from workbench.runtime.sampling import request_seed, sample
from workbench.runtime.virtual import CarriedAdapter, VirtualModule, attach_adapter, pin
from workbench.runtime.weights import assert_aliases, fuse, load_base, random_base
from workbench.runtime.weights import tokenizer as load_tokenizer

Version = tuple[str, int]  # adapter name, version
CAN = frozenset({"chunk", "mixed", "cut_backward", "safepoint"})


class OutOfMemory(MemoryError):
    """The device ran out of memory inside a step; the step was rolled back."""


@contextmanager
def uninterrupted(late: list[bool]) -> Iterator[None]:
    """Ctrl-C waits for the end of this block: it is noted in `late`. Python delivers signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: late.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms within this block, where wanted; an operator that has none warns."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@dataclass(slots=True)
class _Sequence:
    """The engine's record of one admitted request: its tokens so far, prompt first."""

    request: Request
    tokens: list[int]
    seed: int
    pinned: Version | None = None


@dataclass(slots=True)
class _Undo:
    """What a step changed before it could fail."""

    admitted: list[str] = field(default_factory=list)
    slots: dict[int, Version | None] = field(default_factory=dict)


class Engine:
    """One base model, many adapters: serving and fine-tuning in one packed batch."""

    def __init__(self, base: PreTrainedModel, *, tokenizer: Any = None, name: str = "model", config: EngineConfig = EngineConfig()) -> None:
        """Take over `base` (a Hugging Face causal language model): its weights are laid out for the fused linears in place."""
        self.base, self.tokenizer, self.name, self.config = base, tokenizer, name, config
        self.fused = fuse(base)
        assert_aliases(base, self.fused)
        pin(base, "The engine's fused buffers are this module's own weights. Build a new engine with device= or dtype=.")
        self.device, self.dtype = self.fused.embed.device, self.fused.embed.dtype
        self.lock = threading.RLock()
        self._limits, self.memory = fit(
            self.fused.dims,
            config,
            self.device,
            self.dtype,
            weights=sum(p.numel() * p.element_size() for p in base.parameters()),
            scratch=lambda trial: Engine(base, name=name, config=trial),
        )
        pool = KVPool(self.fused.dims, self._limits.num_blocks, config.block_tokens, self.device, self.dtype)
        table = TABLES[config.lora](self.fused.dims, config.num_slots + config.max_jobs, self.device, self.dtype)
        self.runner = Runner(self.fused, pool, table, self._limits.max_model_len, self.device)
        self._table = table
        uses_graphs = config.graphs and self.device.type == "cuda"
        self._graphs = DecodeGraphs(self.runner, self._limits.max_model_len) if uses_graphs else None
        self.runner.pieces = PieceGraphs(self.runner, config.max_batch_tokens) if uses_graphs else None
        self._backward_graphs = BackwardGraphs(self.fused, table, self.runner.cos, self.runner.sin) if uses_graphs else None
        self._current: dict[str, int] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._announced: set[Version] = set()
        self._versions: dict[Version, AdapterWeights] = {}
        self._last_version: dict[str, int] = {}
        self._made_by_jobs: set[str] = set()
        self._slots: dict[int, Version] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._states: dict[str, TrainState] = {}
        self._trainers: dict[str, BackwardPass | RecordedPass] = {}
        self._commands: deque[Command] = deque()
        self._late_interrupts: list[bool] = []
        self._last_sampled: tuple[Sequence[Segment], torch.Tensor] = ([], torch.empty(0, 0))
        self._seed = 0
        self._active, self._froze = False, False
        self._predictor: Predictor | None = None
        self._calibrating = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapters: Mapping[str, str | Path] | Sequence[str | Path] = (),
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        config: EngineConfig = EngineConfig(),
    ) -> "Engine":
        """An engine over a Hugging Face directory (config.json + safetensors) and PEFT adapter directories.

        `adapters` maps names to directories (or lists directories, named after their last folder). `device=None` takes CUDA where there
        is one; `dtype=None` takes bfloat16 on CUDA and float32 on the CPU. Raises ValueError for anything it cannot run as asked.
        """
        device = resolve_device(device)
        engine = cls(
            load_base(path, device=device, dtype=resolve_dtype(dtype, device)),
            tokenizer=load_tokenizer(path),
            name=Path(path).name,
            config=config,
        )
        named = adapters if isinstance(adapters, Mapping) else {Path(a).name: a for a in adapters}
        require(
            len(named) == len(adapters), "adapter directories must have different last folders", list(adapters), "Pass {name: directory}."
        )
        for name, directory in named.items():
            engine.load_adapter(name, directory)
        return engine

    @classmethod
    def random(
        cls,
        shape: str,
        adapters: int | Sequence[int] = 0,
        rank: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        config: EngineConfig = EngineConfig(),
    ) -> "Engine":
        """An engine of a named shape with random weights created on the device: speed does not depend on values.

        `adapters` counts adapters of `rank` on all seven linears, named "adapter-0", ...; or lists one rank each.
        """
        device = resolve_device(device)
        engine = cls(random_base(shape, device=device, dtype=resolve_dtype(dtype, device), seed=seed), name=shape, config=config)
        engine.add_random_adapters([rank] * adapters if isinstance(adapters, int) else adapters, seed=seed + 1)
        return engine

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, device={str(self.device)!r}, dtype={self.dtype}, adapters={sorted(self._current)})"

    # ---- adapters

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Every adapter that requests may name, with its current version."""
        with self.lock:
            return dict(self._infos)

    @property
    def adapter_infos(self) -> Mapping[str, AdapterInfo]:
        """A snapshot; what it names can be loaded into a slot until the next one is taken."""
        with self.lock:
            self._announced = set(self._current.items())
            return dict(self._infos)

    def load_adapter(self, name: str, directory: str | Path) -> int:
        """Load a PEFT directory under `name`, as a new version if the name is taken; returns the version.

        Requests in flight keep the version that they were admitted with. Raises ValueError for an adapter that cannot be served as is.
        """
        require(bool(name), "an adapter's name must not be empty", name)
        weights = load_peft(directory, self.fused.dims, name)
        with self.lock:
            self._made_by_jobs.discard(name)
            return self._register(weights)

    def add_random_adapters(self, ranks: Sequence[int], *, seed: int = 1, std: float = 0.02) -> tuple[str, ...]:
        """Serve adapters "adapter-0", ... of these ranks on all seven linears, A and B drawn on the device from N(0, `std`); their names.

        For speed studies: `unload_adapter` takes them away again. A name that is taken gets a new version. Raises ValueError for a rank
        outside 1..256.
        """
        for rank in ranks:
            require(1 <= rank <= MAX_RANK, f"rank must lie in 1..{MAX_RANK}", rank)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        names = tuple(f"adapter-{i}" for i in range(len(ranks)))
        with self.lock:
            for name, rank in zip(names, ranks, strict=True):  # one after another: each leaves the device before the next is drawn
                self._register(random_adapter(self.fused.dims, name, rank, generator, self.dtype, std))
        return names

    def unload_adapter(self, name: str) -> None:
        """Stop serving `name`: requests in flight finish on their version, waiting ones are rejected with a reason."""
        with self.lock:
            self._known(name)
            self._unregister(name)
            self._forget_unused()

    def save_adapter(self, name: str, directory: str | Path) -> None:
        """Write the current version as an ordinary PEFT directory (unscaled B), loadable by PEFT with equal logits."""
        with self.lock:
            self._known(name)
            save_peft(self._versions[name, self._current[name]], directory, self.name)

    def _known(self, name: str) -> None:
        if name not in self._current:
            raise UnknownAdapterError(f"no adapter is called {name!r}. {did_you_mean(name, list(self._current))}")

    def _register(self, weights: AdapterWeights) -> int:
        weights = self._table.admit(weights)
        version = self._last_version.get(weights.name, 0) + 1
        self._last_version[weights.name] = version
        self._current[weights.name] = version
        self._versions[weights.name, version] = weights
        self._infos[weights.name] = weights.info(version, self.dtype)
        self._forget_unused()
        return version

    def _unregister(self, name: str) -> None:
        del self._current[name], self._infos[name]

    def _forget_unused(self) -> None:
        used = set(self._current.items()) | self._announced | set(self._slots.values()) | {s.pinned for s in self._sequences.values()}
        for version in [v for v in self._versions if v not in used]:
            del self._versions[version]

    def view(self, name: str | None = None) -> Any:
        """This engine's base as a `VirtualModule`, with one adapter (a PEFT model over shared weights) or none."""
        if name is None:
            return VirtualModule(self.base)
        with self.lock:
            self._known(name)
            return attach_adapter(VirtualModule(self.base), CarriedAdapter.of(self._versions[name, self._current[name]]))

    # ---- executor

    @property
    def info(self) -> ExecutorInfo:
        limits, config = self._limits, self.config
        return ExecutorInfo(
            name=f"Engine {self.name}",
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            num_layers=self.fused.dims.num_layers,
            max_model_len=limits.max_model_len,
            max_batch_tokens=config.max_batch_tokens,
            max_requests=config.max_requests,
            num_blocks=limits.num_blocks,
            block_tokens=config.block_tokens,
            num_slots=config.num_slots,
            max_batch_adapters=config.max_batch_adapters,
            activation_tokens=limits.activation_tokens,
            can=CAN if config.backward == "cut" else CAN - {"cut_backward", "safepoint"},
            eos_token_ids=self._eos_token_ids(),
            prefix_cache=config.prefix_cache,
        )

    def _eos_token_ids(self) -> frozenset[int]:
        eos: Any = getattr(self.base.generation_config, "eos_token_id", None) or self.base.config.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    @property
    def predictor(self) -> Predictor | None:
        """The latency model beside the engine that `within_s` and `view.predict` ask; measured on this engine at first need."""
        if self._predictor is None and not self._calibrating:
            self.calibrate()
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        self._predictor = predictor

    def calibrate(self, **options: Any) -> Any:
        """Run a short mix of steps of every kind, fit a `LatencyModel` to them, keep it as `predictor`, and return it."""
        from workbench.runtime.calibrate import calibrate

        with self.uncalibrated():
            self._predictor = calibrate(self, **options)
        return self._predictor

    def warm_up(self) -> None:
        """Record the CUDA graphs for the adapters and jobs known now, so that no step pays for it; nothing on the CPU.

        `begin` does so where `EngineConfig.warm_up` says; what is recorded already costs nothing.
        """
        with self.lock, deterministic_algorithms(self.config.deterministic):
            require(not self._active, "warm_up needs an idle engine", "a running replay", "Call it before.")
            if self._graphs is None:
                return
            for version in self._current.items():
                self._table.expect(self._versions[version].tensors)
            self._graphs.warm_up(self.config.max_requests, has_adapters=bool(self._current))
            if self.runner.pieces is not None:
                self.runner.pieces.warm_up(has_adapters=bool(self._current), keeps=self.runner.arena is not None)
            for state in self._states.values():
                if self._backward_graphs is not None and self.runner.arena is not None:
                    self._backward_graphs.warm_up(state, self.runner.arena)

    @contextmanager
    def uncalibrated(self) -> Iterator[None]:
        """Within this, `predictor` does not start a calibration: for work that no policy asks a prediction for."""
        before, self._calibrating = self._calibrating, True
        try:
            yield
        finally:
            self._calibrating = before

    @property
    def last_logits(self) -> dict[str, torch.Tensor]:
        """Logits [V] that the last step drew tokens from, by request id; views that the next step overwrites."""
        sampled, logits = self._last_sampled
        return dict(zip((s.owner for s in sampled), logits, strict=True))

    def tokens_of(self, request_id: str) -> tuple[int, ...]:
        """Prompt and generated tokens so far of a request of the running replay. Raises KeyError for one that the engine does not hold."""
        return tuple(self._sequences[request_id].tokens)

    def adapter_weights(self, name: str) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, float]]:
        """{(layer, target): (A [r, K], B [N, r], scale)} of the current version. Raises UnknownAdapterError for another name."""
        with self.lock:
            self._known(name)
            weights = self._versions[name, self._current[name]]
            return {key: (*pair, weights.scales[key]) for key, pair in weights.tensors.items()}

    @property
    def is_running(self) -> bool:
        """Whether a replay is between `begin` and `end`."""
        return self._active

    @contextmanager
    def borrowed_entry(self, adapter: str | None) -> Iterator[int | None]:
        """A table entry that holds the current version of `adapter` for a while; None for the base alone."""
        if adapter is None:
            yield None
            return
        self._known(adapter)
        entry = self._table.num_entries - 1
        self._table.load(entry, self._versions[adapter, self._current[adapter]])
        self._table.wait([entry])
        try:
            yield entry
        finally:
            self._table.clear(entry)

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, JobShape]:
        """Start a replay: forget the last one's sequences and jobs, prepare these jobs' data, weights and optimisers."""
        require(len(jobs) <= self.config.max_jobs, "jobs must be at most EngineConfig.max_jobs", len(jobs), "Raise max_jobs.")
        with self.lock:
            if self._active:
                raise RuntimeError("begin needs an idle engine, got a running replay. Wait for its end, or call engine.end().")
            assert_aliases(self.base, self.fused)
            self.end()
            self._table.reset()
            for version in self._current.items():
                self._table.expect(self._versions[version].tensors)
            self._states, self._seed = {}, seed
            for i, job in enumerate(jobs):
                self._states[job.id] = self._create_state(job, self.config.num_slots + i)
            require(len(self._states) == len(jobs), "jobs must have different ids", [j.id for j in jobs], "Give job_id=.")
            if jobs:
                self.allocate_arena()
            if self.config.warm_up:
                self.warm_up()
            # Python's oldest generation holds what torch and transformers imported: going through it takes tens of milliseconds, which
            # would fall on some step. What is there now stays; collections go through what comes. A process that froze it itself knows.
            self._froze = not gc.get_freeze_count()
            if self._froze:
                gc.collect()
                gc.freeze()
            self._active = True
            return {job_id: cast(JobShape, state.prepared) for job_id, state in self._states.items()}

    def allocate_arena(self) -> None:
        """Make the arena of kept activations, once."""
        if self.runner.arena is None:
            limits = self._limits
            self.runner.arena = Arena.allocate(self.fused.dims, limits.activation_tokens, limits.keeps, self.device, self.dtype)

    def _create_state(self, job: FinetuneJob, entry: int) -> TrainState:
        rule = f"{job.id}: dropout must be 0 with EngineConfig(lora='off'), which applies no adapter to drop anything of"
        require(self.config.lora != "off" or job.dropout == 0, rule, job.dropout)
        vocab, eos = self.fused.dims.vocab_size, self._eos_token_ids()
        prepared = prepare(job, tokenizer=self.tokenizer, vocab_size=vocab, eos_token_id=min(eos) if eos else None)
        weights = init_adapter(
            self.fused.dims, job.adapter, rank=job.rank, alpha=job.alpha, targets=job.targets, seed=job.seed, use_rslora=job.use_rslora
        )
        state = TrainState.create(job, prepared, weights, entry, self.device, self.dtype)
        if job.checkpoint is not None:
            restore_state(state, Path(job.checkpoint))
        self._table.put(entry, state.compute, {key: job.scaling for key in state.compute})
        if job.adapter not in self._current or job.adapter in self._made_by_jobs:
            self.publish(state)
            self._made_by_jobs.add(job.adapter)
        return state

    def admissible(self, request: Request) -> Request:
        """The request with its defaults resolved. Raises ValueError for one that this engine could never run."""
        if request.adapter is not None:
            self._known(request.adapter)
        ids = None
        if request.prompt_token_ids is not None or request.prompt is not None:
            ids = prompt_token_ids(request, vocab_size=self.fused.dims.vocab_size, tokenizer=self.tokenizer)
        prompt_tokens = request.prompt_tokens if ids is None else len(ids)
        limits = self._limits
        require(prompt_tokens >= 1, f"{request.request_id}: a prompt must have at least 1 token", prompt_tokens)
        longest = limits.max_model_len
        needed = prompt_tokens + (request.output_tokens if request.output_tokens is not None else 1)
        step = "Raise EngineConfig.max_model_len, or shorten the trace with .with_lengths(clip=)."
        require(needed <= longest, f"{request.request_id}: prompt and output must fit the context of {longest} tokens", needed, step)
        max_tokens = request.max_tokens if request.max_tokens is not None else longest - prompt_tokens
        require(max_tokens >= 1, f"{request.request_id}: max_tokens must be at least 1", max_tokens)
        max_tokens = min(max_tokens, longest - prompt_tokens) if request.output_tokens is not None else max_tokens
        require(
            prompt_tokens + max_tokens <= longest,
            f"{request.request_id}: prompt and max_tokens must fit {longest} tokens",
            max_tokens,
            step,
        )
        capacity = limits.num_blocks * self.config.block_tokens
        step = "Raise EngineConfig.num_blocks."
        require(needed <= capacity, f"{request.request_id}: the KV pool must hold one request ({capacity} tokens)", needed, step)
        return replace(request, prompt_tokens=prompt_tokens, prompt_token_ids=ids, max_tokens=max_tokens)

    def poll(self) -> Sequence[Command]:
        if self._late_interrupts:
            self._late_interrupts.clear()
            raise KeyboardInterrupt
        commands: list[Command] = []
        while self._commands:
            commands.append(self._commands.popleft())
        return commands

    def end(self) -> None:
        """Forget every sequence. Jobs stay in `jobs` (to checkpoint, publish, look at) until the next `begin`."""
        with self.lock:
            self._sequences.clear()
            self._slots.clear()
            self._trainers.clear()
            self._commands.clear()
            for state in self._states.values():
                state.discard_pending()
            if self._active and self._froze:
                gc.unfreeze()
            self._active = False
            self._announced = set()
            self._forget_unused()

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
        events = self._mark()
        self._admit(batch, undo)
        self._load(batch, undo)
        forward = self._forward(batch) if batch.segments else None
        tokens = self._sample(forward) if forward is not None else {}
        should_stop = self.runner.stopper(started, batch.stop_after_s)
        backwards = [self.runner.backward(work, self._trainer(work), should_stop) for work in batch.backwards]
        losses, eval_losses = self._losses(forward)
        room = self._room_to_publish(backwards)
        with uninterrupted(self._late_interrupts):
            published = self._commit(batch, tokens, backwards, room)
            undo.admitted.clear()
            undo.slots.clear()
            gpu_s = self._elapsed(events)
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
            inputs = self._inputs(batch)
            self._table.wait(inputs.layout.slots)  # not before: the copies of a load and the building of inputs overlap
            return self.runner.forward(inputs, self._dropout_states())
        slot_of = {version: slot for slot, version in self._slots.items()}
        segments = batch.segments
        assert all(s.end == len(self._sequences[s.owner].tokens) for s in segments), "a decode takes its sequence's last token"
        rows = DecodeBatch(
            token_ids=[self._sequences[s.owner].tokens[s.start] for s in segments],
            positions=[s.start for s in segments],
            blocks=[s.blocks for s in segments],
            entries=[None if s.adapter is None else slot_of[s.adapter, s.version] for s in segments],
        )
        self._table.wait({entry for entry in rows.entries if entry is not None})
        logits, greedy = self._graphs.run(rows)
        return ForwardOutput(logits, None, list(segments), greedy)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        return begin

    def _elapsed(self, begin: Any) -> float:
        """Device time since `begin`, in seconds, with the device synchronised; 0 on the CPU, where all time is host time."""
        if begin is None:
            return 0.0
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000.0

    def _admit(self, batch: Batch, undo: _Undo) -> None:
        for request in batch.admitted:
            ids = prompt_token_ids(request, vocab_size=self.fused.dims.vocab_size, tokenizer=self.tokenizer)
            seed = request_seed(self._seed, request.sampling.seed, request.request_id)
            self._sequences[request.request_id] = _Sequence(request, list(ids), seed)
            undo.admitted.append(request.request_id)

    def _load(self, batch: Batch, undo: _Undo) -> None:
        for load in batch.loads:
            undo.slots.setdefault(load.slot, self._slots.get(load.slot))
            self._fill(load.slot, (load.adapter, load.version))

    def _fill(self, slot: int, version: Version) -> None:
        self._slots.pop(slot, None)
        self._table.load(slot, self._versions[version])
        self._slots[slot] = version

    def _bucket(self, batch: Batch) -> int | None:
        """The bucket of recorded pieces that can run the batch, if any (dropout has masks of its own)."""
        if self.runner.pieces is None or self._dropout_states():
            return None
        return token_bucket(batch.num_tokens, self.runner.pieces.max_tokens)

    def _inputs(self, batch: Batch) -> StepInputs:
        slot_of = {version: slot for slot, version in self._slots.items()}
        dropout = self._dropout_states()

        def entry_of(s: Segment) -> int | None:
            if s.kind in ("finetune", "evaluate"):
                return None if s.kind == "finetune" and s.owner in dropout else self._states[s.owner].entry
            return None if s.adapter is None else slot_of[s.adapter, s.version]

        def scale_of(s: Segment) -> float:
            assert s.micro_batch is not None
            if s.kind == "evaluate":
                return 1.0
            return 1.0 / max(1, self._states[s.owner].prepared.micro_batch(s.micro_batch).window_labelled)

        def tokens_of(s: Segment) -> list[int]:
            tokens = self._sequences[s.owner].tokens
            assert s.end <= len(tokens) and s.samples == (s.end == len(tokens)), f"segment {s} does not fit {len(tokens)} known tokens"
            return tokens[s.start : s.end]

        return build(
            batch,
            tokens_of=tokens_of,
            documents_of=self._documents,
            entry_of=entry_of,
            scale_of=scale_of,
            block_tokens=self.config.block_tokens,
            device=self.device,
            bucket=self._bucket(batch),
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
            rows, _, positions = train_rows(segment, self._documents(segment), first=0, scale=1.0, device=self.device)
            places = torch.tensor(positions, device=self.device)
            runner, recorded = self.runner, None
            assert runner.arena is not None
            if self._backward_graphs is not None:
                recorded = self._backward_graphs.begin(state, rows, places, runner.arena)
            if recorded is None:
                recorded = BackwardPass(self.fused, self._table, state, rows, runner.cos[places], runner.sin[places])
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
            self._sequences.pop(owner, None)
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
            arena.grad[work.rows : work.rows + work.tokens] = done.grad
            return
        self._trainers.pop(work.owner, None)
        state.commit_micro_batch(work.ends_window)

    def _roll_back(self, undo: _Undo) -> None:
        for request_id in undo.admitted:
            del self._sequences[request_id]
        for slot, version in undo.slots.items():
            self._slots.pop(slot, None)
            self._table.clear(slot)
            if version is not None:
                self._table.defer(slot, self._versions[version])
                self._slots[slot] = version

    # ---- jobs

    @property
    def jobs(self) -> Mapping[str, JobHandle]:
        """The jobs of the running replay, or of the last one, by adapter."""
        return {state.job.adapter: JobHandle(self, state) for state in self._states.values()}

    def command(self, verb: Any, job_id: str) -> None:
        """Queue a command for the ledger, which obeys between two steps; outside a replay there is nobody to obey."""
        if not self._active:
            raise RuntimeError(
                f"{verb} needs a running replay, got none for {job_id}. Call it from a policy, a callback or another thread."
            )
        self._commands.append((verb, job_id))

    def trained_weights(self, state: TrainState) -> AdapterWeights:
        """The job's weights as of its last optimiser step: fp32, on the CPU."""
        with self.lock:
            tensors = {key: (a.detach().to("cpu", copy=True), b.detach().to("cpu", copy=True)) for key, (a, b) in state.master.items()}
        return self._adapter_of(state.job, tensors)

    def _adapter_of(self, job: FinetuneJob, tensors: Pairs, packed: PackedTensors | None = None) -> AdapterWeights:
        names = {"name": job.adapter, "rank": job.rank, "alpha": job.alpha, "base": self.name, "use_rslora": job.use_rslora}
        return AdapterWeights(**names, tensors=tensors, packed=packed)

    def publish(self, state: TrainState, room: PackedTensors | None = None) -> int:
        """Serve the job's weights, in the model's dtype, as a new version of its adapter; requests in flight keep theirs.

        With `room` (from `AdapterTable.reserve`) it takes no more memory on the device.
        """
        with self.lock:
            if room is None:
                room = self._table.reserve(state.compute, staged=True)
            self._table.write(room, state.compute)
            return self._register(self._adapter_of(state.job, room, room))

    # ---- text

    def generate(
        self, prompts: str | Sequence[str | Sequence[int]], adapter: str | None = None, max_tokens: int = 64, **sampling: Any
    ) -> list[Any]:
        """Complete prompts (text or token ids) with one adapter or none; a list of `Completion` in the order of the prompts."""
        from workbench.runtime.generate import generate

        return generate(self, [prompts] if isinstance(prompts, str) else list(prompts), adapter, max_tokens, sampling)

    def nll(self, texts: Sequence[str], adapter: str | None = None) -> float:
        """Mean negative log-likelihood in nats a token of `texts` under the base and one adapter (or none)."""
        from workbench.runtime.generate import nll

        return nll(self, texts, adapter)
