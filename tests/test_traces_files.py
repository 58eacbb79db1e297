"""The shipped traces are what their README says, and the formats of others load as what they mean."""

import hashlib
import json
import re

import pandas as pd
import pytest

from workbench import traces
from workbench.traces import io as trace_io
from workbench.traces.trace import Trace

COUNTS = {
    "azure-conv": (19_366, 3_502, 1020, 129),
    "azure-code": (8_819, 3_436, 1469, 13),
    "mooncake-conversation": (12_031, 3_537, 6909, 350),
    "burstgpt-day29": (4_286, 3_600, None, None),
    "burstgpt-day33": (7_039, 3_600, None, None),
    "burstgpt-e7": (11_325, 7_200, None, None),
    "paper-e6": (630, 420, None, None),
    "w2-offline": (256, 0, None, None),
    "w3-5rps": (156, 30, None, None),
    "w3-10rps": (304, 30, None, None),
    "w3-20rps": (593, 30, None, None),
}


@pytest.mark.parametrize("name", traces.names())
def test_a_shipped_trace_has_the_documented_counts(name):
    trace = traces.load(name)
    count, duration_s, prompt_p50, output_p50 = COUNTS[name]
    assert (len(trace), round(trace.duration_s)) == (count, duration_s)
    assert trace.name == name
    assert not trace.is_closed
    if prompt_p50 is not None:
        assert (trace.frame["prompt_tokens"].median(), trace.frame["output_tokens"].median()) == (prompt_p50, output_p50)
    if trace.has_lengths:
        assert len(trace.validate().requests) == count


def test_checksums_in_the_readme_match_every_file():
    readme = (trace_io.TRACES_DIR / "README.md").read_text()
    listed = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  \S+$", readme, re.M))
    present = {
        p.relative_to(trace_io.TRACES_DIR).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in trace_io.TRACES_DIR.rglob("*")
        if p.is_file() and p.name not in ("README.md", ".gitattributes")
    }
    assert listed == present
    for file in present:
        assert f"`{file}`" in readme, file


def test_the_papers_e7_has_its_six_windows():
    times = traces.load("burstgpt-e7").frame["arrival_s"]
    assert [int(((times >= s) & (times < s + 1200)).sum()) for s in range(0, 7200, 1200)] == [676, 2145, 1465, 2823, 2360, 1856]
    assert times.value_counts().max() == 21
    days = traces.load("burstgpt-day29").then(traces.load("burstgpt-day33"))
    assert days.frame["arrival_s"].tolist() == times.tolist()


def test_ticking_clocks_are_warned_of_and_jitter_ends_it():
    for name, tick, tied in (("burstgpt-e7", 1, "78%"), ("mooncake-conversation", 3, "100%")):
        trace = traces.load(name)
        assert trace.warnings == (
            f"{tied} of the arrivals tie: the clock ticks every {tick} s. Spread them with .jitter({tick:.1f}, seed=).",
        )
        assert trace.jitter(float(tick), seed=0).warnings == ()
    for name in ("azure-conv", "azure-code", "w2-offline", "w3-20rps", "paper-e6"):
        assert traces.load(name).warnings == ()


def test_the_papers_e6_has_one_adapter_per_phase():
    frame = traces.load("paper-e6").frame
    assert frame.groupby("adapter").size().to_dict() == {"adapter-0": 120, "adapter-1": 150, "adapter-2": 240, "adapter-3": 120}
    assert frame.groupby("adapter")["arrival_s"].min().to_dict() == {"adapter-0": 0, "adapter-1": 120, "adapter-2": 180, "adapter-3": 300}


def test_w2_has_the_tokens_of_its_table():
    frame = traces.load("w2-offline").frame
    assert (frame["prompt_tokens"].sum(), frame["output_tokens"].sum()) == (56_764, 46_605)
    assert traces.load("w2-offline").adapters == ("adapter-0", "adapter-1", "adapter-2", "adapter-3")


def test_mooncake_keeps_its_shared_prefixes():
    first, second = traces.load("mooncake-conversation").requests[:2]
    assert first.prefix_ids[:2] == (0, 1)
    assert second.prefix_ids[:2] == (0, 14)
    assert len(first.prefix_ids) == -(-first.prompt_tokens // 512)


def test_job_data_has_the_documented_counts():
    assert len(traces.job_arrivals()) == 15_264
    assert len(traces.job_runtimes()) == 83_154
    assert set(traces.describe().index) == {*traces.names(), *traces.names("lengths"), *traces.names("jobs")}


def test_our_own_frame_survives_every_file_format(tmp_path):
    rows = pd.DataFrame(
        {
            "request_id": ["007", "b", "c"],
            "arrival_s": [0.1, 0.2, 0.3],
            "prompt_tokens": [5, 6, 7],
            "output_tokens": [1, 2, 3],
            "adapter": ["3", None, "x"],
            "max_tokens": [9, None, 9],
            "prefix_ids": [[1, 2], [], [1]],
            "priority": [0, 1, 2],
        }
    )
    trace = Trace.from_frame(rows)
    trace.frame.to_csv(tmp_path / "t.csv", index=False)
    trace.frame.to_parquet(tmp_path / "t.parquet")
    trace.frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        assert traces.load(tmp_path / name).requests == trace.requests, name
    assert [r.adapter for r in trace.requests] == ["3", None, "x"]
    assert [r.max_tokens for r in trace.requests] == [9, None, 9]


BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
45,,2.5,GPT-4,1087,{},1317,API log
"""


def test_burstgpt_csv(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(BURSTGPT.format(230))
    first, second = traces.load(path).requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens, first.tenant, first.session) == (0, 472, 18, "ChatGPT", "a")
    assert (second.arrival_s, second.tenant, second.session) == (40, "GPT-4", None)


def test_failed_requests_are_dropped_only_when_asked_and_counted(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(BURSTGPT.format(0))
    with pytest.raises(ValueError, match=r"burst.csv: output_tokens must be at least 1, got 0 in row 1\..*drop_empty=True"):
        traces.load(path)
    trace = traces.load(path, drop_empty=True)
    assert (len(trace), trace.notes) == (1, ("1 requests with 0 tokens dropped",))


@pytest.mark.parametrize(
    "stamps",
    [
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319600"),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.061930+00:00"),
        ("2024-05-10 23:59:59", "2024-05-10 23:59:59.052000"),
    ],
)
def test_azure_csv_of_both_years(tmp_path, stamps):
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{stamps[0]},4808,10\n{stamps[1]},3180,8\n")
    first, second = traces.load(path).requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0, 4808, 10)
    assert second.arrival_s == 0.052


def test_mooncake_jsonl_counts_milliseconds(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": t, "input_length": 600, "output_length": 9, "hash_ids": [46, i]} for i, t in enumerate((1000, 4500))]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    first, second = traces.load(path).requests
    assert (first.arrival_s, second.arrival_s) == (0, 3.5)
    assert (first.prefix_ids, second.prefix_ids) == ((46, 0), (46, 1))


def test_qwen_bailian_jsonl_keeps_sessions_and_regroups_its_blocks(tmp_path):
    path = tmp_path / "qwen.jsonl"
    blocks = list(range(40))
    rows = [
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.5, "hash_ids": blocks},
        {"chat_id": 2, "parent_chat_id": 1, "timestamp": 70.0, "hash_ids": blocks[:32] + [99]},
        {"chat_id": 3, "parent_chat_id": 2, "timestamp": 80.0, "hash_ids": [98] + blocks[1:]},
    ]
    common = {"input_length": 640, "output_length": 5, "type": "text", "turn": 1}
    path.write_text("\n".join(json.dumps(row | common) for row in rows))
    trace = traces.load(path)
    first, second, third = trace.requests
    assert [r.request_id for r in trace.requests] == ["1", "2", "3"]
    assert [r.session for r in trace.requests] == ["1", "1", "1"]
    assert (second.arrival_s, second.parent_id, second.slo_class) == (8.5, None, "text")
    assert first.prefix_ids[0] == second.prefix_ids[0] != third.prefix_ids[0]
    assert len({first.prefix_ids[1], second.prefix_ids[1], third.prefix_ids[1]}) == 3
    assert "closed loop" in repr(trace.closed_sessions(2.0))


BAD_FILES = {
    "other columns": ("x.csv", "time,tokens\n1,2\n", "x.csv: a trace's columns must be those of a known format"),
    "no such suffix": ("x.xlsx", "", "a trace file must end in"),
    "empty CSV": ("x.csv", "", "x.csv: must be a CSV file with a header line"),
    "bad JSON": ("x.jsonl", '{"arrival_s": 0}\n{"arrival_s"\n', "x.jsonl line 2: must be one JSON object"),
    "a JSON list": ("x.jsonl", "[1]\n", "x.jsonl line 1 must be one JSON object"),
    "bad cell": (
        "x.csv",
        "arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,many,1\n",
        "x.csv: prompt_tokens must be a number, got 'many' in row 1",
    ),
    "bad date": (
        "x.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
        "TIMESTAMP must be a date and time, got 'yesterday' in row 0",
    ),
    "bad Azure order": (
        "x.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 01:00:00,1,1\n2024-05-10 00:00:00,1,1\n",
        "x.csv: arrival_s must not decrease from row to row, got 0.0 in row 1",
    ),
    "bad id list": ("x.csv", 'arrival_s,prefix_ids\n0,"[1, x]"\n', "x.csv: prefix_ids must be a list of integers"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_that_names_it(case, tmp_path):
    name, text, message = BAD_FILES[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        traces.load(tmp_path / name)


def test_unknown_names_get_a_did_you_mean(tmp_path):
    with pytest.raises(ValueError, match=r"got 'burstgpt-day28'. Did you mean 'burstgpt-day29'"):
        traces.load("burstgpt-day28")
    with pytest.raises(ValueError, match=r"got 'arxiv-lengths', which holds lengths only. Use .with_lengths"):
        traces.load("arxiv-lengths")
    with pytest.raises(ValueError, match="holds training jobs"):
        traces.load("philly-jobs")
    with pytest.raises(FileNotFoundError, match=r"existing file, got '.*none.csv'"):
        traces.load(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_text("arrival_s\n0\n")
    with pytest.raises(ValueError, match=r"format must be one of .* got 'azur'. Did you mean 'azure'"):
        traces.load(tmp_path / "t.csv", format="azur")


def test_a_missing_data_folder_says_where_it_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(trace_io, "TRACES_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pip install -e .*LOQUETIER_TRACES"):
        traces.load("azure-conv")
