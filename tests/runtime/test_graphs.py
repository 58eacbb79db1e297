"""What recorded steps depend on and read; recording and replaying themselves need CUDA (tests/gpu)."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import workbench as wb
from kernels.layout import SegmentLayout
from workbench.runtime import shapes
from workbench.runtime.adapters import init_adapter
from workbench.runtime.backward import top_gradient
from workbench.runtime.backward_graphs import BackwardGraphs
from workbench.runtime.block_tables import BlockTables, places_of
from workbench.runtime.graphs import (
    ROW_BUCKETS,
    DecodeBatch,
    DecodeGraphs,
    bucket_tiles,
    context_bucket,
    decode_fields,
    decode_tiles,
    row_bucket,
    tile_bucket,
    tile_rows,
    write_rows,
)
from workbench.runtime.inputs import PackedStep, padded_tiles, token_bucket
from workbench.runtime.mixed_graphs import MixedGraphs, document_bucket, mixed_fields, sequence_bucket, write_step
from workbench.runtime.recording import Recorder
from workbench.runtime.slots import AdapterTable
from workbench.runtime.staging import Staging
from workbench.runtime.weights import Dims

DIMS = Dims.of(shapes.config("tiny-llama"))


def put(table: AdapterTable, entry: int, *, rank: int, layers: tuple[int, ...]) -> None:
    weights = init_adapter(DIMS, "x", rank=rank, b_std=0.1)
    table.put(entry, {key: pair for key, pair in weights.tensors.items() if key[0] in layers}, weights.scales)


def test_an_adapter_that_adds_a_layer_or_another_rank_anywhere_needs_another_graph():
    table = AdapterTable(DIMS, 3, torch.device("cpu"), torch.float32)
    graphs = DecodeGraphs(SimpleNamespace(table=table, device=torch.device("cpu")), 2048)
    every = tuple(range(DIMS.num_layers))
    put(table, 0, rank=8, layers=every[:1])
    first = graphs.key(8, 512, 8, True)
    put(table, 1, rank=8, layers=every)
    second = graphs.key(8, 512, 8, True)
    assert first != second, "a graph recorded before launches nothing in the new layers"
    put(table, 2, rank=8, layers=every)
    assert graphs.key(8, 512, 8, True) == second, "another adapter of the same kind runs under the same graph"
    put(table, 2, rank=3, layers=every[-1:])
    assert graphs.key(8, 512, 8, True) != second, "a graph recorded before assumes ranks that are multiples of 8"
    assert graphs.key(8, 512, 8, False) == (8, 512, 8, None)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (17, 24), (256, 256), (257, None)])
def test_the_row_bucket_is_the_least_that_holds_the_rows(rows, bucket):
    assert row_bucket(rows) == bucket and (bucket is None or bucket in ROW_BUCKETS)


@pytest.mark.parametrize(
    ("context", "longest", "bucket"), [(1, 2048, 512), (513, 2048, 2048), (1, 192, 192), (3000, 4096, 4096), (90_000, 100_000, 100_000)]
)
def test_the_context_bucket_holds_the_context_and_stays_within_the_models(context, longest, bucket):
    assert context_bucket(context, longest) == bucket >= context


@pytest.mark.parametrize("entries", [[], [None], [2], [None, 0, 0, 5, None, None, 1], [3] * 40 + [None] * 3 + [1] * 17, [0, 1] * 8])
def test_the_tiles_of_decode_rows_are_those_of_the_general_layout(entries):
    for height in (16, 32):
        layout = SegmentLayout.build([(entry, 1) for entry in entries], "cpu", block_rows=height)
        assert np.array_equal(decode_tiles(entries, height), layout.tiles.numpy())


@pytest.mark.parametrize("rows", [1, 16, 48, 96, 256])
@pytest.mark.parametrize("adapters", [1, 3, 8, 40])
def test_tiles_of_a_bucket_fit_the_graph_that_they_choose(rows, adapters):
    tiles = bucket_tiles(sorted(i % adapters for i in range(rows)))
    room = tile_bucket(rows, len(tiles))
    assert len(tiles) <= room and tiles[:, 2].max() <= tile_rows(rows, room) and tiles[:, 2].sum() == rows


def shown(blocks, width):
    """These sequences' blocks as a step gathers them."""
    tables = BlockTables(width, 2)
    return tables.gather([tables.show(tables.take(), b) for b in blocks])


def test_block_tables_show_what_a_sequence_holds_after_others_came_and_went():
    tables = BlockTables(4, 2)
    held = [tables.show(tables.take(), blocks) for blocks in ((5, 6), (7,), (8, 9, 10))]
    assert len(set(held)) == 3, "more rows than there were"
    tables.give(held[1])
    assert tables.take() == held[1]
    tables.show(held[1], (1, 2, 3, 4))
    tables.show(held[0], (5, 6, 11))
    found = tables.gather([held[2], held[0], held[1]])
    assert [found[0, :3].tolist(), found[1, :3].tolist(), found[2].tolist()] == [[8, 9, 10], [5, 6, 11], [1, 2, 3, 4]]
    assert places_of(found, np.array([2, 0, 0]), np.array([5, 0, 3]), 2).tolist() == [7, 16, 19]


def test_staged_rows_say_what_the_batch_says_whatever_was_staged_before():
    rng, pool, bucket = np.random.default_rng(0), SimpleNamespace(num_blocks=50, block_tokens=4), 8
    staging = Staging(decode_fields(bucket, 6, bucket), torch.device("cpu"))
    for rows in (5, 8, 8, 1, 3):
        positions = rng.integers(0, 24, rows).tolist()
        blocks = [tuple(rng.permutation(50)[: p // 4 + 1].tolist()) for p in positions]
        batch = DecodeBatch(rng.integers(0, 99, rows).tolist(), positions, shown(blocks, 9), [int(e) for e in rng.integers(0, 2, rows)])
        write_rows(staging.host, batch, bucket_tiles([*batch.entries, *[None] * (bucket - rows)]), pool)
        staging.upload()
        there = {name: tensor.tolist() for name, tensor in staging.device.items()}
        assert there["token_ids"] == batch.token_ids + [0] * (bucket - rows)
        assert there["positions"] == positions + [0] * (bucket - rows)
        assert there["context_lens"] == [p + 1 for p in positions] + [1] * (bucket - rows)
        assert there["places"] == [b[-1] * 4 + p % 4 for b, p in zip(blocks, positions, strict=True)] + [50 * 4] * (bucket - rows)
        for row in range(bucket):
            expected = blocks[row] if row < rows else (50,)
            assert there["block_tables"][row][: len(expected)] == list(expected)
        tiles = bucket_tiles([*batch.entries, *[None] * (bucket - rows)]).tolist()
        assert there["tiles"] == tiles + [[0, 0, 0, 0]] * (bucket - len(tiles))


@pytest.mark.parametrize("row_slots", [[(0, 100), (None, 3)], [(i % 3, 1) for i in range(60)], [(None, 5)], [(1, 700), (0, 200), (1, 1)]])
def test_padded_tiles_visit_every_row_of_the_bucket_and_come_in_two_numbers(row_slots):
    rows = sum(count for _, count in row_slots)
    bucket = token_bucket(rows, 2048)
    plain, (tiles, height, num_tiles) = SegmentLayout.build(row_slots, "cpu"), padded_tiles(row_slots, bucket)
    assert len(tiles) <= num_tiles and num_tiles in (padded_tiles([(0, bucket)], bucket)[2], bucket), "two kinds of step a bucket"
    assert max((count for *_, count, _ in tiles), default=0) <= height
    covered = [row for slot, first, count, is_bare in tiles for row in range(first, first + count) if not is_bare]
    assert covered == [row for slot, first, count in plain.runs for row in range(first, first + count)]
    visited = [row for slot, first, count, _ in tiles for row in range(first, first + count)]
    assert sorted(visited) == (list(range(bucket)) if plain.runs else []), "padding rows too"


@pytest.mark.parametrize(("count", "bucket"), [(0, 0), (1, 32), (33, 256), (256, 256)])
def test_the_sequence_bucket_is_none_few_or_all(count, bucket):
    assert sequence_bucket(count, 256) == bucket and sequence_bucket(min(count, 5), 5) in (0, 5)


def test_the_document_bucket_holds_the_documents():
    assert [document_bucket(n) for n in (0, 1, 8, 9, 64, 65)] == [0, 8, 8, 64, 64, 512]


def test_what_is_recorded_ahead_covers_every_kind_of_mixed_step_once():
    runner = SimpleNamespace(
        fused=SimpleNamespace(dims=DIMS, embed=torch.zeros(1)),
        device=torch.device("cpu"),
        pool=SimpleNamespace(num_blocks=8, block_tokens=16),
        tails=None,
        table=SimpleNamespace(facts=((True, 16, 8),)),
    )
    graphs = MixedGraphs(runner, 512, 256, 192)
    keys = [call.args[0] for call in graphs.recordings(has_adapters=True, trains=True)]
    assert len(set(keys)) == len(keys)
    for tokens in (3, 100, 250, 500):
        for train in (0, 2):
            for queries in ([], [1], [1, tokens - 1 - train], [1] * min(tokens - train, 256)):
                rows = sum(queries) + train
                if not rows:
                    continue
                documents = [SimpleNamespace(queries=[train], is_finetune=True)] if train else []
                step = PackedStep(token_ids=[0] * rows, entries=[(0, rows)], train=documents, queries=queries)
                bucket = token_bucket(rows, 512)
                assert graphs.key(step, bucket, padded_tiles(step.entries, bucket)[2]) in keys, (queries[:3], len(queries), train)


def test_a_staged_mixed_step_says_what_was_packed_whatever_was_staged_before():
    rng, staging = np.random.default_rng(0), Staging(mixed_fields(64, 5, 6), torch.device("cpu"))
    for num in (5, 0, 3):
        queries = rng.integers(1, 9, num).tolist()
        contexts = [q + int(rng.integers(0, 15)) for q in queries]
        blocks = [tuple(rng.permutation(50)[: -(-c // 4)].tolist()) for c in contexts]
        rows = sum(queries)
        step = PackedStep(
            token_ids=rng.integers(0, 99, rows).tolist(),
            positions=rng.integers(0, 24, rows).tolist(),
            places=rng.integers(0, 200, rows),
            entries=[(int(rng.integers(0, 2)), n) for n in queries],
            train=[],
            queries=queries,
            contexts=contexts,
            tables=shown(blocks, 6),
            samples=[i for i in range(rows) if rng.random() < 0.1][:5],
            sampled=[],
        )
        tiles, _, _ = padded_tiles(step.entries, 48)
        write_step(staging.host, step, tiles, 48, 200)
        staging.upload()
        there = {name: tensor.tolist() for name, tensor in staging.device.items()}
        assert there["token_ids"][:48] == step.token_ids + [0] * (48 - rows)
        assert there["positions"][:48] == step.positions + [0] * (48 - rows)
        assert there["places"][:48] == [*step.places.tolist(), *[200] * (48 - rows)]
        assert there["cu_seqlens_q"] == [sum(queries[:i]) for i in range(6)]
        assert there["context_lens"] == contexts + [0] * (5 - num)
        assert there["samples"] == step.samples + [0] * (5 - len(step.samples))
        assert not any(there["document_bounds"]) and not any(there["key_lens"])
        assert there["tiles"] == [list(tile) for tile in tiles] + [[0] * 4] * (64 - len(tiles))
        for row, expected in enumerate(blocks):
            assert there["block_tables"][row][: len(expected)] == list(expected)


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 16), (17, 32), (2000, 2048), (2048, 2048), (2049, None)])
def test_the_token_bucket_is_the_least_that_holds_the_tokens(tokens, bucket):
    assert token_bucket(tokens, 2048) == bucket


def test_facts_only_widen_so_that_adapters_come_and_go_under_one_graph():
    table = AdapterTable(DIMS, 3, torch.device("cpu"), torch.float32)
    put(table, 0, rank=8, layers=tuple(range(DIMS.num_layers)))
    before = table.facts
    table.clear(0)
    assert table.facts == before
    table.expect(init_adapter(DIMS, "x", rank=24).tensors)
    assert table.facts != before and {fact[1:] for fact in table.facts} == {(32, 8)}


def test_a_padded_mixed_step_equals_the_references_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/runtime/interpreted.py"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


def test_what_a_backward_does_above_its_layers_is_compiled_with_their_recordings(monkeypatch):
    engine = wb.Engine.random("tiny-llama", device="cpu", dtype="bfloat16", config=wb.EngineConfig(activation_tokens=64, max_model_len=64))
    job = wb.FinetuneJob.example("tuned", data=wb.RandomTokens(examples=4, tokens=16), batch_size=2, max_tokens=16)
    engine.begin([job], seed=0)
    state, arena = engine._states[job.id], engine.runner.arena
    graphs = BackwardGraphs(engine.fused, engine._table, engine.runner.cos, engine.runner.sin)
    compiled = []
    monkeypatch.setattr(Recorder, "warm_up", lambda self, run: compiled.append((run.func, run())))
    [record] = graphs.recordings(state, arena)
    record()
    [top] = [result for function, result in compiled if function is top_gradient]
    assert top.shape == (32, engine.fused.dims.hidden), "all rows of the micro-batch"
