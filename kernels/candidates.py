"""The launches that the tuner tries for each op: few enough to measure in seconds, wide enough to hold what wins on different GPUs.

A *variant* is what is compiled (block, warps, stages, ranks at once, repeats); splits of a reduction are tried with the best variant and
the best of them with every variant. Everything here is compiled ahead of time for three GPUs in the tests.
"""

from dataclasses import replace

from kernels.launch import Launch, ShapeClass

# Of shared memory, for the stages of a pipelined product: what is left of 228 KB (sm_90) with a second program beside.
SHARED_BYTES = 160 * 1024
# (block, warps, stages)
SHRINK = ((64, 4, 4), (128, 2, 4), (128, 4, 3), (128, 4, 4), (128, 8, 3), (256, 4, 2), (256, 4, 3), (256, 8, 3), (512, 4, 2), (512, 8, 2))
# one program reduces all features: deep pipelines
PLACING = (
    (64, 4, 3),
    (64, 4, 4),
    (128, 2, 4),
    (128, 4, 4),
    (128, 4, 6),
    (256, 4, 3),
    (256, 4, 4),
    (256, 8, 4),
    (512, 4, 2),
    (512, 4, 3),
    (512, 8, 3),
)
OUTER = ((32, 4, 4), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3), (256, 8, 2))
DECODE = ((32, 2, 3), (32, 4, 3), (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2))
PREFILL = ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 8, 2))
# (block, repeats, warps)
EXPAND = (
    (64, 1, 2),
    (64, 1, 4),
    (64, 4, 4),
    (128, 1, 4),
    (128, 1, 8),
    (128, 2, 4),
    (128, 4, 4),
    (128, 4, 8),
    (256, 1, 4),
    (256, 1, 8),
    (256, 4, 8),
)
# (block, warps); two accumulators
GATED = ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
# (block, warps)
SOFTMAX = ((1024, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (16384, 16))
SWIGLU = ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8))
RMS_WARPS = (2, 4, 8, 16)
SPLITS = {"shrink": (1, 2, 4, 8, 16), "shrink_backward": (1, 2, 4, 8, 16), "attention": (1, 2, 4, 8, 16, 32)}


def parts_of(shape: ShapeClass) -> list[int]:
    """In how many parts a tile's rows are tried: 32 rows each, or the whole tile."""
    return sorted({1, max(shape.rows // 32, 1)}, reverse=True)


def variants(shape: ShapeClass, default: Launch) -> list[Launch]:
    """The default and every other variant for this class, splits as in the default."""
    rank, op = default.block_rank, shape.op
    if op in ("shrink", "shrink_backward", "shrink_placing"):
        found = [
            replace(default, block=block, num_warps=warps, num_stages=stages)
            for block, warps, stages in (PLACING if op == "shrink_placing" else SHRINK)
            if stages * block * (shape.rows + rank) * shape.itemsize <= SHARED_BYTES
        ]
    elif op in ("expand", "expand_dx"):
        found = [
            replace(default, block=block, repeats=repeats, num_warps=warps, parts=parts)
            for parts in parts_of(shape)
            for block, repeats, warps in EXPAND
            # The accumulator of one program lies in its threads' registers.
            if shape.rows // parts * block <= 128 * 32 * warps and (op == "expand" or repeats == 1)
        ]
    elif op == "lora_swiglu":
        found = [
            replace(default, block=block, num_warps=warps, parts=parts)
            for parts in parts_of(shape)
            for block, warps in GATED
            if 2 * shape.rows // parts * block <= 128 * 32 * warps
        ]
    elif op in ("outer_da", "outer_db"):
        found = [replace(default, block=block, num_warps=warps, num_stages=stages) for block, warps, stages in OUTER]
    elif op == "attention":
        choices = DECODE if shape.rows <= 16 else PREFILL
        found = [
            replace(default, block=block, num_warps=warps, num_stages=stages)
            for block, warps, stages in choices
            if 2 * stages * block * shape.head_size * shape.itemsize <= SHARED_BYTES
        ]
    elif op == "softmax":
        found = [replace(default, block=block, num_warps=warps) for block, warps in SOFTMAX]
    elif op == "swiglu":
        found = [replace(default, block=block, num_warps=warps) for block, warps in SWIGLU]
    elif op == "rms_norm":
        found = [replace(default, num_warps=warps) for warps in RMS_WARPS]
    else:
        found = []
    longest = max(shape.length, 16)
    found = [launch for launch in found if op == "rms_norm" or launch.block <= longest]
    return list(dict.fromkeys([default, *found]))


def splits(shape: ShapeClass, launch: Launch, processors: int) -> list[Launch]:
    """The launch with every number of splits that leaves each part a block of work, and no more programs than can run in turn."""
    return [
        replace(launch, splits=count)
        for count in SPLITS.get(shape.op, ())
        if count == launch.splits or (count * launch.block <= shape.length and shape.programs * count <= 16 * processors)
    ]
