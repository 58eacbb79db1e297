"""Run by test_graphs.py where Triton interprets: the padded rows of a recorded mixed step, without CUDA, through the kernels themselves."""

from dataclasses import replace

import pytest

from kernels import counters
from kernels.backend import IS_INTERPRETED
from tests.runtime.references import SMALL, job, make_family, mixed_rows, rows_of
from workbench.runtime import mixed_graphs, weights
from workbench.runtime.engine import Engine
from workbench.runtime.mixed_graphs import MixedGraphs

TOLERANCE = 1e-4


@pytest.mark.parametrize("tail", [0, 64])
def test_a_padded_mixed_step_equals_transformers_and_peft_run_separately(tail, tmp_path, monkeypatch):
    assert IS_INTERPRETED
    monkeypatch.setattr(weights, "tail_columns", lambda weight: tail)
    monkeypatch.setattr(mixed_graphs, "TAIL_TOKENS", 16)
    folder, base, adapters = make_family(tmp_path, "qwen3")
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=replace(SMALL, max_batch_tokens=128, max_requests=8))
    graphs = engine.runner.mixed = MixedGraphs(engine.runner, 128, 8, engine.info.max_model_len)
    jobs = [job("first", length=9, evaluation=rows_of(6, 2, 9), evaluate_every=1), job("second", length=33, rank=8, targets=("v_proj",))]
    counters.calls.clear()
    kinds, is_cut = set(), False
    for segment, found, expected in mixed_rows(engine, folder, adapters, jobs, seed=1, steps=2):
        kinds.add(segment.kind)
        is_cut |= segment.kind == "finetune" and segment.start > 0
        exact = expected(base)
        assert float((found - exact).abs().max() / exact.abs().max()) <= TOLERANCE, segment
    assert kinds >= {"finetune", "evaluate", "prefill"}
    assert is_cut, "rows that attend to an earlier chunk"
    assert graphs.recorded, "every step went through the padded path"
    assert (("tail_linear", "triton", "cpu") in counters.calls) == (tail > 0), "adapters lie in the tails where there are any"
