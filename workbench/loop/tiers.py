"""Where adapters lie: in a device slot, in host memory of limited size, or on disk; and which make room for the next.

An adapter that is not in host memory is read from disk first (`ExecutorInfo.read_s + bytes * read_s_per_byte`), inside the step that copies
it to its slot, and stays in host memory until an eviction rule gives it up. What lies in a slot may leave host memory: its slot keeps it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from workbench.config import did_you_mean, require
from workbench.core import AdapterInfo, ExecutorInfo
from workbench.loop.pools import Version
from workbench.loop.views import AdapterView

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger
    from workbench.loop.reserve import Reservation

Tier = Literal["gpu", "host", "disk"]
TIERS: tuple[Tier, ...] = ("gpu", "host", "disk")
Rule = Callable[[AdapterView, Sequence[AdapterView], Any], Sequence[str]]  # policy.Evict


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter without files, for replays on a latency model: its rank, its bytes, and where it lies when a replay begins."""

    rank: int
    bytes: int
    tier: Tier = "disk"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 256, "rank must lie in 1..256", self.rank)
        require(self.bytes >= 1, "bytes must be at least 1", self.bytes)
        require(self.tier in TIERS, f"tier must be one of {TIERS}", self.tier)


def infos_of(adapters: Mapping[str, AdapterSpec | AdapterInfo]) -> dict[str, AdapterInfo]:
    """The adapters as an executor announces them, specs as version 1."""
    return {
        name: AdapterInfo(name=name, version=1, rank=a.rank, bytes=a.bytes, tier=a.tier) if isinstance(a, AdapterSpec) else a
        for name, a in adapters.items()
    }


def check_tiers(adapters: Mapping[str, AdapterInfo], info: ExecutorInfo) -> None:
    """Raise ValueError where the adapters do not fit the tiers that they begin in, or reading from disk would take no time."""
    on_gpu = [a for a in adapters.values() if a.tier == "gpu"]
    require(len(on_gpu) <= info.num_slots, f"adapters that begin on the device must fit its {info.num_slots} slots", len(on_gpu))
    held = sum(a.bytes for a in adapters.values() if a.tier != "disk")
    limit = inf if info.host_bytes is None else info.host_bytes
    step = "Let some begin on disk, or raise host_bytes."
    require(held <= limit, f"adapters that begin in host memory or on the device must fit host_bytes={limit}", held, step)
    reads = info.host_bytes is not None or any(a.tier == "disk" for a in adapters.values())
    step = "Declare read_s_per_byte (1 / the disk's bytes a second), or fit it: tiers.fit_reads."
    require(not reads or info.read_s + info.read_s_per_byte > 0, "reading an adapter from disk must take time", info.read_s, step)


def fit_reads(samples: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Measured reads as (bytes, seconds) -> {"read_s", "read_s_per_byte"}, both at least 0, by least squares on relative errors.

    Pass it on: `model.with_adapters(specs, **fit_reads(samples))`. Raises ValueError for fewer than two samples, or a time of 0.
    """
    import numpy as np
    from scipy.optimize import nnls

    rows = [(float(size), float(seconds)) for size, seconds in samples]
    require(len(rows) >= 2, "a fit needs at least 2 reads", len(rows))
    require(all(seconds > 0 for _, seconds in rows), "a read must take time", min(seconds for _, seconds in rows))
    sizes, seconds = np.array(rows).T
    scale = sizes.max()
    fixed, per_byte = nnls(np.column_stack([1 / seconds, sizes / scale / seconds]), np.ones(len(rows)))[0]
    return {"read_s": float(fixed), "read_s_per_byte": float(per_byte / scale)}


def eviction_rules(evict: Any) -> dict[str, Rule]:
    """One rule for both tiers, or a mapping of "gpu" and "host" to rules; None, and a tier left out, mean least recently used."""
    rules = {} if evict is None else dict(evict) if isinstance(evict, Mapping) else {"gpu": evict, "host": evict}
    for tier, rule in rules.items():
        if tier not in ("gpu", "host"):
            raise ValueError(f"evict must map 'gpu' and 'host' to rules, got {tier!r}. {did_you_mean(str(tier), ('gpu', 'host'))}")
        require(callable(rule) and not isinstance(rule, type), "an eviction rule must be a callable (an instance, not a class)", rule)
    return rules


class HostMemory:
    """Which adapter versions lie in host memory. Changes come in pairs that undo each other."""

    __slots__ = ("entries", "gone", "info", "is_seeded", "used")

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.entries: dict[Version, int] = {}
        self.gone: set[Version] = set()
        self.used = 0
        self.is_seeded = False

    @property
    def limit(self) -> float:
        return inf if self.info.host_bytes is None else self.info.host_bytes

    def seed(self, ledger: "Ledger") -> None:
        """Put every adapter where it begins, once."""
        self.is_seeded = True
        for info in ledger.adapter_infos.values():
            version = (info.name, info.version)
            if info.tier == "disk":
                continue
            if self.used + info.bytes <= self.limit:
                self.put(version, info.bytes)
            if info.tier == "gpu":
                ledger.slots.load(version, info.bytes, 0, fresh=False)

    def has(self, version: Version, info: AdapterInfo) -> bool:
        """Whether it is there; a version that never was elsewhere (a published one) came there with its making, and counts once loaded."""
        return version in self.entries or (info.tier != "disk" and version not in self.gone)

    def read_s(self, version: Version, info: AdapterInfo) -> float:
        """Seconds to bring it there."""
        return 0.0 if self.has(version, info) else self.info.read_s + info.bytes * self.info.read_s_per_byte

    def put(self, version: Version, size_bytes: int) -> None:
        self.entries[version] = size_bytes
        self.used += size_bytes

    def drop(self, version: Version) -> None:
        self.used -= self.entries.pop(version)

    def forget(self, version: Version) -> None:
        """From now on it is on disk alone."""
        self.gone.add(version)

    def unforget(self, version: Version) -> None:
        self.gone.remove(version)


def bring_to_host(step: "Reservation", version: Version, info: AdapterInfo, keep: Collection[Version]) -> float:
    """Bring a version that is about to be loaded to host memory, evicting others; the seconds that reading it takes.

    One that finds no room there, because the rest is needed by the same step, goes through to its slot and does not stay.
    """
    ledger, undo = step.ledger, step.undo
    host, read_s = ledger.host, ledger.host.read_s(version, info)
    if version in host.entries:
        return 0.0
    while info.bytes <= host.limit < host.used + info.bytes:
        candidates = [v for v in host.entries if v not in keep]
        if not candidates:
            break
        victim = choose(ledger, "host", version[0], candidates)
        undo.append((host.put, (victim, host.entries[victim])))
        host.drop(victim)
        _forget(host, victim, undo)
        step.adapter_moves("adapter_dropped", victim, None)
    if host.used + info.bytes <= host.limit:
        undo.append((host.drop, (version,)))
        host.put(version, info.bytes)
    else:
        _forget(host, version, undo)
    if read_s:
        step.adapter_moves("adapter_read", version, float(info.bytes))
    return read_s


def _forget(host: HostMemory, version: Version, undo: list[Any]) -> None:
    if version not in host.gone:
        undo.append((host.unforget, (version,)))
        host.forget(version)


def choose(ledger: "Ledger", tier: Literal["gpu", "host"], wanted: str, candidates: Sequence[Version]) -> Version:
    """The version that gives up its place in `tier`: one that no request can name any more, or what the rule says.

    Raises ValueError for a rule that names nothing, or something else than it may.
    """
    infos = ledger.adapter_infos
    stale = [v for v in candidates if v[0] not in infos or infos[v[0]].version != v[1]]
    if stale:
        return min(stale)
    rule = ledger.evict.get(tier)
    if rule is None or wanted not in infos:
        return min(candidates, key=lambda v: (ledger.uses.get(v[0], (0, -inf))[1], v))
    versions = {v[0]: v for v in sorted(candidates)}
    names = list(rule(AdapterView(ledger, wanted), [AdapterView(ledger, name) for name in versions], ledger.view))
    require(bool(names), f"the eviction rule {rule!r} must name at least one of the evictable adapters", names)
    if names[0] not in versions:
        raise ValueError(
            f"the eviction rule {rule!r} must name evictable adapters, got {names[0]!r}. {did_you_mean(names[0], list(versions))}"
        )
    return versions[names[0]]
