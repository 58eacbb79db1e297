"""The Triton sources on CPU tensors. Run by test_kernels_interpreter.py in a process with TRITON_INTERPRET=1; no test file by itself.

Tolerances are max |a - b| / max |b|: fp32 differs by the order of sums; bf16 rounds v, dv or the softmax weights, and the output, to
8 bits each (2^-8 = 0.004).
"""

import dataclasses

import pytest
import torch

from kernels import counters, layout, tune_problems
from kernels.backend import IS_INTERPRETED
from kernels.candidates import splits, variants
from kernels.counter import dropout_mask, dropout_mask_reference, gumbel_noise, gumbel_noise_reference
from kernels.layout import SegmentLayout
from kernels.plan import overridden, plan
from kernels.problems import (
    cross_entropy_errors,
    gated_errors,
    layer_errors,
    lora_errors,
    paged_attention_errors,
    spoiled_tail,
    tail_errors,
)
from kernels.rotary import rotary, rotary_reference
from kernels.segmented_lora import SlotWeights, segmented_lora
from kernels.testing import random_tensor, relative_error
from kernels.tune import Tuner
from kernels.tuned import Gpu, TunedPlan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def only_triton():
    assert IS_INTERPRETED
    counters.calls.clear()
    yield
    assert not counters.references_on("cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mixed_ranks_ragged_rows_and_missing_slices(dtype):
    ranks = [[1, 3, 8, 16, 17, 64], [8, 0, 128, 3, 0, 1]]
    row_slots = [(0, 1), (None, 5), (1, 15), (2, 0), (3, 33), (4, 2), (5, 18), (0, 4)]
    errors = lora_errors(row_slots, ranks, dtype, "cpu", in_features=40, out_features=(32, 19))
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert counters.calls == {("segmented_lora", "triton", "cpu"): 1, ("lora_gradients", "triton", "cpu"): 2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row_slots", [[(0, 1), (None, 5), (1, 15), (3, 33), (0, 2)], [(2, 40)], [(None, 20), (1, 1)]])
def test_swiglu_adds_the_adapters_term_and_keeps_the_sum(row_slots, dtype):
    errors = gated_errors(row_slots, [[1, 8, 17, 64], [8, 0, 128, 3]], dtype, "cpu", in_features=40, width=24)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize(
    "ranks",
    [[[8, 3, 16, 17], [8, 0, 8, 3]], [[8] * 6, [8] * 6], [[40, 8], [0, 64]], [[8, 3], [8, 0]]],
    ids=["mixed", "many", "large", "all"],
)
def test_base_product_and_adapters_are_one_product_whichever_slots_have_a_place(ranks, columns, dtype):
    slots = len(ranks[0])
    row_slots = [(slot, 5 + 3 * slot) for slot in range(slots)] + [(None, 7), (0, 20)]
    before = [(slots - 1, 9), (0, 1)]  # whose adapters are still in the tails, in other columns
    errors = tail_errors(row_slots, ranks, dtype, "cpu", in_features=40, out_features=(32, 19), columns=columns, before=before)
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert counters.calls[("tail_linear", "triton", "cpu")] == 2


def test_an_adapter_that_is_not_finite_spoils_only_its_own_rows():
    y, clean = spoiled_tail("cpu")
    assert y[:9].isnan().any(1).all(), "rows of the adapter with an infinite weight"
    torch.testing.assert_close(y[9:], clean[9:], rtol=0, atol=0)


def test_a_long_run_is_chunked_and_a_long_input_is_split(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_ROWS", 16)
    monkeypatch.setattr(layout, "MAX_CHUNKS", 3)
    assert SegmentLayout.build([(0, 40)], "cpu").chunks_per_slot == (3,)
    sizes = {"rows": 16, "length": 1100, "programs": 3, "processors": 132, "itemsize": 4}
    assert plan("shrink", **sizes).splits > 1
    errors = lora_errors([(0, 40)], [[70]], torch.float32, "cpu", in_features=1100, out_features=(48,), block_rows=32)
    assert max(errors.values()) < TOLERANCE[torch.float32], errors


@pytest.mark.parametrize("row_slots", [[], [(None, 3)], [(1, 2), (None, 1)]])
def test_batches_without_weights_change_nothing(row_slots):
    errors = lora_errors(row_slots, [[4, 0], [4, 0]], torch.float32, "cpu", in_features=16, out_features=(8, 8))
    assert max(errors.values()) == 0


def test_autograd_through_the_kernels_equals_the_formula():
    a, b = random_tensor((3, 24), 0, torch.float32).requires_grad_(), random_tensor((20, 3), 1, torch.float32).requires_grad_()
    x, y = random_tensor((18, 24), 2, torch.float32).requires_grad_(), random_tensor((18, 20), 3, torch.float32).requires_grad_()
    dy = random_tensor((18, 20), 4, torch.float32)
    out = segmented_lora(x, y * 1, SegmentLayout.build([(0, 17), (None, 1)], "cpu"), [[SlotWeights(a, b, 0.5)]], (20,))
    ours = torch.autograd.grad(out, (x, y, a, b), dy)
    rows = (torch.arange(18) < 17).float()[:, None]
    expected = torch.autograd.grad(y + 0.5 * rows * (x @ a.T @ b.T), (x, y, a, b), dy)
    assert max(relative_error(p, q) for p, q in zip(ours, expected, strict=True)) < TOLERANCE[torch.float32]


ATTENTION = {
    "chunk with a prefix, a decode row and an empty sequence": ([5, 1, 0, 9], [7, 90, 0, 9], (6, 2), 16),
    "decode split over keys": ([1, 1], [1, 300], (8, 1), 32),
    "head size that is no power of two": ([2, 1], [2, 33], (3, 1), 80),
    "no sequences": ([], [], (2, 2), 16),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_paged_attention(case, dtype):
    errors = paged_attention_errors(*ATTENTION[case], dtype, "cpu", block_tokens=8 if dtype == torch.float32 else 16)
    assert errors["out"] < TOLERANCE[dtype], errors


@pytest.mark.parametrize("around", [(3, 2), (21, 0)])
@pytest.mark.parametrize("case", [*ATTENTION, "decode rows and an empty sequence"])
def test_paged_attention_leaves_the_rows_around_the_sequences_alone(case, around):
    arguments = ATTENTION.get(case, ([1, 0, 1], [5, 0, 300], (8, 2), 32))
    errors = paged_attention_errors(*arguments, torch.float32, "cpu", around=around)
    assert errors["out"] < TOLERANCE[torch.float32] and not errors["others"], errors


def test_linear_cross_entropy():
    errors = cross_entropy_errors(5, 16, 5000, torch.float32, "cpu")
    assert max(errors.values()) < TOLERANCE[torch.float32], errors


def test_counter_bits_are_equal():
    seeds, positions = torch.tensor([1, -5, 2**62]), torch.tensor([0, 7, 2**33])
    ours, expected = gumbel_noise(seeds, positions, 101), gumbel_noise_reference(seeds, positions, 101)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for arguments in [(0, 1, 3, 4), (2**63 + 5, 2**32 - 1, 0, 0), (-3, 0, 7, 255)]:
        rows = torch.tensor([0, 1, 2**31 + 7])
        ours = dropout_mask(*arguments, rows, 101, 0.3, torch.float32)
        assert torch.equal(ours, dropout_mask_reference(*arguments, rows, 101, 0.3, torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 16), ((9, 3), 24)])
def test_the_ops_around_the_linears(heads, size, dtype):
    errors = layer_errors(5, heads, size, dtype, "cpu")
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(1, 8), (5, 24), (20, 128)])
def test_rotary_of_a_strided_slice(heads, size, dtype):
    buffer = random_tensor((6, heads + 2, size), 0, dtype, "cpu")
    angle = random_tensor((6, size // 2), 1, torch.float32, "cpu")
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    x = buffer[:, :heads]
    y = rotary(x, cos, sin)
    assert relative_error(y, rotary_reference(x.double(), cos.double(), sin.double())) < TOLERANCE[dtype]
    dy = random_tensor(y.shape, 2, dtype, "cpu")
    expected = rotary_reference(dy.double(), cos.double(), -sin.double())
    assert relative_error(rotary(dy, cos, sin, inverse=True), expected) < TOLERANCE[dtype]


# ---- what the tuner may choose

TINY = {"o": (72, (40,)), "pair": (72, (24, 40))}
TUNED = {
    "lora forward": (lambda: tune_problems.lora("pair", 2, 3, 3, "cpu", torch.float32, TINY), ("shrink", "expand")),
    "lora backward": (
        lambda: tune_problems.lora_backward("o", 1, 3, 3, "cpu", torch.float32, TINY),
        ("shrink_backward", "expand_dx", "outer_da", "outer_db"),
    ),  # and shrink, as above
    "lora and swiglu": (lambda: tune_problems.gated_lora(2, 3, 3, "cpu", torch.float32, {"gate_up": (40, (24, 24))}), ("lora_swiglu",)),
    "decode attention": (lambda: tune_problems.attention(1, 1, 40, 64, "cpu", torch.float32, (2, 1, 16)), ("attention",)),
    "chunked attention": (lambda: tune_problems.attention(1, 3, 20, 32, "cpu", torch.float32, (1, 1, 16)), ("attention",)),
    "cross-entropy": (lambda: tune_problems.cross_entropy(3, 16, 900, "cpu", torch.float32), ("softmax",)),
    "norm": (lambda: tune_problems.norm(3, 40, "cpu", torch.float32), ("rms_norm",)),
    "activation": (lambda: tune_problems.activation(3, 40, "cpu", torch.float32), ("swiglu",)),
}


@pytest.mark.parametrize("case", TUNED)
def test_every_candidate_gives_the_reference(case):
    prepare, ops = TUNED[case]
    instance, asked = prepare().prepare(), {}
    with overridden(lambda shape, default: asked.setdefault(shape, default)):
        assert instance.error() < TOLERANCE[torch.float32]
    assert {shape.op for shape in asked} >= set(ops)
    for shape, default in ((shape, default) for shape, default in asked.items() if shape.op in ops):
        # As for long axes: blocks beyond this problem's are right too.
        long = dataclasses.replace(shape, length=1 << 14, programs=1)
        found = variants(long, default)
        found += [launch for launch in splits(long, dataclasses.replace(default, block=16), 132) if launch.splits in (4, 16)]
        # Here warps and stages are nothing.
        for launch in {dataclasses.replace(launch, num_warps=1, num_stages=1) for launch in found}:
            with overridden(lambda s, d, shape=shape, launch=launch: launch if s == shape else d):
                assert instance.error() < TOLERANCE[torch.float32], (shape, launch)


def test_the_tuner_tunes_real_kernels_and_its_file_changes_no_result(tmp_path):
    gpu = Gpu(name="Interpreter", capability="0.0", processors=132)
    tuner = Tuner(gpu=gpu, versions={}, commit="c", timer=lambda instances: 1.0, say=lambda line: None)
    found = tune_problems.activation(2, 600, "cpu", torch.float32)
    assert tuner.tune([found], 60.0, lambda plan: plan.save(tmp_path)) == []
    (entry,) = TunedPlan.load(tmp_path / gpu.file_name).entries
    assert entry.launch == entry.default and entry.candidates > 2 and entry.error < TOLERANCE[torch.float32]
