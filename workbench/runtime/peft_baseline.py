"""The same work as a user without this project would run it: transformers + PEFT, static padded batches, one adapter at a time.

Legend: N rows of a padded batch, L its padded length, V vocabulary.
"""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from workbench.config import EngineConfig, FinetuneJob, UnknownAdapterError, did_you_mean, require
from workbench.core import AdapterInfo, Backward, Batch, Command, ExecutorInfo, Predictor, Request, Segment, StepResult
from workbench.data import Document, PreparedJob, prepare, prompt_token_ids
from workbench.runtime.adapters import AdapterWeights, Key, init_adapter, load_peft, module_path, peft_config, peft_tensors, save_peft
from workbench.runtime.finetune import learning_rate_factor
from workbench.runtime.guards import elapsed_s, mark
from workbench.runtime.memory import estimate_limits, resolve_device, resolve_dtype
from workbench.runtime.sampling import request_seed, sample
from workbench.runtime.weights import Dims, load_base, random_base
from workbench.runtime.weights import tokenizer as load_tokenizer

Version = tuple[str, int]  # adapter name, version
Rows = tuple[Tensor, Tensor, Tensor]  # token ids, attention mask, labels; each [N, L]
STATIC = EngineConfig(max_batch_tokens=16_384)  # a prefill cannot be cut here, so a batch has to hold whole prompts
IGNORED = -100  # transformers' label of a token without loss


@dataclass(eq=False, slots=True)
class _Group:
    """The requests that were prefilled together: one padded batch with one cache, decoded together until all of them are gone."""

    cache: DynamicCache
    mask: Tensor  # [N, L]: 1 where the cache holds a token of the row, 0 for padding and for steps that the row sat out


@dataclass(eq=False, slots=True)
class _Sequence:
    request: Request
    tokens: list[int]
    seed: int
    group: _Group | None = None
    row: int = 0
    pinned: Version | None = None


@dataclass(eq=False, slots=True)
class _Job:
    job: FinetuneJob
    prepared: PreparedJob
    peft_name: str
    params: dict[Key, tuple[Tensor, Tensor]]
    optimizer: torch.optim.AdamW
    loss: Tensor | None = None
    micro_batches_done: int = 0
    optimizer_steps: int = 0

    @property
    def flat(self) -> list[Tensor]:
        return [t for pair in self.params.values() for t in pair]


@dataclass(slots=True)
class _Effects:
    """What a step found, kept apart until everything in it has succeeded."""

    tokens: dict[str, int] = field(default_factory=dict)
    admitted: dict[str, _Sequence] = field(default_factory=dict)
    groups: list[tuple[_Group, list[Segment]]] = field(default_factory=list)
    advanced: list[tuple[_Group, Tensor]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    eval_losses: dict[str, tuple[float, int]] = field(default_factory=dict)


class PeftBaseline:
    """An executor that mixes and cuts nothing: the baseline that a shared engine is compared with.

    Requests that are prefilled in one step form a padded batch with one transformers cache; a decode step advances the whole batch,
    ended rows included, as `generate` does. Every adapter stays on the device and `set_adapter` switches between them, so loads take no
    time. A fine-tune micro-batch is a padded batch of its documents; its backward runs in one piece. Run it under
    `policies.PeftSequential`, or any policy that heeds `view.can` (which is empty here). Adapters are fp32, as PEFT makes them.
    """

    def __init__(self, base: PreTrainedModel, *, tokenizer: Any = None, name: str = "model", config: EngineConfig = STATIC) -> None:
        """Take over `base` (a Hugging Face causal language model): PEFT injects its adapters into it."""
        if config.deterministic:
            warnings.warn("deterministic=True has no effect on PeftBaseline: it runs transformers as it is", stacklevel=2)
        self.predictor: Predictor | None = None
        self.base, self.tokenizer, self.name, self.config = base, tokenizer, name, config
        self.dims = Dims.of(base.config)
        self.device, self.dtype = base.device, base.dtype
        self._model: Any = base
        self._limits = estimate_limits(self.dims, config, self.device, self.dtype)
        self._infos: dict[str, AdapterInfo] = {}
        self._versions: dict[Version, tuple[str, AdapterWeights]] = {}  # -> PEFT's name, weights
        self._last_version: dict[str, int] = {}
        self._made_by_jobs: set[str] = set()
        self._num_injected = 0
        self._sequences: dict[str, _Sequence] = {}
        self._jobs: dict[str, _Job] = {}
        self._seed = 0

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapters: Mapping[str, str | Path] | Sequence[str | Path] = (),
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        config: EngineConfig = STATIC,
    ) -> "PeftBaseline":
        """A baseline over a Hugging Face directory and PEFT adapter directories; arguments and errors as `Engine.from_pretrained`."""
        target = resolve_device(device)
        base = load_base(path, device=target, dtype=resolve_dtype(dtype, target))
        baseline = cls(base, tokenizer=load_tokenizer(path), name=Path(path).name, config=config)
        named = adapters if isinstance(adapters, Mapping) else {Path(a).name: a for a in adapters}
        require(
            len(named) == len(adapters), "adapter directories must have different last folders", list(adapters), "Pass {name: directory}."
        )
        for name, directory in named.items():
            baseline.load_adapter(name, directory)
        return baseline

    @classmethod
    def random(
        cls,
        shape: str,
        adapters: int | Sequence[int] = 0,
        rank: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        config: EngineConfig = STATIC,
    ) -> "PeftBaseline":
        """A baseline of a named shape with random weights and adapters "adapter-0", ..., as `Engine.random`."""
        target = resolve_device(device)
        baseline = cls(random_base(shape, device=target, dtype=resolve_dtype(dtype, target), seed=seed), name=shape, config=config)
        for i, r in enumerate([rank] * adapters if isinstance(adapters, int) else adapters):
            baseline._register(init_adapter(baseline.dims, f"adapter-{i}", rank=r, alpha=2.0 * r, seed=seed + i, b_std=0.02))
        return baseline

    def __repr__(self) -> str:
        return f"PeftBaseline({self.name!r}, device={str(self.device)!r}, dtype={self.dtype}, adapters={sorted(self._infos)})"

    # ---- adapters

    @property
    def adapter_infos(self) -> Mapping[str, AdapterInfo]:
        return self._infos

    def load_adapter(self, name: str, directory: str | Path) -> int:
        """Load a PEFT directory under `name`, as a new version if the name is taken; returns the version."""
        weights = load_peft(directory, self.dims, name)
        self._made_by_jobs.discard(name)
        return self._register(weights)

    def save_adapter(self, name: str, directory: str | Path) -> None:
        """Write the current version as an ordinary PEFT directory."""
        self._known(name)
        save_peft(self._versions[name, self._infos[name].version][1], directory, self.name)

    def _known(self, name: str) -> None:
        if name not in self._infos:
            raise UnknownAdapterError(f"no adapter is called {name!r}. {did_you_mean(name, list(self._infos))}")

    def _register(self, weights: AdapterWeights) -> int:
        version = self._last_version.get(weights.name, 0) + 1
        peft_name = self._inject(weights, is_trained=False)
        self._last_version[weights.name] = version
        self._versions[weights.name, version] = (peft_name, weights)
        self._infos[weights.name] = weights.info(version, torch.float32)
        self._forget_unused()
        return version

    def _inject(self, weights: AdapterWeights, *, is_trained: bool, dropout: float = 0.0) -> str:
        """Hand the weights to PEFT under a name of its own (PEFT's names allow no dots)."""
        peft_name = f"a{self._num_injected}"
        values = peft_config(weights) | {"inference_mode": not is_trained, "lora_dropout": dropout}
        config = LoraConfig(**values)
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(peft_name, config)
        else:
            self._model = get_peft_model(self.base, config, adapter_name=peft_name)
        found = set_peft_model_state_dict(self._model, peft_tensors(weights), adapter_name=peft_name)
        assert not found.unexpected_keys, found.unexpected_keys
        self._num_injected += 1
        return peft_name

    def _forget_unused(self) -> None:
        used = {(name, info.version) for name, info in self._infos.items()} | {s.pinned for s in self._sequences.values()}
        for version in [v for v in self._versions if v not in used]:
            self._delete(self._versions.pop(version)[0])

    def _delete(self, peft_name: str) -> None:
        others = [name for name in self._model.peft_config if name != peft_name]
        if others:
            self._model.set_adapter(others[0])  # PEFT warns when the active one goes; every step sets its own anyway
        self._model.delete_adapter(peft_name)

    # ---- executor

    @property
    def info(self) -> ExecutorInfo:
        config, limits = self.config, self._limits
        return ExecutorInfo(
            name=f"PeftBaseline {self.name}",
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            num_layers=self.dims.num_layers,
            max_model_len=limits.max_model_len,
            max_batch_tokens=config.max_batch_tokens,
            max_requests=config.max_requests,
            num_blocks=limits.num_blocks,
            block_tokens=config.block_tokens,
            num_slots=config.num_slots,
            max_batch_adapters=1,
            activation_tokens=limits.activation_tokens,
            can=frozenset(),
            eos_token_ids=self._eos_token_ids(),
        )

    def _eos_token_ids(self) -> frozenset[int]:
        eos = getattr(self.base.generation_config, "eos_token_id", None) or self.base.config.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    def begin(self, jobs: Sequence[FinetuneJob], *, seed: int) -> Mapping[str, PreparedJob]:
        """Start a replay: forget the last one's sequences and jobs, prepare these jobs' data, adapters and optimisers."""
        self.end()
        for state in self._jobs.values():
            self._delete(state.peft_name)
        self._jobs, self._seed = {}, seed
        for job in jobs:
            self._jobs[job.id] = self._create_job(job)
        require(len(self._jobs) == len(jobs), "jobs must have different ids", [j.id for j in jobs], "Give job_id=.")
        return {job_id: state.prepared for job_id, state in self._jobs.items()}

    def _create_job(self, job: FinetuneJob) -> _Job:
        if job.checkpoint is not None:
            raise ValueError(f"{job.id}: PeftBaseline starts jobs at their beginning, got a checkpoint. Resume it on an Engine.")
        eos = self._eos_token_ids()
        prepared = prepare(job, tokenizer=self.tokenizer, vocab_size=self.dims.vocab_size, eos_token_id=min(eos) if eos else None)
        weights = init_adapter(
            self.dims, job.adapter, rank=job.rank, alpha=job.alpha, targets=job.targets, seed=job.seed, use_rslora=job.use_rslora
        )
        peft_name = self._inject(weights, is_trained=True, dropout=job.dropout)
        params = {}
        for key in weights.tensors:
            layer: Any = self._model.get_base_model().get_submodule(module_path(key))
            params[key] = (layer.lora_A[peft_name].weight, layer.lora_B[peft_name].weight)
        optimizer = torch.optim.AdamW(
            [t for pair in params.values() for t in pair],
            lr=job.learning_rate,
            betas=job.betas,
            eps=job.eps,
            weight_decay=job.weight_decay,
        )
        if job.adapter not in self._infos or job.adapter in self._made_by_jobs:
            self._register(weights)
            self._made_by_jobs.add(job.adapter)
        return _Job(job, prepared, peft_name, params, optimizer)

    def admissible(self, request: Request) -> Request:
        """The request with its defaults resolved. Raises ValueError for one that could never run here."""
        if request.adapter is not None:
            self._known(request.adapter)
        ids = None
        if request.prompt_token_ids is not None or request.prompt is not None:
            ids = prompt_token_ids(request, vocab_size=self.dims.vocab_size, tokenizer=self.tokenizer)
        length = request.prompt_tokens if ids is None else len(ids)
        require(length >= 1, f"{request.request_id}: a prompt must have at least 1 token", length)
        room = self._limits.max_model_len - length
        wanted = request.output_tokens if request.output_tokens is not None else 1
        step = "Raise EngineConfig.max_model_len, or shorten the trace with .with_lengths(clip=)."
        require(
            wanted <= room, f"{request.request_id}: prompt and output must fit {self._limits.max_model_len} tokens", length + wanted, step
        )
        max_tokens = room if request.max_tokens is None else request.max_tokens
        if request.output_tokens is not None:
            max_tokens = min(max_tokens, room)
        require(1 <= max_tokens <= room, f"{request.request_id}: max_tokens must lie in 1..{room} (the context's rest)", max_tokens, step)
        return replace(request, prompt_tokens=length, prompt_token_ids=ids, max_tokens=max_tokens)

    def poll(self) -> Sequence[Command]:
        return ()

    def end(self) -> None:
        """Forget every sequence and every micro-batch in flight."""
        self._sequences.clear()
        for state in self._jobs.values():
            state.loss = None
        self._forget_unused()

    def step(self, batch: Batch) -> StepResult:
        """Run one batch, one kind and one adapter after the other; if it raises, everything is as before the call."""
        started, effects = time.perf_counter(), _Effects()
        begin = mark(self.device)
        try:
            self._admit(batch, effects)
            self._prefill(list(batch.of("prefill")), effects)
            self._decode(list(batch.of("decode")), effects)
            for segment in (*batch.of("finetune"), *batch.of("evaluate")):
                self._forward(segment, effects)
            layers_done = {work.owner: work.num_layers for work in batch.backwards}
            for work in batch.backwards:
                self._backward(work, effects)
            for work in batch.backwards:
                self._accumulate(work, effects)
        except BaseException:
            for group, mask in effects.advanced:
                group.cache.crop(mask.shape[1])
                group.mask = mask
            raise
        published = self._commit(batch, effects)
        gpu_s = elapsed_s(begin)
        duration_s = time.perf_counter() - started
        return StepResult(
            duration_s=duration_s,
            gpu_s=gpu_s,
            host_s=max(0.0, duration_s - gpu_s),
            tokens=effects.tokens,
            layers_done=layers_done,
            losses=effects.losses,
            eval_losses=effects.eval_losses,
            published=published,
        )

    # ---- serving

    def _admit(self, batch: Batch, effects: _Effects) -> None:
        for request in batch.admitted:
            ids = prompt_token_ids(request, vocab_size=self.dims.vocab_size, tokenizer=self.tokenizer)
            seed = request_seed(self._seed, request.sampling.seed, request.request_id)
            effects.admitted[request.request_id] = _Sequence(request, list(ids), seed)

    def _sequence(self, request_id: str, effects: _Effects) -> _Sequence:
        return effects.admitted.get(request_id) or self._sequences[request_id]

    @torch.no_grad()
    def _prefill(self, segments: Sequence[Segment], effects: _Effects) -> None:
        """One left-padded batch and one cache for each adapter among the segments."""
        for version, rows in _by_version(segments):
            sequences = [self._sequence(s.owner, effects) for s in rows]
            assert all(s.start == 0 and s.tokens == len(q.tokens) for s, q in zip(rows, sequences, strict=True)), (
                "a prefill is never cut here"
            )
            longest = max(len(q.tokens) for q in sequences)
            ids = torch.tensor([[0] * (longest - len(q.tokens)) + q.tokens for q in sequences], device=self.device)
            mask = torch.tensor([[0] * (longest - len(q.tokens)) + [1] * len(q.tokens) for q in sequences], device=self.device)
            cache = DynamicCache()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self._run(version, ids, mask, positions, cache)
            self._sample(logits, sequences, effects)
            effects.groups.append((_Group(cache, mask), rows))

    @torch.no_grad()
    def _decode(self, segments: Sequence[Segment], effects: _Effects) -> None:
        """One more column for every group that has a row among the segments; its other rows are computed too, and masked."""
        of_group: dict[_Group, dict[int, Segment]] = {}
        for s in segments:
            sequence = self._sequences[s.owner]
            assert sequence.group is not None, f"{s.owner} must be prefilled first"
            assert s.start == len(sequence.tokens) - 1, f"{s} must follow {len(sequence.tokens)} tokens"
            of_group.setdefault(sequence.group, {})[sequence.row] = s
        for group, rows in of_group.items():
            num_rows = group.mask.shape[0]
            ids = torch.zeros((num_rows, 1), dtype=torch.int64)
            taking = torch.zeros((num_rows, 1), dtype=torch.int64)
            positions = torch.zeros((num_rows, 1), dtype=torch.int64)
            for row, s in rows.items():
                ids[row], taking[row], positions[row] = self._sequences[s.owner].tokens[-1], 1, s.start
            effects.advanced.append((group, group.mask))
            group.mask = torch.cat([group.mask, taking.to(self.device)], dim=1)
            first = next(iter(rows.values()))
            version = None if first.adapter is None else (first.adapter, first.version)
            logits = self._run(version, ids.to(self.device), group.mask, positions.to(self.device), group.cache)
            order = sorted(rows)
            self._sample(logits[order], [self._sequences[rows[row].owner] for row in order], effects)

    def _run(self, version: Version | None, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [N, V] of the last column."""
        self._model.eval()
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if version is not None:
            self._model.set_adapter(self._versions[version][0])
            return self._model(input_ids=ids, **options).logits[:, -1]
        if not isinstance(self._model, PeftModel):
            return self._model(input_ids=ids, **options).logits[:, -1]
        with self._model.disable_adapter():
            return self._model(input_ids=ids, **options).logits[:, -1]

    def _sample(self, logits: Tensor, sequences: Sequence[_Sequence], effects: _Effects) -> None:
        chosen = sample(
            logits,
            [q.request.sampling for q in sequences],
            seeds=[q.seed for q in sequences],
            positions=[len(q.tokens) for q in sequences],
            histories=[q.tokens for q in sequences],
        )
        effects.tokens |= {q.request.request_id: token for q, token in zip(sequences, chosen.tolist(), strict=True)}

    # ---- fine-tuning

    def _forward(self, segment: Segment, effects: _Effects) -> None:
        """The forward of a whole micro-batch, with labels; a finetune one keeps its graph until the backward."""
        state, index = self._jobs[segment.owner], segment.micro_batch
        assert index is not None
        assert segment.tokens == sum(segment.documents), "a micro-batch is never cut here"
        if segment.kind == "finetune":
            shape = state.prepared.micro_batch(index)
            loss = self._training_loss(state, index)
            effects.kept[segment.owner] = loss
            effects.losses[segment.owner] = (loss.item() * max(1, shape.window_labelled), shape.labelled)
            return
        documents = state.prepared.evaluation_documents(index)
        self._model.eval()
        self._model.set_adapter(state.peft_name)
        with torch.no_grad():
            loss = self._loss(documents, normaliser=1)
        effects.eval_losses[segment.owner] = (loss.item(), sum(d.labelled for d in documents))

    def _training_loss(self, state: _Job, index: int) -> Tensor:
        self._model.train()
        self._model.set_adapter(state.peft_name)
        return self._loss(state.prepared.documents(index), normaliser=max(1, state.prepared.micro_batch(index).window_labelled))

    def _loss(self, documents: Sequence[Document], *, normaliser: int) -> Tensor:
        """Sum of the token losses over `normaliser`, as transformers computes it."""
        ids, mask, labels = (t.to(self.device) for t in padded(documents))
        return self._model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=normaliser, use_cache=False).loss

    def _backward(self, work: Backward, effects: _Effects) -> None:
        """All layers at once."""
        assert work.num_layers == self.dims.num_layers, "a backward is never cut here"
        state = self._jobs[work.owner]
        # A backward that failed has used up its graph: the forward is then run again.
        loss = self._training_loss(state, work.micro_batch) if state.loss is None else state.loss
        state.loss = None
        self._model.set_adapter(state.peft_name)  # which also makes the weights require gradients again
        effects.gradients[work.owner] = torch.autograd.grad(loss, state.flat)

    def _accumulate(self, work: Backward, effects: _Effects) -> None:
        """Add the gradients; at the window's end clip, step and schedule as a training loop would."""
        state = self._jobs[work.owner]
        before = [p.grad for p in state.flat]
        try:
            for p, gradient in zip(state.flat, effects.gradients[work.owner], strict=True):
                p.grad = gradient if p.grad is None else p.grad + gradient
            if work.ends_window:
                self._optimizer_step(state)
        except BaseException:
            for p, gradient in zip(state.flat, before, strict=True):
                p.grad = gradient
            raise

    def _optimizer_step(self, state: _Job) -> None:
        job = state.job
        num_steps = -(-state.prepared.num_micro_batches // job.accumulation)
        if job.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.flat, job.max_grad_norm)
        state.optimizer.param_groups[0]["lr"] = job.learning_rate * learning_rate_factor(job, state.optimizer_steps, num_steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.optimizer_steps += 1

    def trained_weights(self, job_id: str) -> AdapterWeights:
        """A job's weights as of its last optimiser step, fp32 on the CPU."""
        state = self._jobs[job_id]
        job = state.job
        tensors = {key: (a.detach().cpu().clone(), b.detach().cpu().clone()) for key, (a, b) in state.params.items()}
        return AdapterWeights(name=job.adapter, rank=job.rank, alpha=job.alpha, tensors=tensors, base=self.name, use_rslora=job.use_rslora)

    # ---- commit

    def _commit(self, batch: Batch, effects: _Effects) -> dict[str, int]:
        self._sequences |= effects.admitted
        for group, segments in effects.groups:
            for row, s in enumerate(segments):
                sequence = self._sequences[s.owner]
                sequence.group, sequence.row = group, row
                sequence.pinned = None if s.adapter is None else (s.adapter, s.version)
        for request_id, token in effects.tokens.items():
            self._sequences[request_id].tokens.append(token)
        for owner, loss in effects.kept.items():
            self._jobs[owner].loss = loss
        published = self._committed(batch.backwards)
        for owner in batch.released:
            self._sequences.pop(owner, None)  # the cache of a group goes with its last sequence
        if batch.released or published:
            self._forget_unused()
        return published

    def _committed(self, backwards: Iterable[Backward]) -> dict[str, int]:
        published = {}
        for work in backwards:
            state = self._jobs[work.owner]
            state.micro_batches_done += 1
            has_ended = state.micro_batches_done == state.prepared.num_micro_batches
            if (state.job.publish == "step" and work.ends_window) or (state.job.publish == "end" and has_ended):
                published[state.job.adapter] = self._register(self.trained_weights(work.owner))
        return published


def _by_version(segments: Iterable[Segment]) -> list[tuple[Version | None, list[Segment]]]:
    found: dict[Version | None, list[Segment]] = {}
    for s in segments:
        found.setdefault(None if s.adapter is None else (s.adapter, s.version), []).append(s)
    return list(found.items())


def padded(documents: Sequence[Document]) -> Rows:
    """Token ids, attention mask and labels [N, L], one document a row, padded on the right; labels as transformers wants them (its own
    token at each place; it shifts them itself)."""
    shape = (len(documents), max(len(d) for d in documents))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, document in enumerate(documents):
        length = len(document)
        ids[row, :length], mask[row, :length] = torch.tensor(document.token_ids), 1
        following = [IGNORED if label is None else label for label in document.labels[: length - 1]]
        labels[row, 1:length] = torch.tensor(following, dtype=torch.int64)
    return ids, mask, labels
