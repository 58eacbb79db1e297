"""Other ways to apply adapters than segmented LoRA, for ablations: `EngineConfig(lora=...)` chooses one of `TABLES`.

Each is an adapter table whose `add_` and `gradients` differ; everything else of the engine is the same.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.layout import SegmentLayout
from kernels.lora_loop import lora_loop_, lora_loop_gradients
from kernels.segmented_lora import Low
from workbench.runtime.adapters import AdapterWeights
from workbench.runtime.model import GROUPS
from workbench.runtime.packed import Key, Pairs, shapes_of
from workbench.runtime.slots import AdapterTable, Gradients


class LoopTable(AdapterTable):
    """A torch loop over the batch's runs of one adapter, three launches for each linear and run, as a user of PEFT would write it."""

    def tails(self, weights: Sequence[Mapping[str, Tensor]]) -> None:
        return None

    def low(self, layer: int, group: str, x: Tensor, layout: SegmentLayout) -> None:
        return None

    def add_(self, layer: int, group: str, y: Tensor, x: Tensor, layout: SegmentLayout, low: Low | None) -> Tensor:
        return lora_loop_(y, x, self.tables[layer][group], layout)

    def gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, layout: SegmentLayout, into: Tensor | None) -> Gradients:
        return lora_loop_gradients(dy, x, self.tables[layer][group], layout, into=into)


class OffTable(AdapterTable):
    """No adapter is applied: every row gets the base model's output, which is wrong, and jobs learn nothing. A bound on speed only.

    Loads are still planned and copied: their cost is that of the tiers, not of applying an adapter.
    """

    @property
    def facts(self) -> tuple[tuple[bool, int, int], ...]:
        return ()

    def tails(self, weights: Sequence[Mapping[str, Tensor]]) -> None:
        return None

    def low(self, layer: int, group: str, x: Tensor, layout: SegmentLayout) -> None:
        return None

    def add_(self, layer: int, group: str, y: Tensor, x: Tensor, layout: SegmentLayout, low: Low | None) -> Tensor:
        return y

    def gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, layout: SegmentLayout, into: Tensor | None) -> Gradients:
        return {}


class PaddedTable(AdapterTable):
    """Every adapter with zero rows of A and zero columns of B up to the largest rank that the table knows of.

    That is what kernels with one rank for a whole batch need (Punica's BGMV, arXiv 2310.18547; S-LoRA, arXiv 2311.03285, measures the
    cost against its unpadded MBGMV). The rank is that of the largest adapter served or trained, in whichever batch: weights lie padded in
    memory, so that the bytes are really read and the products really made. A linear that an adapter leaves out stays out.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rank = 0
        self._keys_expected: set[Key] = set()
        self._loaded: dict[int, AdapterWeights] = {}
        self._trained: dict[int, tuple[Pairs, Mapping[Key, float]]] = {}
        self._padded: WeakKeyDictionary[AdapterWeights, AdapterWeights] = WeakKeyDictionary()

    def expect(self, tensors: Pairs) -> None:
        self._keys_expected |= set(tensors)
        self._grow(tensors)
        super().expect(self._blank(tensors))

    def _blank(self, keys) -> Pairs:
        """Tensors without content that tell the padded rank."""
        pair = (torch.empty(self.rank, 0), torch.empty(0, self.rank))
        return dict.fromkeys(keys, pair)

    def _grow(self, tensors: Pairs) -> None:
        """Raise the common rank to that of `tensors`; whatever lies in the table is padded anew then."""
        rank = max((a[0] for a, _ in shapes_of(tensors).values()), default=0)
        if rank <= self.rank:
            return
        self.rank = rank
        self._padded.clear()
        loaded, trained = dict(self._loaded), dict(self._trained)
        for entry in (*loaded, *trained):
            self.clear(entry)
        self.stack.narrow()
        super().expect(self._blank(self._keys_expected))
        for entry, weights in loaded.items():
            self.load(entry, weights)
            self.wait([entry])
        for entry, held in trained.items():
            self.put(entry, *held)

    def load(self, entry: int, weights: AdapterWeights) -> None:
        assert weights.packed is not None
        self._grow(weights.packed)
        if weights not in self._padded:
            self._padded[weights] = self._pad(weights)
        super().load(entry, self._padded[weights])
        self._loaded[entry] = weights

    def _pad(self, weights: AdapterWeights) -> AdapterWeights:
        """The version as another one of the padded rank, with the same product on every row."""
        packed = weights.packed
        assert packed is not None
        packed.staged = None
        pairs = {key: padded_pair(*packed[key], self.rank) for key in packed}
        alphas = {key: weights.scales[key] * self.rank for key in packed}
        return self.admit(AdapterWeights(name=weights.name, rank=self.rank, alpha=1.0, alphas=alphas, tensors=pairs))

    def put(self, entry: int, tensors: Pairs, scales: Mapping[Key, float]) -> None:
        """As `AdapterTable.put`; the tensors move into padded memory, so that what is written to them later is read there."""
        self._grow(tensors)
        padded = {key: padded_pair(a, b, self.rank) for key, (a, b) in tensors.items()}
        super().put(entry, padded, scales)
        for key, (a, b) in tensors.items():
            wide_a, wide_b = padded[key]
            a.data, b.data = wide_a[: a.shape[0]], wide_b[:, : b.shape[1]]
        self._trained[entry] = (tensors, scales)

    def clear(self, entry: int) -> None:
        self._loaded.pop(entry, None)
        self._trained.pop(entry, None)
        super().clear(entry)

    def reset(self) -> None:
        self.rank = 0
        self._keys_expected.clear()
        self._padded.clear()
        super().reset()

    def gradients(self, layer: int, group: str, dy: Tensor, x: Tensor, layout: SegmentLayout, into: Tensor | None) -> Gradients:
        found = super().gradients(layer, group, dy, x, layout, into)
        ranks = {place: self._trained[place[1]][0][layer, GROUPS[group][place[0]]][0].shape[0] for place in found}
        return {place: (da[: ranks[place]], db[:, : ranks[place]].contiguous()) for place, (da, db) in found.items()}


def padded_pair(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, K] and B [N, rank] that begin as A [r, K] and B [N, r] and go on with zeros."""
    wide_a, wide_b = a.new_zeros((rank, a.shape[1])), b.new_zeros((b.shape[0], rank))
    wide_a[: a.shape[0]], wide_b[:, : b.shape[1]] = a, b
    return wide_a, wide_b


TABLES: Mapping[str, type[AdapterTable]] = {"segmented": AdapterTable, "padded": PaddedTable, "loop": LoopTable, "off": OffTable}
