"""Routers before replicas that a test loads by hand: cases in which the right decision is known."""

from collections import Counter
from random import Random

import pytest
import simpy

from tests.policy_cases import one
from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.fleet.routers import AdapterAffinity, LeastLoaded, PowerOfTwo, RankAware, RoundRobin, Split, StaticSplit, place, route
from workbench.fleet.view import ArrivalView, Book, ReplicaView
from workbench.loop.ledger import Ledger
from workbench.loop.states import JobState, RequestState
from workbench.loop.views import JobView
from workbench.testing import FixedCost, FixedShape, fixed_info


class Replica:
    """A ledger with its view and its book, without a serving loop."""

    def __init__(self, number, rng, costs):
        executor = FixedCost(info=fixed_info(num_blocks=1000), **costs)
        self.ledger, self.book = Ledger(executor.info, executor.adapter_infos, predictor=executor), Book()
        self.view = ReplicaView(self.ledger, rng, number, self.book, simpy.Environment())

    def take(self, request):
        self.ledger.arrive(request, request.arrival_s)
        self.book.begin(self.ledger.requests[request.request_id])
        self.book.num_routed += 1


class Bench:
    """`num` replicas, and requests that a router spreads over them; every request has a name of its own."""

    def __init__(self, num, *, seed=0, **costs):
        rng = Random(seed)
        self.replicas = [Replica(k, rng, costs) for k in range(num)]
        self.fleet = tuple(r.view for r in self.replicas)
        self.num = 0

    def request(self, prompt=20, output=8, adapter=None, **more):
        self.num += 1
        return one(f"r{self.num}", prompt=prompt, output=output, adapter=adapter, **more)

    def arriving(self, request, slo=None):
        state = RequestState(request, 0, 0.0, request.max_tokens, slo)
        state.view = ArrivalView(state, self.replicas[0].ledger)
        return state.view

    def load(self, number, times=1, **request):
        for _ in range(times):
            self.replicas[number].take(self.request(**request))

    def ask(self, router, slo=None, **request):
        return route(router, self.arriving(self.request(**request), slo), self.fleet)

    def give(self, router, times=1, **request):
        """Where each of some requests goes that stay there."""
        found = []
        for _ in range(times):
            made = self.request(**request)
            found.append(route(router, self.arriving(made), self.fleet))
            self.replicas[found[-1]].take(made)
        return found

    def end(self, number):
        book = self.replicas[number].book
        name = next(iter(book.open))
        book.end(name)
        del self.replicas[number].ledger.requests[name]


def job_view(name="t"):
    return JobView(JobState(FinetuneJob(adapter=name, data=RandomTokens(), steps=1), FixedShape((30,), 3), 4, 90))


def test_round_robin_takes_turns_whatever_the_load():
    bench = Bench(3)
    bench.load(0, times=3, prompt=200)
    assert bench.give(RoundRobin(), times=7) == [0, 1, 2, 0, 1, 2, 0]


def test_least_loaded_counts_prompt_and_expected_output_tokens_and_forgets_what_ended():
    bench = Bench(3)
    bench.load(0, prompt=100, output=10)
    bench.load(1, times=3, prompt=20, output=10)
    bench.load(2, prompt=10, output=90)
    assert [view.outstanding_tokens for view in bench.fleet] == [110, 90, 100]
    assert bench.ask(LeastLoaded()) == 1, "three small requests are less than one large one"
    bench.end(0)
    assert bench.ask(LeastLoaded()) == 0


def test_power_of_two_takes_the_less_loaded_of_two_that_it_draws_and_never_the_fullest():
    bench = Bench(4)
    for number, tokens in enumerate((300, 100, 200, 50)):
        bench.load(number, prompt=tokens)
    found = Counter(bench.ask(PowerOfTwo()) for _ in range(600))
    assert found[0] == 0, "the fullest is never the better of two"
    # of six pairs, replica 3 is the better of three, 1 of two, 2 of one
    assert [found[k] / 600 for k in (3, 1, 2)] == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=0.06)


def test_power_of_two_draws_the_same_for_one_seed_and_others_for_another():
    draws = [[Bench.ask(bench, PowerOfTwo()) for _ in range(40)] for bench in (Bench(8, seed=1), Bench(8, seed=1), Bench(8, seed=2))]
    assert draws[0] == draws[1] != draws[2]
    assert Bench(1).ask(PowerOfTwo()) == 0


def test_affinity_keeps_an_adapter_on_one_replica_and_spreads_adapters():
    bench = Bench(4)
    where = {name: {bench.ask(AdapterAffinity(), adapter=name) for _ in range(5)} for name in "abcdef"}
    assert all(len(found) == 1 for found in where.values())
    assert len(set.union(*where.values())) >= 2


def test_affinity_never_gives_a_replica_more_than_its_bound_and_spills_to_the_next_in_rank():
    bench = Bench(4)
    found = bench.give(AdapterAffinity(bound=1.25), times=40, adapter="a")
    for n in range(1, 41):
        assert max(Counter(found[:n]).values()) <= -(-5 * n // 16), "at most ceil(1.25 n / 4)"
    assert len(set(found)) == 4
    assert set(Bench(4).give(AdapterAffinity(bound=float("inf")), times=40, adapter="a")) == {found[0]}


def test_a_replica_more_takes_adapters_over_and_moves_no_others():
    names = [f"adapter-{i}" for i in range(60)]
    before, after = ([bench.ask(AdapterAffinity(), adapter=n) for n in names] for bench in (Bench(4), Bench(5)))
    moved = [b for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {4}
    assert 3 <= len(moved) <= 25, "about a fifth"


def test_base_requests_need_no_affinity_and_go_where_the_load_is_least():
    bench = Bench(2)
    bench.load(0, prompt=100)
    assert bench.ask(AdapterAffinity()) == 1


@pytest.mark.parametrize(("kernel", "chosen"), [("padded", 0), ("unpadded", 1)])
def test_rank_aware_keeps_a_small_rank_from_a_batch_that_pads_to_a_large_one(kernel, chosen):
    """Padded: the small rank costs 8 per decode where all are of rank 8 but 64 where one is. Unpadded: 8 on both, times those there."""
    bench = Bench(2, prefill_s=0.0, decode_s=0.0, step_s=0.0, context_s=0.0)
    bench.load(0, times=4, adapter="a")
    bench.load(1, times=3, adapter="f")
    router = RankAware(kernel=kernel, rank_s=1e-6)
    costs = [router.cost_s(bench.arriving(bench.request(adapter="b")), view) for view in bench.fleet]
    padded = (5 * 8 - 4 * 8, 4 * 64 - 3 * 64)
    assert costs == pytest.approx([1e-6 * (padded[k] if kernel == "padded" else 8) * (5, 4)[k] for k in (0, 1)])
    assert bench.ask(router, adapter="b") == chosen


def test_rank_aware_puts_a_large_rank_beside_large_ones_though_more_requests_are_there():
    bench = Bench(2, prefill_s=0.0, decode_s=0.0, step_s=0.0, context_s=0.0)
    bench.load(0, times=3, adapter="a")
    bench.load(1, times=4, adapter="f")
    assert bench.ask(RankAware(kernel="padded"), adapter="f") == 1
    assert bench.ask(LeastLoaded(), adapter="f") == 0


def test_rank_aware_avoids_a_replica_whose_decode_step_would_miss_the_token_target():
    """A step of replica 0 lasts 3 ms and 8 ms for its long contexts, one of replica 1 3 ms and 2 ms for its ranks."""
    bench = Bench(2, prefill_s=0.0, decode_s=1e-3, step_s=0.0, context_s=1e-5)
    bench.load(0, times=2, prompt=400, adapter="a")
    bench.load(1, times=2, prompt=20, adapter="f")
    router = RankAware(kernel="padded", rank_s=1e-5)
    assert bench.ask(router, adapter="a", slo=SLO(itl_s=0.020)) == 0
    assert bench.ask(router, adapter="a", slo=SLO(itl_s=0.010)) == 1


def test_split_keeps_requests_from_the_training_replicas_and_jobs_from_the_serving_ones():
    bench = Bench(5)
    found = bench.give(Split(training=2, router=RoundRobin()), times=6)
    assert found == [0, 1, 2, 0, 1, 2]
    assert place(Split(training=2), job_view(), bench.fleet) == 3
    bench.replicas[3].book.num_jobs = 1
    assert place(Split(training=2), job_view(), bench.fleet) == 4
    with pytest.raises(ValueError, match="at least one of 2 replicas must serve: training must be below that, got 2"):
        Split(training=2).check(2)


def test_a_static_split_takes_the_router_of_its_fleet_unless_it_has_one():
    assert StaticSplit(2).routed(RoundRobin()) == Split(2, RoundRobin())
    assert StaticSplit(2, router=LeastLoaded()).routed(RoundRobin()) == Split(2, LeastLoaded())


def test_a_job_goes_where_fewest_jobs_are_and_a_function_is_a_router():
    bench = Bench(3)
    bench.replicas[0].book.num_jobs = 1
    assert place(LeastLoaded(), job_view(), bench.fleet) == 1
    assert bench.ask(lambda request, fleet: len(fleet) - 1) == 2


def test_a_router_sees_queues_blocks_and_adapters_and_cannot_change_them():
    bench = Bench(2)
    bench.load(0, adapter="a")
    view = bench.fleet[0]
    assert (view.outstanding, len(view.waiting), view.free.blocks, view.resident_adapters) == (1, 1, 1000, frozenset())
    assert view.outstanding_adapters == {"a": 1} and view.rank("f") == 64 and view.rank(None) == 0
    for name in ("replica", "outstanding", "_book"):
        with pytest.raises(AttributeError, match="views are read-only"):
            setattr(view, name, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdapterAffinity(bound=0.9), "bound must be at least 1, or no replica may have room, got 0.9"),
        (lambda: RankAware(kernel="mixed"), "kernel must be 'padded' or 'unpadded', got 'mixed'"),
        (lambda: Split(training=0), "training must be at least 1 replica, got 0"),
    ],
)
def test_bad_parameters_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
