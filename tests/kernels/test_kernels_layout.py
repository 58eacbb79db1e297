"""The tables that the kernels read: layout of rows, table of adapter weights, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import CHUNK_ROWS, SegmentLayout
from kernels.lora_table import LoraTable, LoraTableStack, SlotWeights
from kernels.testing import POPULARITIES, adapters_of_rows, random_tensor


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("row_slots", [[], [(None, 7)], [(0, 0), (1, 1)], [(2, 300), (None, 3), (0, 15), (2, 1000)], [(0, 5), (0, 6)]])
def test_tiles_and_chunks_cover_each_adapter_row_once(row_slots, block_rows):
    expected = {}
    row = 0
    for slot, rows in row_slots:
        expected |= {row + i: slot for i in range(rows) if slot is not None}
        row += rows
    layout = SegmentLayout.build(row_slots, "cpu", block_rows=block_rows)
    assert layout.num_rows == row
    for table in (layout.tiles, layout.chunks):
        covered = [(first + i, slot) for slot, first, rows, is_bare in table.tolist() for i in range(rows) if not is_bare]
        assert sorted(covered) == sorted(expected.items())
    bare = [first + i for _, first, rows, is_bare in layout.tiles.tolist() for i in range(rows) if is_bare]
    assert sorted(bare) == [i for i in range(row) if i not in expected and expected], "the other rows, once, if any row has an adapter"
    assert all(rows <= block_rows for _, _, rows, _ in layout.tiles.tolist())
    owners = [slot for slot, *_ in layout.chunks.tolist()]
    assert owners == [slot for slot, n in zip(layout.slots, layout.chunks_per_slot, strict=True) for _ in range(n)]


def test_neighbouring_runs_of_one_slot_are_one_run():
    assert SegmentLayout.build([(1, 3), (1, 4), (None, 0), (1, 1)], "cpu").runs == ((1, 0, 8),)


def test_a_long_run_has_at_most_eight_chunks():
    assert SegmentLayout.build([(0, 3 * CHUNK_ROWS)], "cpu").chunks.shape[0] == 3
    assert SegmentLayout.build([(0, 100 * CHUNK_ROWS)], "cpu").chunks.shape[0] == 8


def test_a_padded_layout_takes_over_another_batch_and_refuses_a_larger_one():
    ours = SegmentLayout.build([(0, 20)], "cpu", block_rows=16, num_tiles=4)
    other = SegmentLayout.build([(1, 10), (2, 10)], "cpu", block_rows=16, num_tiles=4)
    ours.copy_(other)
    assert torch.equal(ours.tiles, other.tiles)
    with pytest.raises(ValueError, match="num_tiles must be at least the 5 tiles"):
        SegmentLayout.build([(0, 80)], "cpu", block_rows=16, num_tiles=4)
    with pytest.raises(ValueError, match="takes over one with equal"):
        ours.copy_(SegmentLayout.build([(0, 21)], "cpu", block_rows=16, num_tiles=4))


@pytest.mark.parametrize("row_slots", [[(-1, 2)], [(0, -2)]])
def test_a_layout_refuses_negative_slots_and_counts(row_slots):
    with pytest.raises(ValueError, match="at least 0"):
        SegmentLayout.build(row_slots, "cpu")


def test_a_table_entry_follows_set_and_clear():
    table = LoraTable(8, (4, 6), 3, device="cpu", dtype=torch.float32)
    a, b = random_tensor((2, 8), 0, torch.float32), random_tensor((6, 2), 1, torch.float32)
    table.set(1, 1, a, b, 0.5)
    assert table.entries[1, 1].tolist() == [a.data_ptr(), b.data_ptr(), 2, 0x3F000000, 4, 6, 0, 0]
    assert table.entries[0, 1].tolist() == [0, 0, 0, 0, 0, 4, 0, 0]
    assert (table.max_rank, table.rank_multiple, table.column_multiple) == (2, 2, 2)
    table.clear(1)
    assert table.entries[1, 1].tolist() == [0, 0, 0, 0, 4, 6, 0, 0]
    assert table.get(1, 1) is None
    assert not table.weights and not table.entries[:, 1, :4].any()


def test_a_table_made_with_weights_equals_one_that_was_set():
    a, b = random_tensor((3, 8), 0, torch.float32), random_tensor((6, 3), 1, torch.float32)
    ours = LoraTable(8, (4, 6), 2, device="cpu", dtype=torch.float32, weights={(1, 0): SlotWeights(a, b, -2.0)})
    other = LoraTable(8, (4, 6), 2, device="cpu", dtype=torch.float32)
    other.set(0, 1, a, b, -2.0)
    assert torch.equal(ours.entries, other.entries)
    assert (ours.max_rank, ours.rank_multiple) == (other.max_rank, other.rank_multiple) == (3, 1)


A, B = torch.zeros(2, 8), torch.zeros(4, 2)
REFUSED = {
    "slot": ((3, 0, A, B), "slot must lie in 0..1, got 3"),
    "slice": ((0, 1, A, B), "slice must lie in 0..0, got 1"),
    "rank 0": ((0, 0, A[:0], B[:, :0]), "rank must lie in 1..256, got 0"),
    "rank 257": ((0, 0, torch.zeros(257, 8), torch.zeros(4, 257)), "rank must lie in 1..256, got 257"),
    "shape of a": ((0, 0, torch.zeros(2, 9), B), r"a must have shape \(2, 8\), got \(2, 9\)"),
    "shape of b": ((0, 0, A, torch.zeros(5, 2)), r"b must have shape \(4, 2\), got \(5, 2\)"),
    "dtype": ((0, 0, A.double(), B), "a must be torch.float32"),
    "gaps": ((0, 0, torch.zeros(8, 2).T, B), "a must be contiguous"),
    "alignment": ((0, 0, torch.zeros(17)[1:].view(2, 8), B), "a must start at a multiple of 16 bytes"),
    "device": ((0, 0, A.to("meta"), B), "a must be on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_refuses_weights_that_a_kernel_could_not_read(case):
    table = LoraTable(8, (4,), 2, device="cpu", dtype=torch.float32)
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        table.set(*arguments, 1.0)
    assert not table.weights
    assert not table.entries[..., :4].any()


GROUPS = ((8, (4, 6)), (16, (8,)))
SLOT_RANKS = st.none() | st.lists(st.sampled_from([0, 1, 2, 8, 16, 24, 32, 256]), min_size=3, max_size=3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), SLOT_RANKS, st.booleans()), min_size=1, max_size=6))
def test_a_stack_equals_tables_that_are_set_and_cleared_one_by_one(changes):
    stack = LoraTableStack(GROUPS, 3, device="cpu", dtype=torch.float32)
    alone = [LoraTable(k, widths, 3, device="cpu", dtype=torch.float32) for k, widths in GROUPS]
    places = [(table, slice) for table in alone for slice in range(table.num_slices)]
    for slot, ranks, narrows in changes:
        weights = {}
        for row, (rank, (table, slice)) in enumerate(zip(ranks or (), places, strict=False)):
            if rank:
                a, b = torch.zeros(rank, table.in_features), torch.zeros(table.out_features[slice], rank)
                weights[row] = SlotWeights(a, b, 0.25 + row)
        for table in alone:
            table.clear(slot)
        for row, (table, slice) in enumerate(places):
            if row in weights:
                table.set(slot, slice, weights[row].a, weights[row].b, weights[row].scale)
        stack.put(slot, None if ranks is None else stack.column(weights))
        if narrows:
            stack.narrow()
            for table in alone:
                table.narrow()
        for ours, theirs in zip(stack.tables, alone, strict=True):
            assert torch.equal(ours.entries, theirs.entries) and ours.entries.is_contiguous()
            assert (ours.max_rank, ours.rank_multiple) == (theirs.max_rank, theirs.rank_multiple)
            assert ours.weights.keys() == theirs.weights.keys()
            assert all(ours.get(*place).a.data_ptr() == found.a.data_ptr() for place, found in theirs.weights.items())


def test_popularities_give_every_row_a_slot_in_packed_order():
    for popularity in POPULARITIES:
        slots = adapters_of_rows(popularity, 200, 8)
        assert slots == sorted(slots)
        assert len(slots) == 200
        assert 0 <= min(slots) <= max(slots) < 8
    assert set(adapters_of_rows("identical", 9, 4)) == {0}
    assert set(adapters_of_rows("distinct", 9, 4)) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="popularity must be one of"):
        adapters_of_rows("zip", 1, 1)


@pytest.mark.parametrize("rows", [0, 1, 700, 1300])
def test_a_resized_layout_covers_the_first_rows_of_its_run_for_another_slot(rows):
    layout = SegmentLayout.build([(0, 1300)], "cpu")
    layout.resize_(3, rows)
    for table in (layout.tiles, layout.chunks):
        assert [row for slot, first, count, _ in table.tolist() for row in range(first, first + count)] == list(range(rows))
        assert set(table[:, 0].tolist()) == {3}
    with pytest.raises(ValueError, match="Build a new layout"):
        layout.resize_(3, 1301)
    with pytest.raises(ValueError, match="one run of all rows"):
        SegmentLayout.build([(0, 5), (None, 1)], "cpu").resize_(0, 5)
