"""Traces for other systems' load generators, read back as these read them."""

import json
import math

import pandas as pd
import pytest

from workbench import traces
from workbench.traces.trace import Trace


def small(**columns):
    rows = {"request_id": ["x", "y", "z"], "arrival_s": [0.0, 0.37, 2.0], "prompt_tokens": [1300, 100, 700], "output_tokens": [5, 6, 7]}
    return Trace.from_frame(pd.DataFrame(rows | columns), name="small")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_vllms_file_is_read_back_as_the_same_trace(tmp_path):
    """vLLM's timed_trace (pull request 39795) takes Mooncake's fields: timestamp, input_length, output_length, hash_ids."""
    trace = small(prefix_ids=[[4, 5, 6], [4], [9, 10]])
    command = trace.export(tmp_path / "trace.jsonl", "vllm")
    again = traces.load(tmp_path / "trace.jsonl", format="mooncake").frame
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "prefix_ids"):
        assert again[name].tolist() == trace.frame[name].tolist(), name
    assert list(lines(tmp_path / "trace.jsonl")[0]) == ["timestamp", "input_length", "output_length", "hash_ids"]
    # its default of 16 tokens a hash would make every prompt 32 times too short
    assert "--timed-trace-chunk-hash-size 512 --timed-trace-sec-multiplier 0.001" in command and "--num-prompts 3" in command


@pytest.mark.parametrize("format, size", [("vllm", 512), ("sglang", 128)])
def test_hash_ids_cover_every_prompt_and_are_shared_only_where_prefixes_are(tmp_path, format, size):
    trace = small(prefix_ids=[[4, 5], [], [4]])
    trace.export(tmp_path / "trace.jsonl", format)
    rows = lines(tmp_path / "trace.jsonl")
    for row in rows:
        assert len(row["hash_ids"]) == math.ceil(row["input_length"] / size)
    shared = set(rows[0]["hash_ids"]) & set(rows[2]["hash_ids"])
    assert len(shared) == 512 // size
    assert not set(rows[1]["hash_ids"]) & (set(rows[0]["hash_ids"]) | set(rows[2]["hash_ids"]))


def test_sglangs_client_makes_prompts_of_about_the_asked_lengths_at_the_asked_times(tmp_path):
    """python/sglang/benchmark/datasets/mooncake.py at 17481b4e: each hash id becomes its digits and 128 words; timestamps are ms."""
    trace = small()
    command = trace.export(tmp_path / "trace.jsonl", "sglang")
    assert "--dataset-name mooncake" in command and "--use-trace-timestamps" in command
    rows = sorted(lines(tmp_path / "trace.jsonl"), key=lambda row: row["timestamp"])
    words = [len("".join(f"{h}" + " ".join(["hi"] * 128) for h in row["hash_ids"]).split()) for row in rows]
    assert [w == pytest.approx(n, abs=128) for w, n in zip(words, [1300, 100, 700], strict=True)] == [True] * 3
    assert [(row["timestamp"] - rows[0]["timestamp"]) / 1000.0 for row in rows] == pytest.approx([0.0, 0.37, 2.0])
    assert [row["output_length"] for row in rows] == [5, 6, 7]


def test_what_a_format_has_no_place_for_is_named_in_a_warning(tmp_path):
    trace = small(adapter=["a", None, "b"], priority=[1, 2, 3])
    with pytest.warns(UserWarning, match="format 'vllm' has no place for adapter, priority of 'small': left out"):
        trace.export(tmp_path / "trace.jsonl", "vllm")


def harness(folder):
    """The requests as tests/test_scalable_loquetier.py (aae33bae) builds them: (time, adapter, text), sorted by time."""
    config = json.loads((folder / "inference.json").read_text())
    timestamps = [int(t) for t in (folder / "timestamps.txt").read_text().splitlines()]
    cases, found = config["testcases"], []
    for k, case in enumerate(cases):
        intervals = timestamps[k :: len(cases)]
        assert case["sample_num"] == len(intervals) and case["lora_name"] in config["lora_names"]
        with open(case["jsonl_path"]) as file:
            texts = file.read().splitlines()[case["sample_offset"] :]
        for t, line in zip(intervals, texts, strict=False):
            text = next(turn["value"] for turn in json.loads(line)["conversations"] if turn["from"] == "human")
            found.append((case["request_start"] + t, case["lora_name"], text))
    return sorted(found, key=lambda row: row[0])


def texts_trace(times, adapters):
    rows = {"request_id": range(len(times)), "arrival_s": times, "adapter": adapters, "prompt": [f"text {i}" for i in range(len(times))]}
    return Trace.from_frame(pd.DataFrame(rows), name="texts")


def test_loquetiers_harness_gets_the_same_requests_whatever_the_order_of_adapters(tmp_path):
    trace = texts_trace([0.0, 1.0, 2.0, 3.0, 4.0], ["b", "b", "a", "a", "b"])
    command = trace.export(tmp_path / "out", "loquetier")
    expected = [(float(t), a, f"text {i}") for i, (t, a) in enumerate(zip(range(5), "bbaab", strict=True))]
    assert harness(tmp_path / "out") == expected
    assert "--timestamp_txt" in command and "inference.json" in command


def test_loquetiers_limits_are_refused_with_the_next_step(tmp_path):
    def export(trace, **options):
        trace.export(tmp_path / "out", "loquetier", **options)

    with pytest.raises(ValueError, match=r"reads whole seconds, got 0.5. Round arrival_s"):
        export(texts_trace([0.0, 0.5], ["a", "b"]))
    with pytest.raises(ValueError, match="serves no request without an adapter"):
        export(texts_trace([0.0, 1.0], ["a", None]))
    with pytest.raises(ValueError, match=r"deals requests to adapters in turn, \[2, 1\] of each, got \[3\]|\[2, 2\] of each, got \[3, 1\]"):
        export(texts_trace([0.0, 1.0, 2.0, 3.0], ["a", "a", "a", "b"]))
    whole = {"request_id": [0, 1], "arrival_s": [0.0, 1.0], "adapter": ["a", "b"]}
    bare = Trace.from_frame(pd.DataFrame(whole))
    with pytest.raises(ValueError, match="needs texts of prompts.*Pass prompts=, a ShareGPT JSONL"):
        export(bare)
    export(bare, prompts="ShareGPT.jsonl")
    assert json.loads((tmp_path / "out" / "inference.json").read_text())["testcases"][1]["jsonl_path"] == "ShareGPT.jsonl"


def test_traces_that_no_load_generator_could_replay_are_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    with pytest.raises(ValueError, match=r"format must be one of vllm, sglang, loquetier, got 'sgl'"):
        small().export(path, "sgl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs arrival times, not a closed loop"):
        small(session=["s", "s", None]).closed_sessions(1.0).export(path, "vllm")
    with pytest.raises(ValueError, match="needs prompt_tokens and output_tokens of every request"):
        traces.poisson(rate=1, duration_s=9, seed=0).export(path, "sglang")
    with pytest.raises(ValueError, match="at least one request"):
        small().head(0).export(path, "vllm")
    with pytest.raises(ValueError, match="prompts is for format='loquetier'"):
        small().export(path, "vllm", prompts="x.jsonl")
