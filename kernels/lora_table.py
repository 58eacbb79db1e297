"""The device table of adapter weights: for one group of linears that share an input, and stacked for all groups of a model.

Legend: K input features, N_j output features of slice j (q, k, v are three slices of one buffer), S slots, J slices, r rank, R rows of a
stack (the slices of all its tables, one after another).
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    table keeps the tensors alive and copies none, so weights that are updated in place are seen by the next launch. A table of a
    `LoraTableStack` is read like any other, but changes only through its stack.
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
        stack: "StackRows | None" = None,
    ) -> None:
        """A table with `weights` by (slice, slot), in one host-to-device copy, or one that `stack` owns and fills.

        Raises ValueError for a size below 1, or as `set` does.
        """
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
        self.column_multiple = largest_power_of_two_divisor(self.out_features)
        self._own: dict[tuple[int, int], SlotWeights] = {}
        self._stack = stack
        self.max_rank, self.rank_bucket, self.rank_multiple = 0, 16, 16
        if stack is not None:
            self.entries = stack.entries
            return
        for (slice, slot), given in (weights or {}).items():
            self._keep(slot, slice, given)
        words = [self._words(j, self.get(j, slot)) for j in range(self.num_slices) for slot in range(num_slots)]
        self.entries = self._upload(words).view(self.num_slices, num_slots, ENTRY_WORDS)

    @property
    def weights(self) -> Mapping[tuple[int, int], SlotWeights]:
        """What every (slice, slot) holds."""
        return self._own if self._stack is None else self._stack

    @property
    def num_slices(self) -> int:
        return len(self.out_features)

    @property
    def total_out(self) -> int:
        return sum(self.out_features)

    def set(self, slot: int, slice: int, a: Float[torch.Tensor, "r K"], b: Float[torch.Tensor, "N r"], scale: float) -> None:
        """Let (slot, slice) read `a` [r, K] and `b` [N_slice, r] from the next launch on; they are kept, not copied.

        Raises ValueError for a slot or slice outside the table, a rank outside 1..256, or a tensor of another shape, dtype, device,
        with gaps, or not 16-byte aligned; and for a table that a stack owns.
        """
        weights = SlotWeights(a.detach(), b.detach(), float(scale))
        self._keep(slot, slice, weights)
        self.entries[slice, slot].copy_(self._upload([self._words(slice, weights)])[0])

    def clear(self, slot: int) -> None:
        """Forget the slot's weights in every slice; rows of that slot are then left as they are."""
        self._check_own()
        check_slot(slot, self.num_slots)
        for j in range(self.num_slices):
            self._own.pop((j, slot), None)
        self.entries[:, slot, :4].zero_()

    def get(self, slice: int, slot: int) -> SlotWeights | None:
        """What `set` stored there, or None."""
        return self.weights.get((slice, slot))

    def _words(self, slice: int, weights: SlotWeights | None) -> tuple[int, ...]:
        return entry_words(weights, self.out_offsets[slice], self.out_features[slice])

    def _upload(self, words: list[tuple[int, ...]]) -> torch.Tensor:
        table = torch.tensor(words, dtype=torch.int64)
        # From pinned memory the copy is asynchronous; torch's pinned allocator keeps the buffer until the stream has read it.
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def _keep(self, slot: int, slice: int, weights: SlotWeights) -> None:
        self._check_own()
        check_slot(slot, self.num_slots)
        self.check(slice, weights)
        self.expect(weights.rank)
        self._own[(slice, slot)] = weights

    def check(self, slice: int, weights: SlotWeights) -> None:
        """Raises ValueError, as `set` does, for weights that a kernel could not read as those of `slice`."""
        if not 0 <= slice < self.num_slices:
            raise ValueError(f"slice must lie in 0..{self.num_slices - 1}, got {slice}")
        if not 1 <= weights.rank <= MAX_RANK:
            raise ValueError(f"rank must lie in 1..{MAX_RANK}, got {weights.rank}")
        self._check_tensor("a", weights.a, (weights.rank, self.in_features))
        self._check_tensor("b", weights.b, (self.out_features[slice], weights.rank))

    def _check_own(self) -> None:
        if self._stack is not None:
            raise ValueError("a table must be its own to change alone, got one of a stack. Change the slot with LoraTableStack.put.")

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

    def expect(self, *ranks: int) -> None:
        """Widen `facts` for weights of these ranks that will come."""
        self.max_rank = max(self.max_rank, *ranks)
        self.rank_multiple = largest_power_of_two_divisor([self.rank_multiple, *ranks])
        self.rank_bucket = power_of_two(self.max_rank, 16, MAX_RANK)

    @property
    def facts(self) -> tuple[bool, int, int]:
        """Whether there has been any weight, the padded rank of intermediate results, and what every rank is a multiple of.

        Launches are specialised on these and a recorded CUDA graph holds them: record again when they change. They only ever widen, so
        that adapters may come and go under one graph.
        """
        return self.max_rank > 0, self.rank_bucket, self.rank_multiple


def check_slot(slot: int, num_slots: int) -> None:
    """Raises ValueError for a slot outside the table."""
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot must lie in 0..{num_slots - 1}, got {slot}. Build the table with more num_slots.")


def entry_words(weights: SlotWeights | None, offset: int, width: int) -> tuple[int, ...]:
    """The ENTRY_WORDS words of one entry whose output columns are [offset, offset + width)."""
    place = (offset, width, 0, 0)
    if weights is None:
        return (0, 0, 0, 0, *place)
    return (weights.a.data_ptr(), weights.b.data_ptr(), weights.rank, float_bits(weights.scale), *place)


def float_bits(value: float) -> int:
    """The bits of `value` as fp32, as a signed 32-bit number."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


@dataclass(frozen=True, eq=False)
class Column:
    """What one slot holds in every row of a stack: `words` [R, 8] int64 as the kernels read them (rank 0: nothing for that row).

    `weights(row)` gives the tensors behind a row, or None; whoever answers keeps them alive as long as the column lives.
    """

    words: np.ndarray
    weights: Callable[[int], SlotWeights | None]


class StackRows(Mapping[tuple[int, int], SlotWeights]):
    """A table's own rows of a stack: `entries` [J, S, 8], and its weights by (slice, slot), looked up when asked for."""

    def __init__(self, entries: torch.Tensor, columns: "list[Column | None]", first: int) -> None:
        """`columns` is the stack's own list, by slot; `first` the number of the table's first row in it."""
        self.entries, self._columns, self._first = entries, columns, first

    def __getitem__(self, place: tuple[int, int]) -> SlotWeights:
        slice, slot = place
        column = self._columns[slot]
        found = None if column is None else column.weights(self._first + slice)
        if found is None:
            raise KeyError(place)
        return found

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for slice in range(self.entries.shape[0]):
            for slot, column in enumerate(self._columns):
                if column is not None and column.words[self._first + slice, 2]:
                    yield slice, slot

    def __len__(self) -> int:
        return sum(1 for _ in self)


class LoraTableStack:
    """The tables of many groups of linears over one tensor, so that a slot changes in all of them by one small copy.

    `tables` in the order of `groups`; `entries` [R, S, 8] int64 holds their rows one after another. What a slot points to may move: kernels
    and recorded CUDA graphs read addresses from `entries`, which stays where it is. Changes are ordered on the current stream: launches
    before a `put` read the old entries, those after it the new ones.
    """

    def __init__(
        self, groups: Sequence[tuple[int, Sequence[int]]], num_slots: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """`groups` lists (in_features, out_features) of each table. Raises ValueError for a size below 1."""
        self.device, self.num_slots = torch.device(device), num_slots
        self.columns: list[Column | None] = [None] * num_slots
        sizes = [len(widths) for _, widths in groups]
        self.first_rows = tuple(sum(sizes[:i]) for i in range(len(groups)))
        places = [(sum(widths[:j]), width) for _, widths in groups for j, width in enumerate(widths)]
        self.blank = np.array([entry_words(None, *place) for place in places], dtype=np.int64)
        words = torch.from_numpy(self.blank)[:, None].expand(-1, num_slots, -1)
        self.entries = words.contiguous().to(self.device)
        self._incoming = torch.empty(self.blank.shape, dtype=torch.int64, device=self.device)
        # The largest rank of each row so far, and every bit that was set in one: what has been seen can widen no facts.
        self._largest, self._seen = np.zeros((2, len(self.blank)), dtype=np.int64)
        self.tables = tuple(
            LoraTable(k, widths, num_slots, device=device, dtype=dtype, stack=self._part(first, len(widths)))
            for (k, widths), first in zip(groups, self.first_rows, strict=True)
        )
        self._facts: tuple[tuple[bool, int, int], ...] | None = None

    @property
    def facts(self) -> tuple[tuple[bool, int, int], ...]:
        """`LoraTable.facts` of every table."""
        if self._facts is None:
            self._facts = tuple(table.facts for table in self.tables)
        return self._facts

    def _part(self, first: int, num_slices: int) -> StackRows:
        return StackRows(self.entries[first : first + num_slices], self.columns, first)

    def column(self, weights: Mapping[int, SlotWeights]) -> Column:
        """A column over tensors that lie anywhere on the device, by row. Raises ValueError as `LoraTable.set` does."""
        words = self.blank.copy()
        for table, first in zip(self.tables, self.first_rows, strict=True):
            for slice in range(table.num_slices):
                found = weights.get(first + slice)
                if found is not None:
                    table.check(slice, found)
                    words[first + slice] = entry_words(found, *self.blank[first + slice, 4:6])
        return Column(words, weights.get)

    def put(self, slot: int, column: Column | None) -> None:
        """Let `slot` hold `column` (None: nothing) from the next launch on. Nothing changes if it raises."""
        check_slot(slot, self.num_slots)
        words = self.blank if column is None else column.words
        if self.device.type == "cuda":
            pinned = torch.empty(words.shape, dtype=torch.int64, pin_memory=True)
            pinned.numpy()[:] = words
            # In two steps: a copy straight into the strided rows would allocate on the device.
            self._incoming.copy_(pinned, non_blocking=True)
            self.entries[:, slot].copy_(self._incoming)
        else:
            self.entries[:, slot].copy_(torch.from_numpy(words))
        self.columns[slot] = column
        self.expect(words[:, 2])

    def narrow(self) -> None:
        """Bring the tables' `facts` back to those of the weights that are here."""
        self._largest, self._seen = np.zeros((2, len(self.blank)), dtype=np.int64)
        self._facts = None
        for table in self.tables:
            table.narrow()
        for column in self.columns:
            if column is not None:
                self.expect(column.words[:, 2])

    def expect(self, ranks: np.ndarray) -> None:
        """Widen the tables' `facts` for an adapter of these ranks, by row [R] (0: nothing for that row), that will come."""
        if (self._seen == (self._seen | ranks)).all() and (ranks <= self._largest).all():
            return
        self._seen |= ranks
        self._largest = np.maximum(self._largest, ranks)
        for table, first in zip(self.tables, self.first_rows, strict=True):
            found = ranks[first : first + table.num_slices]
            if found.any():
                table.expect(*found[found > 0].tolist())
        self._facts = None
