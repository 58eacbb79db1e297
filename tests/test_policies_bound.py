"""The relaxation is a bound: nobody beats it, and on small cases it is what one finds by hand."""

from random import Random

import pytest
from policy_cases import one

from workbench.bench.contest import arrivals
from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.latency import LatencyModel
from workbench.policies import CATALOGUE, LatencyBudget, ServeFirst, SLOSlack, TemporalSharing
from workbench.replay import replay
from workbench.results.bound import upper_bound
from workbench.testing import FixedCost, FixedShape, fixed_info

POLICIES = [policy() for chosen in CATALOGUE.values() for policy in chosen]


def executor(jobs=0, **costs):
    info = fixed_info(**costs.pop("limits", {}))
    return FixedCost(info=info, shapes={f"job:t{i}": FixedShape((30, 30), 400, 1) for i in range(jobs)}, **costs)


def jobs(num):
    return [FinetuneJob(adapter=f"t{i}", data=RandomTokens(), steps=400) for i in range(num)]


SECONDS = {"step_s": 1e-9, "prefill_s": 1e-3, "decode_s": 1e-9, "context_s": 0.0}  # prefills are all that takes time: 1 ms a token


def test_two_requests_that_need_the_same_time_are_one_request():
    pair = [one("x", 0.1, 60, 1), one("y", 0.1, 60, 1)]
    # 120 ms of work: 100 ms hold one of them, 120 ms both, 59 ms none
    for ttft_s, attained in ((0.100, 0.5), (0.1201, 1.0), (0.059, 0.0)):
        assert upper_bound(pair, executor=executor(**SECONDS), slo=SLO(ttft_s=ttft_s)).attainment == attained


def test_intervals_inside_the_trace_are_looked_at():
    # four requests in a burst of which two can be met; time before and after does not help them
    burst = [one(f"r{i}", 5.0, 100, 1) for i in range(4)]
    rest = [one("first", 0.0, 100, 1), one("last", 10.0, 100, 1)]
    bound = upper_bound([*rest, *burst], executor=executor(**SECONDS), slo=SLO(ttft_s=0.2001))
    assert bound.attainment == 4 / 6


def test_each_token_takes_its_share_of_a_step():
    # eight residents at most: 16 requests of 10 tokens take at least 20 steps of 10 ms
    requests = [one(f"r{i}", 1.0, 1, 10) for i in range(16)]
    slow = {"step_s": 0.010, "prefill_s": 0.0, "decode_s": 0.0, "context_s": 0.0}
    assert upper_bound(requests, executor=executor(**slow), slo=SLO(e2e_s=0.2001)).attainment == 1.0
    assert upper_bound(requests, executor=executor(**slow), slo=SLO(e2e_s=0.19)).attainment == 15 / 16
    # alone, ten tokens take ten steps
    assert upper_bound(requests, executor=executor(**slow), slo=SLO(e2e_s=0.099)).attainment == 0.0


def test_memory_bounds_what_can_be_met():
    # each holds 8 of 16 blocks for ten steps of 10 ms: 0.8 block-seconds; 0.2 s of the pool hold 3.2
    requests = [one(f"r{i}", 1.0, 128, 10) for i in range(8)]
    slow = {"step_s": 0.010, "prefill_s": 0.0, "decode_s": 0.0, "context_s": 0.0, "limits": {"num_blocks": 16, "max_model_len": 256}}
    assert upper_bound(requests, executor=executor(**slow), slo=SLO(e2e_s=0.2001)).attainment == 0.5


def test_a_target_shorter_than_a_step_is_met_by_nobody_but_single_tokens():
    requests = [one("x", 1.0, 10, 5), one("y", 1.0, 10, 1)]
    assert upper_bound(requests, executor=executor(), slo=SLO(itl_s=0.003)).attainment == 0.5
    assert upper_bound(requests, executor=executor(), slo=SLO(tpot_s=0.003)).attainment == 0.5


def test_fine_tuning_gets_the_time_that_serving_leaves():
    # a token: 50 us forward, 4 layers of 20 us: 130 us. Serving takes 0.5 s of 2 s before its deadline
    served = [one("x", 0.0, 250, 1), one("y", 0.5, 250, 1), one("end", 2.0, 1, 1)]
    bound = upper_bound(served, executor=executor(1, **SECONDS), slo=SLO(ttft_s=0.3), jobs=jobs(1))
    assert bound.attainment == 1.0
    assert bound.finetune_tokens_per_s == pytest.approx(1 / 130e-6, rel=1e-6)
    assert bound.finetune_at(1.0) == pytest.approx(1.5 / 130e-6 / 2, rel=1e-5)
    assert bound.finetune_at(1.0) < bound.finetune_at(0.5) < bound.finetune_tokens_per_s
    with pytest.raises(ValueError, match=r"attainment must lie in \[0, 1\]"):
        bound.finetune_at(1.1)


class Kinked(FixedCost):
    """A step with fine-tune tokens takes 10 ms more, and 0.1 ms for each packed token above 50."""

    def predict(self, work):
        v = work.values
        return super().predict(work) + 0.010 * (v[0] > 0) + 1e-4 * max(0.0, v[0] + v[2] + v[3] - 50)


def test_a_forwards_constant_and_hinges_bound_training_too():
    # the best step has all 256 tokens that fit: 10 ms + 256 * 50 us + 206 * 100 us; a token's backward takes 4 layers of 20 us
    token_s = (0.010 + 256 * 50e-6 + 206 * 100e-6) / 256 + 80e-6
    requests = [one(f"r{i}", 0.02 * i, 20, 5) for i in range(20)]
    shapes = {"job:t0": FixedShape((30, 30), 4000, 1)}
    bound = upper_bound(requests, executor=Kinked(shapes=shapes), slo=SLO(ttft_s=1.0), jobs=jobs(1))
    assert bound.finetune_tokens_per_s == pytest.approx(1 / token_s, rel=1e-6)
    for policy in POLICIES:
        done = replay(requests, executor=Kinked(shapes=shapes), policy=policy, jobs=jobs(1), planning=0.0, progress=False)
        committed = done.events.query("kind == 'committed' and time_s <= 0.38")["value"].sum()
        assert committed / 0.38 <= bound.finetune_tokens_per_s, policy


class Padded(FixedCost):
    """A forward takes 2 ms and 0.1 ms for each of its tokens, padded to a multiple of 64; nothing else takes time."""

    def predict(self, work):
        tokens = sum(work.values[:4])
        return (0.002 + 64e-4 * -(-tokens // 64)) * (tokens > 0)


def test_what_a_padded_forward_costs_bounds_serving_and_training_beside_it():
    # at best 256 tokens share a forward, which takes 27.6 ms: 13.8 ms for each of the two, or for 128 trained tokens
    pair = [one("x", 0.1, 128, 1), one("y", 0.1, 128, 1)]
    for ttft_s, attained in ((0.0137, 0.0), (0.0139, 0.5), (0.0275, 0.5), (0.0277, 1.0)):
        assert upper_bound(pair, executor=Padded(), slo=SLO(ttft_s=ttft_s)).attainment == attained
    # and no forward takes less than one of 64 tokens
    for ttft_s, attained in ((0.0083, 0.0), (0.0085, 1.0)):
        assert upper_bound([one("z", 0.1, 10, 1)], executor=Padded(), slo=SLO(ttft_s=ttft_s)).attainment == attained
    executor = Padded(shapes={"job:t0": FixedShape((30, 30), 40000, 1)})
    bound = upper_bound([*pair, one("end", 2.0, 1, 1)], executor=executor, slo=SLO(ttft_s=0.1), jobs=jobs(1))
    assert bound.finetune_tokens_per_s == pytest.approx(256 / 0.0276, rel=1e-6)
    assert bound.finetune_at(1.0) == pytest.approx(256 / 0.0276 * (2.0 - 0.0276) / 2.0, rel=1e-5)


class Shared(FixedCost):
    """A forward takes 10 ms and 10 us for each of its tokens; nothing else takes time."""

    def predict(self, work):
        return 0.010 * any(work.values[:4]) + 1e-5 * sum(work.values[:4])


def test_beside_decodes_that_fill_all_steps_a_trained_token_costs_no_share_of_the_forward():
    # 101 steps in which all eight residents have a row, and 248 tokens train: 12.56 ms each
    served, seconds = [one(f"r{i}", 0.0, 1, 101) for i in range(8)], 101 * 0.01256
    executor = Shared(shapes={"job:t0": FixedShape((30, 30), 40000, 1)})
    bound = upper_bound(served, executor=executor, slo=SLO(e2e_s=seconds), jobs=jobs(1), measure=(0.0, seconds + 1e-6))
    assert bound.attainment == 1.0
    assert bound.finetune_at(1.0) == pytest.approx(101 * 248 / seconds, rel=1e-3)
    assert bound.finetune_tokens_per_s == bound.finetune_at(0.0) == pytest.approx(256 / 0.01256, rel=1e-6), "alone it pays for all"


def test_who_puts_nothing_off_trains_in_the_time_that_all_of_serving_leaves():
    # 0.1 s of prefill and 200 gaps of 5 ms, two of which may be late: they may even come after the window. A trained token takes 130 us
    costs = {**SECONDS, "decode_s": 5e-3, "limits": {"max_model_len": 512}}
    served = [one("x", 0.0, 100, 201), one("end", 2.0, 1, 1)]
    slo = SLO(ttft_s=0.3, itl_s=0.01, itl_quantile=0.99)
    bound = upper_bound(served, executor=executor(1, **costs), slo=slo, jobs=jobs(1))
    assert bound.finetune_at(1.0) == pytest.approx(1.9 / 130e-6 / 2, rel=1e-3)
    assert bound.sustained_at(1.0) == pytest.approx(0.899 / 130e-6 / 2, rel=1e-3)
    assert bound.sustained_at(0.5) == pytest.approx(1.999 / 130e-6 / 2, rel=1e-3), "the one that takes less"
    with pytest.raises(ValueError, match=r"attainment must lie in \[0, 1\]"):
        bound.sustained_at(-0.1)


def test_no_more_is_trained_than_there_is():
    bound = upper_bound([one("x", 0.0), one("y", 60.0)], executor=executor(1), slo=SLO(ttft_s=1.0), jobs=jobs(1))
    assert bound.finetune_tokens_per_s == pytest.approx(400 * 60 / 60.0)


def test_what_the_bound_cannot_know_is_refused():
    with pytest.raises(ValueError, match="arrivals that do not depend on the schedule"):
        upper_bound([one("x"), one("y", 1.0, parent_id="x")], executor=executor(), slo=SLO(ttft_s=1.0))
    with pytest.raises(ValueError, match="measure must be"):
        upper_bound([one("x")], executor=executor(), slo=SLO(ttft_s=1.0))


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_beats_the_bound(seed):
    rng = Random(seed)
    # odd seeds: a burst of prefills that take all the time, where the bound is tight
    costs = {"step_s": 1e-5, "prefill_s": 1e-3} if seed % 2 else {}
    gap_s = 0.005 if seed % 2 else rng.choice([0.01, 0.03, 0.08])
    lengths = [(rng.randint(1, 200), rng.randint(1, 30), rng.choice([None, "a", "b"])) for _ in range(14)]
    requests = [one(f"r{i}", gap_s * (i + 1) * rng.random() * 2, *shape) for i, shape in enumerate(lengths)]
    slo = SLO(
        ttft_s=rng.choice([0.02, 0.06, 0.3]),
        itl_s=rng.choice([None, 0.007, 0.03]),
        tpot_s=rng.choice([None, 0.006, 0.02]),
        e2e_s=rng.choice([None, 0.2, 1.0]),
    )
    slo = SLO(ttft_s=0.4) if seed % 2 else slo
    limits = {"max_batch_tokens": 32, "max_requests": 16} if seed % 2 else rng.choice([{}, {"max_requests": 3}, {"num_blocks": 30}])
    window = (0.0, max(r.arrival_s for r in requests))
    bound = upper_bound(requests, executor=executor(1, limits=limits, **costs), slo=slo, jobs=jobs(1), measure=window)
    best = 0.0
    for policy in POLICIES:
        done = replay(
            requests,
            executor=executor(1, limits=limits, **costs),
            policy=policy,
            jobs=jobs(1),
            slo=slo,
            measure=window,
            planning=0.0,
            progress=False,
            lengths=rng.choice(["max", "oracle"]),
        )
        attained = done.requests["met"].mean()
        committed = done.events.query("kind == 'committed' and time_s <= @window[1]")["value"].sum()
        best = max(best, attained)
        assert attained <= bound.attainment + 1e-9, policy
        assert committed / window[1] <= bound.finetune_at(attained) * (1 + 1e-6), policy
        # from the first arrival until nobody is left nothing is put off
        end_s = max(window[1], done.steps.eval("start_s + plan_s + duration_s").max())
        whole = upper_bound(requests, executor=executor(1, limits=limits, **costs), slo=slo, jobs=jobs(1), measure=(0.0, end_s), points=4)
        committed = done.events.query("kind == 'committed' and time_s <= @end_s")["value"].sum()
        assert committed / end_s <= whole.sustained_at(attained) * (1 + 1e-6), policy
    assert bound.attainment > 0
    assert best > 0
    if seed % 2:
        assert best >= bound.attainment - 4 / len(requests)


class Profiled(FixedCost):
    """The shipped 8B profile's costs, without the residuals and stalls that it draws."""

    def __init__(self, model, **options):
        super().__init__(info=model.info, **options)
        self.costs = model.costs

    def predict(self, work):
        return self.costs.predict(work)


@pytest.mark.parametrize(("load", "least"), [(20.0, 0.7), (45.0, 0.6)])
def test_the_bound_on_what_lasts_is_close_to_what_policies_train_on_the_profile_of_an_h100(load, least):
    model = LatencyModel.load("h100-llama3-8b")
    requests = list(arrivals(load, 600, 20.0).requests)
    job = [FinetuneJob(adapter="t0", data=RandomTokens(), steps=4000)]
    slo, best = SLO(ttft_s=5.0, itl_s=0.045), 0.0
    for policy in (SLOSlack(), LatencyBudget(0.028, 512), LatencyBudget(0.04), ServeFirst(), TemporalSharing(every=64)):
        executor = Profiled(model, shapes={"job:t0": FixedShape((1024, 1024), 4000, 4)})
        done = replay(requests, executor=executor, policy=policy, jobs=job, slo=slo, planning=0.0, progress=False)
        end_s = float(done.steps.eval("start_s + plan_s + duration_s").max())
        bound = upper_bound(requests, executor=executor, slo=slo, jobs=job, measure=(0.0, end_s), points=4)
        attained = float(done.requests["met"].mean())
        trained = done.events.query("kind == 'committed' and time_s <= @end_s")["value"].sum() / end_s
        assert trained <= bound.sustained_at(attained), policy
        if attained > 0.99:
            best = max(best, trained / bound.sustained_at(attained))
    assert best > least
