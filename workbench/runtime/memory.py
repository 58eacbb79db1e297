"""How much of everything: device, dtype, and sizes that fit the memory at hand.

On CUDA the KV pool takes what is left after everything else: weights, adapter slots, fine-tune jobs and their arena, recorded graphs,
and the most that a step needs besides, which is measured on a scratch engine of the same base at start-up (as vLLM's profile run).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from workbench.config import LINEARS, EngineConfig, require
from workbench.runtime.graphs import CONTEXT_BUCKETS, ROW_BUCKETS, context_bucket, row_bucket
from workbench.runtime.inputs import TOKEN_BUCKETS, token_bucket
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.memory_profile import CudaGauge, Gauge, profile, profile_blocks
from workbench.runtime.packed import PackedLayout
from workbench.runtime.weights import Dims

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

CPU_POOL_TOKENS = 16_384  # enough for a laptop's replays of small models
CPU_ACTIVATION_TOKENS = 2_048
CUDA_ACTIVATION_TOKENS = 8_192
ARENA_SHARE = 0.4  # of the memory that is free after the weights: beyond it the backward recomputes instead of keeping
LONGEST_DEFAULT_CONTEXT = 8_192
# Left alone, of the device's memory: what the allocator cannot use between its blocks, and what libraries take without asking it.
MARGIN_SHARE = 0.05
GRAPH_BYTES = (
    10 << 20
)  # what is set aside for what the driver keeps of one recorded step; on an H100 all of them took 1.02 times 8 MiB each
MIXED_KINDS = 10  # of recorded mixed steps a bucket: the seven that are recorded ahead, and room for some that come up
# What a job keeps of each weight beside its copy in the model's dtype: master, two moments of AdamW, two gradients, in fp32.
JOB_BYTES_PER_PARAMETER = 5 * 4
SPARE_ADAPTERS = 2  # beside those in slots: the last published one, and the next while it is being published
# For an executor that is not profiled: the share of what is free that it may count on, and what its steps may need of that.
UNPROFILED_SHARE, UNPROFILED_WORKSPACE_BYTES = 0.9, 6 << 30

_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True, slots=True)
class Limits:
    """What `EngineConfig` left open, chosen."""

    max_model_len: int
    num_blocks: int
    activation_tokens: int
    keeps: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Where the device's memory goes, in bytes; `print` shows it as a table.

    `adapters`, `jobs`, `arena` and `graphs` are what is set aside, adapters and jobs as of EngineConfig.reserve_rank on all seven linears;
    `workspace` is the measured peak of a step beyond all the others, None where none was measured (on the CPU, or where
    EngineConfig.num_blocks is given). `total` is the device's memory, None on the CPU.
    """

    weights: int
    adapters: int
    jobs: int
    arena: int
    graphs: int
    workspace: int | None
    kv_pool: int
    total: int | None
    num_blocks: int
    num_slots: int
    activation_tokens: int
    max_batch_tokens: int

    def __str__(self) -> str:
        lines = [
            ("weights", self.weights, ""),
            ("adapters", self.adapters, f"num_slots = {self.num_slots}, and {SPARE_ADAPTERS} being published"),
            ("fine-tune jobs", self.jobs, "weights, optimiser and gradients"),
            ("arena", self.arena, f"activation_tokens = {self.activation_tokens}"),
            ("graphs", self.graphs, "set aside for recorded decode steps"),
            ("workspace", self.workspace, f"the most that a step took, max_batch_tokens = {self.max_batch_tokens}"),
            ("KV pool", self.kv_pool, f"num_blocks = {self.num_blocks}"),
        ]
        if self.total is not None:
            lines.append(("everything else", self.total - sum(size or 0 for _, size, _ in lines), "margin, libraries, other processes"))
        return "\n".join(f"{name:<16} {_mebibytes(size):>16}  {note}".rstrip() for name, size, note in lines)

    def advice(self, error: BaseException | None = None) -> str:
        """Which of the four sizes that a user sets holds the most, and how far to lower it so that what `error` asked for would fit.

        An error that names no size is answered with a tenth.
        """
        held = {
            "num_blocks": (self.kv_pool, self.num_blocks),
            "num_slots": (self.adapters * self.num_slots // (self.num_slots + SPARE_ADAPTERS), self.num_slots),
            "activation_tokens": (self.arena, self.activation_tokens),
            "max_batch_tokens": (self.workspace or 0, self.max_batch_tokens),
        }
        name = max(held, key=lambda n: held[n][0])
        size, value = held[name]
        missing = _missing_bytes(error)
        fewer = -(-value // 10) if missing is None else -(-missing * value // max(1, size))
        lower = max(1, value - fewer)
        frees = (value - lower) * size // value
        sizes = ", ".join(f"{n} {_mebibytes(self.workspace if n == 'max_batch_tokens' else b)}" for n, (b, _) in held.items())
        enough = "" if missing is None or frees >= missing else ", which alone is not enough"
        return (
            f"Of the four that can shrink ({sizes}) {name} holds the most: "
            f"lower EngineConfig.{name} from {value} to {lower}, which frees {_mebibytes(frees)}{enough}."
        )


def _mebibytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / (1 << 20):,.1f} MiB"


def _missing_bytes(error: BaseException | None) -> int | None:
    """How much the failed allocation asked for, if torch's message says so."""
    found = _TRIED.search(str(error))
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def resolve_device(device: str | torch.device | None) -> torch.device:
    """CUDA where there is one and nothing else is asked for. Raises ValueError for CUDA where there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    require(device.type in ("cpu", "cuda"), "device must be cpu or cuda", str(device))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist here, got {str(device)!r} on a machine without CUDA. Pass device='cpu' or leave it out.")
    return device


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and float32 on the CPU unless asked otherwise. Raises ValueError for a dtype that the engine does not compute in."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    require(resolved in (torch.float32, torch.bfloat16, torch.float16), "dtype must be float32, bfloat16 or float16", dtype)
    assert isinstance(resolved, torch.dtype)
    return resolved


def choose_limits(dims: Dims, config: EngineConfig, device: torch.device, dtype: torch.dtype, free: int | None) -> Limits:
    """Fill in what `config` leaves open, with a pool for the CPU. `free` bytes are left after the weights (None: on the CPU).

    Raises ValueError when the context exceeds what the model computes exactly.
    """
    longest = dims.max_exact_len
    max_model_len = config.max_model_len or min(longest, LONGEST_DEFAULT_CONTEXT)
    require(
        max_model_len <= longest,
        f"max_model_len must be at most {longest} (the model's context, sliding window and RoPE scaling)",
        max_model_len,
        "Lower EngineConfig.max_model_len.",
    )
    on_cuda = device.type == "cuda"
    activation_tokens = config.activation_tokens or (CUDA_ACTIVATION_TOKENS if on_cuda else CPU_ACTIVATION_TOKENS)
    keeps = config.activations != "recompute"
    if config.activations is None and free is not None:
        keeps = activation_tokens * Arena.bytes_per_row(dims, True, dtype) <= ARENA_SHARE * free
    blocks = config.num_blocks or max(1, CPU_POOL_TOKENS // config.block_tokens)
    return Limits(max_model_len, blocks, activation_tokens, keeps)


def estimate_limits(dims: Dims, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Limits:
    """As `choose_limits`, for an executor without a pool and without a profile: num_blocks then bounds the tokens that may be resident."""
    free = CudaGauge(device).free_bytes() if device.type == "cuda" else None
    limits = choose_limits(dims, config, device, dtype, free)
    if config.num_blocks is not None or free is None:
        return limits
    left = int(free * UNPROFILED_SHARE) - UNPROFILED_WORKSPACE_BYTES
    left -= limits.activation_tokens * Arena.bytes_per_row(dims, limits.keeps, dtype)
    num_blocks = left // KVPool.bytes_per_block(dims, config.block_tokens, dtype)
    step = "Lower EngineConfig.activation_tokens, or use a smaller model."
    require(num_blocks >= 1, "memory must be left for the requests' keys and values after weights, arena and workspace", left, step)
    return replace(limits, num_blocks=num_blocks)


def report(
    dims: Dims, config: EngineConfig, limits: Limits, dtype: torch.dtype, *, weights: int, workspace: int | None, total: int | None
) -> MemoryReport:
    """The sizes that follow from the limits, beside what was measured."""
    shapes = {
        (layer, target): ((config.reserve_rank, k), (n, config.reserve_rank))
        for layer in range(dims.num_layers)
        for target in LINEARS
        for k, n in [dims.linear(target)]
    }
    adapter = PackedLayout.of(shapes, dtype).bytes
    on_cuda = total is not None
    return MemoryReport(
        weights=weights,
        adapters=(config.num_slots + SPARE_ADAPTERS) * adapter,
        jobs=config.max_jobs * (adapter + adapter // dtype.itemsize * JOB_BYTES_PER_PARAMETER),
        arena=limits.activation_tokens * Arena.bytes_per_row(dims, limits.keeps, dtype),
        graphs=_graph_bytes(dims, config, limits.max_model_len, dtype, 4 * adapter // dtype.itemsize) if config.graphs and on_cuda else 0,
        workspace=workspace,
        kv_pool=limits.num_blocks * KVPool.bytes_per_block(dims, config.block_tokens, dtype),
        total=total,
        num_blocks=limits.num_blocks,
        num_slots=config.num_slots,
        activation_tokens=limits.activation_tokens,
        max_batch_tokens=config.max_batch_tokens,
    )


def _graph_bytes(dims: Dims, config: EngineConfig, max_model_len: int, dtype: torch.dtype, gradients: int) -> int:
    """What recorded steps are given: decode graphs with and without adapters keep their logits [rows, V], mixed ones share theirs and what
    lies between, a job's backward keeps its `gradients` in bytes, and the driver keeps something of each."""
    largest = row_bucket(min(config.max_requests, ROW_BUCKETS[-1])) or ROW_BUCKETS[-1]
    rows = [bucket for bucket in ROW_BUCKETS if bucket <= largest]
    contexts = {context_bucket(bucket, max_model_len) for bucket in (*CONTEXT_BUCKETS, max_model_len)}
    decodes = 2 * len(contexts) * (sum(rows) * dims.vocab_size * dtype.itemsize + len(rows) * GRAPH_BYTES)
    tokens = {token_bucket(min(bucket, config.max_batch_tokens), config.max_batch_tokens) for bucket in TOKEN_BUCKETS}
    qkv = (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim
    intermediates = config.max_batch_tokens * (5 * dims.hidden + 2 * qkv + 6 * dims.intermediate) * dtype.itemsize
    logits = config.max_requests * dims.vocab_size * dtype.itemsize
    mixed = MIXED_KINDS * len(tokens) * GRAPH_BYTES + intermediates + logits
    return decodes + mixed + config.max_jobs * (gradients + GRAPH_BYTES)


def fit(
    dims: Dims,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    weights: int,
    scratch: "Callable[[EngineConfig], Engine]",
    gauge: Gauge | None = None,
) -> tuple[Limits, MemoryReport]:
    """The limits of an engine whose base takes `weights` bytes, and where the memory goes.

    Where `config` gives no num_blocks on a CUDA device (or a `gauge` stands for one), `scratch(config)`, an engine over the same base,
    runs the largest steps to measure what they need, and the KV pool gets what is left. Raises ValueError, naming the size to lower, when
    nothing is left.
    """
    gauge = gauge or (CudaGauge(device) if device.type == "cuda" else None)
    limits = choose_limits(dims, config, device, dtype, None if gauge is None else gauge.free_bytes())
    if gauge is None or config.num_blocks is not None:
        total = None if gauge is None else gauge.total_bytes()
        return limits, report(dims, config, limits, dtype, weights=weights, workspace=None, total=total)
    blocks = profile_blocks(config, limits.max_model_len)
    activations = "keep" if limits.keeps else "recompute"
    tokens = max(2, limits.activation_tokens)
    trial = replace(config, num_blocks=blocks, activation_tokens=tokens, activations=activations, graphs=False)
    total = gauge.total_bytes()
    try:
        workspace = profile(scratch(trial), gauge)
    except (torch.OutOfMemoryError, MemoryError) as error:
        small = report(dims, trial, replace(limits, num_blocks=blocks), dtype, weights=weights, workspace=None, total=total)
        raise ValueError(
            f"the largest step must fit the device beside weights, jobs and arena, got: {error}. Lower EngineConfig.max_batch_tokens, "
            f"activation_tokens, max_jobs or reserve_rank.\n{small}"
        ) from error
    free = gauge.free_bytes() - int(MARGIN_SHARE * total)
    other = report(dims, config, replace(limits, num_blocks=0), dtype, weights=weights, workspace=workspace, total=total)
    left = free - other.adapters - other.jobs - other.arena - other.graphs - workspace
    num_blocks = left // KVPool.bytes_per_block(dims, config.block_tokens, dtype)
    if num_blocks < 1:
        missing = torch.OutOfMemoryError(f"tried to allocate {1 - left} bytes")
        raise ValueError(
            f"memory must be left for the KV pool after everything else, got {_mebibytes(left)}. {other.advice(missing)}\n{other}"
        )
    limits = replace(limits, num_blocks=num_blocks)
    return limits, report(dims, config, limits, dtype, weights=weights, workspace=workspace, total=total)
