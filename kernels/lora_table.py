"""The device table of adapter weights for one group of linears that share an input.

Legend: K input features, N_j output features of slice j (q, k, v are three slices of one buffer), S slots, J slices, r rank.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from kernels.plan import power_of_two

MAX_RANK = 256
# Words of one table entry: address of A, address of B, rank, bits of the fp32 scale, first output column, width N_j, and two spare ones.
ENTRY_WORDS = 8


def largest_power_of_two_divisor(numbers: Sequence[int]) -> int:
    """The largest power of two, at most 16, that divides every number: what a kernel may assume of its addresses."""
    return min(number & -number for number in (*numbers, 16))


@dataclass(frozen=True, eq=False)
class SlotWeights:
    """One adapter's weights for one slice: `a` [r, K], `b` [N_j, r] and the factor on their product (alpha / r, say)."""

    a: Float[torch.Tensor, "r K"]
    b: Float[torch.Tensor, "N r"]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoraTable:
    """Addresses, ranks and scales of every (slice, slot), in device memory where a recorded graph finds later changes too.

    `entries` [J, S, 8] int64: one 64-byte line each (see `ENTRY_WORDS`); rank 0 says that the slot has no weights for that slice. The
    table keeps the tensors alive and copies none, so weights that are updated in place are seen by the next launch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        num_slots: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        weights: Mapping[tuple[int, int], SlotWeights] | None = None,
    ) -> None:
        """A table with `weights` by (slice, slot), in one host-to-device copy. Raises ValueError for a size below 1, or as `set` does."""
        if min(num_slots, in_features, len(out_features), *out_features) < 1:
            raise ValueError(
                "num_slots, in_features and every one of out_features must be at least 1, "
                f"got {num_slots}, {in_features} and {tuple(out_features)}"
            )
        self.in_features = in_features
        self.out_features = tuple(out_features)
        self.out_offsets = tuple(sum(self.out_features[:j]) for j in range(len(self.out_features)))
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.dtype = dtype
        self.weights: dict[tuple[int, int], SlotWeights] = {}
        self.max_rank, self.rank_bucket, self.rank_multiple = 0, 16, 16
        for (slice, slot), given in (weights or {}).items():
            self._keep(slot, slice, given)
        self.column_multiple = largest_power_of_two_divisor(self.out_features)
        words = [self._words(j, self.get(j, slot)) for j in range(self.num_slices) for slot in range(num_slots)]
        self.entries = self._upload(words).view(self.num_slices, num_slots, ENTRY_WORDS)

    @property
    def num_slices(self) -> int:
        return len(self.out_features)

    @property
    def total_out(self) -> int:
        return sum(self.out_features)

    def set(self, slot: int, slice: int, a: Float[torch.Tensor, "r K"], b: Float[torch.Tensor, "N r"], scale: float) -> None:
        """Let (slot, slice) read `a` [r, K] and `b` [N_slice, r] from the next launch on; they are kept, not copied.

        Raises ValueError for a slot or slice outside the table, a rank outside 1..256, or a tensor of another shape, dtype, device,
        with gaps, or not 16-byte aligned.
        """
        weights = SlotWeights(a.detach(), b.detach(), float(scale))
        self._keep(slot, slice, weights)
        self.entries[slice, slot].copy_(self._upload([self._words(slice, weights)])[0])

    def clear(self, slot: int) -> None:
        """Forget the slot's weights in every slice; rows of that slot are then left as they are."""
        self._check_slot(slot)
        for j in range(self.num_slices):
            self.weights.pop((j, slot), None)
        self.entries[:, slot, :4].zero_()

    def get(self, slice: int, slot: int) -> SlotWeights | None:
        """What `set` stored there, or None."""
        return self.weights.get((slice, slot))

    def _words(self, slice: int, weights: SlotWeights | None) -> tuple[int, ...]:
        place = (self.out_offsets[slice], self.out_features[slice], 0, 0)
        if weights is None:
            return (0, 0, 0, 0, *place)
        bits = struct.unpack("<i", struct.pack("<f", weights.scale))[0]
        return (weights.a.data_ptr(), weights.b.data_ptr(), weights.rank, bits, *place)

    def _upload(self, words: list[tuple[int, ...]]) -> torch.Tensor:
        table = torch.tensor(words, dtype=torch.int64)
        # From pinned memory the copy is asynchronous; torch's pinned allocator keeps the buffer until the stream has read it.
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def _keep(self, slot: int, slice: int, weights: SlotWeights) -> None:
        self._check_slot(slot)
        if not 0 <= slice < self.num_slices:
            raise ValueError(f"slice must lie in 0..{self.num_slices - 1}, got {slice}")
        if not 1 <= weights.rank <= MAX_RANK:
            raise ValueError(f"rank must lie in 1..{MAX_RANK}, got {weights.rank}")
        self._check_tensor("a", weights.a, (weights.rank, self.in_features))
        self._check_tensor("b", weights.b, (self.out_features[slice], weights.rank))
        self.expect(weights.rank)
        self.weights[(slice, slot)] = weights

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot must lie in 0..{self.num_slots - 1}, got {slot}. Build the table with more num_slots.")

    def _check_tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != self.dtype:
            raise ValueError(f"{name} must be {self.dtype}, as the table, got {tensor.dtype}. Cast it first.")
        if tensor.device.type != self.device.type:
            raise ValueError(f"{name} must be on {self.device}, as the table, got {tensor.device}. Move it first.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}. Call .contiguous() and keep the result.")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}. Clone it first.")

    def narrow(self) -> None:
        """Bring `facts` back to those of the weights that are here; a graph recorded under wider ones needs to be found by them."""
        self.max_rank, self.rank_bucket, self.rank_multiple = 0, 16, 16
        for weights in self.weights.values():
            self.expect(weights.rank)

    def expect(self, rank: int) -> None:
        """Widen `facts` for weights of this rank that will come."""
        self.max_rank = max(self.max_rank, rank)
        self.rank_multiple = largest_power_of_two_divisor([self.rank_multiple, rank])
        self.rank_bucket = power_of_two(self.max_rank, 16, MAX_RANK)

    @property
    def facts(self) -> tuple[bool, int, int]:
        """Whether there has been any weight, the padded rank of intermediate results, and what every rank is a multiple of.

        Launches are specialised on these and a recorded CUDA graph holds them: record again when they change. They only ever widen, so
        that adapters may come and go under one graph.
        """
        return self.max_rank > 0, self.rank_bucket, self.rank_multiple
