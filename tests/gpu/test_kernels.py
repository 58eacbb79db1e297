"""The Triton kernels and the flash attention operators on a real GPU, against float64 on the CPU.

Tolerances are max |a - b| / max |b|. fp32: the order of sums over up to 4,096 terms. bf16: v or dv (or the softmax weights) and the
output are rounded to 8 bits each (2^-8 = 0.004); the fp32 weight gradients see the first of these only.
"""

import warnings

import pytest
import torch

from kernels import counters, varlen_attention
from kernels.counter import dropout_mask, dropout_mask_reference, gumbel_noise, gumbel_noise_reference
from kernels.layout import SegmentLayout
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.problems import (
    bounds,
    cross_entropy_errors,
    gated_errors,
    layer_errors,
    lora_errors,
    paged_attention_errors,
    scattered_attention_errors,
    spoiled_tail,
    tail_errors,
    varlen_attention_errors,
)
from kernels.segmented_lora import SlotWeights, lora_gradients, segmented_lora, segmented_lora_
from kernels.testing import POPULARITIES, RAGGED_ROWS, RANKS, adapters_of_rows, random_table, random_tensor, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def only_fused_paths(request):
    """No reference runs on CUDA."""
    counters.calls.clear()
    yield
    assert not counters.references_on("cuda") or "fp32_attention" in request.node.name


def assert_close(errors: dict[str, float], dtype: torch.dtype) -> None:
    assert max(errors.values()) < TOLERANCE[dtype], errors


@DTYPES
@pytest.mark.parametrize("rank", RANKS)
def test_segmented_lora_of_every_rank(rank, dtype):
    row_slots = [(0, 33), (None, 7), (1, 100)]
    assert_close(lora_errors(row_slots, [[rank, 8], [0, rank]], dtype, "cuda", in_features=520, out_features=(272, 136)), dtype)


@DTYPES
@pytest.mark.parametrize("rows", RAGGED_ROWS)
def test_segmented_lora_of_ragged_rows_and_mixed_ranks(rows, dtype):
    ranks = [list(RANKS), list(reversed(RANKS)), [0, 8] * 4]
    row_slots = [(slot, max(0, rows - slot)) for slot in range(len(RANKS))] + [(None, 3), (2, rows)]
    assert_close(lora_errors(row_slots, ranks, dtype, "cuda", in_features=300, out_features=(256, 40, 24)), dtype)
    launched = {("segmented_lora", "triton", "cuda"): 1, ("lora_gradients", "triton", "cuda"): 2}
    assert counters.calls == (launched if rows else {})


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@DTYPES
def test_segmented_lora_of_every_tile_height(block_rows, dtype):
    row_slots = [(0, 500), (1, 1), (2, 1300)]
    ranks = [[64, 3, 16]]
    assert_close(lora_errors(row_slots, ranks, dtype, "cuda", in_features=1024, out_features=(512,), block_rows=block_rows), dtype)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@DTYPES
def test_swiglu_with_the_adapters_term_equals_the_ops_one_after_another(block_rows, dtype):
    row_slots = [(0, 200), (None, 77), (1, 1), (2, 130)]
    ranks = [[8, 64, 0], [8, 17, 256]]
    errors = gated_errors(row_slots, ranks, dtype, "cuda", in_features=512, width=1040, block_rows=block_rows)
    assert_close(errors, dtype)
    assert errors["a beside the separate ops"] == errors["kept beside the separate ops"] == errors["a without keeping"] == 0


@pytest.mark.parametrize("columns", [64, 72, 256])
@pytest.mark.parametrize(
    "ranks",
    [[[8, 3, 16, 17], [8, 0, 8, 3]], [[8] * 12] * 2, [[40, 8], [0, 64]], [[8, 3], [8, 0]]],
    ids=["mixed", "many", "large", "all"],
)
@DTYPES
def test_base_product_and_adapters_are_one_product_whichever_slots_have_a_place(ranks, columns, dtype):
    slots = len(ranks[0])
    row_slots = [(slot, 50 + 37 * slot) for slot in range(slots)] + [(None, 77), (0, 200)]
    sizes = {"in_features": 520, "out_features": (1040, 264), "columns": columns}
    for before in ([], [(slots - 1, 9), (0, 1)]):
        assert_close(tail_errors(row_slots, ranks, dtype, "cuda", before=before, **sizes), dtype)


@DTYPES
def test_an_adapter_that_is_not_finite_spoils_only_its_own_rows(dtype):
    y, clean = spoiled_tail("cuda", dtype)
    assert y[:9].isnan().any(1).all()
    torch.testing.assert_close(y[9:], clean[9:], rtol=0, atol=0)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_segmented_lora_of_a_decode_step_of_the_8b_shape(popularity):
    slots = adapters_of_rows(popularity, 64, 32)
    row_slots = [(slot, slots.count(slot)) for slot in sorted(set(slots))]
    ranks = [[16] * 32] * 3
    assert_close(lora_errors(row_slots, ranks, torch.bfloat16, "cuda", in_features=4096, out_features=(4096, 1024, 1024)), torch.bfloat16)


def test_segmented_lora_of_the_down_projection_and_thousands_of_rows():
    row_slots = [(0, 1024), (None, 100), (1, 1500)]
    assert_close(lora_errors(row_slots, [[8, 64]], torch.bfloat16, "cuda", in_features=14336, out_features=(4096,)), torch.bfloat16)


def test_segmented_lora_twice_is_bit_equal():
    table = random_table(4096, (4096,), [[8, 64]], torch.bfloat16, "cuda")
    layout = SegmentLayout.build([(0, 700), (1, 900)], "cuda")
    x, y = (random_tensor((1600, 4096), seed, torch.bfloat16, "cuda") for seed in (0, 1))
    first, second = ((segmented_lora_(y.clone(), x, table, layout), *lora_gradients(y, x, table, layout)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for key, (da, db) in first[2].items():
        assert torch.equal(da, second[2][key][0])
        assert torch.equal(db, second[2][key][1])


def test_segmented_lora_launches_without_synchronisation():
    table = random_table(512, (256,), [[8, 64]], torch.bfloat16, "cuda")
    x, y = random_tensor((40, 512), 0, torch.bfloat16, "cuda"), random_tensor((40, 256), 1, torch.bfloat16, "cuda")
    segmented_lora_(y, x, table, SegmentLayout.build([(0, 20), (1, 20)], "cuda"))
    with warnings.catch_warnings():  # torch says that the mode does not see every synchronisation; it sees copies and .item()
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        layout = SegmentLayout.build([(0, 20), (1, 20)], "cuda")
        segmented_lora_(y, x, table, layout)
        lora_gradients(y, x, table, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_graph_sees_another_layout_and_other_weights():
    table = random_table(512, (256,), [[8, 64, 16]], torch.bfloat16, "cuda")
    x, base = random_tensor((40, 512), 0, torch.bfloat16, "cuda"), random_tensor((40, 256), 1, torch.bfloat16, "cuda")
    layouts = [SegmentLayout.build(rows, "cuda", block_rows=16, num_tiles=8) for rows in ([(0, 40)], [(1, 10), (None, 5), (2, 25)])]
    static = SegmentLayout.build([(0, 40)], "cuda", block_rows=16, num_tiles=8)
    y = base.clone()
    segmented_lora_(y, x, table, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        segmented_lora_(y, x, table, static)
    table.set(0, 0, *(random_tensor(shape, 5, torch.bfloat16, "cuda", std=0.1) for shape in ((56, 512), (256, 56))), 0.5)
    for layout in layouts:
        static.copy_(layout)
        y.copy_(base)
        graph.replay()
        assert torch.equal(y, segmented_lora_(base.clone(), x, table, layout))


@DTYPES
def test_autograd_with_fp32_masters_equals_the_formula(dtype):
    a, b = (random_tensor(shape, seed, torch.float32, "cuda").requires_grad_() for seed, shape in enumerate([(8, 256), (320, 8)]))
    x, y, dy = (random_tensor((700, n), seed, dtype, "cuda").requires_grad_() for seed, n in enumerate([256, 320, 320], start=2))
    out = segmented_lora(x, y * 1, SegmentLayout.build([(0, 650), (None, 50)], "cuda"), [[SlotWeights(a, b, 0.25)]], (320,))
    ours = torch.autograd.grad(out, (x, y, a, b), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, y, a.to(dtype), b.to(dtype))]
    mask = (torch.arange(700, device="cuda") < 650).double()[:, None]
    expected = torch.autograd.grad(wide[1] + 0.25 * mask * (wide[0] @ wide[2].T @ wide[3].T), wide, dy.double())
    assert ours[2].dtype == torch.float32
    assert_close({name: relative_error(p, q) for name, p, q in zip("xyab", ours, expected, strict=True)}, dtype)


@DTYPES
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (9, 3), (8, 2), (10, 2), (14, 2), (8, 1)])
def test_paged_attention_of_chunks_with_prefix_decodes_and_empty_sequences(heads, head_size, dtype):
    assert_close(paged_attention_errors([100, 1, 0, 37, 1], [130, 700, 0, 37, 1], heads, head_size, dtype, "cuda"), dtype)


@DTYPES
@pytest.mark.parametrize("contexts", [[1], [2000], [1, 15, 16, 17, 500], [300] * 64], ids=len)
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (4, 4)])
def test_paged_attention_of_decode_rows(heads, contexts, dtype):
    assert_close(paged_attention_errors([1] * len(contexts), contexts, heads, 128, dtype, "cuda"), dtype)


@DTYPES
@pytest.mark.parametrize("around", [(3, 2), (117, 30)])
@pytest.mark.parametrize("queries", [[100, 1, 0, 37, 1], [1, 1, 0, 1, 1]])
def test_paged_attention_leaves_the_rows_around_the_sequences_alone(queries, around, dtype):
    errors = paged_attention_errors(queries, [130, 700, 0, 37, 1], (32, 8), 128, dtype, "cuda", around=around)
    assert not errors["others"]
    assert_close(errors, dtype)


@pytest.mark.parametrize("head_size", [64, 128])
def test_keys_of_documents_may_lie_anywhere(head_size):
    errors = scattered_attention_errors([63, 0, 300, 1], [80, 0, 1000, 17], (32, 8), head_size, torch.bfloat16, "cuda")
    assert_close(errors, torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("block_tokens", [1, 8, 32])
def test_paged_attention_of_other_block_sizes(block_tokens, dtype):
    assert_close(paged_attention_errors([5, 1], [90, 33], (8, 2), 64, dtype, "cuda", block_tokens=block_tokens), dtype)


VARLEN = {
    "single tokens": ([1, 1], [1, 1]),
    "one document": ([300], [300]),
    "packed": ([1, 63, 500, 100], [1, 63, 500, 100]),
    "chunks": ([40, 1, 0, 100], [300, 64, 5, 100]),
}


@pytest.mark.parametrize("lengths", VARLEN)
@pytest.mark.parametrize("head_size", [60, 64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 2), (8, 1)])
def test_flash_attention_with_groups_forward_and_backward(heads, head_size, lengths):
    assert_close(varlen_attention_errors(*VARLEN[lengths], heads, head_size, torch.bfloat16, "cuda"), torch.bfloat16)
    assert counters.calls == {("varlen_attention", "flash", "cuda"): 1}


def test_flash_attention_takes_groups_as_they_are():
    """If this fails, varlen_attention still works (next test), with copies of the keys and values."""
    assert varlen_attention.flash_accepts_groups(0)


def test_flash_attention_without_group_support_expands_the_heads(monkeypatch):
    monkeypatch.setattr(varlen_attention, "flash_accepts_groups", lambda index: False)
    assert_close(varlen_attention_errors([63, 100], [80, 100], (8, 2), 64, torch.bfloat16, "cuda"), torch.bfloat16)


def test_fp32_attention_takes_the_reference_and_says_so():
    assert_close(varlen_attention_errors([63, 100], [80, 100], (8, 2), 64, torch.float32, "cuda"), torch.float32)
    assert counters.references_on("cuda") == {"varlen_attention": 1}


def test_flash_attention_of_no_rows_is_empty():
    q, k = torch.zeros(0, 4, 64, dtype=torch.bfloat16, device="cuda"), torch.zeros(0, 2, 64, dtype=torch.bfloat16, device="cuda")
    assert varlen_attention.varlen_attention(q, k, k, bounds([], "cuda"), bounds([], "cuda"), 0, 0, 0.1).shape == q.shape


@DTYPES
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 100), (15, 32000), (600, 49152)])
def test_linear_cross_entropy(rows, vocab_size, dtype):
    # The logits are rounded to bf16 too, and they are large: the loss keeps three digits, as it does in transformers.
    assert_close(cross_entropy_errors(rows, 64, vocab_size, dtype, "cuda"), dtype)


def test_linear_cross_entropy_never_holds_all_logits():
    hidden, weight = (random_tensor((n, 64), n, torch.bfloat16, "cuda") for n in (4096, 32000))
    labels = torch.randint(32000, (4096,), device="cuda")
    linear_cross_entropy(hidden, weight, labels, 1.0, True)  # the matrix library takes its workspace once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, 1.0, True)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 32000 * 2 / 2


def test_counter_bits_equal_the_cpu():
    seeds, positions = torch.tensor([1, -5, 2**62]), torch.tensor([0, 7, 2**33])
    ours = gumbel_noise(seeds.cuda(), positions.cuda(), 49152)
    torch.testing.assert_close(ours.cpu(), gumbel_noise_reference(seeds, positions, 49152), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([0, 1, 2**31 + 7])
    for arguments in [(0, 1, 3, 4), (1, 1, 0, 0), (2**63 + 5, 2**32 - 1, 0, 0), (-3, 0, 7, 255)]:
        mask = dropout_mask(*arguments, rows.cuda(), 4097, 0.3, torch.float32)
        assert torch.equal(mask.cpu(), dropout_mask_reference(*arguments, rows, 4097, 0.3, torch.float32))


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, (32, 8), 128), (300, (32, 8), 128), (77, (9, 3), 64), (40, (14, 2), 80)])
def test_the_ops_around_the_linears(tokens, heads, size, dtype):
    assert_close(layer_errors(tokens, heads, size, dtype, "cuda"), dtype)
