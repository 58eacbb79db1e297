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


@pytest.fixture
def padded(tmp_path, monkeypatch):
    """An engine whose steps all go through the padded path, with so many columns behind its weights' rows; and what made it."""

    def build(tail: int):
        monkeypatch.setattr(weights, "tail_columns", lambda weight: tail)
        monkeypatch.setattr(mixed_graphs, "TAIL_TOKENS", 16)
        folder, base, adapters = make_family(tmp_path, "qwen3")
        engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=replace(SMALL, max_batch_tokens=128, max_requests=8))
        engine.runner.mixed = MixedGraphs(engine.runner, 128, 8, engine.info.max_model_len)
        counters.calls.clear()
        return engine, folder, base, adapters

    assert IS_INTERPRETED
    return build


def assert_equal(rows, base) -> None:
    segment, found, expected = rows
    exact = expected(base)
    assert float((found - exact).abs().max() / exact.abs().max()) <= TOLERANCE, segment


def test_a_padded_mixed_step_equals_transformers_and_peft_run_separately(padded):
    engine, folder, base, adapters = padded(0)
    jobs = [job("first", length=9, evaluation=rows_of(6, 2, 9), evaluate_every=1), job("second", length=33, rank=8, targets=("v_proj",))]
    kinds, is_cut = set(), False
    for rows in mixed_rows(engine, folder, adapters, jobs, seed=1, steps=2):
        kinds.add(rows[0].kind)
        is_cut |= rows[0].kind == "finetune" and rows[0].start > 0
        assert_equal(rows, base)
    assert kinds >= {"finetune", "evaluate", "prefill"}
    assert is_cut, "rows that attend to an earlier chunk"
    assert engine.runner.mixed.recorded, "every step went through the padded path"


def test_a_padded_step_with_adapters_in_the_weights_tails_equals_transformers_and_peft(padded):
    engine, folder, base, adapters = padded(64)
    kinds = set()
    for rows in mixed_rows(
        engine, folder, adapters, [job("first", length=9, evaluation=rows_of(6, 2, 9), evaluate_every=1)], seed=1, steps=1
    ):
        kinds.add((rows[0].kind, rows[0].adapter))
        assert_equal(rows, base)
    assert len(kinds) >= 3 and {kind for kind, _ in kinds} == {"evaluate", "prefill"}
    layers = engine.fused.dims.num_layers
    assert counters.calls["tail_linear", "triton", "cpu"] == 3 * layers, "qkv, gate and up, and down"
