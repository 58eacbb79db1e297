"""Every Triton kernel compiles ahead of time for three GPUs, without one: a syntax or type error needs no device to show."""

import os
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import counter, keep, linear_cross_entropy, lora_kernels, lora_tail, paged_attention, qkv, rms_norm, rotary, swiglu
from kernels.candidates import variants
from kernels.launch import Launch, ShapeClass
from kernels.plan import OPS, default_launch

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {
    "source": "*bf16", "y": "*bf16", "dx": "*bf16", "tiles": "*i32", "chunks": "*i32", "entries": "*i64", "partials": "*fp32",
    "out": "*fp32", "q": "*bf16", "k": "*bf16", "v": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "block_tables": "*i32",
    "cu_seqlens_q": "*i32", "context_lens": "*i32", "logsums": "*fp32", "parts": "*fp32", "logits":
    "*bf16", "labels": "*i64", "rows": "i32", "losses": "*fp32", "seeds": "*i64", "positions": "*i64", "scale": "fp32",
    "scale_log2": "fp32", "keep_scale": "fp32", "seed": "i64", "tag": "i64", "threshold": "i64",
    "delta": "*bf16", "weight": "*bf16", "total": "*bf16", "h": "*bf16", "dh": "*bf16", "above": "*bf16", "da": "*bf16",
    "gate_up": "*bf16", "qkv": "*bf16", "q_weight": "*bf16", "k_weight": "*bf16", "k_pool": "*bf16", "v_pool": "*bf16",
    "k_arena": "*bf16", "v_arena": "*bf16", "places": "*i64", "arena": "*bf16", "eps": "fp32",
    "targets": "*i64", "chosen": "*i32", "flags": "*i32", "like": "*bf16", "share_of": "*i32", "sums": "*fp32", "placed": "*i32",
    "x": "*bf16", "cos": "*fp32", "sin": "*fp32", "sign": "fp32",
}  # fmt: skip
LORA = {"R": 256, "RANK_MULTIPLE": 8, "COLUMN_MULTIPLE": 16, "SPLITS": 4, "BLOCK_T": 16, "BLOCK_R": 16, "WIDE": False}
ATTENTION = {"BLOCK_TOKENS": 16, "G": 4, "D": 64, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 64, "WIDE": False}
KERNELS = {
    "shrink": (lora_kernels.shrink_kernel, LORA | {"IS_BACKWARD": False, "BLOCK_K": 64, "PARTS": 2}),
    "shrink backward": (lora_kernels.shrink_kernel, LORA | {"IS_BACKWARD": True, "BLOCK_K": 64, "PARTS": 2}),
    "expand": (lora_kernels.expand_kernel, LORA | {"BLOCK_N": 64, "REPEATS": 4, "PARTS": 2, "SKIPS": True}),
    "expand dx": (lora_kernels.expand_dx_kernel, LORA | {"BLOCK_N": 64, "ADDS": True, "PARTS": 2}),
    "fill tails": (
        lora_tail.fill_kernel,
        {"RANK_MULTIPLE": 8, "COLUMN_MULTIPLE": 16, "MAX_CHOSEN": 8, "BLOCK_N": 512, "STEP_N": 64, "BLOCK_R": 16},
    ),
    "shrink placing": (
        lora_tail.shrink_placing_kernel,
        {
            "R": 16,
            "RANK_MULTIPLE": 8,
            "COLUMN_MULTIPLE": 16,
            "PARTS": 8,
            "BLOCK_T": 16,
            "BLOCK_K": 256,
            "BLOCK_R": 16,
            "BLOCK_C": 32,
            "WIDE": False,
        },
    ),
    "outer": (lora_kernels.outer_kernel, LORA | {"BLOCK_M": 32, "IS_DB": True}),
    "outer transposed": (lora_kernels.outer_kernel, LORA | {"BLOCK_M": 32, "IS_DB": False}),
    "attention": (paged_attention.attention_kernel, ATTENTION | {"SPLITS": 1, "BLOCK_Q": 4, "IS_DECODE": False}),
    "attention decode": (paged_attention.attention_kernel, ATTENTION | {"SPLITS": 4, "BLOCK_Q": 1, "IS_DECODE": True}),
    "merge": (paged_attention.merge_kernel, {"HEADS": 32, "D": 64, "SPLITS": 4, "IS_DECODE": False, "BLOCK_D": 64}),
    "merge decode": (paged_attention.merge_kernel, {"HEADS": 32, "D": 64, "SPLITS": 4, "IS_DECODE": True, "BLOCK_D": 64}),
    "add rms norm": (rms_norm.add_rms_norm_kernel, {"HAS_DELTA": True, "BLOCK": 4096}),
    "rms norm backward": (rms_norm.rms_norm_backward_kernel, {"HAS_ABOVE": True, "BLOCK": 4096}),
    "swiglu": (swiglu.swiglu_kernel, {"BLOCK": 1024}),
    "lora swiglu": (swiglu.lora_swiglu_kernel, LORA | {"BLOCK_N": 64, "KEEPS": True, "PARTS": 2}),
    "swiglu backward": (swiglu.swiglu_backward_kernel, {"BLOCK": 1024}),
    "place qkv": (qkv.place_qkv_kernel, {"D": 128, "HAS_NORM": True, "HAS_ARENA": True, "BLOCK_N": 8, "BLOCK_HALF": 64}),
    "keep": (keep.keep_kernel, {"BLOCK": 1024}),
    "softmax": (linear_cross_entropy.softmax_loss_kernel, {"NEEDS_GRAD": True, "BLOCK": 256}),
    "rotary": (rotary.rotary_kernel, {"D": 128, "BLOCK_N": 16, "BLOCK_HALF": 64}),
    "gumbel": (counter.gumbel_kernel, {"BLOCK": 64}),
    # A launch with the value 1 makes the argument a constant.
    "dropout": (counter.dropout_kernel, {"BLOCK": 64, "micro_step": 1}),
}
SWIGLU = {"out": "*bf16"}
OTHER_TYPES = {
    counter.dropout_kernel: {"rows": "*i64", "out": "*bf16"},
    swiglu.swiglu_kernel: SWIGLU,
    swiglu.lora_swiglu_kernel: SWIGLU | {"kept": "*bf16"},
    swiglu.swiglu_backward_kernel: SWIGLU,
}
UNALIGNED = ("num_slots", "J", "N", "T", "V", "C", "rows", "head_stride", "table_stride", "micro_step", "seed", "tag", "threshold")


def compiled(kernel, constants, target, **launch):
    names = kernel.arg_names
    options = dict(launch)
    if "WAITS" in names:  # as kernels.backend.overlapped
        waits = target.backend == "cuda" and target.arch >= 90
        constants, options = constants | {"WAITS": waits}, options | ({"launch_pdl": True} if waits else {})
    types = TYPES | OTHER_TYPES.get(kernel, {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [n for n in names if n not in constants and n not in UNALIGNED and not signature[n].startswith("fp")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_ahead_of_time(name, target):
    binary = compiled(*KERNELS[name], TARGETS[target])
    # AMD's local memory is the smallest of the three.
    assert binary.metadata.shared <= 64 * 1024


@pytest.mark.parametrize("name", ["shrink", "expand", "lora swiglu"])
def test_weights_behind_a_pointer_table_are_read_in_vectors(name):
    ptx = compiled(*KERNELS[name], TARGETS["sm_90"]).asm["ptx"]
    assert not re.search(r"ld\.global\.b16", ptx), "a 2-byte load: some address lost its declared alignment"
    assert re.search(r"cp\.async\.cg|ld\.global\.v4", ptx)


@pytest.mark.parametrize("name", ["shrink", "expand", "add rms norm", "swiglu", "lora swiglu", "place qkv", "attention decode", "merge"])
def test_kernels_of_a_decode_step_wait_for_the_one_before_on_hopper_only(name):
    assert "griddepcontrol.wait" in compiled(*KERNELS[name], TARGETS["sm_90"]).asm["ptx"]
    assert "griddepcontrol" not in compiled(*KERNELS[name], TARGETS["sm_80"]).asm["ptx"]


# The classes whose variants take most registers and shared memory, at a rank and a head size that compile fast.
SIZES = {"rows": 16, "length": 16384, "programs": 64, "itemsize": 2, "rank": 16, "head_size": 64}
CLASSES = {op: [SIZES] for op in OPS} | {
    "shrink": [SIZES | {"rows": 32}],
    "shrink_backward": [SIZES | {"rows": 32}],
    "shrink_placing": [SIZES | {"rows": 32}],
    "expand_dx": [SIZES | {"rows": 128}],
    "attention": [SIZES, SIZES | {"rows": 64}],
    "rms_norm": [SIZES | {"rows": 1, "length": 4096}],
}
HOPPER_SHARED_BYTES = 227 * 1024


def source_of(op: str, shape: ShapeClass, launch: Launch):
    """The kernel of an op and its constants under a launch."""
    lora = LORA | {
        "R": shape.rank,
        "RANK_MULTIPLE": min(shape.rank, 16),
        "BLOCK_T": shape.rows // launch.parts,
        "BLOCK_R": launch.block_rank,
    }
    whole = {name: value for name, value in lora.items() if name != "SPLITS"}
    rows = shape.rows // 4
    attention = {"D": shape.head_size, "BLOCK_D": shape.head_size, "BLOCK_M": shape.rows, "BLOCK_N": launch.block, "SPLITS": 4}
    return {
        "shrink": (lora_kernels.shrink_kernel, lora | {"IS_BACKWARD": False, "BLOCK_K": launch.block, "PARTS": 2}),
        "shrink_backward": (lora_kernels.shrink_kernel, lora | {"IS_BACKWARD": True, "BLOCK_K": launch.block, "PARTS": 2}),
        "shrink_placing": (lora_tail.shrink_placing_kernel, whole | {"BLOCK_K": launch.block, "PARTS": 2, "BLOCK_C": 32}),
        "expand": (
            lora_kernels.expand_kernel,
            lora | {"BLOCK_N": launch.block, "REPEATS": launch.repeats, "PARTS": launch.parts, "SKIPS": True},
        ),
        "expand_dx": (lora_kernels.expand_dx_kernel, lora | {"BLOCK_N": launch.block, "ADDS": True, "SPLITS": 1, "PARTS": launch.parts}),
        "outer_da": (lora_kernels.outer_kernel, lora | {"BLOCK_T": 64, "BLOCK_M": launch.block, "IS_DB": False, "SPLITS": 1}),
        "outer_db": (lora_kernels.outer_kernel, lora | {"BLOCK_T": 64, "BLOCK_M": launch.block, "IS_DB": True, "SPLITS": 1}),
        "attention": (
            paged_attention.attention_kernel,
            ATTENTION | attention | {"BLOCK_Q": 1 if shape.rows <= 16 else rows, "IS_DECODE": shape.rows <= 16},
        ),
        "softmax": (linear_cross_entropy.softmax_loss_kernel, {"NEEDS_GRAD": True, "BLOCK": launch.block}),
        "rms_norm": (rms_norm.add_rms_norm_kernel, {"HAS_DELTA": True, "BLOCK": launch.block}),
        "swiglu": (swiglu.swiglu_kernel, {"BLOCK": launch.block}),
        "lora_swiglu": (swiglu.lora_swiglu_kernel, lora | {"BLOCK_N": launch.block, "KEEPS": True, "PARTS": launch.parts}),
    }[op]


def candidates(op: str, sizes: dict[str, int]) -> list[tuple[ShapeClass, Launch]]:
    shape = ShapeClass.of(op, **sizes)
    return [(shape, launch) for launch in variants(shape, default_launch(op, processors=132, **sizes))]


def compile_candidate(op: str, shape: ShapeClass, launch: Launch, target: str) -> int:
    """Bytes of shared memory."""
    stages = min(launch.num_stages, 2) if target == "gfx942" else launch.num_stages
    return compiled(*source_of(op, shape, launch), TARGETS[target], num_warps=launch.num_warps, num_stages=stages).metadata.shared


def corners(found: list[tuple[ShapeClass, Launch]]) -> list[tuple[ShapeClass, Launch]]:
    """Of the variants of one class: the most of it in shared memory, the most and the fewest threads on a block."""
    size = lambda pair: pair[1].block * pair[1].num_stages
    density = lambda pair: pair[1].num_warps / pair[1].block
    return list(dict.fromkeys((max(found, key=size), max(found, key=density), min(found, key=density))))


@pytest.mark.parametrize("op", OPS)
def test_candidates_of_the_tuner_compile_and_fit_hopper(op):
    """The extreme ones; with LOQUETIER_EVERY_CANDIDATE=1, after a change of candidates or kernels, every one for every target."""
    every = os.environ.get("LOQUETIER_EVERY_CANDIDATE") == "1"
    for sizes in CLASSES[op]:
        found = candidates(op, sizes)
        for shape, launch in found if every else corners(found):
            assert compile_candidate(op, shape, launch, "sm_90") <= HOPPER_SHARED_BYTES, launch
            if every:
                compile_candidate(op, shape, launch, "sm_80"), compile_candidate(op, shape, launch, "gfx942")


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("op", ["shrink", "expand", "outer_db"])
def test_the_largest_candidate_of_the_tuner_compiles_elsewhere(op, target):
    shape, launch = corners(candidates(op, CLASSES[op][-1]))[0]
    compile_candidate(op, shape, launch, target)
