"""Output-length predictors: none sees a length before its request has finished, and what a prediction is worth can be measured."""

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.core import Request
from workbench.lengths import History, Max, Noisy, Oracle, ladder, predictions, worth
from workbench.policies import FCFS
from workbench.replay import ReplayError
from workbench.testing import FixedCost, fixed_info


def one(name, arrival_s, output=3, adapter="a", **more):
    return Request(request_id=name, arrival_s=arrival_s, prompt_tokens=20, output_tokens=output, adapter=adapter, max_tokens=50, **more)


def run(trace, lengths, policy=None, **options):
    return wb.replay(trace, executor=FixedCost(), policy=policy or FCFS(), lengths=lengths, planning=0.0, progress=False, **options)


def expected_outputs(trace, lengths, **options):
    """What a policy saw of each request at its first sight."""
    seen = {}

    def looks(view, plan):
        for r in (*view.arrived, *view.waiting):
            seen.setdefault(r.id, r.expected_output)
        FCFS()(view, plan)

    run(trace, lengths, looks, **options)
    return seen


# A finishes at about 17 ms: b comes before that, c and d after it
TRACE = [one("a", 0.0, 3), one("b", 0.008, 40), one("c", 0.05, 7), one("d", 0.1, 9, adapter="b")]


def test_history_knows_a_length_only_once_its_request_has_finished():
    assert expected_outputs(TRACE, "history") == {"a": 50, "b": 50, "c": 3, "d": pytest.approx((3 + 7) / 2)}
    result = run(TRACE, "history")
    finished = result.events[result.events["kind"] == "finished"].set_index("owner")["time_s"]
    assert finished["a"] < 0.05 < finished["c"] < 0.1 < finished["b"], "a alone has finished when c comes, a and c when d comes"


@dataclass
class Spy:
    """Notes what it is shown, and when."""

    calls: list = field(default_factory=list)

    def begin(self, seed):
        self.calls.append(("begin", seed))

    def __call__(self, request):
        self.calls.append(("predict", request.request_id, request.output_tokens, request.max_tokens))
        return 5

    def learn(self, request, output_tokens):
        self.calls.append(("learn", request.request_id, request.output_tokens, output_tokens))

    def __deepcopy__(self, memo):
        return self


def test_a_predictor_of_ones_own_is_shown_no_true_length_and_learns_in_the_order_of_ends():
    spy = Spy()
    run(TRACE, spy, seed=7)
    events = [(verb, *rest) for verb, *rest in spy.calls]
    assert events == [
        ("begin", 7),
        ("predict", "a", None, 50),
        ("predict", "b", None, 50),
        ("learn", "a", None, 3),
        ("predict", "c", None, 50),
        ("learn", "c", None, 7),
        ("predict", "d", None, 50),
        ("learn", "d", None, 9),
        ("learn", "b", None, 40),
    ]


def test_a_request_that_was_rejected_or_aborted_teaches_nothing():
    spy = Spy()

    def rejects(view, plan):
        for r in view.waiting:
            if r.id == "b":
                plan.reject(r, "no")
            else:
                plan.prefill(r)
        plan.decode([r for r in view.running if r.id != "c" or r.generated < 2])
        for r in view.running:
            if r.id == "c" and r.generated == 2:
                plan.reject(r, "enough")

    run(TRACE, spy, rejects)
    assert [c[1] for c in spy.calls if c[0] == "learn"] == ["a", "d"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([History(), History(by="tenant", quantile=0.9), History(draw=True), Max()]))
def test_lengths_that_have_not_ended_yet_change_no_prediction(seed, predictor):
    rng = np.random.default_rng(seed)
    num = 12
    at = np.sort(rng.uniform(0, 0.2, num))
    lengths = rng.integers(1, 30, num)
    trace = [one(f"r{i}", at[i], int(lengths[i]), adapter="abc"[i % 3], tenant="xy"[i % 2]) for i in range(num)]
    longer = trace[num // 2]
    changed = [replace(r, output_tokens=50) if r is longer else r for r in trace]
    saw, ended = {}, {}

    def looks_into(into):
        def looks(view, plan):
            for r in view.arrived:
                into.setdefault(r.id, r.expected_output)
            FCFS()(view, plan)

        return looks

    for name, rows in (("as it is", trace), ("longer", changed)):
        saw[name] = {}
        result = run(rows, predictor, looks_into(saw[name]), seed=3)
        events = result.events[(result.events["kind"] == "finished") & (result.events["owner"] == longer.request_id)]
        ended[name] = events["time_s"].iloc[0]
    # until the shorter of the two would have ended nothing may differ, whatever its length will be
    for r in trace:
        if r.arrival_s < min(ended.values()):
            assert saw["as it is"][r.request_id] == saw["longer"][r.request_id]


def test_history_gives_means_quantiles_and_draws_of_its_group_and_window():
    requests = [one(f"r{i}", 0.0, adapter="a", tenant="t") for i in range(10)]

    def after(predictor, lengths, asked="r9"):
        predictor.begin(0)
        for r, length in zip(requests, lengths):
            predictor.learn(r, length)
        return predictor(replace(requests[9], request_id=asked))

    lengths = [4, 1, 3, 2]
    assert after(History(), lengths) == 2.5
    assert (
        after(History(quantile=0.5), lengths) == 2
        and after(History(quantile=0.51), lengths) == 3
        and after(History(quantile=1.0), lengths) == 4
    )
    assert after(History(window=2), lengths) == 2.5 and after(History(window=2, quantile=1.0), [9, 9, 1, 2]) == 2
    assert after(History(prior=12.0), []) == 12 and after(History(), []) == 50
    drawn = {after(History(draw=True), lengths, f"q{i}") for i in range(60)}
    assert drawn == {1, 2, 3, 4} and after(History(draw=True), lengths) == after(History(draw=True), lengths)
    other = History(by="tenant")
    other.learn(replace(requests[0], tenant="u"), 30)
    other.learn(requests[0], 10)
    assert (other(requests[1]), other(replace(requests[1], tenant="u")), other(replace(requests[1], tenant="new"))) == (10, 30, 20)


def test_the_noisy_oracle_is_the_oracle_at_zero_and_errs_by_sigma_whatever_the_order():
    trace = [one(f"r{i}", 0.0, 20) for i in range(2000)]
    trace = [replace(r, max_tokens=10**9) for r in trace]
    assert {Noisy(0.0)(r) for r in trace} == {20.0}
    noisy = Noisy(0.5)
    noisy.begin(1)
    found = np.array([noisy(r) for r in trace])
    # the standard error of a standard deviation of 2,000 draws is 1.6 %
    assert np.std(np.log(found / 20)) == pytest.approx(0.5, rel=0.06) and abs(np.mean(np.log(found / 20))) < 0.04
    assert [noisy(r) for r in trace[::-1][:9]] == found[::-1][:9].tolist()
    noisy.begin(2)
    assert noisy(trace[0]) != found[0], "another seed, other errors"


def test_predictions_stay_within_one_token_and_max_tokens():
    assert expected_outputs([one("x", 0.0)], lambda r: 0.2) == {"x": 1.0}
    assert expected_outputs([one("x", 0.0)], lambda r: 1e9) == {"x": 50.0}


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_prediction_that_is_no_length_ends_the_replay_with_the_request_named(value):
    with pytest.raises(ReplayError, match=r"must predict a number of tokens above 0 \(x\)"):
        run([one("x", 0.0)], lambda r: value)


@pytest.mark.parametrize(
    "lengths, sentence", [("histroy", "Did you mean 'history'"), (3, "or a callable"), (History, "an instance of a predictor")]
)
def test_what_is_no_predictor_is_refused_before_anything_runs(lengths, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(TRACE, lengths)


def test_a_predictor_is_copied_for_each_replay():
    predictor = History()
    first, second = expected_outputs(TRACE, predictor), expected_outputs(TRACE, predictor)
    assert first == second and predictor == History()


def test_predictions_of_a_replay_are_those_that_its_policy_saw():
    for lengths in ("history", History(quantile=0.9), Noisy(0.7), "oracle"):
        result = run(TRACE, lengths, seed=5)
        frame = predictions(result, lengths)
        seen = expected_outputs(TRACE, lengths, seed=5)
        assert frame["predicted"].to_dict() == seen and frame["output_tokens"].to_dict() == {"a": 3, "b": 40, "c": 7, "d": 9}


@dataclass(frozen=True)
class ShortestFirst:
    """One request at a time, the one that is expected to be shortest."""

    def __call__(self, view, plan):
        plan.decode(view.running)
        if not view.running:
            plan.prefill(min(view.waiting, key=lambda r: (r.expected_output, r.arrival_s, r.id)))


def trace(seed):
    rng = np.random.default_rng(seed)
    num = 40
    rows = {
        "request_id": [f"r{i}" for i in range(num)],
        "arrival_s": np.sort(rng.uniform(0, 1.0, num)),
        "prompt_tokens": 16,
        "output_tokens": np.where(rng.random(num) < 0.3, 60, 4),
        "max_tokens": 64,
        "adapter": None,
    }
    return wb.Trace.from_frame(pd.DataFrame(rows))


def test_prediction_is_worth_what_a_sweep_over_the_ladder_says():
    found = wb.sweep(
        [ShortestFirst()],
        trace=trace,
        executor=FixedCost(info=fixed_info(max_requests=1)),
        slo=wb.SLO(e2e_s=0.4),
        planning=0.0,
        seeds=range(3),
        axes={"lengths": ladder((0.3, 3.0), history=History())},
        n_jobs=1,
        progress=False,
    )
    table = worth(found).loc["ShortestFirst()"]
    assert table.loc["max", "gain"] == 0 and table.loc["oracle", "share"] == 1
    assert table.loc["oracle", "gain"] > 0.1, "knowing the lengths has to help shortest-first"
    assert min(table.loc["oracle", "mean"], table.loc["sigma 0.3", "mean"]) > table.loc["sigma 3", "mean"] + 0.05
    assert table.loc["sigma 0.3", "low"] <= table.loc["sigma 0.3", "gain"] <= table.loc["sigma 0.3", "high"]
    with pytest.raises(ValueError, match="must hold 'max' and 'oracle'"):
        worth(found, lengths="oracle")


def test_the_oracle_gives_the_length_at_which_generation_ends():
    assert Oracle()(replace(one("x", 0.0, 90))) == 50 and Oracle()(replace(one("x", 0.0), output_tokens=None)) == 50
