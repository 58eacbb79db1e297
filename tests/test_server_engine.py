"""The engine behind a socket: in a process of its own as `python -m workbench.serve` starts it, and its failures on a stand-in."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

import workbench as wb
from workbench.config import RandomTokens
from workbench.policies import FCFS, ServeFirst
from workbench.replay import ReplayError
from workbench.testing import FixedCost

ROOT = Path(__file__).resolve().parents[1]
SLO = wb.SLO(ttft_s=5.0, itl_s=1.0)
CHAT = "{% for m in messages %}{% if m.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}{{ m.content }} {% endfor %}w9"


def save_tokenizer(folder: Path, words: int) -> None:
    """Words w3, w4, ... as tokens 3, 4, ... and a chat template that joins the messages."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, words))]
    made = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


CONFIG = wb.EngineConfig(max_model_len=192, num_blocks=64, num_slots=4, max_jobs=3, activation_tokens=512, warm_up=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer: its directory."""
    from workbench.runtime.weights import random_base

    folder = tmp_path_factory.mktemp("served")
    base = random_base("tiny-llama", seed=3)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(8)
    base.save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny", base.config.vocab_size)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    """An engine over it, whose two adapters lie beside it."""
    made = wb.Engine.from_pretrained(folder / "tiny", device="cpu", config=CONFIG)
    for name in made.add_random_adapters([4, 9], std=0.2):
        made.save_adapter(name, folder / name)
    return made


# What `python -m workbench.serve` does, in a process that has imported torch already.
SERVE = """
import os, runpy, sys
sys.stdout = open(sys.argv.pop(), "w", buffering=1)
print(os.getpid())
runpy.run_module("workbench.serve", run_name="__main__", alter_sys=True)
"""


class Process:
    """A server in a process of its own: `url`, `record` (where it will write its replay), `stop()`."""

    def __init__(self, with_torch, folder: Path) -> None:
        self.record, log = folder / "replay", folder / "log"
        options = ["--model", folder / "tiny", "--port", 0, "--device", "cpu", "--record", self.record, "--max-model-len", 192]
        options += ["--adapter", f"adapter-0={folder / 'adapter-0'}", "--adapter", f"adapter-1={folder / 'adapter-1'}", log]
        self.ends: list[subprocess.CompletedProcess[str]] = []
        call = lambda: self.ends.append(with_torch.run(SERVE, *options, path=(ROOT,), cwd=ROOT))
        self.thread = threading.Thread(target=call)
        self.thread.start()
        while "\n" not in (said := log.read_text() if log.exists() else "").partition("\n")[2]:
            assert not self.ends, self.ends
            time.sleep(0.05)
        pid, line = said.splitlines()[:2]
        assert "serves tiny, adapter-0, adapter-1 at http://127.0.0.1:" in line
        self.pid, self.url = int(pid), line.split()[-1]

    def stop(self) -> subprocess.CompletedProcess[str]:
        if not self.ends:
            os.kill(self.pid, signal.SIGTERM)
        self.thread.join()
        return self.ends[0]


@pytest.fixture(scope="module")
def process(folder, engine, with_torch):
    running = Process(with_torch, folder)
    yield running
    running.stop()


def post(url: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(url.removesuffix("/v1") + path, json=body, timeout=60)


def events_of(answer: httpx.Response) -> list[Any]:
    found = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert found.pop() == "[DONE]"
    return [json.loads(data) for data in found]


def test_a_completion_is_the_engines_own_text_streamed_or_not(process, engine):
    prompt, options = "w5 w6 w70 w8", {"model": "adapter-0", "max_tokens": 8, "temperature": 0}
    own = engine.generate([prompt], "adapter-0", 8)[0]
    whole = post(process.url, prompt=prompt, return_token_ids=True, **options).json()
    assert whole["choices"][0] == {
        "index": 0, "logprobs": None, "finish_reason": own.finish_reason, "text": own.text, "token_ids": list(own.token_ids)
    }  # fmt: skip
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": len(own.token_ids), "total_tokens": 4 + len(own.token_ids)}
    *pieces, last = events_of(post(process.url, prompt=prompt, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == own.text and len(pieces) == len(own.token_ids)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [own.finish_reason]
    assert last["usage"] == whole["usage"] and last["choices"] == [] and "usage" not in pieces[0]


def test_a_chat_goes_through_the_models_template(process, engine):
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "w5 w6"}]
    own = engine.generate(["w5 w6 w9"], None, 6)[0]
    whole = post(process.url, path, messages=messages, max_completion_tokens=6, temperature=0).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": own.text} and whole["usage"]["prompt_tokens"] == 3
    pieces = events_of(post(process.url, path, messages=messages, max_tokens=6, temperature=0, stream=True))
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == own.text
    assert pieces[0]["object"] == "chat.completion.chunk" and pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    refused = post(process.url, path, messages=[{"role": "villain", "content": "w5"}])
    assert refused.status_code == 400 and "no villains" in refused.json()["error"]["message"]


def test_a_trace_through_the_process_gives_the_engines_own_greedy_tokens_and_both_sides_tell_one_story(process, engine):
    trace = wb.traces.poisson(rate=30, duration_s=0.5, seed=1).with_lengths("w3-5rps", seed=1, clip=(40, 8))
    trace = trace.assign_adapters(2, popularity=wb.uniform(), seed=0)
    options = {"vocab_size": engine.fused.dims.vocab_size, "slo": SLO, "max_lag_s": 1e9, "progress": False}
    result = wb.replay_server(trace, url=process.url, **options)
    assert result.requests["outcome"].eq("finished").all() and len(result.requests) == len(trace) > 8
    with engine.uncalibrated():
        own = wb.replay(trace, executor=engine, policy=FCFS(), slo=SLO, progress=False)
        plain = wb.replay([replace(r, adapter=None) for r in trace.requests], executor=engine, policy=FCFS(), progress=False)
    assert result.outputs == own.outputs, "the same tokens, whatever the batches were"
    assert all(plain.outputs[name] != tokens for name, tokens in own.outputs.items()), "the adapters say something else than the base"
    both = wb.Comparison.of({"virtual clock": own, "server": result})
    assert both.table()["requests"].tolist() == [len(trace)] * 2 and "serving tiny" in both.caption
    ended = process.stop()
    assert ended.returncode == 0, ended.stderr
    inside = wb.load_replay(process.record)
    mine = inside.requests.loc[result.requests.index]
    assert mine["output_tokens"].tolist() == result.requests["output_tokens"].tolist()
    assert (mine["ttft_s"] < result.requests["ttft_s"]).all(), "a client sees a token after its server does"
    assert inside.steps["decode_tokens"].max() > 1, "requests of several connections share a step"


@dataclass
class StandIn(FixedCost):
    """What `serve` needs of an engine, without a model."""

    name: str = "standin"
    tokenizer: Any = None
    fused: Any = field(default_factory=lambda: SimpleNamespace(dims=SimpleNamespace(vocab_size=100)))


def stand_in(**options: Any) -> StandIn:
    return StandIn(token=lambda owner, index: 10 + index, sleeps=True, **options)


def test_what_is_not_understood_is_refused_and_named():
    with wb.serve(stand_in(), policy=FCFS()) as server:
        good = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        refusals = [
            ({"prompt": "text"}, 400, "a text prompt needs a tokenizer"),
            ({"model": "z"}, 404, "model must be served here, got 'z'"),
            ({"stop": ["x"]}, 400, "stop is not supported here"),
            ({"max_token": 3}, 400, "Did you mean 'max_tokens'"),
            ({"n": 2}, 400, "n is not supported here, got 2"),
            ({"max_tokens": "many"}, 400, "max_tokens must be of type int"),
            ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
            ({"min_tokens": 2}, 400, "min_tokens is supported with ignore_eos only"),
            ({"temperature": -1}, 400, "temperature must be at least 0"),
            ({"prompt": [1, 100]}, 400, "token ids must lie in 0..99"),
            ({"prompt": []}, 400, "neither empty"),
            ({"prompt": [[1], [2]]}, 400, "one prompt a request"),
            ({"prompt": [1] * 600}, 400, "must fit the context of 512 tokens"),
        ]
        for change, status, message in refusals:
            answer = post(server.url, **(good | change))
            assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
        chat = post(server.url, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
        assert chat.status_code == 400 and "needs a tokenizer with a chat template" in chat.text
        assert httpx.post(server.url + "/v1/completions", content=b"{").status_code == 400
        assert httpx.get(server.url + "/v1/embeddings").status_code == 404
        accepted = post(server.url, **(good | {"n": 1, "ignore_eos": True, "return_token_ids": True, "user": "me"}))
        assert accepted.json()["choices"][0]["token_ids"] == [10, 11, 12, 13]
        assert httpx.get(server.url + "/health").status_code == 200
    busy = stand_in()
    busy.begin = lambda jobs, seed: (_ for _ in ()).throw(RuntimeError("begin needs an idle engine"))
    with pytest.raises(RuntimeError, match="begin needs an idle engine"):
        wb.serve(busy, policy=FCFS())
    with pytest.raises(ValueError, match="the base must not have the name of an adapter, got 'a'"):
        wb.serve(stand_in(), policy=FCFS(), name="a")


def test_a_client_that_goes_away_frees_what_its_request_held_and_jobs_go_on_beside():
    job = wb.FinetuneJob(adapter="mine", data=RandomTokens(examples=4, tokens=32), batch_size=1, epochs=1000)
    with wb.serve(stand_in(step_s=0.01), policy=ServeFirst(step_s=0.02), jobs=[job], record=True) as server:
        body = {"prompt": [1, 2], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, headers={"X-Request-Id": "gone"}) as answer:
            next(answer.iter_raw())
        assert post(server.url, prompt=[1, 2], max_tokens=2).status_code == 200
        replay = server.stop()
    assert replay is not None
    row = replay.requests.loc["gone"]
    assert row["outcome"] == "aborted" and 1 <= row["output_tokens"] < 100 and replay.jobs["committed_tokens"].sum() > 0
    assert replay.events.loc[replay.events["kind"] == "aborted", "note"].tolist() == ["the client closed its connection"]


def test_a_request_that_the_policy_turns_away_is_too_many_and_a_failing_executor_is_said_to_every_client():
    def refuses(view, plan):
        for request in view.waiting:
            plan.reject(request, "not today")

    with wb.serve(stand_in(), policy=refuses) as server:
        answer = post(server.url, prompt=[1], max_tokens=2, stream=True)
        assert answer.status_code == 429 and answer.json()["error"]["message"] == "not today"

    def fails(batch):
        if batch.step == 3:
            raise RuntimeError("the device is gone")

    server = wb.serve(stand_in(fails=fails), policy=FCFS())
    assert (
        "the device is gone" in events_of(post(server.url, prompt=[1], max_tokens=9, ignore_eos=True, stream=True))[-1]["error"]["message"]
    )
    assert post(server.url, prompt=[1], max_tokens=2).status_code == 503 and "the device is gone" in server.error
    with pytest.raises(ReplayError, match="the device is gone"):
        server.stop()


def test_stopping_lets_requests_end_and_a_server_that_does_not_record_keeps_nothing():
    server = wb.serve(stand_in(step_s=0.02), policy=FCFS())
    answers: list[httpx.Response] = []
    client = threading.Thread(target=lambda: answers.append(post(server.url, prompt=[1], max_tokens=10, ignore_eos=True)))
    client.start()
    while not server._run.ledger.requests:
        time.sleep(0.005)
    assert server.stop() is None
    client.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 10
    run = server._run
    rows = run.ledger.history
    assert not any((run.ledger.events, rows.size, rows.results, rows.digests, run.outputs, run.resolved, run.received, run._names))
    with pytest.raises(httpx.ConnectError):
        post(server.url, prompt=[1])


def test_a_wrong_command_line_says_what_to_write(capsys):
    from workbench.serve.__main__ import main

    assert main(["--model", "x", "--policy", "FCFSS"]) == 2 and "Did you mean 'FCFS'" in capsys.readouterr().err
    assert main(["--model", "x", "--adapter", "a"]) == 2 and "adapter must be NAME=DIR" in capsys.readouterr().err
