"""The ops around the linears of a decoder layer: their references against torch, autograd and transformers."""

import pytest
import torch
import torch.nn.functional as F

from kernels.keep import keep_rows_
from kernels.layout import SegmentLayout
from kernels.lora_table import LoraTable
from kernels.qkv import place_qkv_
from kernels.rms_norm import add_rms_norm, rms_norm_backward
from kernels.rotary import rotary_reference
from kernels.segmented_lora import Low
from kernels.swiglu import lora_swiglu, swiglu, swiglu_backward
from kernels.testing import random_tensor


def test_add_rms_norm_adds_first_and_equals_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, delta = random_tensor((5, 24), 0, torch.float32), random_tensor((5, 24), 1, torch.float32)
    norm = LlamaRMSNorm(24, eps=1e-5)
    norm.weight.data = random_tensor((24,), 2, torch.float32)
    total, h = add_rms_norm(x, delta, norm.weight.data, 1e-5)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(h, norm(x + delta).detach(), rtol=1e-5, atol=1e-6)
    same, h = add_rms_norm(x, None, norm.weight.data, 1e-5)
    assert same is x
    torch.testing.assert_close(h, norm(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_above", [False, True])
def test_the_norms_gradient_equals_autograd(with_above):
    x, dh, above, w = (random_tensor(shape, i, torch.float64) for i, shape in enumerate([(7, 16), (7, 16), (7, 16), (16,)]))
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(F.rms_norm(leaf, (16,), w, 1e-5), leaf, dh)[0] + (above if with_above else 0)
    torch.testing.assert_close(rms_norm_backward(dh, x, w, 1e-5, above if with_above else None), expected, rtol=1e-9, atol=1e-9)


def test_swiglu_and_its_gradient_equal_autograd():
    gate_up, da = random_tensor((6, 20), 0, torch.float64), random_tensor((6, 10), 1, torch.float64)
    leaf = gate_up.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(swiglu(gate_up), expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(swiglu_backward(da, gate_up), torch.autograd.grad(expected, leaf, da)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normed_rotated_and_put_where_their_places_say(has_norms):
    tokens, heads, kv_heads, size = 6, 4, 2, 8
    qkv = random_tensor((tokens, heads + 2 * kv_heads, size), 0, torch.float32)
    cos, sin = (random_tensor((9, size // 2), seed, torch.float32).repeat(1, 2) for seed in (1, 2))
    norms = (random_tensor((size,), 3, torch.float32), random_tensor((size,), 4, torch.float32)) if has_norms else None
    positions, places = torch.tensor([0, 8, 3, 3, 1, 2]), torch.tensor([5, -1, 0, ~3, 7, ~0 - 1])
    pool = tuple(torch.full((2, 4, kv_heads, size), torch.nan) for _ in range(2))
    arena = tuple(torch.full((4, kv_heads, size), torch.nan) for _ in range(2))
    found = qkv.clone()
    place_qkv_(found, positions, cos, sin, norms, 1e-6, pool, arena, places)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q, k = (F.rms_norm(t, (size,), w, 1e-6) for t, w in zip((q, k), norms, strict=True))
    q, k = (rotary_reference(t, cos[positions], sin[positions]) for t in (q, k))
    torch.testing.assert_close(found, torch.cat((q, k, v), 1))
    for cache, kept, part in zip(pool, arena, (k, v), strict=True):
        flat = cache.view(8, kv_heads, size)
        torch.testing.assert_close(flat[[5, 0, 7]], part[[0, 2, 4]])
        torch.testing.assert_close(kept[[0, 3, 1]], part[[1, 3, 5]])
        assert flat[[1, 2, 3, 4, 6]].isnan().all() and kept[2].isnan().all(), "nobody else's place is touched"


def test_only_rows_with_a_place_in_the_arena_are_kept():
    arena, x = torch.full((4, 3), torch.nan), random_tensor((4, 3), 0, torch.float32)
    keep_rows_(arena, x, torch.tensor([~2, 0, ~0, 7]))
    assert torch.equal(arena[[2, 0]], x[[0, 2]]) and arena[[1, 3]].isnan().all()


TABLE, LAYOUT = LoraTable(3, (4, 4), 1, device="cpu", dtype=torch.float32), SegmentLayout.build([(0, 3)], "cpu")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(4), 1e-5), "delta must be"),
        (lambda: add_rms_norm(torch.zeros(4, 2).T, None, torch.ones(4), 1e-5), "contiguous"),
        (lambda: swiglu(torch.zeros(2, 5)), "2 I"),
        (lambda: lora_swiglu(torch.zeros(2, 8), Low(torch.zeros(2, 3)), TABLE, SegmentLayout.build([(0, 3)], "cpu")), "rows with slices"),
        (lambda: lora_swiglu(torch.zeros(3, 8), Low(torch.zeros(3, 3)), TABLE, LAYOUT, kept=torch.zeros(4, 8)), "given with places"),
        (lambda: swiglu_backward(torch.zeros(2, 3), torch.zeros(2, 4)), "da must be"),
        (lambda: keep_rows_(torch.zeros(4, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)), "must fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
