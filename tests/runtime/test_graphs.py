"""What a recorded decode graph depends on; recording and replaying themselves need CUDA (tests/gpu)."""

from types import SimpleNamespace

import pytest
import torch

from workbench.runtime import shapes
from workbench.runtime.adapters import init_adapter
from workbench.runtime.graphs import ROW_BUCKETS, DecodeGraphs, context_bucket, row_bucket
from workbench.runtime.slots import AdapterTable
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
    first = graphs.key(8, 512, True)
    put(table, 1, rank=8, layers=every)
    second = graphs.key(8, 512, True)
    assert first != second, "a graph recorded before launches nothing in the new layers"
    put(table, 2, rank=8, layers=every)
    assert graphs.key(8, 512, True) == second, "another adapter of the same kind runs under the same graph"
    put(table, 2, rank=3, layers=every[-1:])
    assert graphs.key(8, 512, True) != second, "a graph recorded before assumes ranks that are multiples of 8"
    assert graphs.key(8, 512, False) == (8, 512, None)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (17, 24), (256, 256), (257, None)])
def test_the_row_bucket_is_the_least_that_holds_the_rows(rows, bucket):
    assert row_bucket(rows) == bucket and (bucket is None or bucket in ROW_BUCKETS)


@pytest.mark.parametrize(
    ("context", "longest", "bucket"), [(1, 2048, 512), (513, 2048, 2048), (1, 192, 192), (3000, 4096, 4096), (90_000, 100_000, 100_000)]
)
def test_the_context_bucket_holds_the_context_and_stays_within_the_models(context, longest, bucket):
    assert context_bucket(context, longest) == bucket >= context
