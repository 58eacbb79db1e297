"""A trace against a server over a real socket: what is sent, what is heard, and what becomes of each way to fail."""

import json
import math
import os
import signal
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from tests.scripted_server import ScriptedServer
from workbench.config import UnknownAdapterError
from workbench.core import Request, Sampling
from workbench.policies import FCFS
from workbench.server.protocol import EventDecoder
from workbench.testing import FixedCost
from workbench.verify import verify

SLO = wb.SLO(ttft_s=5.0)
NEVER = 1e9  # a busy test machine is late, and that is no claim here


@pytest.fixture(scope="module")
def server():
    with ScriptedServer() as running:
        yield running


def ask(name: str, at: float = 0.0, output: int | None = 3, **options) -> Request:
    options = {"prompt_token_ids": (3, 4, 5, 6)} | options
    return Request(request_id=name, arrival_s=at, prompt_tokens=4, output_tokens=output, **options)


def sent(server, *requests, **options):
    options = {"slo": SLO, "max_lag_s": NEVER, "progress": False} | options
    return wb.replay_server(requests, url=server.url, **options)


REASONS = {
    "busy": ("rejected", "HTTP 429: too many requests"),
    "broken": ("rejected", "HTTP 500: Internal Server Error"),
    "cut": ("aborted", "connection cut after 1 pieces: RemoteProtocolError"),
    "slow": ("aborted", "timeout: no end within 0.4 s, 1 pieces came"),
    "inside": ("aborted", "the stream ended inside an event"),
    "page": ("aborted", "not a stream of events, but text/html: HTTP 200: <html>a proxy's page</html>"),
    "malformed": ("aborted", "malformed event: "),
    "alien": ("aborted", "malformed event: no choices"),
    "error": ("aborted", "error in the stream: CUDA out of memory"),
    "undone": ("aborted", "the stream ended without [DONE] after 1 pieces"),
    "empty": ("aborted", "the stream ended without a token"),
    "aborted": ("aborted", "the server ended it: finish_reason 'abort'"),
}


def test_every_way_to_fail_is_the_outcome_of_its_own_request_and_loses_no_other(server):
    names = [*REASONS, "good-1"]
    result = sent(server, ask("good-0"), *(ask(name, 0.001 * k) for k, name in enumerate(names)), timeout_s=0.4)
    frame = result.requests
    assert frame.loc[["good-0", "good-1"], "outcome"].tolist() == ["finished"] * 2
    for name, (outcome, reason) in REASONS.items():
        assert frame.loc[name, "outcome"] == outcome and frame.loc[name, "reason"].startswith(reason), frame.loc[name, "reason"]
    assert result.summary()["attainment"] == 2 / 14 and frame["met"].sum() == 2
    assert result.outputs["good-0"] == (5, 6, 7) and result.texts["good-0"] == "x\u2028y"
    assert not result.interrupted and "2 finished" in repr(result)


def test_a_refused_connection_is_an_outcome_once_the_load_runs():
    with ScriptedServer(leaves=True) as running:
        result = sent(running, ask("good-0", 0.2), ask("good-1", 0.3))
    assert result.requests["outcome"].tolist() == ["rejected"] * 2
    assert result.requests["reason"].str.startswith("no connection: ").all() and result.summary()["attainment"] == 0


@pytest.mark.parametrize("name", ["ids", "counted", "total", "ending"])
def test_tokens_merged_in_one_piece_count_in_full_and_make_one_gap(server, name):
    result = sent(server, ask(name, output=6), slo=wb.SLO(itl_s=1.0))
    row, gaps = result.requests.loc[name], wb.metrics.token_gaps(result.events)
    times = result.events.loc[result.events["kind"] == "token", "time_s"].to_numpy()
    assert row["output_tokens"] == 6 and row["pieces"] == 3 and len(gaps) == 2 and row["met"]
    assert row["tpot_s"] == pytest.approx((times[-1] - times[0]) / 5)
    assert gaps["itl_s"].min() > 0.001, "no gap of zero inside a piece"
    seconds = result.summary()["measure_end_s"]
    assert result.summary()["decode_tokens_per_s"] * seconds == pytest.approx(6)
    told = name in ("ids", "counted")
    assert any("got several tokens in one piece" in note for note in result.settings["notes"])
    assert any("only their total" in note for note in result.settings["notes"]) != told


def test_without_a_word_on_tokens_pieces_are_counted_and_the_result_says_so(server):
    result = sent(server, ask("untold", output=6))
    assert result.requests.loc["untold", "output_tokens"] == 2
    assert any("reported no usage" in note for note in result.settings["notes"])
    assert any("another length than the trace asks for" in note for note in result.settings["notes"])


def test_latency_counts_from_the_intended_arrival_where_the_client_held_a_request_back(server):
    with pytest.warns(UserWarning, match="1 requests were held back by max_connections=1"):
        result = sent(server, ask("wait-0"), ask("wait-1", 0.01), max_connections=1)
    row = result.requests.loc["wait-1"]
    assert row["arrival_s"] == 0.01 and row["send_lag_s"] > 0.25 and row["ttft_s"] > row["send_lag_s"] + 0.25
    alone = sent(server, ask("wait-0"), ask("wait-1", 0.01)).requests.loc["wait-1"]
    assert alone["send_lag_s"] < 0.25 and alone["ttft_s"] < row["ttft_s"] - 0.2


def test_a_client_that_lags_is_warned_of_and_its_lag_stands_beside_the_result(server):
    with pytest.warns(UserWarning, match=r"the client sent requests late: p99 .* ms"):
        result = sent(server, ask("good-0"), ask("good-1", 0.05), max_lag_s=1e-9)
    assert result.summary()["send_lag_max_s"] >= result.summary()["send_lag_p50_s"] > 0
    assert result.settings["client"]["send_lag_max_s"] == result.summary()["send_lag_max_s"]
    assert any("sent requests late" in note for note in result.settings["notes"])


def test_a_session_goes_on_think_time_after_its_turn_ended_however_it_ended(server):
    turns = [ask("good-0"), ask("broken-1", parent_id="good-0", think_s=0.1), ask("good-2", parent_id="broken-1")]
    result = sent(server, *turns)
    ends = result.events[result.events["kind"].isin(("finished", "rejected"))].set_index("owner")["time_s"]
    frame = result.requests
    assert frame.loc["broken-1", "arrival_s"] == pytest.approx(ends["good-0"] + 0.1)
    assert frame.loc["good-2", "arrival_s"] == pytest.approx(ends["broken-1"]) and "closed loop" in repr(result)


def test_ctrl_c_keeps_what_came_until_then(server):
    timer = threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = sent(server, ask("good-0"), ask("slow-1", 0.05), ask("good-2", 30.0))
    assert result.interrupted and result.requests["outcome"].to_dict() == {"good-0": "finished", "slow-1": "unfinished"}
    assert result.requests.loc["slow-1", "output_tokens"] == 1


def test_bodies_ask_for_the_traces_lengths_and_name_adapters_as_models(server):
    drawn = ask("good-0", adapter="a", sampling=Sampling(temperature=0.5, top_k=7, seed=3), max_tokens=2)
    sent(server, drawn, ask("good-1", prompt_token_ids=None), vocab_size=50, api_key="right", extra={"return_token_ids": None})
    seen = server.seen["good-0"]
    assert seen["model"] == "a" and seen["prompt"] == [3, 4, 5, 6] and seen["authorization"] == "Bearer right"
    assert (seen["max_tokens"], seen["min_tokens"], seen["ignore_eos"], seen["stream"]) == (2, 2, True, True)
    assert (seen["temperature"], seen["top_p"], seen["top_k"], seen["seed"]) == (0.5, 1.0, 7, 3) and "return_token_ids" not in seen
    assert server.seen["good-1"]["model"] == "base" and server.seen["good-1"]["temperature"] == 0
    from workbench.data import prompt_token_ids

    assert server.seen["good-1"]["prompt"] == list(prompt_token_ids(ask("good-1", prompt_token_ids=None), vocab_size=50))


def test_texts_own_lengths_and_chats_are_asked_for_in_their_own_form(server):
    text = {"prompt": "hello", "prompt_token_ids": None}
    result = sent(
        server,
        ask("good-0", output=9, **text),
        ask("good-1", output=None, max_tokens=5, **text),
        endpoint="chat",
        lengths="text",
        model_of=lambda adapter: "a",
    )
    seen = server.seen["good-0"]
    assert seen["messages"] == [{"role": "user", "content": "hello"}] and seen["model"] == "a"
    assert seen["max_tokens"] == 9 and "ignore_eos" not in seen and server.seen["good-1"]["max_tokens"] == 5
    assert result.requests["outcome"].tolist() == ["finished"] * 2


def test_what_cannot_be_sent_is_refused_before_anything_is(server):
    server.seen.clear()
    with pytest.raises(ValueError, match="vocab_size must be known, got None. Pass vocab_size="):
        sent(server, ask("good-0", prompt_token_ids=None))
    with pytest.raises(ValueError, match="chat needs the text of a prompt, request 'good-0' has none"):
        sent(server, ask("good-0"), endpoint="chat")
    with pytest.raises(ValueError, match="must have max_tokens, or a server cuts its text"):
        sent(server, ask("good-0", output=None))
    with pytest.raises(UnknownAdapterError, match="the server lists no model 'b'. Known: 'a', 'base'"):
        sent(server, ask("good-0", adapter="b"))
    with pytest.raises(ValueError, match="api_key must be one that the server takes, got 'HTTP 401'"):
        sent(server, ask("good-0"), api_key="wrong")
    with pytest.raises(ValueError, match="url must begin with http"):
        wb.replay_server([ask("good-0")], url="localhost:8000")
    with pytest.raises(TypeError, match="not JSON serializable"):
        sent(server, ask("good-0"), extra={"x": object()})
    assert server.seen == {}


def test_no_server_is_a_clear_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=r"a server must answer at http://127.0.0.1:\d+/v1/models, got ConnectError"):
            wb.replay_server([ask("good-0")], url=url)
    with ScriptedServer(models="<html>") as running, pytest.raises(ConnectionError, match="must list models in OpenAI's form"):
        sent(running, ask("good-0"))


def test_a_saved_replay_of_a_server_gives_the_same_numbers_and_nan_for_what_nobody_saw(server, tmp_path):
    result = sent(server, ask("good-0"), ask("busy-1"), ask("ids-2", output=6), label="system X")
    again = wb.load_replay(result.save(tmp_path / "run"))
    assert isinstance(again, wb.ServerReplay) and again.server == result.server and again.texts == result.texts
    assert again.summary() == pytest.approx(result.summary(), nan_ok=True) and again.requests.equals(result.requests)
    assert again.policy == "system X" and again.server.name == "scripted 1.2.3 serving base"
    assert again.provenance.versions["server"] == "1.2.3"
    row = result.summary()
    assert all(math.isnan(row[name]) for name in ("steps", "queue_mean_s", "preemptions", "finetune_tokens_per_s", "busy_share"))
    assert len(result.steps) == len(result.jobs) == 0 and "duration_s" in result.steps and "committed_tokens" in result.jobs
    with pytest.raises(ValueError, match="attribution needs the steps of a replay"):
        result.attribution()


def test_a_server_stands_beside_an_executor_and_the_caption_says_how_each_was_measured(server, tmp_path):
    requests = [ask("good-0"), ask("good-1", 0.1)]
    ours = wb.replay(requests, executor=FixedCost(), policy=FCFS(), slo=SLO, planning=0.0)
    theirs = sent(server, *requests)
    both = wb.Comparison.of({"FCFS": ours, "system X": theirs})
    assert both.table()["attainment"].tolist() == [1.0, 1.0] and both.table()["ttft_p50_s"].gt(0).all()
    assert "FCFS: simulated by FixedCost" in both.caption and "over HTTP, in wall-clock time" in both.caption
    assert both.plot() is not None
    assert [check for check in verify(both.bundle(tmp_path / "bundle")) if check.problem] == []
    other = sent(server, ask("good-0"))
    with pytest.raises(ValueError, match="replays of one seed must be of the same trace"):
        wb.Comparison.of({"a": ours, "b": other})
    with pytest.raises(ValueError, match="every label must have as many replays"):
        wb.Comparison.of({"a": [ours, ours], "b": theirs})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4), st.lists(st.integers(1, 20), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_events_are_the_same_wherever_the_stream_is_cut_into_pieces(texts, sizes, end):
    values = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    stream = "".join(f": ping{end}{end}data: {value}{end}{end}" for value in values).encode()
    decoder, found, at, k = EventDecoder(), [], 0, 0
    while at < len(stream):
        size = sizes[k % len(sizes)]
        found += decoder.feed(stream[at : at + size])
        at, k = at + size, k + 1
    assert found == values and not decoder.is_cut
