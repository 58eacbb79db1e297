"""What a trace's changes do, worked out on small traces, and as properties over seeds."""

import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import traces
from workbench.core import Sampling
from workbench.traces.trace import Trace


def small(times=(0.0, 1.0, 1.0, 4.0), **columns):
    """Requests "0", "1", ... at `times` with lengths 10 + i and 1 + i."""
    n = len(times)
    rows = {"request_id": range(n), "arrival_s": times, "prompt_tokens": range(10, 10 + n), "output_tokens": range(1, 1 + n)}
    return Trace.from_frame(pd.DataFrame(rows | columns), name="small", duration_s=max(5.0, *times))


def ids(trace):
    return [r.request_id for r in trace.requests]


def times(trace):
    return [r.arrival_s for r in trace.requests]


@st.composite
def any_trace(draw):
    """An open trace at dyadic times, so that shifting them is exact."""
    ticks = draw(st.lists(st.integers(0, 400), min_size=1, max_size=40))
    return small(tuple(sorted(t / 8 for t in ticks)))


# ---- the value


def test_classes_are_drawn_by_their_shares_and_say_so():
    trace = small(times=np.linspace(0, 5, 2000)).assign_classes({"chat": 0.25, "batch": 0.75}, seed=3)
    drawn = trace.frame["slo_class"]
    assert (drawn == "chat").mean() == pytest.approx(0.25, abs=0.04) and set(drawn) == {"chat", "batch"}
    assert trace.redrawn == ("classes",) and trace.notes == ("classes: 25% chat, 75% batch",)
    assert trace == small(times=np.linspace(0, 5, 2000)).assign_classes({"chat": 0.25, "batch": 0.75}, seed=3)
    again = trace.assign_classes({"batch": 1.0}, seed=0)
    assert set(again.frame["slo_class"]) == {"batch"} and again.notes == ("classes: 100% batch",)
    with pytest.raises(ValueError, match="shares must sum to 1, got 0.5"):
        trace.assign_classes({"chat": 0.5}, seed=0)
    with pytest.raises(ValueError, match="shares must be at least 0"):
        trace.assign_classes({"chat": 1.5, "batch": -0.5}, seed=0)


def test_a_trace_is_a_frozen_value_with_a_checksum_of_its_content():
    trace = small()
    with pytest.raises(FrozenInstanceError):
        trace.name = "other"
    copy = trace.frame
    copy.loc[0, "prompt_tokens"] = 999
    assert trace.frame.loc[0, "prompt_tokens"] == trace.requests[0].prompt_tokens == 10
    assert trace == replace(small(), name="other")
    assert hash(trace) == hash(small())
    assert trace != small(prompt_tokens=[10, 11, 12, 14])
    assert trace != small(adapter=["a", None, None, None])
    assert len(trace.checksum) == 16


def test_the_checksum_is_the_same_on_every_machine():
    assert small().checksum == "a1dcea6c518176c5"
    assert (
        small(adapter=["ü", None, "b", "b"], prefix_ids=[[1], [], None, [2, 3]], deadline_s=[None, 2, 3, 9]).checksum == "db810475e48e3e2e"
    )


def test_requests_carry_every_column():
    trace = small(
        (0.0, 1.0),
        adapter=["a", None],
        max_tokens=[5, None],
        tenant=["t", None],
        slo_class=[None, "fast"],
        priority=[3, None],
        deadline_s=[None, 8.0],
        session=["s", "s"],
        parent_id=[None, "0"],
        think_s=[None, 2.0],
        prefix_ids=[None, (4, 5)],
        temperature=[0.9, None],
        top_p=[0.8, None],
        top_k=[40, None],
        repetition_penalty=[1.1, None],
        seed=[7, None],
    )
    first, second = trace.requests
    assert (first.adapter, first.max_tokens, first.tenant, first.slo_class, first.priority) == ("a", 5, "t", "", 3)
    assert (first.deadline_s, first.session, first.parent_id, first.think_s, first.prefix_ids) == (None, "s", None, 0.0, ())
    assert first.sampling == Sampling(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.1, seed=7)
    assert (second.adapter, second.max_tokens, second.tenant, second.slo_class, second.priority) == (None, None, "", "fast", 0)
    assert (second.deadline_s, second.parent_id, second.think_s, second.prefix_ids) == (8.0, "0", 2.0, (4, 5))
    assert second.sampling == Sampling()
    for value in (first.prompt_tokens, first.output_tokens, first.max_tokens, first.priority, first.sampling.seed, second.prefix_ids[0]):
        assert type(value) is int
    assert type(first.arrival_s) is float
    assert trace.is_closed


def test_prompts_as_text_or_ids_need_no_counts():
    text = Trace.from_frame(pd.DataFrame({"request_id": ["a"], "arrival_s": [0.0], "prompt": ["hello"]}))
    assert (text.requests[0].prompt, text.requests[0].output_tokens, text.requests[0].prompt_tokens) == ("hello", None, 0)
    given_ids = Trace.from_frame(
        pd.DataFrame({"request_id": ["a"], "arrival_s": [0.0], "prompt_token_ids": [[3, 4]], "output_tokens": [2]})
    )
    assert (given_ids.requests[0].prompt_token_ids, given_ids.requests[0].prompt_tokens) == ((3, 4), 2)


def test_lengths_that_a_trace_lacks_are_never_invented():
    arrivals = traces.poisson(rate=1, duration_s=20, seed=0)
    with pytest.raises(ValueError, match=r"without prompt and output lengths: 'poisson'. Draw them with .with_lengths"):
        _ = arrivals.requests
    half = Trace.from_frame(pd.DataFrame({"request_id": ["a"], "arrival_s": [0.0], "prompt_tokens": [3]}))
    with pytest.raises(ValueError, match="without output lengths"):
        half.validate()
    assert "no lengths" in repr(arrivals)


def test_repr_says_what_it_is_and_what_was_done():
    trace = (
        traces.load("burstgpt-day29")
        .jitter(1.0, seed=1)
        .with_lengths("azure-conv", seed=1)
        .assign_adapters(4, popularity=traces.round_robin())
    )
    text = repr(trace)
    for part in ("4,286 requests in 3,600 s", "open loop", "4 adapters", "lengths: azure-conv", "spread over 1 s", "by round_robin()"):
        assert part in text
    assert trace.redrawn == ("arrivals", "lengths")


# ---- which requests


def test_slice_keeps_a_half_open_span_and_rebases_it():
    part = small().slice(1.0, 4.0)
    assert (ids(part), times(part), part.duration_s) == (["1", "2"], [0.0, 0.0], 3.0)
    assert part.notes == ("slice 1-4 s",)
    assert ids(small().slice(1.0)) == ["1", "2", "3"]
    assert (len(small().slice(2.0, 3.0)), small().slice(2.0, 3.0).duration_s) == (0, 1.0)


def test_head_spans_to_the_next_arrival():
    part = small().head(3)
    assert (ids(part), part.duration_s) == (["0", "1", "2"], 4.0)
    assert small().head(9) == small()


@settings(max_examples=25, deadline=None)
@given(trace=any_trace(), cut=st.integers(1, 399))
def test_two_slices_one_after_the_other_are_the_whole(trace, cut):
    at = min(cut / 8, trace.duration_s - 1 / 8)
    whole = trace.slice(0, at).then(trace.slice(at))
    assert whole == trace
    assert whole.duration_s == trace.duration_s


def test_then_and_merge_rename_ids_that_occur_twice():
    twice = small().then(small())
    assert times(twice) == [0, 1, 1, 4, 5, 6, 6, 9]
    assert ids(twice)[4:] == ["2/0", "2/1", "2/2", "2/3"]
    assert ids(twice.then(small()))[8:] == ["3/0", "3/1", "3/2", "3/3"]
    both = small().merge(small((0.5, 1.0)))
    assert (ids(both), times(both)) == (["0", "2/0", "1", "2", "2/1", "3"], [0, 0.5, 1, 1, 1, 4])
    assert both.duration_s == 5.0
    closed = small((0.0, 1.0), parent_id=[None, "0"])
    assert [r.parent_id for r in closed.then(closed).requests] == [None, "0", None, "2/0"]


def test_traces_with_and_without_lengths_do_not_mix():
    with pytest.raises(ValueError, match="both traces must have lengths, or neither"):
        small().then(traces.constant(rate=1, duration_s=5))


def test_slicing_a_closed_session_frees_orphans_and_says_so():
    part = small((0.0, 2.0, 3.0), parent_id=[None, "0", "1"]).slice(1.0)
    assert [r.parent_id for r in part.requests] == [None, "1"]
    assert "1 requests whose parent was cut off arrive at their own time" in part.notes


# ---- another rate


@settings(max_examples=20, deadline=None)
@given(trace=any_trace(), factor=st.floats(0.2, 5))
def test_compress_keeps_every_request_and_hits_the_rate(trace, factor):
    scaled = trace.scale(rate=trace.rate * factor, how="compress")
    assert ids(scaled) == ids(trace)
    assert scaled.rate == pytest.approx(trace.rate * factor)
    assert times(scaled) == pytest.approx([t / factor for t in times(trace)])
    assert scaled.redrawn == ()


@settings(max_examples=20, deadline=None)
@given(trace=any_trace(), share=st.floats(0.05, 1), seed=st.integers(0, 9))
def test_thin_is_a_subset_at_the_original_times(trace, share, seed):
    thin = trace.scale(rate=trace.rate * share, how="thin", seed=seed)
    original = {r.request_id: r for r in trace.requests}
    assert all(original[r.request_id] == r for r in thin.requests)
    assert len(thin) == round(trace.rate * share * trace.duration_s)
    assert (thin.duration_s, thin.redrawn) == (trace.duration_s, ("arrivals",))
    assert thin == trace.scale(rate=trace.rate * share, how="thin", seed=seed)


@settings(max_examples=20, deadline=None)
@given(trace=any_trace(), factor=st.floats(1, 4), seed=st.integers(0, 9))
def test_superpose_adds_turned_copies_to_the_trace_itself(trace, factor, seed):
    more = trace.scale(rate=trace.rate * factor, how="superpose", seed=seed)
    assert len(more) == round(trace.rate * factor * trace.duration_s)
    assert set(trace.requests) <= set(more.requests)
    assert len(set(ids(more))) == len(more)
    assert more.duration_s == trace.duration_s
    assert all(0 <= t <= trace.duration_s for t in times(more))
    assert sorted(times(more)) == times(more)
    assert more == trace.scale(rate=trace.rate * factor, how="superpose", seed=seed)
    more.validate()


def test_superposing_keeps_bursts_and_compressing_packs_them():
    trace = traces.load("azure-code")
    rate = 4 * trace.rate

    def busiest_second(t):
        return np.bincount(t.frame["arrival_s"].astype(int)).max()

    compressed = trace.scale(rate=rate, how="compress")
    superposed = trace.scale(rate=rate, how="superpose", seed=0)
    assert busiest_second(trace) == pytest.approx(67, abs=1)
    assert busiest_second(compressed) > 1.5 * busiest_second(superposed)


def test_a_whole_session_moves_and_stays_together():
    closed = small((0.0, 2.0, 3.0, 4.0), parent_id=[None, "0", None, "1"], session=["s", "s", None, "s"])
    spread = closed.jitter(1.0, seed=0)
    at = {r.request_id: r.arrival_s for r in spread.requests}
    assert at["0"] == pytest.approx(at["1"] - 2.0) == pytest.approx(at["3"] - 4.0)
    more = closed.scale(rate=2 * closed.rate, how="superpose", seed=1).validate()
    assert {r.parent_id for r in more.requests if r.session == "s~1"} == {None, "0~1", "1~1"}
    for seed in range(8):
        kept = set(ids(closed.scale(rate=0.61, how="thin", seed=seed)))
        assert kept in ({"2"}, {"0", "1", "3"})


def test_deadlines_move_with_their_arrivals():
    trace = small(deadline_s=[2.0, 2.0, 9.0, 4.5])
    for changed in (trace.slice(1.0), trace.scale(rate=3.0, how="compress"), trace.jitter(2.0, seed=0), trace.then(trace)):
        slack = {r.request_id.removeprefix("2/"): r.deadline_s - r.arrival_s for r in changed.requests}
        for request in trace.requests:
            if request.request_id in slack:
                assert slack[request.request_id] == pytest.approx(request.deadline_s - request.arrival_s)


# ---- what a request is


def test_lengths_are_drawn_in_pairs_by_seed():
    source = pd.DataFrame({"prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]})
    arrivals = traces.poisson(rate=5, duration_s=60, seed=0)
    drawn = arrivals.with_lengths(source, seed=1)
    assert {(r.prompt_tokens, r.output_tokens) for r in drawn.requests} == {(10, 1), (20, 2), (30, 3)}
    assert drawn == arrivals.with_lengths(source, seed=1) != arrivals.with_lengths(source, seed=2)
    assert drawn.redrawn == ("arrivals", "lengths")
    assert times(drawn) == arrivals.frame["arrival_s"].tolist()


def test_the_length_source_and_what_was_clipped_stand_in_the_notes():
    trace = small().with_lengths(pd.DataFrame({"prompt_tokens": [300], "output_tokens": [9]}), seed=0, clip=(200, None))
    assert {(r.prompt_tokens, r.output_tokens) for r in trace.requests} == {(200, 9)}
    assert trace.notes == ("lengths: a frame, prompt_tokens clipped at 200 (4 of 4 cut)",)
    assert trace.with_lengths("arxiv-lengths", seed=0).notes == ("lengths: arxiv-lengths",)
    assert small().with_lengths(small(), seed=0).notes == ("lengths: small",)


def test_drawn_lengths_have_the_sources_distribution():
    drawn = traces.load("burstgpt-e7").with_lengths("azure-conv", seed=0).frame
    source = traces.load("azure-conv").frame
    for column in ("prompt_tokens", "output_tokens"):
        assert drawn[column].mean() == pytest.approx(source[column].mean(), rel=0.03)
    assert drawn["prompt_tokens"].corr(drawn["output_tokens"]) == pytest.approx(
        source["prompt_tokens"].corr(source["output_tokens"]), abs=0.05
    )


@settings(max_examples=15, deadline=None)
@given(trace=any_trace(), seed=st.integers(0, 99), width=st.floats(0.01, 3))
def test_jitter_moves_each_arrival_by_less_than_its_width(trace, seed, width):
    spread = trace.jitter(width, seed=seed)
    before, after = (t.frame.set_index("request_id")["arrival_s"] for t in (trace, spread))
    moved = after[before.index] - before
    assert ((moved >= 0) & (moved < width + 1e-9)).all()
    assert spread == trace.jitter(width, seed=seed)
    assert spread.redrawn == ("arrivals",)


def test_sampling_gives_every_request_a_seed_of_its_own():
    trace = small().with_sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.1, seed=5)
    assert {(r.sampling.temperature, r.sampling.top_p, r.sampling.top_k) for r in trace.requests} == {(0.9, 0.8, None)}
    assert len({r.sampling.seed for r in trace.requests}) == 4
    assert trace == small().with_sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.1, seed=5)
    assert trace != small().with_sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.1, seed=6)


def test_closed_sessions_chain_the_turns_of_a_session():
    closed = small(session=["a", "b", "a", "a"]).closed_sessions(2.5)
    assert [(r.parent_id, r.think_s) for r in closed.requests] == [(None, 2.5), (None, 2.5), ("0", 2.5), ("2", 2.5)]
    assert "closed loop" in repr(closed)
    assert "open loop" in repr(small(session=["a", "b", "a", "a"]))


def test_an_empty_trace_is_a_trace():
    empty = Trace.from_frame(pd.DataFrame({"request_id": [], "arrival_s": []}), duration_s=10)
    assert (len(empty), empty.requests, empty.rate) == (0, (), 0.0)
    assert empty.then(small()).duration_s == 15
    assert small().merge(empty) == small()
    assert math.isinf(traces.load("w2-offline").rate)


# ---- bad input


def frame(**columns):
    base = {"request_id": ["a", "b", "c"], "arrival_s": [0.0, 1.0, 2.0], "prompt_tokens": [5, 6, 7], "output_tokens": [1, 2, 3]}
    return pd.DataFrame({name: value for name, value in (base | columns).items() if value is not None})


NAN = float("nan")
BAD_FRAMES = {
    "negative time": ({"arrival_s": [-1.0, 0, 1]}, "arrival_s must be at least 0, got -1.0 in row 0. Rebase the times"),
    "unsorted": ({"arrival_s": [0, 2, 1]}, "arrival_s must not decrease from row to row, got 1 in row 2. Sort first: df.sort_values"),
    "missing time": ({"arrival_s": [0, NAN, 1]}, "arrival_s must not be missing, got nan in row 1"),
    "text time": ({"arrival_s": [0, "soon", 1]}, "arrival_s must be a number, got 'soon' in row 1"),
    "infinite time": ({"arrival_s": [0, 1, float("inf")]}, "arrival_s must be finite, got inf in row 2"),
    "dates": ({"arrival_s": pd.to_datetime(["2024-01-01"] * 3)}, "arrival_s must be numbers, not datetime64"),
    "milliseconds since 1970": ({"arrival_s": [1.7e12, 1.8e12, 1.9e12]}, "arrival_s must be at most 1e+09 seconds"),
    "no times": ({"arrival_s": None}, "a trace must have the column 'arrival_s'"),
    "no ids": ({"request_id": None}, "a trace must have the column 'request_id'"),
    "duplicate id": ({"request_id": ["a", "b", "a"]}, "request_id must be unique, got 'a' in row 2. Number the rows"),
    "missing id": ({"request_id": ["a", None, "c"]}, "request_id must not be missing or empty, got "),
    "unknown column": ({"adaptr": ["x"] * 3}, "got 'adaptr'. Did you mean 'adapter'? Rename or drop it."),
    "zero prompt": ({"prompt_tokens": [5, 0, 7]}, "prompt_tokens must be at least 1, got 0 in row 1"),
    "zero output": ({"output_tokens": [1, 2, 0]}, "output_tokens must be at least 1, got 0 in row 2"),
    "negative output": ({"output_tokens": [-4, 2, 1]}, "output_tokens must be at least 1, got -4 in row 0"),
    "huge prompt": ({"prompt_tokens": [5, 6, 10**9]}, "prompt_tokens must be at most 10,000,000, got 1000000000 in row 2"),
    "fraction": ({"prompt_tokens": [5, 6.5, 7]}, "prompt_tokens must be a whole number, got 6.5 in row 1"),
    "text count": ({"output_tokens": [1, "x", 3]}, "output_tokens must be a number, got 'x' in row 1"),
    "missing prompt": ({"prompt_tokens": [5, None, 7]}, "prompt_tokens must not be missing, got nan in row 1"),
    "truth values": ({"prompt_tokens": [True, True, True]}, "prompt_tokens must be numbers, not bool"),
    "output alone": ({"prompt_tokens": None}, "output_tokens must come with prompt_tokens"),
    "zero max": ({"max_tokens": [1, 0, 9]}, "max_tokens must be at least 1, got 0 in row 1"),
    "beyond max": ({"max_tokens": [1, 1, 9]}, "output_tokens must be at most the request's max_tokens, got 2 in row 1"),
    "two prompts": (
        {"prompt": ["x"] * 3, "prompt_token_ids": [[1]] * 3, "prompt_tokens": None},
        "must not have both prompt and prompt_token_ids",
    ),
    "a prompt missing": ({"prompt": ["x", None, "y"], "prompt_tokens": None}, "every request must have a prompt, got 'b' in row 1"),
    "ids disagree": (
        {"prompt_token_ids": [[1] * 5, [1] * 6, [1]]},
        "prompt_tokens must equal the number of prompt_token_ids, got 7 in row 2",
    ),
    "ids as text": (
        {"prompt_token_ids": ["1,2", None, None]},
        "prompt_token_ids must be a sequence of integers of at least 0, got '1,2' in row 0",
    ),
    "empty ids": ({"prompt_token_ids": [[], None, None]}, "prompt_token_ids must be a sequence of integers"),
    "negative prefix": ({"prefix_ids": [[1], [-1], []]}, "prefix_ids must be a sequence of integers of at least 0, got [-1] in row 1"),
    "deadline past": ({"deadline_s": [1, 0.5, 9]}, "deadline_s must not lie before arrival_s, got 0.5 in row 1"),
    "unknown parent": ({"parent_id": [None, "z", None]}, "parent_id must name an earlier request of the trace, got 'z' in row 1"),
    "later parent": ({"parent_id": ["b", None, None]}, "parent_id must name an earlier request of the trace, got 'b' in row 0"),
    "negative think": ({"think_s": [-1, 0, 0]}, "think_s must be at least 0, got -1 in row 0"),
    "top_p": ({"top_p": [0.5, 0.0, 1.0]}, "top_p must lie in (0, 1], got 0.0 in row 1"),
    "temperature": ({"temperature": [0.5, -1.0, 1.0]}, "temperature must be at least 0"),
    "top_k": ({"top_k": [1, 0, 5]}, "top_k must be a whole number of at least 1, got 0 in row 1"),
    "seed": ({"seed": [1, 2.5, 5]}, "seed must be a whole number in 0..2^53-1, got 2.5 in row 1"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_a_bad_frame_is_an_error_with_rule_value_row_and_next_step(case):
    columns, message = BAD_FRAMES[case]
    with pytest.raises(ValueError) as caught:
        Trace.from_frame(frame(**columns))
    assert message in str(caught.value)
    assert str(caught.value).rstrip().endswith((".", ")"))


def test_the_error_of_a_bad_frame_comes_through_from_another_process_with_its_rows():
    with pytest.raises(ValueError) as caught:
        Trace.from_frame(frame(arrival_s=[0, 2, 1]))
    there = pickle.loads(pickle.dumps(caught.value))
    assert type(there) is type(caught.value) and str(there) == str(caught.value)
    assert vars(there) == vars(caught.value) and list(there.rows) == [2] and there.column == "arrival_s"


def test_other_things_than_frames_and_doubled_columns_are_refused():
    with pytest.raises(ValueError, match="a trace must be a DataFrame, got list"):
        Trace.from_frame([1, 2])
    doubled = pd.concat([frame(), frame()[["prompt_tokens"]]], axis=1)
    with pytest.raises(ValueError, match="columns must be distinct, got 'prompt_tokens' twice"):
        Trace.from_frame(doubled)
    with pytest.raises(ValueError, match="duration_s must reach the last arrival, 2 s, got 1"):
        Trace.from_frame(frame(), duration_s=1)


BAD_CALLS = {
    "slice backwards": (lambda t: t.slice(3, 2), "slice must have 0 <= start_s < end_s, got (3, 2)"),
    "slice beyond": (lambda t: t.slice(6, 8), "start_s must lie within the trace's 5 s, got 6"),
    "negative head": (lambda t: t.head(-1), "n must be at least 0, got -1"),
    "unknown how": (lambda t: t.scale(rate=1, how="squeeze"), 'how must be "compress", "thin" or "superpose", got \'squeeze\''),
    "zero rate": (lambda t: t.scale(rate=0, how="compress"), "rate must be above 0 requests per second, got 0"),
    "thin up": (lambda t: t.scale(rate=2, how="thin", seed=0), 'how="thin" needs a rate of at most the trace\'s 0.8/s, got 2'),
    "superpose down": (lambda t: t.scale(rate=0.1, how="superpose", seed=0), 'how="superpose" needs a rate of at least the trace\'s 0.8/s'),
    "thin unseeded": (lambda t: t.scale(rate=0.1, how="thin"), 'how="thin" draws at random and needs a seed'),
    "scale offline": (lambda t: traces.load("w2-offline").scale(rate=1, how="compress"), "scale needs a trace with a rate"),
    "jitter": (lambda t: t.jitter(0, seed=0), "width_s must be above 0 seconds, got 0"),
    "clip": (lambda t: t.with_lengths("azure-conv", seed=0, clip=(0, None)), "clip of prompt_tokens must be at least 1, got 0"),
    "length name": (lambda t: t.with_lengths("azur-conv", seed=0), "got 'azur-conv'. Did you mean 'azure-conv'"),
    "lengths of arrivals": (
        lambda t: t.with_lengths("burstgpt-e7", seed=0),
        "a source of lengths must have token counts, got 'burstgpt-e7'",
    ),
    "lengths of a frame": (
        lambda t: t.with_lengths(pd.DataFrame({"prompt_tokens": [1]}), seed=0),
        "must have prompt_tokens and output_tokens",
    ),
    "no adapters": (lambda t: t.assign_adapters(0, popularity=traces.uniform(), seed=0), "adapters must name at least one adapter, got 0"),
    "one name": (
        lambda t: t.assign_adapters("a", popularity=traces.uniform(), seed=0),
        "a count or a sequence of names, got 'a'. Write ['a']",
    ),
    "same names": (lambda t: t.assign_adapters(["a", "a"], popularity=traces.uniform(), seed=0), "adapter names must be distinct"),
    "unseeded": (lambda t: t.assign_adapters(2, popularity=traces.zipf(1.0)), "zipf(s=1.0) draws at random and needs a seed"),
    "sampling": (lambda t: t.with_sampling(top_p=0), "top_p must lie in (0, 1], got 0"),
    "no session": (lambda t: t.closed_sessions(1), "closed_sessions needs the column session"),
    "wrong kind": (lambda t: traces.names("trace"), 'kind must be "requests", "lengths" or "jobs"'),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_an_error_with_rule_and_value(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError) as caught:
        call(small())
    assert message in str(caught.value)


def test_text_prompts_cannot_get_drawn_lengths():
    text = Trace.from_frame(pd.DataFrame({"request_id": ["a"], "arrival_s": [0.0], "prompt": ["hello"]}))
    with pytest.raises(ValueError, match="with_lengths needs a trace without prompt"):
        text.with_lengths("azure-conv", seed=0)
