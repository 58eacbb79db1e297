"""Calibration covers what an engine does by design: every bucket in every kind of step, within every limit, the same steps twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_latency_padding import PADDED, measured, model

import workbench as wb
from tests.runtime.references import SMALL
from workbench.core import AdapterInfo
from workbench.features import INDEX, NAMES
from workbench.latency import LatencyModel
from workbench.latency.fit import fit_costs
from workbench.latency.terms import CLASSES, DECODING, SERVING, TRAINING, Padding, Places, classes_of
from workbench.runtime.backward_graphs import LONGEST
from workbench.runtime.buckets import buckets
from workbench.runtime.calibrate import Mix, _is_settled, _Steps, measure
from workbench.runtime.driver import Driver
from workbench.runtime.graphs import row_bucket
from workbench.runtime.inputs import token_bucket
from workbench.runtime.mixed_graphs import sequence_bucket

INFO = replace(PADDED, num_blocks=512, max_requests=64, activation_tokens=512, num_layers=8, num_slots=4, max_batch_adapters=5)
PADDING = Padding.of(INFO)
MIX = Mix(max_resident=8, max_prompt_tokens=120, max_chunk_tokens=128, max_rows=64, micro_batches=((2, 128), (1, 64)))
ADAPTERS = [None, "a", "b", "c"]


@pytest.fixture(scope="module")
def executor():
    """A latency model stands for the engine: it has the same limits and takes the same batches."""
    return executor_of(INFO)


def executor_of(info):
    fitted, adapters = model(), {name: AdapterInfo(name=name, version=1, rank=8, bytes=4096) for name in ADAPTERS if name}
    return LatencyModel(fitted.costs, fitted.steps, info=info, report=fitted.report, provenance={}, adapters=adapters, vocab_size=100)


def steps(executor, num, rounds=1, seed=0):
    """The features [num, len(NAMES)] of a calibration's first steps, the rounds that they belong to, and their batches."""
    values, found, batches = [], [], []
    with Driver(executor, MIX.jobs(), seed=seed) as driver:
        made = _Steps(driver, MIX, ADAPTERS, rounds, seed)
        while len(values) < num:
            row = made.run()
            values.append([row[name] for name in NAMES])
            found.append(row["round"])
            batches.append(driver.batch)
    return np.array(values), np.array(found), batches


@pytest.fixture(scope="module")
def calibrated(executor):
    return steps(executor, 320, rounds=3)


def test_every_bucket_of_every_kind_of_step_is_visited_in_each_round(calibrated):
    values, rounds, _ = calibrated
    assert set(rounds) >= {0, 1, 2}
    for which in range(3):
        here = values[rounds == which]
        index = Places.of(here, PADDING, rounded=False).index
        largest = Places.of(values[values[:, 0] == values[:, 0].max()], PADDING, rounded=False).index[TRAINING].max()
        assert set(range(len(PADDING.decode))) <= set(index[DECODING])
        assert set(range(len(PADDING.forward))) <= set(index[SERVING])
        assert set(range(largest + 1)) <= set(index[TRAINING])
    kinds = classes_of(values)
    assert set(kinds) == set(range(len(CLASSES)))
    assert {1, 2, 4, 8} <= set(values[kinds == 0, INDEX["backward_layers"]]), "slices of several sizes"
    behind = Places.of(values, PADDING, rounded=True)
    assert set(behind.layer_tokens[kinds == 0]) == {64, 256}, "each micro-batch's own size"
    alone = (values[:, :4] == 0).all(axis=1)
    assert (alone & (kinds == 0)).any() and (~alone & (kinds == 0)).any(), "with decodes beside and without"
    for name in NAMES:
        assert (values[:, INDEX[name]] > 0).any(), name
    assert (values[(kinds == 3), INDEX["adapters"]] == 0).any(), "decodes without adapters"


def test_no_step_exceeds_what_a_plan_could_ask_for(calibrated):
    _, _, batches = calibrated
    for batch in batches:
        assert 0 < batch.num_tokens + len(batch.backwards) and batch.num_tokens <= INFO.max_batch_tokens
        served = [s for s in batch.segments if s.kind in ("prefill", "decode")]
        assert len(served) <= INFO.max_requests and len({s.adapter for s in batch.segments} - {None}) <= INFO.max_batch_adapters
        assert all(s.end <= INFO.max_model_len and max(s.blocks) < INFO.num_blocks for s in served)
        held = [block for s in served for block in s.blocks]
        assert len(held) == len(set(held)), "no block belongs to two sequences"


def test_the_same_seed_runs_the_same_steps_and_another_does_not(executor, calibrated):
    again = steps(executor, 60, rounds=3)
    assert [b.digest() for b in again[2]] == [b.digest() for b in calibrated[2][:60]]
    assert [b.digest() for b in steps(executor, 60, rounds=3, seed=1)[2]] != [b.digest() for b in again[2]]


def test_two_rounds_say_what_random_mixes_of_as_many_steps_do_not(executor, calibrated):
    covered = calibrated[0][calibrated[1] < 2][: (calibrated[1] < 2).sum()]
    mixed, rounds, _ = steps(executor, len(covered), rounds=0)
    assert set(rounds) == {-1}
    fresh = steps(executor, 200, rounds=9, seed=7)[0]
    errors = []
    for values in (covered, mixed):
        found = fit_costs(values, measured(values, noise=0.01, delayed=0.03), PADDING)
        errors.append(np.abs(found.predict_all(fresh) / measured(fresh) - 1).mean())
    assert errors[0] < 0.02 and errors[1] > 1.5 * errors[0]


def test_a_load_is_measured_more_than_once_though_adapters_stay(calibrated):
    values, rounds, batches = calibrated
    assert (values[rounds >= 0, INDEX["loads"]] > 0).sum() >= 6
    for batch in batches:
        assert {load.slot for load in batch.loads} <= set(range(INFO.num_slots)) and len(batch.loads) == len({x.slot for x in batch.loads})


def test_a_small_kv_pool_makes_steps_smaller_and_none_fails():
    executor = executor_of(replace(INFO, num_blocks=40, max_requests=16))
    values, rounds, _ = steps(executor, 150, rounds=2)
    assert set(rounds) >= {0, 1} and values[:, INDEX["decode_tokens"]].max() >= 4


def test_where_nothing_is_padded_sizes_double():
    executor = executor_of(replace(INFO, token_buckets=(), sequence_buckets=(), decode_buckets=(), backward_buckets=()))
    values, rounds, _ = steps(executor, 150)
    decodes = values[(classes_of(values) == 3) & (rounds == 0), INDEX["decode_tokens"]]
    assert len({int(np.ceil(np.log2(n))) for n in decodes}) == 7, "1 to 64"


def test_an_engines_calibration_leaves_out_what_is_done_once():
    engine = wb.Engine.random("tiny-llama", adapters=2, device="cpu", config=replace(SMALL, progress=False))
    assert engine.info.token_buckets == engine.info.decode_buckets == engine.info.backward_buckets == ()
    found = measure(engine, max_steps=40, seconds=0.0, rounds=3)
    assert 20 <= len(found) < 40 and set(found["round"]) <= {0, 1}
    values = np.zeros((4, len(NAMES)))
    values[1:, 0] = values[2:, 3] = 1
    frame = found.head(4).copy()
    frame[list(NAMES)] = values
    assert list(_is_settled(frame)) == [True, False, False, True]
    with pytest.raises(ValueError, match="rounds must be at least 0, got -1"):
        measure(engine, rounds=-1)


@pytest.mark.parametrize(("tokens", "requests", "arena"), [(2048, 256, 8192), (500, 7, 300), (4096, 300, 20_000)])
def test_an_engine_says_the_buckets_that_it_chooses(tokens, requests, arena):
    said = buckets(tokens, requests, arena, torch.bfloat16)

    def bucket_of(name, size):
        return next((b for b in said[name] if b >= size), None)

    assert all(bucket_of("token_buckets", n) == token_bucket(n, tokens) for n in range(1, tokens + 2))
    assert all(bucket_of("decode_buckets", n) == row_bucket(n) for n in range(1, min(requests, 256) + 1))
    assert all(bucket_of("sequence_buckets", n) == sequence_bucket(n, requests) for n in range(1, requests + 1))
    for n in range(1, arena + 1):
        chosen = token_bucket(n, LONGEST)
        assert bucket_of("backward_buckets", n) == (chosen if chosen is not None and chosen <= arena else None)
    assert buckets(tokens, requests, arena, torch.float32)["backward_buckets"] == ()


def test_whole_passes_follow_right_after_one_another(calibrated):
    values, _, _ = calibrated
    serves = values[:, INDEX["decode_tokens"]] + values[:, INDEX["prefill_tokens"]] > 0
    whole = (values[:, INDEX["backward_layers"]] == INFO.num_layers) & ~serves
    forward = (values[:, INDEX["finetune_tokens"]] > 0) & ~serves
    assert (whole[1:] & forward[:-1]).sum() >= 12, "whole backwards right after a forward"
    assert (forward[1:] & whole[:-1]).sum() >= 8, "and forwards right after a whole backward"


def test_as_many_sequences_as_there_may_be_decode_beside_prompts_and_beside_training(calibrated):
    values, _, _ = calibrated
    rows = values[:, INDEX["decode_tokens"]]
    assert rows[values[:, INDEX["prefill_tokens"]] > 0].max() > MIX.max_rows // 2
    assert rows[values[:, INDEX["finetune_tokens"]] > 0].max() > MIX.max_rows // 2
    assert rows[values[:, INDEX["backward_layers"]] > 0].max() > MIX.max_rows // 2
