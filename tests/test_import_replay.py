"""Result files of other systems, made by hand in the exact form that their sources write, read as replays measured elsewhere."""

import json
import math

import numpy as np
import pytest

from workbench.config import SLO
from workbench.experiments.compare import Comparison
from workbench.results import metrics
from workbench.results.imports import import_replay

# vLLM: the keys of `result` in vllm/benchmarks/serve.py at 009e6d4a (2026), `--save-result --save-detailed`; per-request lists in order
# of sending, times in seconds of perf_counter. The first request: 3 tokens at 0.5, 0.6 and 0.8 s after it was sent.
VLLM = {
    "date": "20260101-000000",
    "endpoint_type": "vllm",
    "backend": "vllm",
    "label": None,
    "model_id": "meta-llama/Meta-Llama-3-8B",
    "tokenizer_id": "meta-llama/Meta-Llama-3-8B",
    "num_prompts": 4,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 10.0,
    "completed": 3,
    "failed": 1,
    "total_input_tokens": 60,
    "total_output_tokens": 6,
    "request_throughput": 0.3,
    "input_lens": [10, 20, 30, 40],
    "output_lens": [3, 1, 2, 0],
    "ttfts": [0.5, 0.25, 1.0, 0.0],
    "itls": [[0.1, 0.2], [], [0.5], []],
    "latencies": [0.8, 0.25, 1.5, 0.0],
    "start_times": [1000.0, 1001.0, 1002.5, 1003.0],
    "queue_times": [0.0, 0.0, 0.0, 0.0],
    "generated_texts": ["a b c", "d", "e f", ""],
    "errors": ["", "", "", "Service Unavailable"],
    "mean_ttft_ms": 583.3,
}
OLD = ("start_times", "queue_times", "latencies")  # benchmark_serving.py did not write these (v0.6 to v0.9)


def write(path, record):
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def without(*names, **changes):
    return {k: v for k, v in VLLM.items() if k not in names} | changes


def test_vllms_file_gives_the_times_that_it_states(tmp_path):
    result = import_replay(write(tmp_path / "run.json", VLLM), "vllm", slo=SLO(ttft_s=0.6, itl_s=0.3))
    frame = result.requests
    assert frame["arrival_s"].tolist() == [0.0, 1.0, 2.5, 3.0]
    assert frame["ttft_s"].tolist()[:3] == pytest.approx([0.5, 0.25, 1.0]) and math.isnan(frame["ttft_s"].iloc[3])
    assert frame["e2e_s"].tolist()[:3] == pytest.approx([0.8, 0.25, 1.5])
    assert frame["tpot_s"].iloc[0] == pytest.approx(0.15) and math.isnan(frame["tpot_s"].iloc[1])
    assert frame["itl_max_s"].iloc[0] == pytest.approx(0.2)
    assert frame["output_tokens"].tolist() == [3, 1, 2, 0] and frame["prompt_tokens"].tolist() == [10, 20, 30, 40]
    assert frame["outcome"].tolist() == ["finished", "finished", "finished", "aborted"]
    assert frame["met"].tolist() == [True, True, False, False]
    assert metrics.token_gaps(result.events)["itl_s"].tolist() == pytest.approx([0.1, 0.2, 0.5])
    row = result.summary()
    assert row["attainment"] == 0.5 and row["goodput_per_s"] == pytest.approx(0.2) and row["decode_tokens_per_s"] == pytest.approx(0.6)
    assert row["aborted"] == 1 and row["measure_end_s"] == 10.0
    assert result.events.query("kind == 'aborted'")["note"].tolist() == ["Service Unavailable"]


def test_what_a_client_cannot_see_is_nan_and_said(tmp_path):
    result = import_replay(write(tmp_path / "run.json", VLLM), "vllm")
    row = result.summary()
    unseen = ("preemptions", "kv_occupancy_mean", "steps", "attainment_admission_wait", "queue_mean_s", "finetune_tokens_per_s")
    assert all(math.isnan(row[name]) for name in unseen)
    assert result.requests[["queue_s", "preemptions"]].isna().all(axis=None)
    assert "measured elsewhere" in repr(result) and "not in the file: queueing" in repr(result)
    assert result.executor.name == "meta-llama/Meta-Llama-3-8B" and not result.executor.simulated
    assert result.record["request_throughput"] == 0.3 and "itls" not in result.record
    assert result.steps.empty and result.work.empty and result.jobs.empty


def test_without_start_times_arrivals_are_nan_and_latencies_the_same(tmp_path):
    result = import_replay(write(tmp_path / "old.json", without(*OLD)), "vllm", slo=SLO(ttft_s=0.6))
    new = import_replay(write(tmp_path / "run.json", VLLM), "vllm", slo=SLO(ttft_s=0.6))
    assert result.requests["arrival_s"].isna().all() and math.isnan(result.summary()["saturated"])
    for name in ("ttft_s", "e2e_s", "tpot_s", "itl_max_s"):
        np.testing.assert_allclose(result.requests[name], new.requests[name], atol=1e-9)
    assert result.summary()["attainment"] == new.summary()["attainment"] == 0.5
    assert any("arrival times are not in the file" in note for note in result.notes)
    given = import_replay(tmp_path / "old.json", "vllm", timestamps=[0.0, 1.0, 2.5, 3.0])
    assert given.requests["arrival_s"].tolist() == new.requests["arrival_s"].tolist()


def test_time_that_the_client_held_a_request_back_counts_from_the_intended_arrival(tmp_path):
    held = without(queue_times=[0.0, 0.75, 0.0, 0.0])
    result = import_replay(write(tmp_path / "run.json", held), "vllm")
    assert result.requests["arrival_s"].iloc[1] == pytest.approx(0.25) and result.requests["ttft_s"].iloc[1] == pytest.approx(1.0)
    assert any("1 requests were held back by the client for up to 0.75 s" in note for note in result.notes)


def test_several_tokens_at_once_leave_lengths_and_means_right_and_counts_per_event_unknown(tmp_path):
    chunked = without(output_lens=[5, 1, 2, 0])
    result = import_replay(write(tmp_path / "run.json", chunked), "vllm")
    assert result.requests["output_tokens"].tolist() == [5, 1, 2, 0]
    assert result.requests["tpot_s"].iloc[0] == pytest.approx(0.3 / 4)
    row = result.summary()
    assert math.isnan(row["decode_tokens_per_s"]) and math.isnan(row["tpot_p50_s"]) and row["ttft_p50_s"] == pytest.approx(0.5)
    assert any("1 requests got several tokens at once" in note for note in result.notes)


def test_a_request_that_was_not_streamed_has_no_first_token_time(tmp_path):
    unstreamed = without(ttfts=[0.0, 0.25, 1.0, 0.0], itls=[[], [], [0.5], []])
    result = import_replay(write(tmp_path / "run.json", unstreamed), "vllm", slo=SLO(ttft_s=0.6))
    assert math.isnan(result.requests["ttft_s"].iloc[0]) and result.requests["outcome"].iloc[0] == "finished"
    assert math.isnan(result.summary()["attainment"])


# SGLang: `result | result_details` of python/sglang/benchmark/serving.py at 00f9ec47 (2026), `--output-details`: a line per run, appended.
SGLANG = {
    "tag": None,
    "backend": "sglang",
    "dataset_name": "mooncake",
    "request_rate": "trace",
    "max_concurrency": None,
    "duration": 4.0,
    "completed": 2,
    "total_input_tokens": 30,
    "total_output_tokens": 4,
    "input_lens": [10, 20],
    "output_lens": [3, 1],
    "ttfts": [0.5, 0.25],
    "itls": [[0.1, 0.2], []],
    "generated_texts": ["a b c", "d"],
    "errors": ["", ""],
}


def test_sglangs_lines_are_runs_and_one_must_be_chosen_where_there_are_several(tmp_path):
    path = tmp_path / "sglang.jsonl"
    second = SGLANG | {"ttfts": [1.5, 1.25], "duration": 8.0}
    path.write_text("".join(json.dumps(r) + "\n" for r in (SGLANG, second)), encoding="utf-8")
    with pytest.raises(ValueError, match="holds 2 runs: run must say which, got None. Pass run=0"):
        import_replay(path, "sglang")
    with pytest.raises(ValueError, match=r"run must lie in 0..1, got 2"):
        import_replay(path, "sglang", run=2)
    result = import_replay(path, "sglang", run=1)
    assert result.requests["ttft_s"].tolist() == pytest.approx([1.5, 1.25])
    assert result.requests["e2e_s"].tolist() == pytest.approx([1.8, 1.25])
    assert result.summary()["decode_tokens_per_s"] == pytest.approx(0.5)
    assert result.requests["arrival_s"].isna().all()


# Loquetier: tests/test_scalable_loquetier.py at aae33bae: NAME_I.txt holds the waits ("-1" for a request dropped after 6 s), an empty
# line, and "prefill_tokens decode_tokens seconds idle_seconds" per model call; NAME_F.txt "type tokens seconds idle_seconds", with type
# 0 train forward, 1 evaluate forward, 2 backward.
INFERENCE = "0.000 1.500 -1 0.250\n\n200 16 0.050 0.000\n0 32 0.150 -0.002\n"
FINETUNE = "0 2048 0.200 0.010\n2 0 0.300 0.010\n1 512 0.100 0.000\n"


def test_loquetiers_files_give_waits_drops_and_its_own_rates(tmp_path):
    (tmp_path / "result_I.txt").write_text(INFERENCE)
    (tmp_path / "result_F.txt").write_text(FINETUNE)
    (tmp_path / "timestamps.txt").write_text("0\n2\n1\n3\n")
    result = import_replay(tmp_path / "result_I.txt", "loquetier", timestamps=tmp_path / "timestamps.txt", slo=SLO(ttft_s=1.0))
    frame = result.requests
    assert frame["arrival_s"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert frame["queue_s"].tolist()[:2] == pytest.approx([0.0, 1.5]) and math.isnan(frame["queue_s"].iloc[2])
    assert frame["outcome"].tolist() == ["unknown", "unknown", "rejected", "unknown"]
    assert frame[["ttft_s", "e2e_s", "output_tokens", "met", "prompt_tokens"]].isna().all(axis=None)
    row = result.summary()
    assert row["attainment_admission_wait"] == 0.75 and row["rejected"] == 1 and row["queue_mean_s"] == pytest.approx(1.75 / 3)
    assert all(math.isnan(row[name]) for name in ("attainment", "goodput_per_s", "decode_tokens_per_s", "finished", "saturated"))
    assert result.record["decode_tokens_per_model_s"] == pytest.approx(48 / 0.2)
    assert result.record["finetune_tokens_per_model_s"] == pytest.approx(2048 / 0.5)
    assert result.calls["kind"].tolist() == ["inference"] * 2 + ["train forward", "backward", "evaluate forward"]
    assert any("1 lines of its log hold negative durations" in note for note in result.notes)


def test_loquetiers_file_alone_has_no_arrivals(tmp_path):
    (tmp_path / "result_I.txt").write_text(INFERENCE)
    result = import_replay(tmp_path / "result_I.txt", "loquetier")
    assert result.requests["arrival_s"].isna().all() and result.summary()["attainment_admission_wait"] == 0.75
    assert result.calls["kind"].tolist() == ["inference"] * 2


def test_imported_runs_stand_beside_replays_in_a_comparison(tmp_path):
    path = write(tmp_path / "run.json", VLLM)
    imported = import_replay(path, "vllm", slo=SLO(ttft_s=0.6))
    both = {("a", 0): imported, ("b", 0): import_replay(path, "vllm", slo=SLO(ttft_s=2.0))}
    comparison = Comparison(labels=("a", "b"), seeds=(0,), replays=both, trace_name="vllm's own", redrawn=())
    assert comparison.table()["attainment"].tolist() == [0.5, 0.75]
    assert "measured on meta-llama/Meta-Llama-3-8B, unknown device, measured elsewhere" in comparison.caption


def test_a_file_that_lacks_what_is_needed_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="a result file must exist"):
        import_replay(tmp_path / "none.json", "vllm")
    path = write(tmp_path / "run.json", without("itls"))
    with pytest.raises(ValueError, match=r"a run without \['itls'\]'?\"?. Run the benchmark with --save-detailed"):
        import_replay(path, "vllm")
    with pytest.raises(ValueError, match="--output-details"):
        import_replay(path, "sglang")
    with pytest.raises(ValueError, match=r"format must be one of vllm, sglang, loquetier, got 'vlm'. Did you mean 'vllm'"):
        import_replay(path, "vlm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lists must be of one length"):
        import_replay(write(path, without(ttfts=[0.5])), "vllm")
    with pytest.raises(ValueError, match="ttfts must be seconds of at least 0"):
        import_replay(write(path, without(ttfts=[0.5, -1.0, 1.0, 0.0])), "vllm")
    with pytest.raises(ValueError, match="timestamps must hold one time for each of the 4 requests, got 2"):
        import_replay(write(path, without(*OLD)), "vllm", timestamps=[0.0, 1.0])
    path.write_text("not json")
    with pytest.raises(ValueError, match="must be a JSON object, or one a line"):
        import_replay(path, "vllm")
    (tmp_path / "result_F.txt").write_text(FINETUNE)
    with pytest.raises(ValueError, match="must be its file NAME_I.txt, got 'result_F.txt'"):
        import_replay(tmp_path / "result_F.txt", "loquetier")
    (tmp_path / "bad_I.txt").write_text("0.0 x\n\n1 2 3 4\n")
    with pytest.raises(ValueError, match="must hold a line of waits"):
        import_replay(tmp_path / "bad_I.txt", "loquetier")
