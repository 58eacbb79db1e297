"""Rotary embedding: the reference against transformers' formula, and its gradient against autograd."""

import pytest
import torch

from kernels.rotary import rotary, rotary_reference


def angles(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.randn(tokens, size // 2, generator=torch.Generator().manual_seed(1)) * 3
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def test_rotary_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, (cos, sin) = torch.randn(7, 6, 16, generator=torch.Generator().manual_seed(0)), angles(7, 16)
    q, k = x[:, :4], x[:, 4:]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    found = rotary(x, cos, sin)
    torch.testing.assert_close(found, torch.cat(expected, 1)[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_the_inverse_rotation_is_the_gradient():
    cos, sin = angles(5, 8)
    x = torch.randn(5, 3, 8, requires_grad=True)
    dy = torch.randn(5, 3, 8)
    expected = torch.autograd.grad(rotary_reference(x, cos, sin), x, dy)[0]
    torch.testing.assert_close(rotary(dy, cos, sin, inverse=True), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "x, angle, message",
    [
        (torch.zeros(3, 2, 7), torch.zeros(3, 7), "even D"),
        (torch.zeros(3, 2, 8), torch.zeros(2, 8), r"\[T, D\]"),
        (torch.zeros(3, 2, 8), torch.zeros(3, 8, dtype=torch.float64), "contiguous fp32"),
        (torch.zeros(3, 8, 2).transpose(1, 2), torch.zeros(3, 8), "stride 1"),
    ],
)
def test_shapes_and_strides_that_do_not_fit_are_refused(x, angle, message):
    with pytest.raises(ValueError, match=message):
        rotary(x, angle, angle)
