"""The device table of adapters: which weights each table entry points to, for every layer and group of linears.

Entries 0 .. num_slots-1 serve; a training job takes an entry of its own above them. Setting an entry rebuilds nothing else.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.layout import SegmentLayout
from kernels.segmented_lora import LoraTable, segmented_lora_
from workbench.runtime.model import GROUP_OF, GROUPS, group_widths
from workbench.runtime.weights import Dims

Pairs = Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, target) -> A [r, K], B [N, r]


class AdapterTable:
    """One `LoraTable` per layer and group. Weights are kept alive here as long as an entry points to them."""

    def __init__(self, dims: Dims, num_entries: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dims, self.num_entries, self.device, self.dtype = dims, num_entries, device, dtype
        self.tables: list[dict[str, LoraTable]] = [
            {
                group: LoraTable(in_features, widths, num_entries, device=device, dtype=dtype)
                for group, (in_features, widths) in group_widths(dims).items()
            }
            for _ in range(dims.num_layers)
        ]
        self.targets: list[frozenset[tuple[int, str]]] = [frozenset()] * num_entries
        self._facts: tuple[tuple[bool, int, int], ...] | None = None

    @property
    def facts(self) -> tuple[tuple[bool, int, int], ...]:
        """`LoraTable.facts` of every layer and group: what recorded launches are specialised on."""
        if self._facts is None:
            self._facts = tuple(table.facts for tables in self.tables for table in tables.values())
        return self._facts

    def expect(self, tensors: Pairs) -> None:
        """Widen `facts` for an adapter that will come, so that what is recorded now can run it then."""
        self._facts = None
        for (layer, target), (a, _) in tensors.items():
            self.tables[layer][GROUP_OF[target]].expect(a.shape[0])

    def put(self, entry: int, tensors: Pairs, scales: Mapping[tuple[int, str], float]) -> None:
        """Point `entry` to these weights, cast and copied to the device where they are not there yet."""
        self.clear(entry)
        self._facts = None
        self.targets[entry] = frozenset(tensors)  # first: a `put` that fails half-way must be cleared too
        for layer, tables in enumerate(self.tables):
            for group, targets in GROUPS.items():
                for index, target in enumerate(targets):
                    pair = tensors.get((layer, target))
                    if pair is not None:
                        a, b = (self._aligned(t.to(self.device, self.dtype).contiguous()) for t in pair)
                        tables[group].set(entry, index, a, b, scales[layer, target])

    @staticmethod
    def _aligned(tensor: Tensor) -> Tensor:
        """The tensor at an address that the kernels can load 16 bytes from; tensors mapped from a file may lie anywhere."""
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

    def clear(self, entry: int) -> None:
        if self.targets[entry]:
            for tables in self.tables:
                for table in tables.values():
                    table.clear(entry)
        self.targets[entry] = frozenset()
        self._facts = None

    def reset(self) -> None:
        """Empty every entry, and narrow `facts` to an empty table's: what an earlier replay loaded must not slow down this one."""
        for entry in range(self.num_entries):
            self.clear(entry)
        for tables in self.tables:
            for table in tables.values():
                table.narrow()

    def add_(self, layer: int, group: str, y: Tensor, x: Tensor, layout: SegmentLayout) -> Tensor:
        """y [T, N] += each row's own adapter on x [T, K]."""
        return segmented_lora_(y, x, self.tables[layer][group], layout)
