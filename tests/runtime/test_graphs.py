"""What a recorded decode graph depends on; recording and replaying themselves need CUDA (tests/gpu)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.layout import SegmentLayout
from workbench.runtime import shapes
from workbench.runtime.adapters import init_adapter
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
from workbench.runtime.inputs import padded_layout, token_bucket
from workbench.runtime.slots import AdapterTable
from workbench.runtime.staging import Staging
from workbench.runtime.weights import Dims

DIMS = Dims.of(shapes.config("tiny-llama"))


def put(table: AdapterTable, entry: int, *, rank: int, layers: tuple[int, ...]) -> None:
    weights = init_adapter(DIMS, "x", rank=rank, b_std=0.1)
    table.put(entry, {key: pair for key, pair in weights.tensors.items() if key[0] in layers}, weights.scales)


def test_an_adapter_that_adds_a_layer_or_another_rank_anywhere_needs_another_graph():
    table = AdapterTable(DIMS, 3, torch.device("cpu"), torch.float32)
    graphs = DecodeGraphs(SimpleNamespace(table=table), 2048)
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


def test_staged_rows_say_what_the_batch_says_whatever_was_staged_before():
    rng, pool, bucket = np.random.default_rng(0), SimpleNamespace(num_blocks=50, block_tokens=4), 8
    staging = Staging(decode_fields(bucket, 6, bucket), torch.device("cpu"))
    held = [None] * bucket
    for rows in (5, 8, 8, 1, 3):
        positions = rng.integers(0, 24, rows).tolist()
        blocks = [tuple(rng.permutation(50)[: p // 4 + 1].tolist()) for p in positions]
        batch = DecodeBatch(rng.integers(0, 99, rows).tolist(), positions, blocks, [int(e) for e in rng.integers(0, 2, rows)])
        write_rows(staging.host, batch, bucket_tiles([*batch.entries, *[None] * (bucket - rows)]), held, pool)
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
def test_a_padded_layout_has_the_same_rows_for_every_step_of_its_bucket_and_tile_count(row_slots):
    rows = sum(count for _, count in row_slots)
    bucket = token_bucket(rows, 2048)
    plain, padded = SegmentLayout.build(row_slots, "cpu"), padded_layout(row_slots, bucket, torch.device("cpu"))
    assert padded.num_rows == bucket >= rows and padded.runs == plain.runs
    few = padded_layout([(0, bucket)], bucket, torch.device("cpu")).num_tiles
    assert padded.num_tiles in (few, bucket), "two kinds of step a bucket"
    tiles = padded.tiles.tolist()
    covered = [row for slot, first, count, is_bare in tiles for row in range(first, first + count) if not is_bare]
    assert covered == [row for slot, first, count in plain.runs for row in range(first, first + count)]
    visited = [row for slot, first, count, _ in tiles for row in range(first, first + count)]
    assert sorted(visited) == (list(range(bucket)) if plain.runs else []), "padding rows too"


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
