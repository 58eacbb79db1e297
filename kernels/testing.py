"""Random problems for tests and benches: popularity of adapters, ragged row counts, tables with mixed ranks, NaN-poisoned memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch

from kernels.lora_table import LoraTable

Popularity = Literal["identical", "distinct", "uniform", "zipf", "skewed"]
POPULARITIES: tuple[str, ...] = get_args(Popularity)
RANKS = (1, 3, 8, 16, 17, 64, 128, 256)
RAGGED_ROWS = (0, 1, 15, 63, 100, 500)


def adapters_of_rows(popularity: str, num_rows: int, num_slots: int, seed: int = 0) -> list[int]:
    """The slot of each row, sorted, as the engine packs a batch.

    identical: all rows use slot 0. distinct: round-robin. uniform: drawn evenly. zipf: weight 1 / (slot + 1). skewed: half of the rows use
    slot 0, the others are drawn evenly. Raises ValueError for another name.
    """
    if popularity not in POPULARITIES:
        raise ValueError(f"popularity must be one of {', '.join(POPULARITIES)}, got {popularity!r}")
    rng = np.random.default_rng(seed)
    if popularity == "identical":
        slots = np.zeros(num_rows, dtype=int)
    elif popularity == "distinct":
        slots = np.arange(num_rows) % num_slots
    else:
        weights = np.ones(num_slots)
        if popularity == "zipf":
            weights = 1.0 / np.arange(1, num_slots + 1)
        slots = rng.choice(num_slots, size=num_rows, p=weights / weights.sum())
        if popularity == "skewed":
            slots[: num_rows // 2] = 0
    return sorted(int(slot) for slot in slots)


def random_tensor(shape: Sequence[int], seed: int, dtype: torch.dtype, device: str = "cpu", std: float = 1.0) -> torch.Tensor:
    """Normal numbers, equal on every device: drawn on the CPU in fp32, then rounded and moved."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)


def random_table(
    in_features: int, out_features: Sequence[int], ranks: Sequence[Sequence[int]], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> LoraTable:
    """A table with weights of `ranks[slice][slot]` (0: none), A and B of a size that makes every term about 1."""
    table = LoraTable(in_features, out_features, len(ranks[0]), device=device, dtype=dtype)
    for j, row in enumerate(ranks):
        for slot, rank in enumerate(row):
            if rank:
                key = seed * 10007 + j * 101 + slot
                a = random_tensor((rank, in_features), 2 * key, dtype, device, std=in_features**-0.5)
                b = random_tensor((out_features[j], rank), 2 * key + 1, dtype, device, std=rank**-0.5)
                table.set(slot, j, a, b, 0.5 + slot / 8)
    return table


def widened(table: LoraTable) -> LoraTable:
    """The same weights in float64 on the CPU: what a reference is computed with."""
    wide = LoraTable(table.in_features, table.out_features, table.num_slots, device="cpu", dtype=torch.float64)
    for (j, slot), weights in table.weights.items():
        wide.set(slot, j, weights.a.double().cpu(), weights.b.double().cpu(), weights.scale)
    return wide


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill whatever torch.empty and empty_like allocate with NaN (floats), so that a kernel that reads unwritten memory shows it."""
    plain_empty, plain_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def empty(*args: Any, **options: Any) -> torch.Tensor:
        return poison(plain_empty(*args, **options))

    def empty_like(*args: Any, **options: Any) -> torch.Tensor:
        return poison(plain_like(*args, **options))

    torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = plain_empty, plain_like


def relative_error(actual: torch.Tensor, expected: torch.Tensor, *, floor: float = 1e-30) -> float:
    """max |a - b| / max(max |b|, floor) in float64 on the CPU; infinite where `actual` is not finite."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not a.numel():
        return 0.0
    if not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(floor))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its shape annotations executed (jaxtyping and beartype); for tests, which install both."""
    from beartype import beartype
    from jaxtyping import jaxtyped

    return jaxtyped(typechecker=beartype)(function)
