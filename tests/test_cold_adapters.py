"""Adapters without files in three tiers: what a cold one costs, who makes room, and what of it the metrics tell."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.core import AdapterInfo, Request, StepResult
from workbench.latency import LatencyModel
from workbench.loop.ledger import Ledger
from workbench.loop.plan import Plan
from workbench.loop.tiers import AdapterSpec, fit_reads
from workbench.policies import FCFS, LFU, LRU, CostAware
from workbench.recorded import Recorded
from workbench.replay import ReplayError
from workbench.testing import FixedCost, fixed_info

READ_S = 0.05


def executor(tiers, *, slots=2, host=None, read_s=READ_S, sizes=None, **more):
    """FixedCost with adapters of 1 byte (unless `sizes` says more) in these tiers; a load takes 2 ms, a read 50 ms."""
    made = FixedCost(info=fixed_info(num_slots=slots, max_batch_adapters=slots, host_bytes=host, read_s=read_s), adapters={}, **more)
    for name, tier in tiers.items():
        made.adapter_infos[name] = AdapterInfo(name=name, version=1, rank=8, bytes=(sizes or {}).get(name, 1), tier=tier)
    return made


def one(name, arrival_s, adapter, output=1):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=20, output_tokens=output, adapter=adapter, max_tokens=50)


def in_turn(adapters, apart_s=1.0):
    return [one(f"r{i}", apart_s * i, name) for i, name in enumerate(adapters)]


def run(trace, made, **options):
    return wb.replay(trace, executor=made, policy=options.pop("policy", FCFS()), planning=0.0, progress=False, **options)


def events(result, kind):
    return result.events.loc[result.events["kind"] == kind, "owner"].tolist()


def test_a_cold_adapter_waits_for_its_read_a_warm_one_for_its_copy_and_a_resident_one_for_nothing():
    made = executor({"cold": "disk", "warm": "host", "hot": "gpu"}, slots=3)
    result = run(in_turn(["cold", "warm", "hot", "cold"]), made)
    alone_s = 0.004 + 20 * 4e-5
    assert result.requests["ttft_s"].tolist() == pytest.approx([alone_s + READ_S + 0.002, alone_s + 0.002, alone_s, alone_s])
    row = result.summary()
    assert (row["adapter_loads"], row["adapter_reads"], row["adapter_evictions"]) == (2, 1, 0)
    assert row["adapter_hit_share"] == 0.5 and row["adapter_host_hit_share"] == 0.5
    assert row["adapter_load_bytes"] == 2 and row["adapter_read_bytes"] == 1
    assert result.steps["predicted_s"].tolist() == pytest.approx(result.steps["duration_s"].tolist()), "the plan knew of the read"


def test_the_read_is_the_loads_part_of_the_step_and_so_the_adapters_in_the_attribution():
    result = run(in_turn(["cold"]), executor({"cold": "disk"}))
    assert result.steps["load_s"].iloc[0] == pytest.approx(READ_S + 0.002)


def test_host_memory_is_limited_so_what_was_evicted_is_read_again():
    made = executor(dict.fromkeys("abc", "disk"), slots=1, host=2)
    result = run(in_turn("abcba"), made)
    # c drops a (least recently used) and b is still there, then a again, which drops c
    assert events(result, "adapter_read") == ["a", "b", "c", "a"] and events(result, "adapter_dropped") == ["a", "c"]
    assert len(events(result, "adapter_loaded")) == 5, "one slot: every request loads"
    assert result.summary()["adapter_host_hit_share"] == pytest.approx(1 / 5)


def test_an_adapter_larger_than_what_is_left_of_host_memory_goes_through_and_evicts_nobody():
    made = executor(dict.fromkeys("ab", "disk"), slots=1, host=2, sizes={"b": 3})
    result = run(in_turn("abab"), made)
    assert events(result, "adapter_read") == ["a", "b", "b"] and events(result, "adapter_dropped") == []


@pytest.mark.parametrize("rule, gone", [(LRU(), "a"), (LFU(), "b"), (CostAware(), "b"), (lambda wanted, may_go, view: ["b"], "b")])
def test_a_rule_chooses_which_slot_is_given_up(rule, gone):
    """a was used three times, then b once; c needs a slot."""
    made = executor(dict.fromkeys("abc", "host"), slots=2)
    result = run(in_turn("aaabc"), made, evict=rule)
    assert events(result, "adapter_evicted") == [gone]
    assert list(result.settings["evict"]) == ["gpu", "host"]


def test_cost_aware_keeps_what_is_dear_to_bring_back():
    """a and b are used alike; a would come back from host memory, b (gone from there) from disk."""
    tiers = dict.fromkeys("abc", "disk")
    rules = {"host": lambda wanted, may_go, view: ["b"]}
    made = executor(tiers, slots=2, host=2, sizes={"c": 1})
    result = run(in_turn("bac"), made, evict=rules | {"gpu": CostAware()})
    assert events(result, "adapter_dropped") == ["b"] and events(result, "adapter_evicted") == ["a"]
    result = run(in_turn("bac"), made, evict=rules)
    assert events(result, "adapter_evicted") == ["b"], "least recently used, whatever it costs"


def test_old_uses_count_half_after_a_half_life():
    made = executor(dict.fromkeys("abc", "host"), slots=2)
    trace = [one("r0", 0.0, "a"), one("r1", 1.0, "a"), one("r2", 9.0, "b"), one("r3", 10.0, "c")]
    kept = {half_life: events(run(trace, made, evict=CostAware(half_life_s=half_life)), "adapter_evicted") for half_life in (1.0, 1000.0)}
    assert kept == {1.0: ["a"], 1000.0: ["b"]}


def test_a_rule_sees_live_views_of_what_may_go_and_of_nothing_else():
    seen = []

    def rule(wanted, may_go, view):
        seen.append((wanted.name, wanted.state, [(a.name, a.state, a.uses) for a in may_go], round(view.now_s, 3)))
        return [may_go[0].name]

    made = executor({"a": "host", "b": "disk", "c": "disk"}, slots=2)
    run([one("long", 0.0, "a", output=30), one("r1", 0.01, "b"), one("r2", 0.09, "c")], made, evict={"gpu": rule})
    # the long request still holds a
    assert [(s[0], s[2]) for s in seen] == [("c", [("b", "gpu", 1)])]


@pytest.mark.parametrize(
    "rule, sentence", [(lambda w, e, v: [], "must name at least one"), (lambda w, e, v: ["c"], "must name evictable adapters, got 'c'")]
)
def test_a_rule_that_names_nothing_or_another_ends_the_replay(rule, sentence):
    made = executor(dict.fromkeys("abc", "host"), slots=1)
    with pytest.raises(ReplayError, match=sentence):
        run(in_turn("ab"), made, evict=rule)


@pytest.mark.parametrize("evict, sentence", [({"disk": LRU()}, "'gpu' and 'host'"), (LRU, "an instance, not a class"), (3, "a callable")])
def test_what_is_no_rule_is_refused_before_anything_runs(evict, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(in_turn("a"), executor({"a": "host"}), evict=evict)


@dataclass
class Counts:
    """A rule with state of its own."""

    calls: int = 0

    def __call__(self, wanted, evictable, view):
        self.calls += 1
        return [evictable[self.calls % len(evictable)].name]


def test_a_rules_state_does_not_leak_into_the_next_replay_and_recorded_plays_it_again(tmp_path):
    rule = Counts()
    trace = in_turn("abcdabdcab" * 2, 0.05)
    made = executor(dict.fromkeys("abcd", "disk"), slots=2, host=3)
    first, second = (run(trace, made, evict=rule) for _ in range(2))
    assert rule.calls == 0
    pd.testing.assert_frame_equal(first.events, second.events)
    again = run(trace, Recorded(wb.load_replay(first.save(tmp_path / "saved")), predictor=made), evict=rule)
    pd.testing.assert_frame_equal(first.events, again.events)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_host_memory_never_holds_more_than_it_can_and_a_rollback_restores_it(seed):
    rng = np.random.default_rng(seed)
    names = [f"a{i}" for i in range(8)]
    sizes = {name: int(rng.integers(1, 6)) for name in names}
    tiers = {name: str(rng.choice(["disk", "disk", "host"])) for name in names}
    host = sum(sizes[n] for n in names if tiers[n] == "host") + int(rng.integers(0, 6))
    made = executor(tiers, slots=int(rng.integers(1, 4)), host=host, sizes=sizes)
    ledger = Ledger(made.info, made.adapter_infos, predictor=made)
    ledger.evict = {"host": CostAware(tier="host")} if rng.random() < 0.5 else {}
    ledger.sync_adapters(0.0)
    for k in range(12):
        ledger.now_s = k * 0.1
        ledger.arrive(one(f"r{k}", ledger.now_s, str(rng.choice(names))), ledger.now_s)
        plan = Plan(ledger)
        plan.decode(ledger.running_views)
        plan.prefill(ledger.waiting_views, skip=("slots", "batch_adapters"))
        if rng.random() < 0.3:
            plan.load(str(rng.choice(names)))
        before, expected = ledger.snapshot(), plan.work.read_s
        batch = ledger.apply(plan)
        assert sum(load.read_s for load in batch.loads) == pytest.approx(expected), "the plan's read is the step's"
        if rng.random() < 0.3:
            ledger.rollback(batch)
            assert ledger.snapshot() == before
            continue
        ledger.commit(batch, StepResult(duration_s=0.01), ledger.now_s + 0.01)
        held = ledger.host.entries
        assert ledger.host.used == sum(held.values()) <= host
        assert all(size == sizes[name] for (name, _), size in held.items())
        for name in names:
            here = ledger.host.has((name, 1), made.adapter_infos[name])
            assert here == ((name, 1) in held), "nothing is in host memory that is not accounted for"


# on a latency model


@pytest.fixture(scope="module")
def model():
    from tests.test_latency import INFO, synthetic

    return LatencyModel.fit(synthetic(noise=0.02), info=INFO)


def cold(num, size=40_000_000, tier="disk"):
    return {f"adapter-{i}": AdapterSpec(8, size, tier) for i in range(num)}


def zipf_trace(seed, num=300, adapters=1000):
    return (
        wb.traces.poisson(rate=40, duration_s=num / 40, seed=seed)
        .with_lengths("azure-conv", seed=seed, clip=(60, 4))
        .assign_adapters(adapters, popularity=wb.zipf(1.0), seed=seed)
    )


def test_a_thousand_cold_adapters_without_a_file_replay_and_popular_ones_are_hit(model):
    served = model.with_adapters(cold(1000), host_bytes=100 * 40_000_000, read_s_per_byte=1 / 3e9, load_s=1e-4, load_s_per_byte=1 / 25e9)
    assert len(served.adapter_infos) == 1000
    results = {slots: run(zipf_trace(0), served.with_limits(num_slots=slots, max_batch_adapters=slots)).summary() for slots in (4, 16)}
    for row in results.values():
        assert row["finished"] == row["requests"] and 0 < row["adapter_hit_share"] < 1 and 0 < row["adapter_host_hit_share"] < 1
        assert (
            row["adapter_load_bytes"] == 40_000_000 * row["adapter_loads"]
            and row["adapter_read_bytes"] == 40_000_000 * row["adapter_reads"]
        )
    assert results[16]["adapter_hit_share"] > results[4]["adapter_hit_share"], "more slots, more hits"


def test_a_load_from_disk_and_from_host_lasts_what_was_declared(model):
    from workbench.features import Work

    served = model.with_adapters(cold(2), read_s=1e-3, read_s_per_byte=1 / 4e9, load_s=2e-4, load_s_per_byte=1 / 20e9)
    ledger = Ledger(served.info, served.adapter_infos, predictor=served)
    view = ledger.view.adapters["adapter-0"]
    assert view.state == "disk" and view.read_s == pytest.approx(1e-3 + 0.01)
    assert view.load_s == pytest.approx(1e-3 + 0.01 + 2e-4 + 0.002)
    work = Work()
    work.add_load(40_000_000)
    assert served.predict(work) - served.predict(Work()) == pytest.approx(2e-4 + 0.002)


def test_specs_survive_saving_and_change_the_identity(model, tmp_path):
    served = model.with_adapters(cold(3), host_bytes=80_000_000, read_s_per_byte=1 / 3e9)
    again = LatencyModel.load(served.save(tmp_path / "model"))
    assert again.adapter_infos == served.adapter_infos and again.info == served.info and again.identity() == served.identity()
    assert served.identity() != model.with_adapters(cold(3, tier="host"), read_s_per_byte=1 / 3e9).identity()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"adapters": cold(1)}, "reading an adapter from disk must take time"),
        ({"adapters": cold(3, tier="host"), "host_bytes": 10**8, "read_s": 1.0}, "must fit host_bytes"),
        ({"adapters": cold(5, tier="gpu")}, "must fit its 4 slots"),
        ({"adapters": cold(1), "read_s": -1.0}, "read_s must be at least 0"),
    ],
)
def test_tiers_that_cannot_be_are_refused(model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.with_adapters(**arguments)


@pytest.mark.parametrize("spec, sentence", [((0, 1), "rank must lie"), ((8, 0), "bytes must be"), ((8, 1, "tape"), "tier must be one of")])
def test_a_spec_that_cannot_be_is_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdapterSpec(*spec)


def test_reads_are_fitted_from_measured_ones():
    sizes = np.array([1e6, 5e6, 2e7, 8e7])
    found = fit_reads(zip(sizes, 2e-3 + sizes / 3e9, strict=True))
    assert found["read_s"] == pytest.approx(2e-3) and found["read_s_per_byte"] == pytest.approx(1 / 3e9)
    with pytest.raises(ValueError, match="at least 2 reads"):
        fit_reads([(1.0, 1.0)])


def test_eviction_rules_are_an_axis_of_a_sweep(model):
    served = model.with_adapters(cold(1000), host_bytes=40 * 40_000_000, read_s_per_byte=1 / 3e9)
    found = wb.sweep(
        [FCFS()],
        trace=lambda seed: zipf_trace(seed, 100),
        executor=served,
        planning=0.0,
        axes={"evict": {"LRU": LRU(), "cost": {"gpu": CostAware(), "host": CostAware("host")}}},
        n_jobs=1,
        progress=False,
    )
    assert found.frame["evict"].tolist() == ["LRU", "cost"] and (found.frame["adapter_loads"] > 0).all()
