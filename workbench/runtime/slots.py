"""The adapters' two tiers: packed versions in host memory, and the device table of slots that every layer's kernels read.

Every registered version lives in host memory for as long as it may be asked for, in one buffer (`packed`), pinned for a CUDA device. A
version in a slot has a device buffer besides, from torch's caching allocator and as large as its own rank needs: an arena with places for
the largest rank would hold 16 x rank 256 for 16 adapters of rank 8. The buffer goes when the slot gets another version.

The order of things, none of which the host waits for:
- A load is one copy on a stream of its own. A step waits on the device for the copies of the entries that it reads (`wait`), and for no
  other: a version loaded ahead (`plan.load`) travels while steps run.
- No buffer is overwritten. One that a slot lets go is reused only after the steps launched before have read it (`record_stream`).
- Entries change on the stream of the steps: those launched before read the old weights, those after it the new ones. A recorded CUDA
  graph reads addresses from the table, so weights may move under it; what it was specialised on is `LoraTable.rank_multiple`.
- A version that was made on the device (a published job) is copied to the host behind the steps. The device copy of the last such
  version stays until it is loaded, which then costs nothing, or another is published.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from kernels.layout import SegmentLayout
from kernels.lora_table import MAX_RANK, Column, LoraTableStack, float_bits
from kernels.lora_tail import LoraTails, columns_behind
from kernels.segmented_lora import Gradients, LoraTable, Low, SlotWeights, expand_, lora_gradients, shrink
from workbench.config import require
from workbench.runtime.adapters import AdapterWeights, module_path
from workbench.runtime.model import GROUPS, group_widths
from workbench.runtime.packed import Key, PackedLayout, PackedTensors, Pairs, shapes_of
from workbench.runtime.weights import Dims


class Copies:
    """Copies between the tiers on a CUDA stream of their own. Without CUDA the tiers are one, and nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def has_tiers(self) -> bool:
        """Whether the device has memory of its own."""
        return self._stream is not None

    def to_device(self, packed: PackedTensors) -> tuple[Tensor, torch.cuda.Event | None]:
        """A device buffer that will hold the version, and the event at which it does (None: it does already)."""
        if self._stream is None:
            return packed.host, None
        with torch.cuda.stream(self._stream):
            buffer = torch.empty(packed.layout.size, dtype=packed.layout.dtype, device=self.device)
            buffer.copy_(packed.host, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        buffer.record_stream(torch.cuda.current_stream(self.device))
        return buffer, arrival

    def to_host(self, packed: PackedTensors) -> None:
        """Start filling the host buffer from the version's device copy, which the current stream has written."""
        if self._stream is None or packed.staged is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            packed.host.copy_(packed.staged, non_blocking=True)
            packed.arrival = torch.cuda.Event()
            packed.arrival.record()
        packed.staged.record_stream(self._stream)

    def wait(self, arrival: torch.cuda.Event) -> None:
        """Let the current stream go on only after `arrival`."""
        torch.cuda.current_stream(self.device).wait_event(arrival)


class AdapterTable:
    """One `LoraTable` per layer and group, over entries 0 .. num_entries-1: serving slots first, then one for each job in training."""

    def __init__(self, dims: Dims, num_entries: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dims, self.num_entries, self.device, self.dtype = dims, num_entries, device, dtype
        groups = group_widths(dims)
        self.stack = LoraTableStack(list(groups.values()) * dims.num_layers, num_entries, device=device, dtype=dtype)
        tables = iter(self.stack.tables)
        self.tables: list[dict[str, LoraTable]] = [{group: next(tables) for group in groups} for _ in range(dims.num_layers)]
        self._keys = [(layer, target) for layer in range(dims.num_layers) for group in groups for target in GROUPS[group]]
        self._rows = {key: row for row, key in enumerate(self._keys)}
        self.copies = Copies(device)
        self._templates: WeakKeyDictionary[AdapterWeights, np.ndarray] = WeakKeyDictionary()
        self._largest_ranks: WeakKeyDictionary[Column, tuple[int, ...]] = WeakKeyDictionary()
        self._arrivals: dict[int, torch.cuda.Event] = {}
        self._deferred: dict[int, AdapterWeights] = {}
        self._last_staged: ref[PackedTensors] | None = None

    @property
    def facts(self) -> tuple[tuple[bool, int, int], ...]:
        """`LoraTable.facts` of every layer and group: what recorded launches are specialised on."""
        return self.stack.facts

    def expect(self, tensors: Pairs) -> None:
        """Widen `facts` for an adapter that will come, so that what is recorded now can run it then."""
        ranks = np.zeros(len(self._keys), dtype=np.int64)
        for key, (a, _) in shapes_of(tensors).items():
            ranks[self._rows[key]] = a[0]
        self.stack.expect(ranks)

    # ---- the host tier

    def admit(self, weights: AdapterWeights) -> AdapterWeights:
        """The same adapter as a version that `load` can take: packed in host memory in the table's dtype.

        Weights of that dtype become views of the packed buffer; others stay beside it as they are, so that they are saved as they came.
        """
        if weights.packed is None:
            is_on_device = any(t.device.type != "cpu" for pair in weights.tensors.values() for t in pair)
            packed = self.reserve(weights.tensors, staged=is_on_device)
            self.write(packed, weights.tensors)
            is_same = all(t.dtype == self.dtype for pair in weights.tensors.values() for t in pair)
            tensors = packed if is_same else {key: (a.cpu(), b.cpu()) for key, (a, b) in weights.tensors.items()}
            weights = replace(weights, tensors=tensors, packed=packed)
        self._templates[weights] = self._template(weights)
        return weights

    def reserve(self, like: Pairs, *, staged: bool) -> PackedTensors:
        """All the memory of a version with these shapes, to be written later; with `staged` a device copy too, where that is another
        memory. Raises torch.OutOfMemoryError."""
        layout = PackedLayout.of(shapes_of(like), self.dtype)
        return PackedTensors.allocate(layout, self.device, staged=staged and self.copies.has_tiers)

    def write(self, packed: PackedTensors, tensors: Pairs) -> None:
        """Fill reserved memory. From the device this allocates nothing there, and the way to the host is not waited for."""
        packed.write(tensors)
        if packed.staged is not None:
            self.copies.to_host(packed)
            before = None if self._last_staged is None else self._last_staged()
            if before is not None:
                before.staged = None
            self._last_staged = ref(packed)

    def _template(self, weights: AdapterWeights) -> np.ndarray:
        """The version's column [R, 8] as if its buffer lay at address 0."""
        assert weights.packed is not None
        words = self.stack.blank.copy()
        for key, (a, b) in weights.packed.layout.shapes.items():
            width_in, width_out = self.dims.linear(key[1])
            rule = (
                f"{weights.name}: A and B of {module_path(key)} must have shapes (r, {width_in}) and ({width_out}, r), r in 1..{MAX_RANK}"
            )
            require(a == (a[0], width_in) and b == (width_out, a[0]) and 1 <= a[0] <= MAX_RANK, rule, (a, b))
            words[self._rows[key], :4] = (*weights.packed.layout.offsets[key], a[0], float_bits(weights.scales[key]))
        return words

    # ---- the device tier

    def put(self, entry: int, tensors: Pairs, scales: Mapping[Key, float]) -> None:
        """Let `entry` read these tensors where they are, from the next launch on: weights in training are updated in place.

        Raises ValueError for tensors that the kernels could not read: of another dtype or device, with gaps, or not 16-byte aligned.
        """
        self.clear(entry)
        found = {self._rows[key]: SlotWeights(a.detach(), b.detach(), scales[key]) for key, (a, b) in tensors.items()}
        self.stack.put(entry, self.stack.column(found))

    def load(self, entry: int, weights: AdapterWeights) -> None:
        """Start copying an admitted version to `entry`; what reads it must `wait`. If it raises, the entry is empty."""
        self.clear(entry)
        packed = weights.packed
        assert packed is not None
        if packed.staged is not None:
            buffer, arrival, packed.staged = packed.staged, None, None
        else:
            buffer, arrival = self.copies.to_device(packed)
        self.stack.put(entry, self._column(weights, buffer))
        if arrival is not None:
            self._arrivals[entry] = arrival

    def _column(self, weights: AdapterWeights, buffer: Tensor) -> Column:
        words = self._templates[weights].copy()
        words[:, :2] += buffer.data_ptr() * (words[:, 2:3] > 0)
        assert weights.packed is not None
        layout, scales, keys = weights.packed.layout, weights.scales, self._keys

        @cache
        def find(row: int) -> SlotWeights | None:
            key = keys[row]
            return SlotWeights(*layout.view(buffer, key), scales[key]) if key in layout.shapes else None

        return Column(words, find)

    def defer(self, entry: int, weights: AdapterWeights) -> None:
        """`entry` will hold this version once something waits for it. Allocates nothing: for undoing a step that found no memory."""
        self.clear(entry)
        self._deferred[entry] = weights

    def wait(self, entries: Iterable[int]) -> None:
        """What is launched from now on may read `entries`: the device, not the host, waits for the copies to them."""
        for entry in entries:
            if entry in self._deferred:
                self.load(entry, self._deferred[entry])
            if entry in self._arrivals:
                self.copies.wait(self._arrivals.pop(entry))

    def clear(self, entry: int) -> None:
        """Forget what `entry` holds; its rows are then left as they are."""
        self._arrivals.pop(entry, None)
        self._deferred.pop(entry, None)
        if self.stack.columns[entry] is not None:
            self.stack.put(entry, None)

    def reset(self) -> None:
        """Empty every entry, and narrow `facts` to an empty table's: what an earlier replay loaded must not slow down this one."""
        for entry in range(self.num_entries):
            self.clear(entry)
        self.stack.narrow()

    def tails(self, weights: Sequence[Mapping[str, Tensor]]) -> LoraTails | None:
        """What places adapters in the tails of the layers' weights [N, K], by group; None where no weight has columns behind its rows."""
        ordered = [of_group[group] for of_group in weights for group in GROUPS]
        if not any(columns_behind(weight) for weight in ordered):
            return None
        return LoraTails(self.stack.tables, ordered, self.stack.entries, len(GROUPS))

    def largest_rank(self, kind: int, entry: int) -> int:
        """The largest rank of an entry in the linears of group number `kind`, over all layers."""
        column = self.stack.columns[entry]
        if column is None:
            return 0
        if column not in self._largest_ranks:
            by_target = column.words[:, 2].reshape(self.dims.num_layers, -1).max(0)
            bounds = np.cumsum([len(targets) for targets in GROUPS.values()])
            self._largest_ranks[column] = tuple(int(part.max()) for part in np.split(by_target, bounds[:-1]))
        return self._largest_ranks[column][kind]

    def low(self, layer: int, group: str, x: Tensor, layout: SegmentLayout) -> Low | None:
        """The first half of each row's own adapter on x [T, K], to be launched before the base product; None where there is none."""
        return shrink(x, self.tables[layer][group], layout)

    def add_(self, layer: int, group: str, y: Tensor, x: Tensor, layout: SegmentLayout, low: Low | None) -> Tensor:
        """y [T, N] += each row's own adapter on x [T, K], whose first half is `low`."""
        return expand_(y, low, self.tables[layer][group], layout)

    def gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, layout: SegmentLayout, into: Tensor | None) -> Gradients:
        """{(slice, entry): (dA [r, K], dB [N, r])} in fp32 of `add_`; its dX [T, K] is added to `into`, where that is given."""
        return lora_gradients(dy, x, self.tables[layer][group], layout, needs_dx=into is not None, into=into)[1]
