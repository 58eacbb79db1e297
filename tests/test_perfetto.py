"""The Chrome trace of a replay: valid JSON, sorted, named, nested, and the same sums as the frames."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
from test_attribution import AnythingGoes, job, one, run, serve_and_train

from workbench.features import NAMES
from workbench.latency import LatencyModel
from workbench.results.perfetto import ADAPTERS, JOBS, PREDICTED, PROCESSES, REQUESTS, STEPS
from workbench.testing import FixedCost, FixedShape, fixed_info


@pytest.fixture(scope="module", params=["plain", "random"])
def replay(request):
    adapters = [None, "a", "b", "c"]
    trace = [one(f"r{i}", 0.003 * i, 20 + i, 1 + i % 7, adapter=adapters[i % 4]) for i in range(30)]
    info = fixed_info(num_blocks=16, max_requests=6, num_slots=2, max_batch_adapters=2, max_model_len=160)
    executor = FixedCost(info=info, shapes={"job:t": FixedShape((24, 8), 20, 2, 2, ((16,),))})
    policy = serve_and_train if request.param == "plain" else AnythingGoes(3)
    return run(trace, policy, executor, jobs=[job()], planning=0.0003, until=0.6)


@pytest.fixture(scope="module")
def model(replay):
    return LatencyModel.fit(replay.steps, info=replace(replay.executor, simulated=False)).perturb(0.4)  # too long: they overlap


@pytest.fixture(scope="module")
def trace(replay, model, tmp_path_factory):
    path = replay.save_trace(tmp_path_factory.mktemp("trace") / "replay.json", predicted=model)
    return json.loads(path.read_text(encoding="utf-8"))


def slices(trace, pid):
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == pid]


def by_track(events):
    tracks = defaultdict(list)
    for e in events:
        tracks[e["pid"], e["tid"]].append(e)
    return tracks


def whole(us):
    """Nanoseconds: the file holds them as microseconds with three decimals."""
    assert abs(us * 1000 - round(us * 1000)) < 1e-3
    return round(us * 1000)


def test_every_event_has_what_the_format_asks_and_times_are_sorted(trace, replay):
    events = trace["traceEvents"]
    assert trace["displayTimeUnit"] == "ms" and trace["otherData"]["policy"] == replay.policy
    num_metadata = sum(e["ph"] == "M" for e in events)
    assert all(e["ph"] == "M" for e in events[:num_metadata])
    timed = events[num_metadata:]
    assert {e["ph"] for e in timed} == {"X", "i", "C"}
    assert all(isinstance(e["name"], str) and {"pid", "tid", "ts"} <= e.keys() and e["ts"] >= 0 for e in timed)
    assert all(e["dur"] >= 0 for e in timed if e["ph"] == "X")
    counters = [e for e in timed if e["ph"] == "C" and e["pid"] != PREDICTED]
    assert counters and all(isinstance(e["args"]["value"], int) and e["args"]["value"] >= 0 for e in counters)
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)


def test_every_process_and_track_has_a_name(trace, model):
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {pid: processes.pop(pid) for pid in PROCESSES} == PROCESSES
    assert processes == {PREDICTED: f"predicted by {model.info.name} beside measured"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] in ("X", "i")} <= tracks


def test_slices_of_a_track_nest(trace):
    for events in by_track(e for e in trace["traceEvents"] if e["ph"] == "X").values():
        stack = []
        for e in events:
            start, end = whole(e["ts"]), whole(e["ts"]) + whole(e["dur"])
            while stack and stack[-1] <= start:
                stack.pop()
            assert not stack or end <= stack[-1], e
            stack.append(end)


def test_steps_hold_their_planning_and_parts_and_last_as_long_as_in_the_frame(trace, replay):
    events = slices(trace, STEPS)
    steps = [e for e in events if e["name"].startswith("step ")]
    assert [e["name"] for e in steps] == [f"step {k}" for k in replay.steps["step"]]
    expected = ((replay.steps["end_s"] - replay.steps["start_s"]) * 1e6).tolist()
    assert [e["dur"] for e in steps] == pytest.approx(expected, abs=2e-3)
    # the children fill their step without a gap
    assert sum(whole(e["dur"]) for e in events) == 2 * sum(whole(e["dur"]) for e in steps)
    for name in ("prefill", "decode", "finetune", "backward"):
        assert sum(e["dur"] for e in events if e["name"] == name) == pytest.approx(replay.steps[f"{name}_s"].sum() * 1e6, abs=0.1)
    assert sum(e["args"]["prefill_tokens"] for e in events if e["name"] == "prefill") == replay.steps["prefill_tokens"].sum()


def test_requests_last_from_arrival_to_end_and_their_phases_fill_them(trace, replay):
    frame = replay.requests
    tops, inner = {}, 0
    for e in slices(trace, REQUESTS):
        if "outcome" in e.get("args", {}):
            tops[e["name"].split(" ")[0]] = e
        else:
            inner += whole(e["dur"])
    assert set(tops) == set(frame.index)
    assert inner == sum(whole(e["dur"]) for e in tops.values())
    for name, e2e in frame["e2e_s"].dropna().items():
        assert tops[name]["dur"] == pytest.approx(e2e * 1e6, abs=2e-3)
        assert tops[name]["args"]["met"] is bool(frame.loc[name, "met"])
    num_preempted = sum(e["name"] == "preempted" and e["ph"] == "i" for e in trace["traceEvents"])
    assert num_preempted == frame["preemptions"].sum()


def test_jobs_and_adapters_show_what_the_events_say(trace, replay):
    jobs, kinds = slices(trace, JOBS), replay.events["kind"]
    work = replay.work.groupby("kind")["tokens"].sum()
    assert sum(e["args"]["tokens"] for e in jobs if e["name"] == "forward") == work["finetune"]
    assert sum(e["args"]["layers"] for e in jobs if e["name"] == "backward") == work["backward"]
    instants = [e["name"] for e in trace["traceEvents"] if e["ph"] == "i"]
    assert instants.count("optimizer step") == (kinds == "optimizer_step").sum() > 0
    assert len(slices(trace, ADAPTERS)) == (kinds == "adapter_loaded").sum() > 0
    assert instants.count("evict") == (kinds == "adapter_evicted").sum() > 0


def test_a_replay_without_a_step_can_be_saved(tmp_path):
    result = run([], serve_and_train, until=0.1)
    events = json.loads(result.save_trace(tmp_path / "empty.json").read_text())["traceEvents"]
    assert all(e["ph"] == "M" for e in events)


def test_what_the_model_predicts_for_each_step_stands_beside_what_was_measured(trace, replay, model):
    tracks = by_track(slices(trace, PREDICTED))
    measured = tracks.pop((PREDICTED, 1))
    steps = replay.steps
    names = [f"step {k}" for k in steps["step"]]
    duration_us = ((steps["end_s"] - steps["start_s"] - steps["plan_s"]) * 1e6).tolist()
    assert [e["name"] for e in measured] == names and [e["dur"] for e in measured] == pytest.approx(duration_us, abs=2e-3)
    tops = {e["name"]: e for events in tracks.values() for e in events if e["name"].startswith("step ")}
    expected = model.costs.predict_all(steps[list(NAMES)].to_numpy(float)) * 1e6
    assert [tops[name]["dur"] for name in names] == pytest.approx(expected.tolist(), abs=2e-3)
    assert all(tops[e["name"]]["ts"] == e["ts"] and tops[e["name"]]["args"] == e["args"] for e in measured)
    assert [e["args"]["stopped_early"] for e in measured] == steps["stopped_early"].tolist()


def test_a_prediction_is_the_sum_of_its_cost_terms(trace, model):
    events = slices(trace, PREDICTED)
    tops = [e for e in events if e["name"].startswith("step ") and e["tid"] > 1]
    terms = [e for e in events if not e["name"].startswith("step ")]
    assert {e["name"] for e in terms} <= set(model.costs.table().index) and len({e["name"] for e in terms}) > 2
    assert sum(whole(e["dur"]) for e in terms) == sum(whole(e["dur"]) for e in tops)


def test_predicted_must_be_a_latency_model(replay, tmp_path):
    with pytest.raises(ValueError, match="predicted must be a LatencyModel, got 'h100'. Fit one with"):
        replay.save_trace(tmp_path / "trace.json", predicted="h100")
