"""Steps made at one go, steps made from sums and steps made row by row are the same steps, bit for bit."""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from workbench import policies
from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.core import Batch, Request
from workbench.features import INDEX, NAMES, Work
from workbench.fleet import Fleet, routers
from workbench.latency import LatencyModel
from workbench.policies import FCFS
from workbench.recorded import Recorded
from workbench.replay import Replay, replay
from workbench.testing import FixedCost, fixed_info


@cache
def model() -> LatencyModel:
    """Fitted to made-up steps with correlated noise: its residuals come in whole blocks and wrap around."""
    rng, num = np.random.default_rng(0), 250
    values = np.zeros((num, len(NAMES)))
    decodes, kind = rng.integers(0, 9, num), rng.integers(0, 3, num)
    values[:, INDEX["decode_tokens"]] = values[:, INDEX["samples"]] = values[:, INDEX["requests"]] = decodes
    values[:, INDEX["decode_context"]] = decodes * rng.integers(1, 200, num)
    values[:, INDEX["prefill_tokens"]] = np.where(kind == 1, rng.integers(1, 200, num), 0)
    values[:, INDEX["finetune_tokens"]] = np.where(kind == 2, rng.integers(1, 128, num), 0)
    values[:, INDEX["backward_layers"]] = np.where(kind == 2, rng.integers(0, 5, num), 0)
    values[:, INDEX["backward_token_layers"]] = values[:, INDEX["backward_layers"]] * 64
    cost = FixedCost(context_s=3.1e-6)
    seconds = [cost.predict(Work(row)) for row in values] * (1 + np.repeat(rng.normal(0, 0.1, num // 5), 5))
    info = fixed_info(simulated=False)
    return LatencyModel.fit(pd.DataFrame(values, columns=list(NAMES)).assign(duration_s=seconds), info=info)


class OneByOne(LatencyModel):
    """The same model, but every repeated step is a step of its own."""

    @property
    def preview(self):
        raise AttributeError("no jumps")


class RowByRow:
    """The same model, but it reads every row of every batch."""

    def __init__(self, one: LatencyModel) -> None:
        self.one = one

    def __getattr__(self, name):
        if name in ("preview", "simulate"):
            raise AttributeError("row by row only")
        return getattr(self.one, name)


def made(kind=LatencyModel, **limits):
    """The model as `kind`, under these limits."""
    one = model().with_limits(**limits)
    if kind is RowByRow:
        return RowByRow(one)
    one.__class__ = kind
    return one


@dataclass
class Repeats:
    """Repeats whatever it plans, or sometimes does not, or so often; decodes all, or all but one; trains or not."""

    seed: int
    trains: bool = False
    some: bool = False
    rng: Random | None = None

    def __call__(self, view, plan):
        self.rng = self.rng or Random(self.seed)
        leaves_out = self.some and len(view.running) > 1 and view.step % 5 == 0
        plan.decode(view.running[1:] if leaves_out else view.running)
        plan.prefill(view.waiting, 40)
        for job in view.jobs if self.trains else ():
            plan.train(job, within_s=0.02)
        if self.rng.random() < 0.5:
            plan.stop_on_arrival()
        if self.rng.random() < 0.3:
            plan.stop_after(0.008)
        if self.rng.random() < 0.9:
            plan.repeat(self.rng.choice([None, None, 0, 1, 3, 17]))


def trace_of(rng: Random, num: int, rate: float) -> list[Request]:
    out, now = [], 0.0
    for i in range(num):
        now += rng.expovariate(rate)
        sizes = {"prompt_tokens": rng.randint(1, 100), "output_tokens": rng.choice([1, 2, 30, rng.randint(1, 120)])}
        parent = {"parent_id": f"r{i - 1}", "think_s": 0.01} if i and rng.random() < 0.1 else {}
        out.append(Request(request_id=f"r{i}", arrival_s=now, adapter=rng.choice(("b", "a", None)), **sizes, **parent))
    return out


def assert_same(first: Replay, second: Replay) -> None:
    for name in ("events", "steps", "work", "requests", "jobs"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)
    assert first.digests == second.digests
    assert first.results == second.results
    assert first.tape == second.tape


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_a_jump_is_its_steps_bit_for_bit_and_so_are_steps_from_sums(data):
    seed, rate = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([2.0, 20.0, 200.0]))
    limits = {"num_blocks": data.draw(st.sampled_from([18, 30, 200])), "max_requests": data.draw(st.sampled_from([1, 4, 12]))}
    limits |= {"prefix_cache": data.draw(st.booleans()), "block_tokens": data.draw(st.sampled_from([1, 7, 16])), "max_batch_adapters": 2}
    limits["num_blocks"] *= 16 // limits["block_tokens"]
    policy = Repeats(seed, trains=data.draw(st.booleans()), some=data.draw(st.booleans()))
    jobs = [FinetuneJob(adapter="t", data=RandomTokens(examples=4, tokens=30), steps=8, accumulation=2, publish="step")]
    until = data.draw(st.sampled_from([None, 0.7]))
    options = {"policy": policy, "jobs": jobs, "seed": seed, "planning": data.draw(st.sampled_from([0.0, 0.0013])), "until": until}
    trace = trace_of(Random(seed), data.draw(st.integers(1, 25)), rate)
    at_once, one_by_one, row_by_row = (
        replay(trace, executor=made(kind, **limits), slo=SLO(ttft_s=1.0), progress=False, **options)
        for kind in (LatencyModel, OneByOne, RowByRow)
    )
    event("jumps" if at_once.history.num_runs < at_once.num_steps else "no jump")
    event("preempts" if (at_once.events["kind"] == "preempted").any() else "no preemption")
    assert_same(at_once, one_by_one)
    assert_same(at_once, row_by_row)
    again = replay(trace, executor=Recorded(at_once), slo=SLO(ttft_s=1.0), progress=False, **options)
    pd.testing.assert_frame_equal(at_once.events, again.events, check_exact=True)


def test_repeated_decodes_become_few_runs_and_asking_at_every_step_gives_the_same_events():
    trace = trace_of(Random(3), 20, 5.0)
    repeated, asked = (
        replay(trace, executor=made(num_blocks=400), policy=policy, planning=0.0, progress=False)
        for policy in (FCFS(), lambda view, plan: (plan.decode(view.running), plan.prefill(view.waiting)))
    )
    assert repeated.history.num_runs < asked.history.num_runs / 4 == asked.num_steps / 4
    pd.testing.assert_frame_equal(repeated.events, asked.events, check_exact=True)
    pd.testing.assert_frame_equal(repeated.steps, asked.steps, check_exact=True)


def test_the_last_step_of_a_jump_is_the_one_in_which_a_request_arrives():
    asked = []

    def policy(view, plan):
        asked.append((view.now_s, len(view.waiting)))
        plan.decode(view.running)
        plan.prefill(view.waiting)
        plan.repeat()

    trace = [Request(request_id=f"r{i}", arrival_s=0.2 * i, prompt_tokens=8, output_tokens=100) for i in range(2)]
    result = replay(trace, executor=made(), policy=policy, planning=0.0, progress=False)
    assert [waiting for _, waiting in asked[:3]] == [1, 0, 1]
    ends = result.steps["end_s"].to_numpy()
    assert asked[2][0] == ends[np.searchsorted(ends, 0.2)]


def test_a_preview_is_what_the_steps_then_take():
    one, other = made(), made()
    for executor in (one, other):
        executor.begin([], seed=5)
    work = Work([0, 0, 0, 3, 0, 0, 90, 3, 3, 1, 0, 0, 0, 0, 0, 0, 0])
    predicted, drawn = one.preview(work, 40)
    one.skip(7)
    assert one.preview(work, 3)[1] != drawn[:3]
    for k in range(7):
        assert predicted[k] == other.predict(work)
        assert drawn[k] == _simulated(other, work)
        work.values[INDEX["decode_context"]] += 3
    assert _simulated(one, work) == _simulated(other, work)


def _simulated(executor: LatencyModel, work: Work) -> float:
    return executor.simulate(work, Batch(step=0))


REPEATING = (
    policies.FCFS(),
    policies.InferenceOnly(),
    policies.ServeFirst(),
    policies.ChunkedPrefill(),
    policies.FCFSSkip(),
    policies.MemoryLookahead(),
    policies.AffinityCluster(),
    policies.RankAware(),
    policies.TokenCoserving(),
    policies.LatencyBudget(),
    policies.TemporalSharing(every=9),
    policies.LoquetierStatic(),
    policies.LoquetierScalable(steps=9),
)


@dataclass
class NeverRepeats:
    """Another policy, asked at every step."""

    policy: Any

    def __call__(self, view, plan):
        self.policy(view, plan)
        plan.repeat(0)


@pytest.mark.parametrize("policy", REPEATING, ids=repr)
@pytest.mark.parametrize("num_jobs", [0, 2])
def test_shipped_policies_that_repeat_decide_as_when_asked_at_every_step(policy, num_jobs):
    trace = trace_of(Random(1), 40, 30.0)
    data = RandomTokens(examples=4, tokens=30)
    jobs = [FinetuneJob(adapter=f"t{k}", data=data, steps=8, accumulation=2, arrival_s=0.3 * k) for k in range(num_jobs)]
    first, second = (
        replay(trace, executor=made(num_blocks=40), policy=one, jobs=jobs, planning=0.0, progress=False)
        for one in (policy, NeverRepeats(policy))
    )
    if num_jobs:
        counts = isinstance(policy, (policies.TemporalSharing, policies.LoquetierStatic))
        assert (first.history.num_runs < second.history.num_runs) >= counts
        pd.testing.assert_frame_equal(first.events, second.events, check_exact=True)
        pd.testing.assert_frame_equal(first.steps, second.steps, check_exact=True)
        return
    assert first.history.num_runs < first.num_steps == second.history.num_runs
    for name in ("events", "steps", "work"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)


@dataclass
class Trains:
    """Decodes all, prefills and trains with what is left of a step, by `train` or by the verb and amount of the phase; counts its calls."""

    calls: list[float]
    repeats: bool
    verb: str
    first: bool = False

    def __deepcopy__(self, memo):
        return self

    def __call__(self, view, plan):
        self.calls.append(view.now_s)
        if not self.first:
            plan.decode(view.running)
        plan.prefill(view.waiting, 64)
        for job in view.jobs:
            if self.verb == "train":
                plan.train(job, within_s=0.02)
            elif job.phase == "forward":
                plan.finetune(job, 24)
            elif job.phase == "backward":
                plan.backward(job, 3, within_s=0.05)
            else:
                plan.evaluate(job, 20)
        if self.first:
            plan.decode(view.running)
        plan.repeat(None if self.repeats and not view.waiting else 0)


@pytest.mark.parametrize("kind", [LatencyModel, RowByRow])
@pytest.mark.parametrize(("verb", "first", "asks"), [("train", False, 0.6), ("amounts", False, 0.8), ("train", True, 1.0)])
def test_training_that_is_repeated_goes_on_row_for_row_as_when_asked_at_every_step(kind, verb, first, asks):
    trace = trace_of(Random(4), 40, 12.0)
    data = RandomTokens(examples=6, tokens=90)
    options = {"steps": 12, "accumulation": 2, "publish": "step", "evaluation": RandomTokens(examples=2, tokens=50), "evaluate_every": 3}
    jobs = [FinetuneJob(adapter=f"t{k}", data=data, arrival_s=0.4 * k, **options) for k in range(2)]
    often: list[float] = []
    seldom: list[float] = []
    asked, repeated = (
        replay(trace, executor=made(kind, num_blocks=60), policy=policy, jobs=jobs, until="jobs", planning=0.0, progress=False)
        for policy in (Trains(often, False, verb, first), Trains(seldom, True, verb, first))
    )
    for name in ("events", "steps", "work", "requests", "jobs"):
        pd.testing.assert_frame_equal(getattr(asked, name), getattr(repeated, name), check_exact=True)
    assert asked.digests == repeated.digests
    assert set(asked.jobs["outcome"]) == {"finished"} and {"evaluate", "backward", "prefill"} < set(asked.work["kind"])
    assert len(seldom) <= asks * len(often)


def looks(request, fleet):
    """A router that goes by how far each replica is."""
    seen = [
        (sum(r.generated for r in view.running), view.free.blocks, view.step, 0.0 if view.last is None else view.last.duration_s)
        for view in fleet
    ]
    return seen.index(min(seen))


ROUTERS = (routers.RoundRobin(), routers.LeastLoaded(), routers.AdapterAffinity(), routers.RankAware(), routers.PowerOfTwo(), looks)


def on_fleets(router, seed, **options):
    """The same replay on a fleet that looks ahead and on one that does not."""
    jobs = [FinetuneJob(adapter="t", data=RandomTokens(examples=4, tokens=30), steps=8, accumulation=2, publish="step")]
    trace, options = trace_of(Random(seed), 60, 60.0), {"planning": 0.0013, "progress": False, "seed": seed} | options
    return [
        replay(
            trace,
            executor=Fleet(made(kind, num_blocks=40), 3, router=router, homes={"a": 0}),
            policy=Repeats(seed, trains=True),
            jobs=jobs,
            **options,
        )
        for kind in (LatencyModel, OneByOne)
    ]


@pytest.mark.parametrize("until", [None, 0.9])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: getattr(r, "__name__", type(r).__name__))
def test_replicas_that_look_ahead_make_the_steps_that_they_would_make_one_by_one(router, until):
    ahead, one_by_one = on_fleets(router, 5, until=until)
    assert sum(part.history.num_runs for part in ahead.replicas) < 0.8 * sum(part.history.num_runs for part in one_by_one.replicas)
    for first, second in zip(ahead.replicas, one_by_one.replicas, strict=True):
        assert_same(first, second)


def test_a_replica_is_cut_only_by_what_comes_to_it_unless_the_router_looks():
    runs = []
    for router in (routers.RoundRobin(), lambda request, fleet: (fleet[0].free, routers.RoundRobin().route(request, fleet))[1]):
        trace = [Request(request_id=f"r{k}", arrival_s=0.05 * k, prompt_tokens=8, output_tokens=120) for k in range(24)]
        result = replay(trace, executor=Fleet(made(num_blocks=400), 8, router=router), policy=FCFS(), planning=0.0, progress=False)
        runs.append(sum(part.history.num_runs for part in result.replicas))
    assert runs[0] < runs[1] / 2


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_stopped_replay_holds_the_steps_that_ended_whether_it_looked_ahead_or_not(num_replicas):
    def stops(request, fleet):
        if request.id == "r40":
            raise KeyboardInterrupt
        return sum(view.num_routed for view in fleet) % num_replicas

    ahead, one_by_one = on_fleets(stops, 7) if num_replicas > 1 else (stopped(LatencyModel), stopped(OneByOne))
    assert ahead.interrupted and one_by_one.interrupted
    for first, second in zip(getattr(ahead, "replicas", [ahead]), getattr(one_by_one, "replicas", [one_by_one]), strict=True):
        pd.testing.assert_frame_equal(first.steps, second.steps, check_exact=True)
        pd.testing.assert_frame_equal(first.events, second.events, check_exact=True)


def stopped(kind):
    """A replay on one device that is stopped when its last request arrives, in the middle of a step."""
    trace = [Request(request_id=f"r{k}", arrival_s=0.3 * k, prompt_tokens=8, output_tokens=120) for k in range(4)]

    def lengths(request):
        if request.request_id == "r3":
            raise KeyboardInterrupt
        return 1.0

    return replay(trace, executor=made(kind, num_blocks=400), policy=FCFS(), planning=0.0, progress=False, lengths=lengths)
