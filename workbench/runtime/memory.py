"""How much of everything: device, dtype, and sizes that fit the memory at hand."""

from dataclasses import dataclass

import torch

from workbench.config import EngineConfig, require
from workbench.runtime.kv_cache import Arena, KVPool
from workbench.runtime.weights import Dims

CPU_POOL_TOKENS = 16_384  # enough for a laptop's replays of small models
CPU_ACTIVATION_TOKENS = 2_048
CUDA_ACTIVATION_TOKENS = 8_192
CUDA_SHARE = 0.9  # of the memory that is free after the weights
CUDA_WORKSPACE_BYTES = 6 << 30  # a step's intermediates, optimiser state, adapters
ARENA_SHARE = 0.4  # of the memory that is free after the weights: beyond it the backward recomputes instead of keeping
LONGEST_DEFAULT_CONTEXT = 8_192


@dataclass(frozen=True, slots=True)
class Limits:
    """What `EngineConfig` left open, chosen."""

    max_model_len: int
    num_blocks: int
    activation_tokens: int
    keeps: bool


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


def choose_limits(dims: Dims, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Limits:
    """Fill in what `config` leaves open.

    Raises ValueError when the context exceeds what the model computes exactly, or the pool cannot hold one request.
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
    if config.activations is None and on_cuda:
        keeps = activation_tokens * Arena.bytes_per_row(dims, True, dtype) <= ARENA_SHARE * torch.cuda.mem_get_info(device)[0]
    block_bytes = KVPool.bytes_per_block(dims, config.block_tokens, dtype)
    num_blocks = config.num_blocks
    if num_blocks is None and on_cuda:
        arena = activation_tokens * Arena.bytes_per_row(dims, keeps, dtype)
        free = torch.cuda.mem_get_info(device)[0] * CUDA_SHARE - CUDA_WORKSPACE_BYTES - arena
        num_blocks = int(free // block_bytes)
        step = "Lower EngineConfig.activation_tokens, or use a smaller model."
        require(num_blocks >= 1, "memory must be left for the KV pool after weights, arena and workspace", int(free), step)
    elif num_blocks is None:
        num_blocks = max(1, CPU_POOL_TOKENS // config.block_tokens)
    return Limits(max_model_len, num_blocks, activation_tokens, keeps)
