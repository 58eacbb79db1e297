"""Random numbers from a counter: sampling noise and dropout masks that no schedule can change.

bits = Philox-4x32-10(key = seed, counter = (c0, c1, c2, c3)), Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).

    Gumbel noise   counter (token id // 4, position low, position high, 0), word token id % 4;  g = -log(-log(u)), 0 < u < 1
    dropout mask   counter (column // 4, row, micro-step, 2^31 + 256 layer + module), word column % 4;  kept iff bits >= p 2^32

Legend: B sequences, V vocabulary, T rows. The CPU path and the Triton path give equal bits; the logarithms differ by rounding.
"""

import torch
from jaxtyping import Float, Int64

from kernels.backend import jit, tl, triton, uses_triton
from kernels.counters import count

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85

Word = int | torch.Tensor


def philox(seed: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32-10 in int64 arithmetic: four int64 tensors of values in [0, 2^32), broadcast over the arguments.

    `seed` is 64 bits wide (an int of any sign, or int64), each counter word is taken modulo 2^32.
    """
    device = next((w.device for w in (seed, c0, c1, c2, c3) if isinstance(w, torch.Tensor)), torch.device("cpu"))

    def words(value: Word, shift: int = 0) -> torch.Tensor:
        if isinstance(value, int):
            return torch.tensor((value >> shift) & _MASK, dtype=torch.int64, device=device)
        return (value.to(torch.int64) >> shift) & _MASK

    k0, k1 = words(seed), words(seed, 32)
    x0, x1, x2, x3 = words(c0), words(c1), words(c2), words(c3)
    for _ in range(10):
        # The 64-bit products wrap as signed numbers, but their bits are the unsigned product's.
        a, b = x0 * _ROUND_A, x2 * _ROUND_B
        x0, x1, x2, x3 = ((b >> 32) & _MASK) ^ x1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    x0, x1, x2, x3 = torch.broadcast_tensors(x0, x1, x2, x3)
    return x0, x1, x2, x3


def gumbel_noise_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The specification of `gumbel_noise`."""
    groups = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    words = philox(seeds[:, None], groups[None], positions[:, None], positions[:, None] >> 32, 0)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]  # [B, V]
    # 23 bits and a half fit fp32 exactly, so u is never 0 and never 1.
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def dropout_mask_reference(
    seed: int, micro_step: int, layer: int, module: int, rows: torch.Tensor, columns: int, p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The specification of `dropout_mask`."""
    groups = torch.arange((columns + 3) // 4, device=rows.device)
    words = philox(seed, groups[None], rows[:, None], micro_step, _dropout_tag(layer, module))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :columns]  # [T, columns]
    return torch.where(bits >= _threshold(p), 1 / (1 - p), 0.0).to(dtype)


def _dropout_tag(layer: int, module: int) -> int:
    return 2**31 + 256 * layer + module


def _threshold(p: float) -> int:
    return min(round(p * 2**32), _MASK)


@jit
def gumbel_kernel(seeds, positions, out, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    c0 = group.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    for lane in tl.static_range(4):
        word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
        token = group * 4 + lane
        uniform = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
        tl.store(out + row * V + token, -tl.log(-tl.log(uniform)), mask=token < V)


@jit
def dropout_kernel(rows, out, seed, micro_step, tag, threshold, keep_scale, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c0 = group.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (tl.load(rows + row) & 0xFFFFFFFF).to(tl.uint32)
    # A launch with the value 1 passes a compile-time constant, which has no .to(): widen by adding.
    zero = tl.zeros(c0.shape, dtype=tl.int64)
    c2 = (zero + micro_step).to(tl.uint32)
    c3 = (zero + tag).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    for lane in tl.static_range(4):
        word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
        column = group * 4 + lane
        kept = tl.where(word.to(tl.int64) >= threshold, keep_scale, 0.0)
        tl.store(out + row * C + column, kept.to(out.dtype.element_ty), mask=column < C)


_BLOCK = 256


def gumbel_noise(seeds: Int64[torch.Tensor, " B"], positions: Int64[torch.Tensor, " B"], vocab_size: int) -> Float[torch.Tensor, "B V"]:
    """Standard Gumbel noise [B, V] fp32, a function of (seed, position, token id) alone.

    argmax(logits / temperature + noise) draws a token from the softmax, whatever else shares the batch.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    if not uses_triton(seeds):
        count("gumbel_noise", "reference", seeds.device.type)
        return gumbel_noise_reference(seeds, positions, vocab_size)
    count("gumbel_noise", "triton", seeds.device.type)
    out = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float32, device=seeds.device)
    if out.numel():
        grid = (seeds.shape[0], triton.cdiv(vocab_size, 4 * _BLOCK))
        gumbel_kernel[grid](seeds.contiguous(), positions.contiguous(), out, vocab_size, BLOCK=_BLOCK)
    return out


def dropout_mask(
    seed: int, micro_step: int, layer: int, module: int, rows: Int64[torch.Tensor, " T"], columns: int, p: float, dtype: torch.dtype
) -> Float[torch.Tensor, "T columns"]:
    """Dropout factors [T, columns]: 0 with probability p, else 1 / (1 - p), a function of the counter alone.

    `rows` are row numbers inside the job's micro-batch (below 2^32), never packed positions. Raises ValueError for p outside [0, 1), a
    module outside 0..255 or a layer outside 0..2^23 - 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if not (0 <= module < 256 and 0 <= layer < 2**23):
        raise ValueError(f"module must lie in 0..255 and layer in 0..{2**23 - 1}, got {module} and {layer}")
    if not uses_triton(rows):
        count("dropout_mask", "reference", rows.device.type)
        return dropout_mask_reference(seed, micro_step, layer, module, rows, columns, p, dtype)
    count("dropout_mask", "triton", rows.device.type)
    out = torch.empty(rows.shape[0], columns, dtype=dtype, device=rows.device)
    if out.numel():
        # The seed's 64 bits as a signed number: negative seeds are sign-extended on every path.
        key = ((seed + 2**63) % 2**64) - 2**63
        grid = (rows.shape[0], triton.cdiv(columns, 4 * _BLOCK))
        dropout_kernel[grid](
            rows.contiguous(), out, key, micro_step % 2**32, _dropout_tag(layer, module), _threshold(p), 1 / (1 - p), columns, BLOCK=_BLOCK
        )
    return out
