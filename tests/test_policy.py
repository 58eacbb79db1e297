"""Views cannot be written through; plan verbs take what fits and say why not the rest."""

import copy
from itertools import accumulate
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.config import SLO, FinetuneJob, RandomTokens
from workbench.core import Request, StepResult
from workbench.loop.ledger import Ledger
from workbench.loop.plan import Plan
from workbench.policy import AdapterView, JobView, PlanError, RequestView, Room, View, policy_label
from workbench.testing import FixedCost, FixedShape, fixed_info

DOCUMENTS = (40, 24)


class Bench:
    """A ledger with a view, driven by hand: each step lasts 1 s."""

    def __init__(self, slo=None, **limits):
        self.executor = FixedCost(info=fixed_info(**limits))
        self.ledger = Ledger(self.executor.info, self.executor.adapter_infos, predictor=self.executor, slo=slo)
        self.view = View(self.ledger, Random(0))

    def arrive(self, name, prompt=20, output=8, adapter=None):
        request = Request(request_id=name, arrival_s=self.ledger.now_s, prompt_tokens=prompt, output_tokens=output, adapter=adapter)
        assert self.ledger.arrive(request, self.ledger.now_s)
        return self.of(name)

    def job(self, adapter="t", documents=DOCUMENTS, num=3, **shape):
        job = FinetuneJob(adapter=adapter, data=RandomTokens(), steps=1)
        self.ledger.add_job(job, FixedShape(documents, num, **shape), self.ledger.now_s)
        return self.view.jobs[-1]

    def of(self, name):
        return self.ledger.requests[name].view

    def plan(self):
        return Plan(self.ledger)

    def run(self, plan):
        batch = self.ledger.apply(plan)
        self.ledger.now_s += 1.0
        self.ledger.commit(batch, StepResult(duration_s=1.0), self.ledger.now_s)
        return batch

    def running(self, *names, prompt=20, output=8, adapter=None):
        """Requests that have prefilled and can decode."""
        views = []
        for name in names:
            views.append(self.arrive(name, prompt, output, adapter))
            plan = self.plan()
            plan.prefill(views[-1])
            self.run(plan)
        return views


# views


def test_a_policy_cannot_write_through_any_view():
    bench = Bench()
    request = bench.arrive("x", adapter="a")
    job, adapter = bench.job(), bench.view.adapters["a"]
    before = bench.ledger.snapshot()
    for view in (request, job, adapter, bench.view):
        names = [n for n in dir(type(view)) if not n.startswith("__")] + ["anything"]
        for name in names:
            with pytest.raises(AttributeError):
                setattr(view, name, 1)
            with pytest.raises(AttributeError):
                delattr(view, name)
    for room in (bench.view.limits, bench.view.free, bench.plan().left):
        with pytest.raises(AttributeError):
            room.tokens = 10**9
    with pytest.raises(TypeError):
        bench.view.adapters["a"] = adapter
    assert isinstance(bench.view.running, tuple)
    assert isinstance(bench.view.waiting, tuple)
    assert isinstance(bench.view.jobs, tuple)
    with pytest.raises(TypeError, match="views are live"):
        copy.deepcopy(request)
    assert bench.ledger.snapshot() == before


def test_a_view_is_live_and_hides_the_true_output_length():
    bench = Bench()
    request = bench.arrive("x", prompt=20, output=3, adapter="a")
    assert (request.prefill_left, request.generated, request.version, request.blocks) == (20, 0, None, 0)
    plan = bench.plan()
    plan.prefill(request, 15)
    bench.run(plan)
    assert (request.prefill_left, request.version, request.blocks) == (5, 1, 2)
    assert bench.view.waiting == (request,)
    plan = bench.plan()
    plan.prefill(request)
    bench.run(plan)
    assert (request.prefill_left, request.generated, request.first_token_s) == (0, 1, 2.0)
    assert bench.view.running == (request,)
    assert request.max_tokens == 512 - 20
    assert request.expected_output == 492.0
    hidden = {name for name in dir(request) if not name.startswith("_")}
    assert not hidden & {"output_tokens", "limit", "request"}


def test_due_follows_the_requests_own_slo():
    bench = Bench(slo=SLO(ttft_s=2.0, itl_s=0.1))
    request = bench.arrive("x")
    assert request.due_s == 2.0
    plan = bench.plan()
    plan.prefill(request)
    bench.run(plan)
    assert request.due_s == pytest.approx(1.1)
    assert Bench().arrive("y").due_s == float("inf")


def test_job_view_counts_documents_layers_and_tokens_left():
    bench = Bench()
    job = bench.job(num=2, evaluate_every=1, evaluation_documents=((10,), (6, 6)))
    assert (job.phase, job.next_tokens, job.left_tokens, job.layers, job.evaluate_left) == ("forward", (40, 24), 128, 4, 0)
    for tokens, left in ((30, (10, 24)), (20, (14,)), (14, ())):
        plan = bench.plan()
        assert plan.finetune(job, tokens) == tokens
        bench.run(plan)
        assert job.next_tokens == left
    assert (job.phase, job.layers_left, job.committed_tokens) == ("backward", 4, 0)
    plan = bench.plan()
    assert plan.backward(job, 3) == 3
    bench.run(plan)
    assert (job.layers_left, job.committed_tokens) == (1, 0)
    plan = bench.plan()
    assert plan.train(job) == 1
    bench.run(plan)
    assert (job.phase, job.committed_tokens, job.left_tokens, job.evaluate_left) == ("evaluate", 64, 64, 22)
    plan = bench.plan()
    assert plan.train(job) == 10
    bench.run(plan)
    assert job.evaluate_left == 12


def test_adapter_view_says_where_it_is_and_who_wants_it():
    bench = Bench()
    bench.arrive("x", adapter="a")
    bench.arrive("y", adapter="a")
    a = bench.view.adapters["a"]
    assert (a.state, a.waiting, a.running, a.uses, a.pinned) == ("host", 2, 0, 0, False)
    assert a.load_s == pytest.approx(0.002)
    assert a.ready_s == pytest.approx(0.002)
    plan = bench.plan()
    plan.prefill(bench.of("x"))
    bench.run(plan)
    assert (a.state, a.waiting, a.running, a.uses, a.pinned, a.last_used_s) == ("gpu", 1, 1, 1, True, 1.0)
    assert list(bench.view.adapters) == list("abcdef")
    assert isinstance(a, AdapterView)


def test_last_step_says_what_was_really_done():
    bench = Bench()
    request, job = bench.arrive("x"), bench.job()
    plan = bench.plan()
    plan.prefill(request, 5)
    plan.finetune(job)
    batch = bench.ledger.apply(plan)
    result = StepResult(duration_s=0.5)
    bench.ledger.commit(batch, result, 0.5)
    bench.ledger.last = (batch, result, 0.0, 0.4, 0.1)
    last = bench.view.last
    assert last.work == (("job:t", "finetune", 64), ("x", "prefill", 5))
    assert (last.start_s, last.duration_s, last.predicted_s, last.plan_s, last.stopped_early) == (0.0, 0.5, 0.4, 0.1, False)


# limits


def test_tokens_bound_a_step_and_the_last_prefill_is_cut():
    bench = Bench(max_batch_tokens=64)
    job = bench.job(documents=(30,))
    for name in "xyz":
        bench.arrive(name, prompt=30)
    plan = bench.plan()
    assert plan.prefill(bench.view.waiting) == 64
    assert plan.why == "tokens"
    assert [(s.id, n) for s, n, _ in plan.prefills] == [("x", 30), ("y", 30), ("z", 4)]
    assert plan.left.tokens == 0
    assert plan.finetune(job) == 0
    assert plan.why == "tokens"
    assert plan.left.activation_tokens == 512


def test_whole_prefills_are_taken_whole_or_not_at_all():
    bench = Bench(max_batch_tokens=64)
    for name in "xyz":
        bench.arrive(name, prompt=30)
    plan = bench.plan()
    assert plan.prefill(bench.view.waiting, whole=True) == 60
    assert plan.why == "tokens"
    assert len(plan.prefills) == 2


def test_prefill_stops_at_the_first_that_does_not_fit_unless_its_reason_is_skipped():
    for skip, expected in (((), ["x"]), (("blocks",), ["x", "z"])):
        bench = Bench(num_blocks=8, max_model_len=128)
        for name, prompt in (("x", 40), ("y", 100), ("z", 40)):
            bench.arrive(name, prompt)
        plan = bench.plan()
        plan.prefill(bench.view.waiting, skip=skip)
        assert [s.id for s, _, _ in plan.prefills] == expected
        assert plan.why == "blocks"


def test_residents_are_bounded():
    bench = Bench(max_requests=2)
    for name in "xyz":
        bench.arrive(name)
    plan = bench.plan()
    assert plan.prefill(bench.view.waiting) == 40
    assert plan.why == "requests"
    assert plan.left.requests == 0


def test_distinct_adapters_in_a_batch_and_slots_are_bounded():
    bench = Bench(max_batch_adapters=2, num_slots=4)
    for name in "abc":
        bench.arrive(name, adapter=name)
    bench.arrive("base")
    plan = bench.plan()
    plan.prefill(bench.view.waiting, skip=("batch_adapters",))
    assert [s.id for s, _, _ in plan.prefills] == ["a", "b", "base"]
    assert plan.why == "batch_adapters"
    bench = Bench(max_batch_adapters=4, num_slots=2)
    for name in "abc":
        bench.arrive(name, adapter=name)
    plan = bench.plan()
    plan.prefill(bench.view.waiting)
    assert plan.why == "slots"
    assert plan.left.slots == 0
    assert {load.adapter for load in bench.run(plan).loads} == {"a", "b"}


def test_an_idle_adapter_makes_room_least_recently_used_first():
    bench = Bench(num_slots=2)
    bench.running("x", adapter="a", output=1)
    bench.running("y", adapter="b", output=1)
    bench.running("z", adapter="a", output=1)
    bench.arrive("w", adapter="c")
    plan = bench.plan()
    plan.prefill(bench.of("w"))
    bench.run(plan)
    assert set(bench.ledger.slots.entries) == {("a", 1), ("c", 1)}
    assert [e[3] for e in bench.ledger.events if e[2] == "adapter_evicted"] == ["b"]


def test_the_arena_bounds_jobs_and_a_micro_batch_keeps_its_rows_until_its_backward_is_done():
    bench = Bench(activation_tokens=100)
    first, second = bench.job("t"), bench.job("u")
    plan = bench.plan()
    assert plan.finetune(first) == 64
    assert plan.finetune(second) == 0
    assert plan.why == "activation"
    bench.run(plan)
    plan = bench.plan()
    assert plan.backward(first) == 4
    assert plan.finetune(second) == 0
    assert plan.why == "activation"
    bench.run(plan)
    plan = bench.plan()
    assert plan.finetune(second) == 64
    assert plan.why == ""


def test_a_decode_without_a_free_block_preempts_the_youngest_other_or_is_skipped():
    for when_full, decoded, preempted in (("preempt", ["x", "y"], ["z"]), ("skip", [], [])):
        bench = Bench(num_blocks=6, max_model_len=80, max_batch_tokens=512)
        bench.running("x", "y", "z", prompt=32, output=20)
        assert bench.view.free.blocks == 0
        plan = bench.plan()
        taken = plan.decode(bench.view.running, when_full=when_full)
        assert [r.id for r in taken] == decoded
        assert list(plan.preempted) == preempted
        assert plan.why == ("phase" if preempted else "blocks")
        assert plan.left.blocks == 0


# seconds


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(-1, 120), st.integers(0, 70), st.booleans())
def test_the_largest_amount_is_found_for_any_cost_that_does_not_fall_wherever_the_search_begins(rises, bound, guess, whole):
    bench, costs = Bench(), list(accumulate([0, *rises]))
    bench.ledger.predictor = SimpleNamespace(predict=lambda work: float(costs[int(work.values[0])]))
    bench.ledger.found_amounts["finetune"] = guess

    def put(amount):
        plan.work.values[0] = amount

    most, plan = len(rises), bench.plan()
    fitting = [n for n in range(1, most + 1) if costs[n] <= bound and (n == most or not whole)]
    largest = max(fitting, default=0)
    assert plan._largest("finetune", most, put, float(bound), whole=whole) == largest
    assert plan.work.values[0] == largest


def test_within_s_takes_the_largest_amount_that_fits_the_whole_plan():
    bench = Bench()
    executor, view = bench.executor, bench.view
    bench.running("x")
    request, job = bench.arrive("y", prompt=100), bench.job(documents=(100,))
    for verb, target in ((lambda p, s: p.prefill(request, within_s=s), 0.006), (lambda p, s: p.finetune(job, within_s=s), 0.0071)):
        plan = bench.plan()
        plan.decode(view.running)
        taken = verb(plan, target)
        assert 0 < taken < 100
        assert plan.why == "within_s"
        assert plan.predicted_s <= target < plan.predicted_s + 5e-5
        assert view.predict(plan) == plan.predicted_s == executor.predict(plan.work)
        assert verb(bench.plan(), 0.001) == 0
    plan = bench.plan()
    plan.finetune(job)
    bench.run(plan)
    plan = bench.plan()
    assert plan.backward(job, within_s=0.004 + 2.5 * 100 * 2e-5) == 2
    assert plan.why == "within_s"


def test_without_a_predictor_a_time_bound_is_refused_with_the_next_step():
    bench = Bench()
    bench.ledger.predictor = None
    request, plan = bench.arrive("x"), bench.plan()
    with pytest.raises(PlanError, match=r"predictor=None\. Fit a LatencyModel"):
        plan.prefill(request, within_s=0.1)
    with pytest.raises(ValueError, match="Fit a LatencyModel"):
        bench.view.remaining_s(request)
    assert plan.predicted_s == 0.0
    plan.prefill(request)
    assert plan.predicted_s != plan.predicted_s


def test_slack_is_what_the_targets_leave_after_the_predicted_work():
    bench = Bench(slo=SLO(ttft_s=1.0, e2e_s=2.0))
    request = bench.arrive("x", prompt=100, output=11)
    request._state.expected_output = 11.0
    prefill_s = 0.004 + 100 * 4e-5
    assert bench.view.prefill_s(request) == pytest.approx(prefill_s)
    assert (request.expected_left, request.finish_by_s) == (11.0, 2.0)
    assert bench.view.slack_s(request) == pytest.approx(1.0 - prefill_s)
    bench.ledger.now_s = 0.1
    assert bench.view.slack_s(request) == pytest.approx(0.9 - prefill_s)
    plan = bench.plan()
    plan.prefill(request)
    bench.run(plan)
    # the first token is there; what is left are ten decodes until the end
    assert (bench.view.prefill_s(request), request.expected_left) == (0.0, 10.0)
    assert bench.view.slack_s(request) == pytest.approx(0.9 - bench.view.remaining_s(request))
    request._state.expected_output = 0.0
    assert request.expected_left == 1.0


def test_the_end_of_a_request_is_due_at_its_deadline_or_by_its_target_whichever_is_first():
    bench = Bench(slo=SLO(e2e_s=2.0))
    for deadline_s, due_s in ((None, 2.0), (1.5, 1.5), (9.0, 2.0)):
        request = Request(request_id=f"x{deadline_s}", arrival_s=0.0, prompt_tokens=20, output_tokens=3, deadline_s=deadline_s)
        bench.ledger.arrive(request, 0.0)
        assert bench.of(request.request_id).finish_by_s == due_s
    assert Bench().arrive("x").finish_by_s == float("inf")
    assert Bench().view.slack_s(Bench().arrive("x")) == float("inf")


def test_remaining_s_is_prefill_plus_expected_decodes():
    bench = Bench()
    request = bench.arrive("x", prompt=100)
    bench.ledger.requests["x"].expected_output = 11.0
    assert bench.view.remaining_s(request) == pytest.approx(0.004 + 100 * 4e-5 + 10 * (0.004 + 2e-4), rel=1e-3)


# what an executor cannot do


@pytest.mark.parametrize("lacking", ["mixed", "chunk", "cut_backward", "safepoint"])
def test_a_verb_that_the_executor_cannot_do_takes_nothing_and_says_unsupported(lacking):
    can = frozenset({"mixed", "chunk", "cut_backward", "safepoint"}) - {lacking}
    bench = Bench(can=can)
    running, waiting, job = bench.running("x")[0], bench.arrive("y", prompt=50), bench.job()
    plan = bench.plan()
    if lacking == "mixed":
        assert plan.decode(running)
        assert plan.prefill(waiting) == 0
    elif lacking == "chunk":
        assert plan.prefill(waiting, 10) == 0
        assert plan.why == "unsupported"
        assert plan.finetune(job, 10) == 0
    elif lacking == "safepoint":
        plan.stop_on_arrival()
        assert not plan.stops_on_arrival
        plan.stop_after(0.01)
        assert plan.stop_after_s == float("inf")
    else:
        first = bench.plan()
        first.finetune(job)
        bench.run(first)
        plan = bench.plan()
        assert plan.backward(job, 2) == 0
    assert plan.why == "unsupported"
    assert plan.merge("a") is False
    assert plan.why == "unsupported"
    if lacking != "mixed":
        assert plan.empty


def test_preempting_to_the_host_is_unsupported_and_changes_nothing():
    bench = Bench()
    running = bench.running("x")[0]
    plan = bench.plan()
    assert not plan.preempt(running, keep="host")
    assert plan.why == "unsupported"
    assert plan.decode(running)


# misuse


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda b, p: (p.decode(b.view.running), p.decode(b.view.running)), "named once in a plan, got 'x' twice"),
        (lambda b, p: (p.prefill(b.view.waiting, 5), p.prefill(b.view.waiting, 5)), "named once in a plan, got 'y' twice"),
        (lambda b, p: (p.decode(b.view.running), p.preempt(b.of("x"))), "named once in a plan, got 'x' twice"),
        (lambda b, p: (p.train(b.view.jobs[0]), p.train(b.view.jobs[0])), "named once in a plan, got 'job:t' twice"),
        (lambda b, p: p.decode(b.view.waiting), "'y' is waiting. Prefill"),
        (lambda b, p: p.prefill(b.view.running), "'x' is running. Use plan.decode"),
        (lambda b, p: p.prefill(b.view.waiting, -1), "tokens must be at least 0.*got -1"),
        (lambda b, p: p.backward(b.view.jobs[0], -2), "num_layers must be at least 0.*got -2"),
        (lambda b, p: p.prefill(b.view.waiting, within_s=float("nan")), "within_s must be at least 0"),
        (lambda b, p: p.load("aa"), "unknown adapter 'aa'"),
        (lambda b, p: p.wait(0.0), "wait needs a time after now"),
        (lambda b, p: p.repeat(-1), "max_steps must be at least 0"),
        (lambda b, p: p.decode(b.view.running, when_full="swap"), "when_full must be"),
        (lambda b, p: p.preempt(b.of("x"), keep="disk"), "keep must be"),
        (lambda b, p: (p.reject(b.of("y"), "no"), p.reject(b.of("y"), "no")), "named once in a plan, got 'y' twice"),
        (lambda b, p: p.train(Bench().job("other")), "must belong to this replay"),
        (lambda b, p: p.reject(Bench().arrive("other"), "no"), "must be waiting or running"),
    ],
)
def test_misuse_is_a_plan_error_with_a_sentence_and_leaves_the_ledger_alone(misuse, message):
    bench = Bench()
    bench.running("x")
    bench.arrive("y")
    bench.job()
    before = bench.ledger.snapshot()
    with pytest.raises(PlanError, match=message):
        misuse(bench, bench.plan())
    assert bench.ledger.snapshot() == before


def test_a_finished_request_cannot_be_planned():
    bench = Bench()
    (request,) = bench.running("x", output=1)
    assert bench.view.finished == (request,)
    for verb in ("decode", "prefill"):
        with pytest.raises(PlanError, match="'x' is finished"):
            getattr(bench.plan(), verb)(request)


# the rest of the verbs


def test_a_rejected_request_is_passed_over_by_later_verbs_and_ends_with_its_reason():
    bench = Bench()
    running, waiting = bench.running("x")[0], bench.arrive("y")
    bench.arrive("z")
    plan = bench.plan()
    assert plan.reject(waiting, "late")
    assert plan.reject(running, "enough")
    assert plan.decode(bench.view.running) == ()
    assert plan.prefill(bench.view.waiting) == 20
    assert plan.left.blocks == 64 - 2
    bench.run(plan)
    ends = {(e[2], e[3], e[6]) for e in bench.ledger.events if e[2] in ("rejected", "aborted")}
    assert ends == {("rejected", "y", "late"), ("aborted", "x", "enough")}
    assert bench.ledger.released == ["x"]


def test_load_ahead_is_kept_until_its_first_use_and_evict_is_unusable_in_the_same_plan():
    bench = Bench(num_slots=2)
    bench.running("x", adapter="a", output=30)
    plan = bench.plan()
    assert plan.load("b")
    assert not plan.empty
    assert not plan.load("c")
    assert plan.why == "slots"
    plan.decode(bench.view.running)
    assert [load.adapter for load in bench.run(plan).loads] == ["b"]
    waiting = bench.arrive("y", adapter="c")
    plan = bench.plan()
    assert plan.prefill(waiting) == 0
    assert plan.why == "slots"
    assert not plan.evict("a")
    assert plan.why == "phase"
    assert plan.evict("b")
    assert plan.left.slots == 1
    assert plan.prefill(waiting) == 20
    bench.run(plan)
    other = bench.arrive("z", adapter="b")
    plan = bench.plan()
    assert plan.prefill(other) == 0
    assert plan.why == "slots"


def test_a_held_job_keeps_its_rows_and_does_nothing_until_let_go():
    bench = Bench()
    job = bench.job()
    plan = bench.plan()
    plan.finetune(job, 10)
    bench.run(plan)
    plan = bench.plan()
    assert plan.hold(job)
    assert plan.train(job) == 0
    assert plan.why == "phase"
    bench.run(plan)
    assert job.phase == "paused"
    assert bench.ledger.in_use()["arena_rows"] == 64
    plan = bench.plan()
    assert plan.train(job) == 0
    assert plan.hold(job, False)
    bench.run(plan)
    assert job.phase == "forward"
    assert [e[2] for e in bench.ledger.events][-2:] == ["job_paused", "job_resumed"]
    plan = bench.plan()
    assert plan.train(job) == 54


def test_a_copy_is_independent_of_its_original():
    bench = Bench()
    bench.running("x")
    job = bench.job()
    plan = bench.plan()
    plan.decode(bench.view.running)
    before = (plan.left, plan.predicted_s, repr(plan))
    other = plan.copy()
    assert other.finetune(job) == 64
    assert other.predicted_s > plan.predicted_s
    assert (plan.left, plan.predicted_s, repr(plan)) == before
    assert plan.finetune(job, 3) == 3


def test_a_policy_is_named_by_its_repr_a_function_by_its_name():
    from workbench.policies import ServeFirst

    def mine(view, plan):
        pass

    assert (policy_label(mine), policy_label(ServeFirst(step_s=0.03))) == ("mine", "ServeFirst(step_s=0.03)")


def test_the_public_interface_is_the_designed_one():
    def public(cls):
        return {n for n in dir(cls) if not n.startswith("_")} | {n for n in cls.__annotations__ if not n.startswith("_")}

    text = "id adapter version tenant slo_class priority session arrival_s first_token_s slo due_s prompt_tokens cached_tokens"
    text += " prefill_left generated max_tokens expected_output blocks preemptions"
    assert set(text.split()) <= public(RequestView)
    text = "id adapter tenant priority weight arrival_s deadline_s phase next_tokens layers layers_left evaluate_left committed_tokens"
    assert set((text + " left_tokens last_progress_s").split()) <= public(JobView)
    text = "now_s step replica can running waiting arrived finished last jobs adapters limits free block_tokens remaining_s rng oracle"
    assert set(text.split()) | {"token_buckets"} <= public(View)
    verbs = "decode prefill finetune backward evaluate train preempt reject load evict merge hold stop_on_arrival wait repeat copy"
    assert set(verbs.split()) | {"left", "predicted_s", "empty", "stop_after"} <= public(Plan)
    assert "why" in Plan.__mro__[1].__slots__
    assert set(Room._fields) == set("tokens requests blocks batch_adapters slots activation_tokens".split())
