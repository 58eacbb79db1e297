"""The engine's part that knows adapters: names, versions, and the weights behind them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from workbench.config import FinetuneJob, UnknownAdapterError, did_you_mean, require
from workbench.core import AdapterInfo, Request
from workbench.runtime.adapters import MAX_RANK, AdapterWeights, load_peft, random_adapter, save_peft
from workbench.runtime.finetune import TrainState
from workbench.runtime.guards import DeviceLock
from workbench.runtime.packed import PackedTensors, Pairs
from workbench.runtime.slots import AdapterTable
from workbench.runtime.virtual import CarriedAdapter, VirtualModule, attach_adapter
from workbench.runtime.weights import FusedWeights

Version = tuple[str, int]  # adapter name, version


@dataclass(slots=True)
class KnownSequence:
    """The engine's record of one admitted request: its tokens so far, prompt first, and its row of the block tables."""

    request: Request
    tokens: list[int]
    seed: int
    row: int
    pinned: Version | None = None


class EngineAdapters:
    """A part of `Engine`: every adapter that requests may name has a current version; older ones live while somebody holds them."""

    base: PreTrainedModel
    name: str
    fused: FusedWeights
    device: torch.device
    dtype: torch.dtype
    lock: DeviceLock
    _table: AdapterTable
    _slots: dict[int, Version]
    _sequences: dict[str, KnownSequence]

    def __init__(self) -> None:
        self._current: dict[str, int] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._announced: set[Version] = set()
        self.shared_versions: set[Version] = set()  # those that parts of this engine may still load
        self._versions: dict[Version, AdapterWeights] = {}
        self._last_version: dict[str, int] = {}
        self._made_by_jobs: set[str] = set()

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Every adapter that requests may name, with its current version."""
        with self.lock:
            return dict(self._infos)

    @property
    def adapter_infos(self) -> Mapping[str, AdapterInfo]:
        """A snapshot; what it names can be loaded into a slot until the next one is taken."""
        with self.lock:
            self._announced = set(self._current.items())
            return dict(self._infos)

    def adopt(self, info: AdapterInfo, source: Any) -> None:
        """Serve the adapter that another replica's engine serves as `info`, as a new version if the name is taken."""
        other: EngineAdapters = getattr(source, "engine", source)
        with other.lock:
            weights = other._versions[info.name, info.version]
            tensors = {key: (a.to("cpu", copy=True), b.to("cpu", copy=True)) for key, (a, b) in weights.tensors.items()}
        with self.lock:
            self._register(replace(weights, tensors=tensors, packed=None))

    def load_adapter(self, name: str, directory: str | Path) -> int:
        """Load a PEFT directory under `name`, as a new version if the name is taken; returns the version.

        Requests in flight keep the version that they were admitted with. Raises ValueError for an adapter that cannot be served as is.
        """
        require(bool(name), "an adapter's name must not be empty", name)
        weights = load_peft(directory, self.fused.dims, name)
        with self.lock:
            self._made_by_jobs.discard(name)
            return self._register(weights)

    def add_random_adapters(self, ranks: Sequence[int], *, seed: int = 1, std: float = 0.02) -> tuple[str, ...]:
        """Serve adapters "adapter-0", ... of these ranks on all seven linears, A and B drawn on the device from N(0, `std`); their names.

        For speed studies: `unload_adapter` takes them away again. A name that is taken gets a new version. Raises ValueError for a rank
        outside 1..256.
        """
        for rank in ranks:
            require(1 <= rank <= MAX_RANK, f"rank must lie in 1..{MAX_RANK}", rank)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        names = tuple(f"adapter-{i}" for i in range(len(ranks)))
        with self.lock:
            for name, rank in zip(names, ranks, strict=True):  # one after another: each leaves the device before the next is drawn
                self._register(random_adapter(self.fused.dims, name, rank, generator, self.dtype, std))
        return names

    def unload_adapter(self, name: str) -> None:
        """Stop serving `name`: requests in flight finish on their version, waiting ones are rejected with a reason."""
        with self.lock:
            self._known(name)
            self._unregister(name)
            self._forget_unused()

    def save_adapter(self, name: str, directory: str | Path) -> None:
        """Write the current version as an ordinary PEFT directory (unscaled B), loadable by PEFT with equal logits."""
        with self.lock:
            self._known(name)
            save_peft(self._versions[name, self._current[name]], directory, self.name)

    def _known(self, name: str) -> None:
        if name not in self._current:
            raise UnknownAdapterError(f"no adapter is called {name!r}. {did_you_mean(name, list(self._current))}")

    def _register(self, weights: AdapterWeights) -> int:
        weights = self._table.admit(weights)
        version = self._last_version.get(weights.name, 0) + 1
        self._last_version[weights.name] = version
        self._current[weights.name] = version
        self._versions[weights.name, version] = weights
        self._infos[weights.name] = weights.info(version, self.dtype)
        self._forget_unused()
        return version

    def _unregister(self, name: str) -> None:
        del self._current[name], self._infos[name]

    def _forget_unused(self) -> None:
        used = set(self._current.items()) | self._announced | self.shared_versions
        used |= set(self._slots.values()) | {s.pinned for s in self._sequences.values() if s.pinned is not None}
        for version in [v for v in self._versions if v not in used]:
            del self._versions[version]

    def view(self, name: str | None = None) -> Any:
        """This engine's base as a `VirtualModule`, with one adapter (a PEFT model over shared weights) or none."""
        if name is None:
            return VirtualModule(self.base)
        with self.lock:
            self._known(name)
            return attach_adapter(VirtualModule(self.base), CarriedAdapter.of(self._versions[name, self._current[name]]))

    def adapter_weights(self, name: str) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, float]]:
        """{(layer, target): (A [r, K], B [N, r], scale)} of the current version. Raises UnknownAdapterError for another name."""
        with self.lock:
            self._known(name)
            weights = self._versions[name, self._current[name]]
            return {key: (*pair, weights.scales[key]) for key, pair in weights.tensors.items()}

    @contextmanager
    def borrowed_entry(self, adapter: str | None) -> Iterator[int | None]:
        """A table entry that holds the current version of `adapter` for a while; None for the base alone."""
        if adapter is None:
            yield None
            return
        self._known(adapter)
        entry = self._table.num_entries - 1
        self._table.load(entry, self._versions[adapter, self._current[adapter]])
        self._table.wait([entry])
        try:
            yield entry
        finally:
            self._table.clear(entry)

    def trained_weights(self, state: TrainState) -> AdapterWeights:
        """The job's weights as of its last optimiser step: fp32, on the CPU."""
        with self.lock:
            tensors = {key: (a.detach().to("cpu", copy=True), b.detach().to("cpu", copy=True)) for key, (a, b) in state.master.items()}
        return self._adapter_of(state.job, tensors)

    def _adapter_of(self, job: FinetuneJob, tensors: Pairs, packed: PackedTensors | None = None) -> AdapterWeights:
        names = {"name": job.adapter, "rank": job.rank, "alpha": job.alpha, "base": self.name, "use_rslora": job.use_rslora}
        return AdapterWeights(**names, tensors=tensors, packed=packed)

    def publish(self, state: TrainState, room: PackedTensors | None = None) -> int:
        """Serve the job's weights, in the model's dtype, as a new version of its adapter; requests in flight keep theirs.

        With `room` (from `AdapterTable.reserve`) it takes no more memory on the device.
        """
        with self.lock:
            if room is None:
                room = self._table.reserve(state.compute, staged=True)
            self._table.write(room, state.compute)
            return self._register(self._adapter_of(state.job, room, room))
