"""What a router sees: every replica as a read-only view, with what was given to it and has not ended."""

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING

from workbench.features import Work
from workbench.loop.states import RequestState
from workbench.loop.views import AdapterView, AdapterViews, RequestView, View

if TYPE_CHECKING:
    import simpy

    from workbench.loop.ledger import Ledger


class Book:
    """What was given to one replica: counted by the request, as a router in front of servers can."""

    __slots__ = ("adapters", "num_jobs", "num_routed", "open", "tokens")

    def __init__(self) -> None:
        self.open: dict[str, tuple[float, str | None]] = {}
        self.tokens = 0.0
        self.adapters: Counter[str | None] = Counter()
        self.num_routed = self.num_jobs = 0

    def begin(self, state: RequestState) -> None:
        tokens = state.request.prompt_tokens + state.expected_output
        self.open[state.id] = (tokens, state.adapter)
        self.tokens += tokens
        self.adapters[state.adapter] += 1

    def end(self, request_id: str) -> None:
        if request_id not in self.open:
            return
        tokens, adapter = self.open.pop(request_id)
        self.tokens = self.tokens - tokens if self.open else 0.0
        self.adapters[adapter] -= 1
        if not self.adapters[adapter]:
            del self.adapters[adapter]


class ArrivalView(RequestView):
    """A request that no replica has yet. What a replica's prefix cache would spare it: `ReplicaView.cached_tokens`."""

    __slots__ = ()

    @property
    def cached_tokens(self) -> int:
        return 0


class _WatchedAdapters(AdapterViews):
    """The adapters of one replica, whose state may depend on how far it is."""

    __slots__ = ("_watch",)

    def __init__(self, ledger: "Ledger", watch: Callable[[], None]) -> None:
        super().__init__(ledger)
        self._watch = watch

    def __getitem__(self, name: str) -> AdapterView:
        self._watch()
        return super().__getitem__(name)


class ReplicaView(View):
    """One replica, live: a policy's `View` of it (queues, `free`, `adapters`, `jobs`), and sums over the requests that it was given.

    `rng` is one generator for all replicas of a replay, seeded with its seed, for routers that draw. Between arrivals a replica may be
    behind the clock; `watch`, called before anybody looks at how far it is, brings it there, then and at every arrival to come.
    """

    __slots__ = ("_book", "_env", "_of_replica", "_watch")
    _book: Book
    _env: "simpy.Environment"
    _of_replica: "Ledger"
    _watch: Callable[[], None]

    def __init__(
        self,
        ledger: "Ledger",
        rng: Random,
        replica: int,
        book: Book,
        env: "simpy.Environment",
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        for name, value in (("_book", book), ("_env", env), ("_of_replica", ledger), ("_watch", watch)):
            object.__setattr__(self, name, value)
        super().__init__(ledger, rng, None, replica, _WatchedAdapters(ledger, watch))

    @property
    def _ledger(self) -> "Ledger":  # pyright: ignore[reportIncompatibleVariableOverride]
        self._watch()
        return self._of_replica

    @_ledger.setter
    def _ledger(self, ledger: "Ledger") -> None:
        assert ledger is self._of_replica

    @property
    def now_s(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self._env.now)

    @property
    def outstanding(self) -> int:
        """Requests that it was given and that have not ended."""
        return len(self._book.open)

    @property
    def outstanding_tokens(self) -> float:
        """Their prompt and expected output tokens, those already computed included: a router sees requests end, not progress."""
        return self._book.tokens

    @property
    def outstanding_adapters(self) -> Mapping[str | None, int]:
        """How many of them each adapter has; None is the base."""
        return dict(self._book.adapters)

    @property
    def num_routed(self) -> int:
        """Requests that it was given so far."""
        return self._book.num_routed

    @property
    def num_jobs(self) -> int:
        """Jobs that were placed on it so far."""
        return self._book.num_jobs

    @property
    def resident_adapters(self) -> frozenset[str]:
        """Adapters with a version on its device."""
        return frozenset(name for name, _ in self._of_replica.slots.entries)

    def rank(self, adapter: str | None) -> int:
        """The adapter's rank; 0 for the base, and for one that it does not know."""
        info = None if adapter is None else self._of_replica.adapter_infos.get(adapter)
        return 0 if info is None else info.rank

    def cached_tokens(self, request: RequestView) -> int:
        """Prompt tokens of an arriving request that a prefill here would find in the prefix cache."""
        state = request._state
        state.keys = None
        return len(self._ledger.cached_blocks(state)) * self.block_tokens

    def decode_s(self, *joined: RequestView) -> float:
        """Predicted seconds of one decode step of every outstanding request, with `joined` among them.

        Raises ValueError without a predictor.
        """
        predictor = self._predictor("decode_s")
        contexts = [s.context for s in self._ledger.requests.values()] + [r.prompt_tokens for r in joined]
        work = Work()
        v = work.values
        v[3] = v[7] = v[8] = len(contexts)
        v[6] = sum(contexts)
        v[9] = len({*self._book.adapters, *(r.adapter for r in joined)} - {None})
        return predictor.predict(work)

    def __repr__(self) -> str:
        return f"ReplicaView({self.replica}, outstanding={self.outstanding}, outstanding_tokens={self.outstanding_tokens:.0f})"
