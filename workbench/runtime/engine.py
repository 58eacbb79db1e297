"""The engine: runs mixed batches for real, on CUDA with the fused kernels or on the CPU with their reference versions.

It is an executor (`workbench.core.Executor`): the ledger decides which block, slot and arena row holds what; the engine holds the
tensors. `step` is a transaction: what it computes becomes visible only once everything in it has succeeded.
"""

import gc
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from kernels import tuned
from workbench.config import EngineConfig, FinetuneJob, require
from workbench.core import Command, ExecutorInfo, JobShape, Request
from workbench.data import prepare, prompt_token_ids
from workbench.runtime.ablations import TABLES
from workbench.runtime.adapters import init_adapter
from workbench.runtime.backward_graphs import BackwardGraphs
from workbench.runtime.block_tables import BlockTables
from workbench.runtime.buckets import buckets
from workbench.runtime.engine_measuring import EngineMeasuring
from workbench.runtime.engine_step import OutOfMemory
from workbench.runtime.finetune import TrainState
from workbench.runtime.forward import Runner
from workbench.runtime.graphs import DecodeGraphs
from workbench.runtime.guards import DeviceLock
from workbench.runtime.jobs import JobHandle, restore_state
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.memory import fit, resolve_device, resolve_dtype
from workbench.runtime.mixed_graphs import MixedGraphs
from workbench.runtime.parts import Parts
from workbench.runtime.virtual import pin
from workbench.runtime.weights import assert_aliases, fuse, load_base, random_base
from workbench.runtime.weights import tokenizer as load_tokenizer

if TYPE_CHECKING:
    from workbench.runtime.partition import EnginePart

__all__ = ["Engine", "OutOfMemory"]

CAN = frozenset({"chunk", "mixed", "cut_backward", "safepoint"})


class Engine(EngineMeasuring):
    """One base model, many adapters: serving and fine-tuning in one packed batch."""

    def __init__(self, base: PreTrainedModel, *, tokenizer: Any = None, name: str = "model", config: EngineConfig = EngineConfig()) -> None:
        """Take over `base` (a Hugging Face causal language model): its weights are laid out for the fused linears in place."""
        super().__init__()
        self.base, self.tokenizer, self.name, self.config = base, tokenizer, name, config
        self.fused = fuse(base)
        assert_aliases(base, self.fused)
        pin(base, "The engine's fused buffers are this module's own weights. Build a new engine with device= or dtype=.")
        self.device, self.dtype = self.fused.embed.device, self.fused.embed.dtype
        tuned.of_device(self.device)  # now: the launches of a process are settled, and what is amiss with them is said, before a step
        self.lock = DeviceLock(self.device)
        self._limits, self.memory = fit(
            self.fused.dims,
            config,
            self.device,
            self.dtype,
            weights=sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in base.parameters())}.values()),
            scratch=lambda trial: Engine(base, name=name, config=trial),
        )
        pool = KVPool(self.fused.dims, self._limits.num_blocks, config.block_tokens, self.device, self.dtype)
        table = TABLES[config.lora](self.fused.dims, config.num_slots + config.max_jobs, self.device, self.dtype)
        self.runner = Runner(self.fused, pool, table, self._limits.max_model_len, self.device)
        self.runner.parts = Parts(config.ranges)
        self._table = table
        self._tables = BlockTables(-(-self._limits.max_model_len // config.block_tokens))
        uses_graphs = config.graphs and self.device.type == "cuda"
        self._graphs = DecodeGraphs(self.runner, self._limits.max_model_len) if uses_graphs else None
        if uses_graphs:
            self.runner.mixed = MixedGraphs(self.runner, config.max_batch_tokens, config.max_requests, self._limits.max_model_len)
        self._backward_graphs = BackwardGraphs(self.fused, table, self.runner.cos, self.runner.sin) if uses_graphs else None
        self._commands: deque[Command] = deque()
        self._seed = 0
        self._active, self._froze = False, False

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

    def replicas(self, num: int) -> list["EnginePart"]:
        """`num` instances for a `Fleet` on these weights, each with an equal share of KV blocks, slots and arena rows."""
        from workbench.runtime.partition import partition

        return partition(self, num)

    # ---- executor

    @property
    def info(self) -> ExecutorInfo:
        limits, config = self._limits, self.config
        sizes = (config.max_batch_tokens, config.max_requests, limits.activation_tokens, self.dtype)
        info = ExecutorInfo(
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
        return info if self._graphs is None else replace(info, **buckets(*sizes))

    def _eos_token_ids(self) -> frozenset[int]:
        eos: Any = getattr(self.base.generation_config, "eos_token_id", None) or self.base.config.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    @property
    def last_logits(self) -> dict[str, torch.Tensor]:
        """Logits [V] that the last step drew tokens from, by request id; views that the next step overwrites."""
        sampled, logits = self._last_sampled
        return dict(zip((s.owner for s in sampled), logits, strict=True))

    def tokens_of(self, request_id: str) -> tuple[int, ...]:
        """Prompt and generated tokens so far of a request of the running replay. Raises KeyError for one that the engine does not hold."""
        return tuple(self._sequences[request_id].tokens)

    @property
    def is_running(self) -> bool:
        """Whether a replay is between `begin` and `end`."""
        return self._active

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
            # Python's oldest generation holds what torch and transformers imported: going through it took 275 ms on a two-core CPU, which
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
            for owner in list(self._sequences):
                self._forget(owner)
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
