"""The prefix cache: what is found, by whom, at what cost, and when it is forgotten again."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.check import Workload
from workbench.config import FinetuneJob, RandomTokens
from workbench.core import AdapterInfo, Batch, Request, StepResult
from workbench.data import PREFIX_TOKENS, prompt_token_ids
from workbench.latency import LatencyModel
from workbench.loop.ledger import Ledger
from workbench.loop.plan import Plan
from workbench.loop.prefix_cache import prompt_keys
from workbench.loop.views import View
from workbench.policies import FCFS, ServeFirst
from workbench.replay import replay
from workbench.testing import FixedCost, fixed_info

WIDE = dict(prefix_cache=True, num_blocks=300, max_model_len=3000, max_batch_tokens=2048)


def request(name: str, length: int, output: int = 3, adapter: str | None = None, **more) -> Request:
    return Request(request_id=name, arrival_s=0.0, prompt_tokens=length, output_tokens=output, adapter=adapter, **more)


class Bench:
    """A ledger with the cache on, driven by hand."""

    def __init__(self, **limits):
        self.executor = FixedCost(info=fixed_info(**(WIDE | limits)))
        self.ledger = Ledger(self.executor.info, self.executor.adapter_infos, predictor=self.executor)
        self.view = View(self.ledger, Random(0))

    def arrive(self, *args, **more):
        assert self.ledger.arrive(request(*args, **more), 0.0)
        return self.ledger.requests[args[0]].view

    def run(self, plan: Plan) -> Batch:
        batch = self.ledger.apply(plan)
        self.ledger.now_s += 1.0
        self.ledger.commit(batch, StepResult(duration_s=1.0), self.ledger.now_s)
        self.ledger.sync_adapters(self.ledger.now_s)
        return batch

    def prefill(self, *views, tokens: int | None = None) -> Batch:
        plan = Plan(self.ledger)
        plan.prefill(views, tokens)
        return self.run(plan)

    def preempt(self, view) -> None:
        plan = Plan(self.ledger)
        assert plan.preempt(view)
        self.run(plan)

    def finish(self) -> None:
        while self.ledger.requests:
            plan = Plan(self.ledger)
            FCFS()(self.view, plan)
            self.run(plan)


# keys


def common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    block_tokens=st.sampled_from([16, 48, 128, 512, 700]),
    prompts=st.tuples(st.integers(1, 2200), st.integers(1, 2200)),
    shared=st.lists(st.integers(0, 5), max_size=3),
    tails=st.tuples(st.lists(st.integers(6, 7), min_size=1, max_size=2), st.lists(st.integers(6, 7), min_size=1, max_size=2)),
)
def test_keys_from_prefix_ids_are_equal_exactly_where_those_of_the_drawn_tokens_are(block_tokens, prompts, shared, tails):
    pair = [request(name, p, prefix_ids=(*shared, *tail)) for name, p, tail in zip("ab", prompts, tails, strict=True)]
    drawn = [request(r.request_id, r.prompt_tokens, prompt_token_ids=prompt_token_ids(r, vocab_size=5000)) for r in pair]
    by_prefix, by_token = ([prompt_keys(r, block_tokens) for r in some] for some in (pair, drawn))
    assert [len(k) for k in by_prefix] == [len(k) for k in by_token] == [p // block_tokens for p in prompts]
    assert common(*by_prefix) == common(*by_token)
    assert all(len(set(keys)) == len(keys) for keys in by_prefix + by_token)


def test_a_prompt_of_unknown_tokens_has_no_keys():
    assert prompt_keys(request("x", 100), 16) == []
    assert prompt_keys(request("x", 100, prompt="many words"), 16) == []
    assert len(prompt_keys(request("x", 100, prompt="many words", prompt_token_ids=(5,) * 100), 16)) == 6


# what is found


def test_a_request_begins_where_the_committed_blocks_of_an_earlier_one_end():
    bench = Bench()
    first, second = bench.arrive("x", 1100, prefix_ids=(1, 2, 3)), bench.arrive("y", 1300, prefix_ids=(1, 2, 4))
    assert (second.cached_tokens, second.prefill_left) == (0, 1300)
    bench.prefill(first)
    free = bench.view.free.blocks
    assert (second.cached_tokens, second.prefill_left, bench.ledger.in_use()["blocks"]) == (1024, 276, 69)
    plan = Plan(bench.ledger)
    assert plan.prefill(second) == 276
    assert (plan.work["prefill_tokens"], plan.work["prefill_pairs"]) == (276, (1300 * 1301 - 1024 * 1025) // 2)
    assert plan.left.blocks == free - 18  # 82 blocks, 64 of them shared
    (segment,) = bench.run(plan).segments
    assert (segment.start, segment.tokens, segment.samples, len(segment.blocks)) == (1024, 276, True, 82)
    assert segment.blocks[:64] == tuple(bench.ledger.requests["x"].blocks[:64])
    assert (second.cached_tokens, second.prefill_left) == (1024, 0)
    bench.finish()
    assert [(e[3], e[5]) for e in bench.ledger.events if e[2] == "cached"] == [("y", 1024.0)]
    assert [e[5] for e in bench.ledger.events if e[2] == "prefill"] == [1100.0, 276.0]


def test_blocks_are_found_once_their_chunk_is_committed_and_not_in_the_same_step():
    bench = Bench()
    x, y, z = (bench.arrive(name, 500, prefix_ids=(1,)) for name in "xyz")
    bench.prefill(x, y, tokens=600)
    assert (x.prefill_left, y.prefill_left) == (0, 400), "two requests in one step do not share"
    assert z.cached_tokens == 496
    cache = bench.ledger.cache
    assert cache is not None
    assert [bench.ledger.requests["x"].blocks[i] in cache.keys for i in (0, 30, 31)] == [True, True, False]
    assert not set(bench.ledger.requests["y"].blocks) & set(cache.keys), "the first one's blocks are kept"


def test_of_a_fully_cached_prompt_the_last_block_is_computed_again_in_a_block_of_its_own():
    bench = Bench()
    x, y = bench.arrive("x", 64, prefix_ids=(1,)), bench.arrive("y", 64, prefix_ids=(1,))
    bench.prefill(x)
    assert y.cached_tokens == 48
    (segment,) = bench.prefill(y).segments
    assert (segment.start, segment.tokens, segment.samples) == (48, 16, True)
    assert segment.blocks[:3] == tuple(bench.ledger.requests["x"].blocks[:3])
    assert segment.blocks[3] not in bench.ledger.requests["x"].blocks
    bench.finish()
    assert bench.ledger.in_use()["blocks"] == 0


def test_adapters_versions_and_the_base_share_nothing_with_each_other():
    bench = Bench()
    bench.prefill(*(bench.arrive(f"{name}0", 200, adapter=name, prefix_ids=(1,)) for name in ("a", "b", None)))
    later = {name: bench.arrive(f"{name}1", 200, adapter=name, prefix_ids=(1,)) for name in ("a", "b", "c", None)}
    assert {name: view.cached_tokens for name, view in later.items()} == {"a": 192, "b": 192, "c": 0, None: 192}
    bench.executor.adapter_infos["a"] = AdapterInfo(name="a", version=2, rank=8, bytes=1)
    assert {name: view.cached_tokens for name, view in later.items()} == {"a": 0, "b": 192, "c": 0, None: 192}
    bench.prefill(later["a"])
    assert later["a"].version == 2
    assert later["a"].cached_tokens == 0


def test_what_a_replaced_or_unloaded_version_computed_is_forgotten_while_its_requests_go_on():
    bench = Bench()
    old, gone = bench.arrive("old", 200, 9, adapter="a", prefix_ids=(1,)), bench.arrive("gone", 200, adapter="b", prefix_ids=(1,))
    bench.prefill(gone)
    bench.prefill(old, tokens=100)
    bench.executor.adapter_infos["a"] = AdapterInfo(name="a", version=2, rank=8, bytes=1)
    del bench.executor.adapter_infos["b"]
    bench.ledger.sync_adapters(2.0)
    cache = bench.ledger.cache
    assert cache is not None and not cache.keys
    bench.prefill(old)
    assert not cache.keys, "nor is what it computes later found"
    bench.finish()
    assert len(cache.free) == bench.ledger.info.num_blocks


def test_a_preempted_request_finds_its_own_prompt_again_but_not_its_generated_tokens():
    bench = Bench()
    view = bench.arrive("x", 100, 30, prefix_ids=(1,))
    bench.prefill(view)
    for _ in range(20):
        plan = Plan(bench.ledger)
        plan.decode(view)
        bench.run(plan)
    bench.preempt(view)
    assert (view.cached_tokens, view.prefill_left) == (96, 121 - 96)
    (segment,) = bench.prefill(view).segments
    assert (segment.start, segment.end, segment.samples) == (96, 121, True)
    events = bench.ledger.events
    assert [e[5] for e in events if e[2] == "cached"] == [96.0]
    frame = wb.metrics.request_frame([request("x", 100)], _frame(events))
    assert frame["cached_tokens"].tolist() == [0], "only what the first prefill finds is a hit"


def _frame(rows):
    from workbench.results.frames import EVENT_COLUMNS, rows_to_frame

    return rows_to_frame(rows, EVENT_COLUMNS)


# memory


def test_cached_blocks_count_as_free_and_the_longest_unused_go_first_ends_before_beginnings():
    bench = Bench(num_blocks=10, max_model_len=160)
    for name, prefix in (("x", 1), ("y", 2)):
        bench.prefill(bench.arrive(name, 64, 1, prefix_ids=(prefix,)))
    assert bench.view.free.blocks == 10
    assert bench.ledger.in_use()["blocks"] == 0
    again = bench.arrive("again", 64, 1, prefix_ids=(1,))
    assert again.cached_tokens == 48
    bench.prefill(again)  # x's first three blocks were used again, its last one was not needed
    bench.prefill(bench.arrive("big", 80, 1))  # 5 of 10: 2 free ones, then x's last block and y's last two
    probes = {prefix: bench.arrive(f"probe{prefix}", 100, prefix_ids=(prefix,)) for prefix in (1, 2)}
    assert {prefix: view.cached_tokens for prefix, view in probes.items()} == {1: 48, 2: 32}


def test_what_one_request_of_a_plan_found_is_not_evicted_for_another():
    bench = Bench(num_blocks=10, max_model_len=160)
    bench.prefill(bench.arrive("x", 96, 1, prefix_ids=(1,)))
    big, sharing = bench.arrive("big", 60, 1), bench.arrive("sharing", 96, 1, prefix_ids=(1,))
    plan = Plan(bench.ledger)
    assert plan.prefill([big, sharing]) == 60 + 16
    batch = bench.ledger.apply(plan)
    blocks = {s.owner: s.blocks for s in batch.segments}
    assert not set(blocks["big"]) & set(blocks["sharing"])
    assert len(bench.ledger.blocks.snapshot()["cached"]) == 0
    bench.ledger.rollback(batch)


def test_a_full_pool_preempts_the_youngest_that_holds_a_block_alone():
    bench = Bench(num_blocks=5, max_model_len=80)
    oldest, early, late = (
        bench.arrive("oldest", 16, 20),
        bench.arrive("early", 64, 9, prefix_ids=(1,)),
        bench.arrive("late", 48, 9, prefix_ids=(1,)),
    )
    for view in (oldest, late, early):
        bench.prefill(view)
    assert (early.cached_tokens, bench.view.free.blocks) == (48, 0)
    plan = Plan(bench.ledger)
    assert plan.decode(oldest) == (oldest,)
    assert list(plan.preempted) == ["early"], "all that `late` holds is shared with it"
    assert plan.left.blocks == 0
    bench.run(plan)
    assert bench.view.free.blocks == 0


def test_after_a_replay_nothing_is_held_or_cached():
    ledgers = []

    def watch(view, plan):
        ledgers.append(view._ledger)
        FCFS()(view, plan)

    info = fixed_info(prefix_cache=True)
    replay([request(f"r{i}", 100, prefix_ids=(1,)) for i in range(5)], executor=FixedCost(info=info), policy=watch, planning=0.0)
    cache = ledgers[0].cache
    assert (len(cache.free), cache.keys, cache.refs, cache.tables) == (info.num_blocks, {}, {}, {})


# the line


def shared_prefixes(num: int = 40, seed: int = 3) -> list[Request]:
    rng = Random(seed)
    return [
        Request(
            request_id=f"r{i}",
            arrival_s=0.0,
            prompt_tokens=rng.randint(20, 150),
            output_tokens=rng.randint(1, 30),
            adapter=rng.choice([None, "a", "b"]),
            prefix_ids=(rng.randrange(4),),
        )
        for i in range(num)
    ]


def latency_model(**limits) -> LatencyModel:
    job = FinetuneJob(adapter="t", data=RandomTokens(examples=2, tokens=64), steps=20, publish="never")
    measured = replay(shared_prefixes(), executor=FixedCost(), policy=ServeFirst(), jobs=[job], planning=0.0, until="jobs")
    return LatencyModel.fit(measured.steps, info=fixed_info(simulated=False, **limits), adapters=["a", "b"])


def test_every_executor_has_the_same_hits_and_recordings_play_again(tmp_path):
    info = fixed_info(prefix_cache=True, num_blocks=40)
    requests = shared_prefixes()
    results = [
        replay(requests, executor=executor, policy=FCFS(), planning=0.0, progress=False)
        for executor in (FixedCost(info=info), latency_model(num_blocks=40).with_limits(prefix_cache=True))
    ]
    assert (results[0].events["kind"] == "preempted").any()
    hits = results[0].requests["cached_tokens"]
    assert 0 < hits.sum() < results[0].requests["prompt_tokens"].sum()
    assert (hits < results[0].requests["prompt_tokens"]).all()
    for other in (results[1], replay(requests, executor=wb.Recorded(results[0]), policy=FCFS(), progress=False)):
        assert other.work.equals(results[0].work)
        assert other.requests["cached_tokens"].equals(hits)
    loaded = wb.load_replay(results[0].save(tmp_path))
    assert loaded.executor.prefix_cache
    assert replay(requests, executor=wb.Recorded(loaded), policy=FCFS(), progress=False).work.equals(results[0].work)
    assert loaded.summary()["prefix_hit_share"] == hits.sum() / results[0].requests["prompt_tokens"].sum()


def test_the_share_of_hits_follows_from_the_work_rows_and_is_0_without_the_cache():
    requests = shared_prefixes()
    by_switch = {}
    for is_on in (True, False):
        result = replay(requests, executor=FixedCost(info=fixed_info(prefix_cache=is_on)), policy=FCFS(), planning=0.0, progress=False)
        first = result.work[result.work["kind"] == "prefill"].groupby("owner")["start"].first()
        assert first.reindex(result.requests.index).tolist() == result.requests["cached_tokens"].tolist()
        by_switch[is_on] = result.summary()["prefix_hit_share"]
        assert by_switch[is_on] == first.sum() / sum(r.prompt_tokens for r in requests)
    assert by_switch[False] == 0 < by_switch[True]


def test_a_trace_without_prefixes_is_served_the_same_with_and_without_the_cache():
    requests = [request(f"r{i}", 50 + i, 20, "ab"[i % 2]) for i in range(30)]
    on, off = (
        replay(requests, executor=FixedCost(info=fixed_info(prefix_cache=is_on, num_blocks=30)), policy=FCFS(), planning=0.0)
        for is_on in (True, False)
    )
    assert (on.events["kind"] == "preempted").any()
    assert on.digests == off.digests
    assert on.events.equals(off.events)


def test_models_and_replays_saved_before_there_was_a_cache_load_without_one(tmp_path):
    model = latency_model()
    recorded = replay(shared_prefixes(), executor=FixedCost(), policy=FCFS(), planning=0.0)
    for folder, file, entry in (
        (model.save(tmp_path / "m"), "model.json", "info"),
        (recorded.save(tmp_path / "r"), "replay.json", "executor"),
    ):
        record = json.loads((folder / file).read_text())
        assert record[entry].pop("prefix_cache") is False
        (folder / file).write_text(json.dumps(record))
    assert not LatencyModel.load(tmp_path / "m").info.prefix_cache
    assert replay(shared_prefixes(), executor=wb.Recorded(wb.load_replay(tmp_path / "r")), policy=FCFS()).events.equals(recorded.events)


@pytest.mark.parametrize("policy", [FCFS(), ServeFirst(), wb.policies.LoquetierStatic()], ids=repr)
def test_shipped_policies_keep_the_rules_where_requests_share_prefixes(policy):
    info = fixed_info(prefix_cache=True, num_blocks=20, max_model_len=200)
    workload = Workload("shared prefixes", info, tuple(shared_prefixes(30)), 1)
    assert repr(wb.check_policy(policy, workloads=[workload])).startswith(f"{policy!r}: no finding")


def recount(requests: dict[str, Request], work, block_tokens: int) -> dict[str, int]:
    """Hits in a pool without an end: a block is there once an earlier step computed it, whoever did. Counted from the work rows alone."""
    there: set[tuple] = set()
    hits: dict[str, int] = {}

    def block(request: Request, i: int) -> tuple:
        return (request.adapter, i, request.prefix_ids[: ((i + 1) * block_tokens - 1) // PREFIX_TOKENS + 1])

    prefills = work[work["kind"] == "prefill"]
    for _, rows in prefills.groupby("step", sort=True):
        for owner in rows["owner"]:
            if owner not in hits:
                r = requests[owner]
                num = (r.prompt_tokens - 1) // block_tokens
                hits[owner] = block_tokens * next((i for i in range(num) if block(r, i) not in there), num)
        for owner, start, tokens in zip(rows["owner"], rows["start"], rows["tokens"], strict=True):
            r = requests[owner]
            there |= {block(r, i) for i in range(start // block_tokens, min(start + tokens, r.prompt_tokens) // block_tokens)}
    return hits


@pytest.mark.parametrize("max_requests", [1, 32])
def test_hits_on_the_mooncake_trace_equal_a_recount_in_a_pool_without_an_end(max_requests):
    requests = {r.request_id: r for r in wb.traces.load("mooncake-conversation").requests[:150]}
    info = fixed_info(prefix_cache=True, num_blocks=60_000, block_tokens=64, max_model_len=140_000, max_batch_tokens=8192)
    executor = FixedCost(info=replace(info, max_requests=max_requests), step_s=0.002, decode_s=1e-5, prefill_s=1e-6)
    short = [replace(r, output_tokens=3) for r in requests.values()]
    result = replay(short, executor=executor, policy=FCFS(), planning=0.0, progress=False)
    expected = recount(requests, result.work, info.block_tokens)
    assert result.requests["cached_tokens"].to_dict() == expected
    assert 0 < result.summary()["prefix_hit_share"] < 1
    np.testing.assert_allclose(result.summary()["prefix_hit_share"], sum(expected.values()) / sum(r.prompt_tokens for r in short))
