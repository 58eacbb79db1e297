"""The plain-torch references are the specification: here they are held against the equations, in float64 and by autograd."""

import pytest
import torch

from kernels import counters
from kernels.counter import dropout_mask, gumbel_noise, philox
from kernels.layout import SegmentLayout
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.paged_attention import paged_attention
from kernels.problems import (
    bounds,
    cross_entropy_errors,
    lora_errors,
    paged_attention_errors,
    scattered_attention_errors,
    varlen_attention_errors,
)
from kernels.qkv import place_qkv_
from kernels.segmented_lora import LoraTable, SlotWeights, segmented_lora, segmented_lora_
from kernels.testing import checked, random_table, random_tensor
from kernels.varlen_attention import expand_heads, varlen_attention

F64 = torch.float64


def weights(rank: int, width: int, seed: int, *, dtype: torch.dtype = F64) -> SlotWeights:
    a, b = random_tensor((rank, 8), seed, dtype), random_tensor((width, rank), seed + 1, dtype)
    return SlotWeights(a.requires_grad_(), b.requires_grad_(), 0.5 + seed)


def test_segmented_lora_is_each_rows_own_product():
    layout = SegmentLayout.build([(1, 2), (None, 1), (0, 3)], "cpu")
    table = random_table(8, (5, 4), [[3, 0], [2, 7]], F64)
    x, y = random_tensor((6, 8), 0, F64), random_tensor((6, 9), 1, F64)
    expected = y.clone()
    for row, slot in enumerate([1, 1, None, 0, 0, 0]):
        for j, columns in enumerate([slice(0, 5), slice(5, 9)]):
            adapter = None if slot is None else table.get(j, slot)
            if adapter is not None:
                expected[row, columns] += adapter.scale * (adapter.b @ (adapter.a @ x[row]))
    out = checked(segmented_lora_)(y, x, table, layout)
    assert out is y
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[2], random_tensor((6, 9), 1, F64)[2])


def test_segmented_lora_gradients_equal_finite_differences():
    layout = SegmentLayout.build([(0, 3), (None, 2), (1, 4), (0, 1)], "cpu")
    slices = [[weights(3, 5, 1), None], [weights(2, 4, 3), weights(1, 4, 5)]]
    flat = [t for row in slices for w in row if w is not None for t in (w.a, w.b)]
    x, y = random_tensor((10, 8), 7, F64).requires_grad_(), random_tensor((10, 9), 8, F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y, *_: segmented_lora(x, y * 1, layout, slices, (5, 4)), (x, y, *flat))


def test_a_slot_without_rows_gets_a_zero_gradient():
    slices = [[weights(3, 5, 1), weights(2, 5, 2)]]
    x = random_tensor((4, 8), 0, F64)
    out = checked(segmented_lora)(x, torch.zeros(4, 5, dtype=F64), SegmentLayout.build([(0, 4)], "cpu"), slices, (5,))
    out.sum().backward()
    assert slices[0][0].a.grad.abs().sum() > 0
    assert slices[0][1].a.grad.abs().sum() == 0


def test_fp32_masters_get_fp32_gradients_under_bf16_activations():
    slices = [[weights(4, 5, 1, dtype=torch.float32)]]
    x, y = random_tensor((6, 8), 0, torch.bfloat16), torch.zeros(6, 5, dtype=torch.bfloat16)
    out = segmented_lora(x, y, SegmentLayout.build([(0, 6)], "cpu"), slices, (5,))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert slices[0][0].a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_ops_equal_float64(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    errors = lora_errors([(0, 5), (None, 3), (2, 17)], [[8, 3, 17], [64, 0, 1]], dtype, "cpu")
    errors |= cross_entropy_errors(20, 16, 100, dtype, "cpu")
    errors |= {"chunk": paged_attention_errors([5, 0, 1], [9, 3, 40], (6, 2), 16, dtype, "cpu")["out"]}
    errors |= {"decode": paged_attention_errors([1, 1, 1], [1, 3, 40], (6, 2), 16, dtype, "cpu")["out"]}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_attention_is_the_masked_softmax_of_its_document(heads):
    query_lens, key_lens, (num_heads, kv_heads) = [3, 0, 5], [3, 2, 9], heads
    q, k, v = (random_tensor((n, h, 16), i, F64) for i, (n, h) in enumerate([(8, num_heads), (14, kv_heads), (14, kv_heads)]))
    out = checked(varlen_attention)(q, k, v, bounds(query_lens, "cpu"), bounds(key_lens, "cpu"), 5, 9, 0.3)
    first_q = first_k = row = 0
    for q_len, k_len in zip(query_lens, key_lens, strict=True):
        for i in range(q_len):
            for head in range(num_heads):
                sees = slice(first_k, first_k + i + 1 + k_len - q_len)
                kv_head = head // (num_heads // kv_heads)
                weight = torch.softmax(0.3 * (k[sees, kv_head] @ q[first_q + i, head]), dim=0)
                torch.testing.assert_close(out[row, head], weight @ v[sees, kv_head])
            row += 1
        first_q, first_k = first_q + q_len, first_k + k_len


def test_a_document_cut_in_chunks_equals_the_uncut_one():
    q, k, v = (random_tensor((9, h, 16), h, F64) for h in (4, 2, 2))
    whole = varlen_attention(q, k, v, bounds([9], "cpu"), bounds([9], "cpu"), 9, 9, 0.25)
    for cut in range(1, 9):
        later = varlen_attention(q[cut:], k, v, bounds([9 - cut], "cpu"), bounds([9], "cpu"), 9 - cut, 9, 0.25)
        torch.testing.assert_close(later, whole[cut:])


def test_a_query_that_sees_no_key_gives_zero():
    q, k = random_tensor((4, 2, 8), 0, F64), random_tensor((2, 2, 8), 1, F64)
    out = varlen_attention(q, k, k, bounds([4], "cpu"), bounds([2], "cpu"), 4, 2, 0.3)
    assert not out[:2].any()
    assert torch.allclose(out[2], k[0])


def test_expanded_heads_equal_grouped_ones_forward_and_backward():
    def run(expands: bool) -> list[torch.Tensor]:
        q, k, v = (random_tensor((7, h, 16), h, F64).requires_grad_() for h in (6, 2, 2))
        keys, values = (expand_heads(t, 3) for t in (k, v)) if expands else (k, v)
        cu = bounds([3, 4], "cpu")
        out = varlen_attention(q, keys, values, cu, cu, 4, 4, 0.3)
        out.square().sum().backward()
        return [out, q.grad, k.grad, v.grad]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)


def test_keys_of_documents_may_lie_anywhere():
    errors = scattered_attention_errors([3, 0, 5, 1], [3, 0, 9, 4], (4, 2), 16, torch.float32, "cpu")
    assert errors["out"] < 1e-5


@pytest.mark.parametrize("queries", [[5, 0, 1], [1, 0, 1], []])
def test_rows_around_the_sequences_stay_as_they_are(queries):
    errors = paged_attention_errors(queries, [9, 3, 40][: len(queries)], (6, 2), 16, torch.float32, "cpu", around=(3, 2))
    assert errors["out"] < 1e-5 and not errors["others"]


def test_varlen_attention_gradients_equal_float64():
    errors = varlen_attention_errors([3, 5, 1], [3, 9, 4], (4, 2), 16, torch.float32, "cpu")
    assert max(errors.values()) < 1e-5, errors


def test_stored_keys_are_read_back_by_attention():
    k, v = random_tensor((5, 2, 8), 0, F64), random_tensor((5, 2, 8), 1, F64)
    k_cache, v_cache = (torch.full((4, 2, 2, 8), float("nan"), dtype=F64) for _ in range(2))
    blocks = torch.tensor([[3, 0, 2]], dtype=torch.int32)
    ones, zeros, rows = torch.ones(1, 8), torch.zeros(1, 8), torch.zeros(5, dtype=torch.int64)
    qkv = torch.cat((torch.zeros(5, 4, 8, dtype=F64), k, v), dim=1)
    checked(place_qkv_)(qkv, rows, ones, zeros, None, 0.0, (k_cache, v_cache), None, torch.tensor([6, 7, 0, 1, 4]))
    q = random_tensor((2, 4, 8), 2, F64)
    context = torch.tensor([5], dtype=torch.int32)
    out = checked(paged_attention)(q, k_cache, v_cache, blocks, bounds([2], "cpu"), context, 2, 5, 0.3)
    torch.testing.assert_close(out, varlen_attention(q, k, v, bounds([2], "cpu"), bounds([5], "cpu"), 2, 5, 0.3))


def test_linear_cross_entropy_equals_autograd():
    hidden, weight = random_tensor((700, 16), 0, F64).requires_grad_(), random_tensor((30, 16), 1, F64)
    labels = torch.randint(30, (700,), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (0.3 * expected).backward()
    loss, grad = checked(linear_cross_entropy)(hidden, weight, labels, 0.3, True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(grad, hidden.grad)
    assert linear_cross_entropy(hidden, weight, labels, 0.3, False)[1] is None


def test_philox_gives_the_published_vectors():
    zeros = philox(0, 0, 0, 0, 0)
    assert [int(w) for w in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox(-1, *([2**32 - 1] * 4))
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox(0x299F31D0_A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [int(w) for w in pi] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_depends_on_seed_and_position_alone():
    seeds, positions = torch.tensor([5, 5, 6]), torch.tensor([1, 2, 1])
    noise = checked(gumbel_noise)(seeds, positions, 1001)
    assert torch.equal(noise[1:2], gumbel_noise(seeds[1:2], positions[1:2], 1001))
    assert torch.equal(noise[:, :50], gumbel_noise(seeds, positions, 50))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_gumbel_noise_draws_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = gumbel_noise(torch.full((40_000,), 3), torch.arange(40_000), 4)
    assert noise.isfinite().all()
    share = torch.bincount((logits + noise).argmax(1), minlength=4) / 40_000
    # Four standard errors of a share of 40,000 draws.
    torch.testing.assert_close(share, torch.softmax(logits, 0), atol=0.01, rtol=0)


def test_dropout_masks_belong_to_rows_not_to_positions():
    rows = torch.tensor([7, 2, 9])
    mask = checked(dropout_mask)(1, 2, 3, 4, rows, 1001, 0.3, torch.float32)
    assert torch.equal(mask[1:2], dropout_mask(1, 2, 3, 4, torch.tensor([2]), 1001, 0.3, torch.float32))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    for other in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]:
        assert not torch.equal(mask, dropout_mask(*other, rows, 1001, 0.3, torch.float32))
    assert (dropout_mask(1, 2, 3, 4, rows, 10, 0.0, torch.float32) == 1).all()
    kept = (dropout_mask(1, 2, 3, 4, torch.arange(200), 1000, 0.3, torch.float32) > 0).float().mean()
    assert kept.item() == pytest.approx(0.7, abs=0.005)


BAD_CALLS = {
    "slices": (
        lambda _, layout: segmented_lora(torch.zeros(2, 8), torch.zeros(2, 9), layout, [[weights(1, 5, 1)]], (5, 4)),
        "slices must be 2 rows of equal length",
    ),
    "rows": (lambda t, layout: segmented_lora_(torch.zeros(3, 9), torch.zeros(2, 8), t, layout), "y must have shape"),
    "features": (lambda t, layout: segmented_lora_(torch.zeros(2, 9), torch.zeros(2, 7), t, layout), "x must have shape"),
    "dtype": (lambda t, layout: segmented_lora_(torch.zeros(2, 9).double(), torch.zeros(2, 8), t, layout), "y must be torch.float32"),
    "slot": (
        lambda t, _: segmented_lora_(torch.zeros(2, 9), torch.zeros(2, 8), t, SegmentLayout.build([(2, 2)], "cpu")),
        "below the table's num_slots 2, got 2",
    ),
    "p": (lambda *_: dropout_mask(0, 0, 0, 0, torch.zeros(1, dtype=torch.int64), 4, 1.0, torch.float32), r"p must lie in \[0, 1\)"),
    "label": (
        lambda *_: linear_cross_entropy(torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 5]), 1.0, False),
        r"labels must lie in 0..4, got 0..5",
    ),
    "heads": (lambda *_: varlen_attention(*(torch.zeros(1, h, 8) for h in (3, 2, 2)), *[bounds([1], "cpu")] * 2, 1, 1, 1.0), "multiple of"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_ops_refuse_what_does_not_fit(case):
    call, message = BAD_CALLS[case]
    table = LoraTable(8, (5, 4), 2, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        call(table, SegmentLayout.build([(0, 2)], "cpu"))


def test_counters_name_the_path_and_the_device():
    counters.calls.clear()
    gumbel_noise(torch.tensor([1]), torch.tensor([1]), 8)
    assert counters.calls == {("gumbel_noise", "reference", "cpu"): 1}
    assert counters.references_on("cpu") == {"gumbel_noise": 1}
    assert counters.references_on("cuda") == {}
