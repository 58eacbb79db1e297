"""The ledger under random plans, preemptions, aborts, executor errors: nothing leaks, nothing is counted wrongly."""

import itertools
import re
from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import AdapterInfo, Batch, Request, StepResult
from workbench.features import of_batch
from workbench.loop.ledger import Ledger
from workbench.loop.plan import Plan
from workbench.loop.prefix_cache import prompt_keys
from workbench.loop.views import View
from workbench.policies import FCFS
from workbench.replay import ReplayError, replay
from workbench.testing import FixedCost, FixedShape, fixed_info

LIMITS = (
    fixed_info(),
    fixed_info(num_blocks=12, max_model_len=150, num_slots=2, max_batch_adapters=2, max_requests=4),
    fixed_info(num_blocks=40, max_batch_tokens=48, max_batch_adapters=1, num_slots=1, activation_tokens=90),
    fixed_info(can=frozenset(), max_batch_tokens=600),
    fixed_info(prefix_cache=True),
    fixed_info(prefix_cache=True, num_blocks=14, max_model_len=150, num_slots=2, max_batch_adapters=2, max_requests=5),
    fixed_info(prefix_cache=True, num_blocks=24, max_batch_tokens=48, block_tokens=8, max_model_len=150),
    fixed_info(prefix_cache=True, can=frozenset(), max_batch_tokens=600),
)
DOCUMENTS = (40, 25, 15)


def job(adapter: str) -> FinetuneJob:
    return FinetuneJob(adapter=adapter, data=RandomTokens(examples=4, tokens=40), steps=3)


def new_ledger(info, executor: FixedCost | None = None) -> tuple[Ledger, View]:
    executor = executor or FixedCost(info=info)
    ledger = Ledger(info, executor.adapter_infos, predictor=executor)
    return ledger, View(ledger, Random(0))


def request(name: str, prompt: int = 20, output: int = 5, adapter: str | None = None, **more) -> Request:
    return Request(request_id=name, arrival_s=0.0, prompt_tokens=prompt, output_tokens=output, adapter=adapter, **more)


def check_by_recount(ledger: Ledger) -> None:
    """Every counter equals what a brute-force count over requests and jobs gives."""
    shown = {"running": list(ledger.running_views), "waiting": list(ledger.waiting_views)}
    assert shown == {"running": [s.view for s in ledger.running.values()], "waiting": [s.view for s in ledger.waiting_states()]}
    info, states = ledger.info, list(ledger.requests.values())
    held = Counter(b for s in states for b in s.blocks)
    if ledger.cache is None:
        assert sorted([*held.elements(), *ledger.blocks.free]) == list(range(info.num_blocks))
    else:
        check_cache(ledger, held)
    for s in states:
        resident = s.id in ledger.running or s.id in ledger.begun
        assert resident == bool(s.blocks)
        assert s.capacity == len(s.blocks) * info.block_tokens
        assert s.context == s.request.prompt_tokens + s.generated
        assert s.capacity >= (s.context - 1 if s.phase == "running" else s.prefilled)
        assert sum(s.id in q for q in (ledger.running, ledger.begun, ledger.preempted, ledger.fresh)) == 1
    assert ledger.num_resident == sum(bool(s.blocks) for s in states) <= info.max_requests
    refs = {key: 0 for key in ledger.slots.entries}
    for s in states:
        if s.blocks and s.key is not None:
            refs[s.key] += 1
    assert refs == {key: slot.refs for key, slot in ledger.slots.entries.items()}
    assert sorted([slot.index for slot in ledger.slots.entries.values()] + ledger.slots.free) == list(range(info.num_slots))
    assert ledger.slots.num_evictable == sum(slot.refs == 0 and not slot.fresh for slot in ledger.slots.entries.values())
    ranges = sorted(ledger.arena.ranges.values())
    assert all(start >= 0 and start + rows <= info.activation_tokens for start, rows in ranges)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert {j.id: j.rows for j in ledger.jobs.values() if j.rows is not None} == {o: s for o, (s, _) in ledger.arena.ranges.items()}
    for j in ledger.jobs.values():
        busy = j.layers_left > 0 or (j.phase in ("forward", "evaluate") and j.offset > 0)
        assert busy == (j.rows is not None)


def check_cache(ledger: Ledger, held: Counter[int]) -> None:
    """Every block is held, cached or free; as many holders as counted; the keys are those of what was computed into the block."""
    cache = ledger.cache
    assert cache is not None
    assert sorted([*held, *cache.cached, *cache.free]) == list(range(ledger.info.num_blocks))
    assert cache.refs == {b: held[b] for b in {*cache.keys, *(b for b, n in held.items() if n > 1)}}
    assert set(cache.cached) <= set(cache.keys)
    assert sorted(cache.cached.values()) == list(cache.cached.values())
    assert {(v, k): b for v, table in cache.tables.items() for k, b in table.items()} == {key: b for b, key in cache.keys.items()}
    assert all(cache.tables.values())
    for s in ledger.requests.values():
        known = prompt_keys(s.request, ledger.info.block_tokens)
        for i, block in enumerate(s.blocks):
            assert block not in cache.keys or (s.key, known[i]) == cache.keys[block]


def check_found(ledger: Ledger, batch: Batch, requests: dict[str, Request]) -> None:
    """What a committed prefill has filled with prompt tokens can be found."""
    size = ledger.info.block_tokens
    for s in batch.of("prefill") if ledger.cache is not None else ():
        version = None if s.adapter is None else (s.adapter, s.version)
        filled = prompt_keys(requests[s.owner], size)[s.start // size : s.end // size]
        assert not filled or set(filled) <= set(ledger.cache.tables[version])


def check_batch(ledger: Ledger, plan: Plan, batch: Batch) -> None:
    """The batch keeps every limit, and the plan's running totals are those of the batch."""
    info = ledger.info
    recount = of_batch(batch)
    assert plan.work.values == recount.values
    assert plan.work.adapters == recount.adapters
    assert batch.num_tokens <= info.max_batch_tokens
    serving = [s for s in batch.segments if s.kind in ("prefill", "decode")]
    assert len({(s.adapter, s.version) for s in serving if s.adapter}) <= info.max_batch_adapters
    assert len({s.owner for s in batch.segments} | {b.owner for b in batch.backwards}) == len(batch.segments) + len(batch.backwards)
    assert [s.kind for s in batch.segments] == sorted(
        [s.kind for s in batch.segments], key=("finetune", "evaluate", "prefill", "decode").index
    )
    written = [b for s in serving for b in s.blocks[s.start // info.block_tokens :]]
    read = [b for s in serving for b in s.blocks[: s.start // info.block_tokens]]
    assert len(written) == len(set(written)) and not set(written) & set(read), "no row writes where another one reads or writes"
    if ledger.cache is None:
        assert len(read) == len(set(read))
    else:
        assert not set(written) & set(ledger.cache.keys), "what can be found is never written again"
        assert all(ledger.cache.holders(b) == 1 for b in written)
    for s in serving:
        assert len(s.blocks) == -(-s.end // info.block_tokens)
        assert s.adapter is None or (s.adapter, s.version) in ledger.slots.entries
    for load in batch.loads:
        assert ledger.slots.entries[load.adapter, load.version].index == load.slot
    if "mixed" not in info.can:
        assert len({s.kind for s in batch.segments}) + bool(batch.backwards) <= 1


def random_plan(rng: Random, view: View, plan: Plan) -> None:
    """Any verb in any order with any amounts, each owner once."""
    running, waiting, jobs = list(view.running), list(view.waiting), list(view.jobs)
    for some in (running, waiting, jobs):
        rng.shuffle(some)
    for request in (running + waiting)[:2]:
        if rng.random() < 0.1:
            plan.preempt(request)
        elif rng.random() < 0.05:
            plan.reject(request, "random")
    if rng.random() < 0.1:
        plan.load(rng.choice(sorted(view.adapters)))
    if rng.random() < 0.1:
        plan.evict(rng.choice(sorted(view.adapters)))
    verbs = ["decode", "prefill", "train"]
    rng.shuffle(verbs)
    within_s = rng.choice([float("inf"), 0.002, 0.006, 0.012])
    for verb in verbs:
        if verb == "decode":
            plan.decode([r for r in running if r.id not in plan.rejected], when_full=rng.choice(["preempt", "skip"]))
        elif verb == "prefill":
            some = [r for r in waiting if rng.random() < 0.7]
            skip = rng.choice([(), ("blocks", "slots", "batch_adapters")])
            plan.prefill(some, rng.choice([None, 0, 7, 64]), whole=rng.random() < 0.2, skip=skip, within_s=within_s)
        else:
            for one in jobs:
                amount = rng.choice([None, None, 1, 3, 30])
                verb = {"backward": plan.backward, "evaluate": plan.evaluate}.get(one.phase, plan.finetune)
                verb(one, amount, within_s=within_s)
    if jobs and rng.random() < 0.05 and jobs[0].id not in plan.named:
        plan.hold(jobs[0], rng.random() < 0.5)


def drain(ledger: Ledger, view: View) -> None:
    for _ in range(3000):
        if not ledger.requests:
            return
        plan = Plan(ledger)
        FCFS()(view, plan)
        if plan.empty:
            plan.decode(view.running)
        ledger.commit(ledger.apply(plan), StepResult(duration_s=0.01), ledger.now_s + 0.01)
        check_by_recount(ledger)
    raise AssertionError("the ledger did not drain")


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), info=st.sampled_from(LIMITS))
def test_nothing_leaks_under_random_plans_preemptions_aborts_and_errors(seed, info):
    rng = Random(seed)
    executor = FixedCost(info=info)
    ledger, view = new_ledger(info, executor)
    for name in ("t", "u"):
        ledger.add_job(job(name), FixedShape(DOCUMENTS, 4, 2, 1, ((20, 10), (30,))), 0.0)
    arrived: dict[str, Request] = {}
    found = 0
    for step in range(60):
        ledger.now_s = now = float(step)
        if rng.random() < 0.5:
            arriving = Request(
                request_id=f"r{step}",
                arrival_s=now,
                prompt_tokens=rng.randint(1, 90),
                output_tokens=rng.randint(1, 40),
                adapter=rng.choice([None, "a", "b", "c", "d", "e"]) if rng.random() < 0.5 else "a",
                prefix_ids=rng.choice([(), (1,), (2,), (2,)]),
            )
            arrived[arriving.request_id] = arriving
            ledger.arrive(arriving, now)
        if rng.random() < 0.05:
            executor.adapter_infos["a"] = AdapterInfo(name="a", version=executor.adapter_infos["a"].version + 1, rank=4, bytes=9)
        ledger.sync_adapters(now)
        plan = Plan(ledger)
        random_plan(rng, view, plan)
        left, before = plan.left, ledger.snapshot()
        batch = ledger.apply(plan)
        check_batch(ledger, plan, batch)
        assert (left.blocks, left.slots) == (ledger.blocks.num_free, _available(ledger, plan))
        if rng.random() < 0.2:
            evicted = [] if ledger.cache is None else [block for block, *_ in ledger.cache.evicted]
            ledger.rollback(batch)
            assert ledger.snapshot() == without(before, evicted)
            check_by_recount(ledger)
            continue
        found += sum(map(len, plan.found.values()))
        layers_done = {b.owner: rng.randint(0, b.num_layers) for b in batch.backwards if rng.random() < 0.3}
        ledger.commit(batch, StepResult(duration_s=0.5, layers_done=layers_done), now + 0.5)
        check_by_recount(ledger)
        check_found(ledger, batch, arrived)
    event("shares blocks" if found else "shares nothing")
    drain(ledger, view)
    for one in list(ledger.jobs.values()):
        ledger.stop_job(one, 99.0)
    assert ledger.in_use() == {"blocks": 0, "arena_rows": 0, "slots": 0}
    check_by_recount(ledger)


def without(snapshot: dict, evicted: list[int]) -> dict:
    """The snapshot as it is when these blocks' contents are not known any more."""
    blocks = snapshot["blocks"]
    for b in evicted:
        del blocks["keys"][b]
        if b in blocks["cached"]:
            blocks["cached"].remove(b)
            blocks["free"].append(b)
        if blocks["refs"][b] < 2:
            del blocks["refs"][b]
    return snapshot


def _available(ledger: Ledger, plan: Plan) -> int:
    """Slots that a further version could have taken in this plan, counted in the ledger after `apply`."""
    idle = [v for v, slot in ledger.slots.entries.items() if slot.refs == 0 and not slot.fresh and v not in plan.versions]
    return len(ledger.slots.free) + len(idle)


def serve_step(ledger: Ledger, view: View, now: float = 1.0, **verbs) -> Batch:
    plan = Plan(ledger)
    plan.decode(view.running)
    plan.prefill(view.waiting)
    batch = ledger.apply(plan)
    ledger.commit(batch, StepResult(duration_s=0.1), now)
    return batch


def test_rollback_restores_everything_bit_for_bit_after_preemption_eviction_and_load():
    info = fixed_info(num_slots=1, max_batch_adapters=1)
    ledger, view = new_ledger(info)
    ledger.arrive(request("x", 40, 30, "a"), 0.0)
    ledger.arrive(request("y", 40, 30, "b"), 0.1)
    serve_step(ledger, view)
    before = ledger.snapshot()
    plan = Plan(ledger)
    assert plan.preempt(view.running[0])
    assert plan.prefill(view.waiting) == 40
    batch = ledger.apply(plan)
    assert [load.adapter for load in batch.loads] == ["b"]
    assert ledger.snapshot() != before
    ledger.rollback(batch)
    assert ledger.snapshot() == before


def test_a_request_keeps_its_version_through_replacement_and_preemption():
    executor = FixedCost()
    ledger, view = new_ledger(executor.info, executor)
    ledger.arrive(request("x", 20, 9, "a"), 0.0)
    assert serve_step(ledger, view).segments[0].version == 1
    executor.adapter_infos["a"] = AdapterInfo(name="a", version=2, rank=8, bytes=1)
    ledger.arrive(request("y", 20, 9, "a"), 0.5)
    versions = {s.owner: s.version for s in serve_step(ledger, view).segments}
    assert versions == {"x": 1, "y": 2}
    plan = Plan(ledger)
    plan.preempt(view.running[0])
    ledger.commit(ledger.apply(plan), StepResult(duration_s=0.0), 2.0)
    again = serve_step(ledger, view, 3.0)
    assert {(s.owner, s.kind, s.version, s.start, s.tokens) for s in again.segments} == {
        ("x", "prefill", 1, 0, 22),
        ("y", "decode", 2, 20, 1),
    }


def test_unloading_rejects_the_waiting_and_lets_requests_in_flight_finish():
    executor = FixedCost()
    ledger, view = new_ledger(executor.info, executor)
    ledger.arrive(request("x", 20, 3, "a"), 0.0)
    serve_step(ledger, view)
    ledger.arrive(request("y", 20, 3, "a"), 1.5)
    ledger.arrive(request("z", 20, 3, "b"), 1.5)
    del executor.adapter_infos["a"]
    ledger.sync_adapters(2.0)
    assert [r.id for r in view.waiting] == ["z"]
    assert [(e[2], e[3], e[6]) for e in ledger.events if e[2] == "rejected"] == [
        ("rejected", "y", "adapter 'a' was unloaded while the request waited")
    ]
    for now in (3.0, 4.0, 5.0, 6.0):
        serve_step(ledger, view, now)
    assert {e[3] for e in ledger.events if e[2] == "finished"} == {"x", "z"}
    assert not any(ledger.in_use().values())


def test_a_preempted_request_prefills_prompt_and_generated_tokens_then_goes_on():
    ledger, view = new_ledger(fixed_info())
    ledger.arrive(request("x", 20, 4), 0.0)
    serve_step(ledger, view)
    serve_step(ledger, view, 2.0)
    plan = Plan(ledger)
    plan.preempt(view.running[0])
    ledger.commit(ledger.apply(plan), StepResult(duration_s=0.0), 2.5)
    assert view.waiting[0].prefill_left == 22
    segment = serve_step(ledger, view, 3.0).segments[0]
    assert (segment.kind, segment.start, segment.tokens, segment.samples) == ("prefill", 0, 22, True)
    segment = serve_step(ledger, view, 4.0).segments[0]
    assert (segment.kind, segment.start, segment.end) == ("decode", 22, 23)
    assert [e[5] for e in ledger.events if e[2] == "token"] == [1, 2, 3, 4]
    assert [e[2] for e in ledger.events if e[2] in ("scheduled", "preempted", "finished")] == ["scheduled", "preempted", "finished"]


def test_a_job_goes_forward_backward_window_evaluation_and_ends():
    ledger, view = new_ledger(fixed_info())
    ledger.add_job(job("t"), FixedShape((30, 20), 4, 2, 1, ((10, 5), (8,))), 0.0)
    result = {"losses": {"job:t": (100.0, 48)}, "eval_losses": {"job:t": (26.0, 13)}}
    for step in range(40):
        plan = Plan(ledger)
        for one in view.jobs:
            plan.train(one)
        if plan.empty:
            break
        ledger.commit(ledger.apply(plan), StepResult(duration_s=0.1, **result), float(step))
        check_by_recount(ledger)
    kinds = [(e[2], e[5]) for e in ledger.events if e[2] in ("committed", "optimizer_step", "eval_loss", "loss", "job_finished")]
    micro_batch = [("loss", 100 / 48), ("committed", 50.0)]
    window = [*micro_batch, *micro_batch]
    assert kinds == [
        *window,
        ("optimizer_step", 1),
        ("eval_loss", 2.0),
        *window,
        ("optimizer_step", 2),
        ("eval_loss", 2.0),
        ("job_finished", None),
    ]
    assert ledger.released == ["job:t"]
    assert not ledger.jobs
    assert not any(ledger.in_use().values())


def test_a_micro_batch_larger_than_the_arena_is_refused_with_the_field_to_raise():
    ledger, _ = new_ledger(fixed_info(activation_tokens=49))
    with pytest.raises(ValueError, match=r"activation_tokens=49.*one of 50 tokens.*EngineConfig\.activation_tokens"):
        ledger.add_job(job("t"), FixedShape((30, 20), 1), 0.0)
    assert not ledger.jobs


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request("x", 0), "prompt_tokens must be at least 1, got 0"),
        (request("x", 5, 0), "at least 1 token must be generated"),
        (request("x", 500, 20), "max_model_len=512, got 500 \\+ 20"),
        (request("x", 300, 20), "pool of 18 blocks of 16, got 319 tokens"),
    ],
)
def test_a_request_that_could_never_run_is_rejected_with_the_rule_and_the_value(asked, reason):
    ledger, _ = new_ledger(fixed_info(num_blocks=18))
    before = ledger.in_use()
    assert not ledger.arrive(asked, 1.0)
    assert [e[2] for e in ledger.events] == ["arrived", "rejected"]
    assert re.search(reason, ledger.events[-1][6])
    assert ledger.in_use() == before
    assert not ledger.requests


def test_rows_without_a_reported_token_are_an_error_that_can_be_rolled_back():
    ledger, view = new_ledger(fixed_info())
    ledger.arrive(request("x"), 0.0)
    ledger.arrive(request("y"), 0.0)
    before = ledger.snapshot()
    plan = Plan(ledger)
    plan.prefill(view.waiting)
    batch = ledger.apply(plan)
    with pytest.raises(RuntimeError, match="missing \\['y'\\]"):
        ledger.commit(batch, StepResult(duration_s=0.1, tokens={"x": 5}), 1.0)
    ledger.rollback(batch)
    assert ledger.snapshot() == before


@pytest.mark.parametrize("error", [MemoryError("out of memory"), RuntimeError("device lost")])
def test_an_error_in_the_middle_of_a_step_leaves_a_usable_partial_replay_and_nothing_held(error):
    def fails(batch):
        if batch.step == 7:
            raise error

    executor = FixedCost(fails=fails)
    requests = [request(f"r{i}", 30, 20, "ab"[i % 2]) for i in range(12)]
    with pytest.raises(ReplayError, match="executor failed") as caught:
        replay(requests, executor=executor, policy=FCFS(), planning=0.0)
    assert caught.value.__cause__ is error
    partial = caught.value.replay
    assert len(partial.steps) == len(partial.results) == 7
    assert partial.events["step"].max() == 6
    assert "executor failed" in partial.error
    assert executor.num_open == 0


def test_a_replay_that_failed_in_another_process_raises_there_and_here_the_same_error_with_what_was_done():
    def fails(view, plan):
        if view.step == 7:
            raise ValueError("my mistake")
        FCFS()(view, plan)

    requests = [request(f"r{i}", 30, 20, "ab"[i % 2]) for i in range(12)]
    with pytest.raises(ReplayError, match="my mistake") as caught:
        Parallel(n_jobs=2)(delayed(replay)(requests, executor=FixedCost(), policy=fails, planning=0.0) for _ in range(2))
    assert len(caught.value.replay.steps) == 7
    assert caught.value.replay.error == str(caught.value)
