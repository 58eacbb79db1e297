"""From the fused q/k/v projection to attention's inputs in one pass: head norms, rotary embedding, and the new keys' and values' places.

    q[t] and k[t] are normed per head (where the model has such norms) and rotated by position[t], in place;
    rotated k[t] and v[t] are copied to the KV pool or to the activation arena, wherever place[t] says.

Legend: T rows, Nq query heads, Nkv key/value heads, D head size. place[t] >= 0 is a slot of the pool (block * block_tokens + offset);
place[t] < 0 is ~(row of the arena): -1 is row 0. cos and sin repeat their D/2 angles (transformers' layout). Arithmetic is fp32; the
norm's result is rounded before the rotation, as transformers does.
Sources: rotary embedding arXiv 2104.09864, paged KV arXiv 2309.06180.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64

from kernels.backend import jit, overlapped, tl, triton, uses_triton, wait_for_previous
from kernels.counters import count
from kernels.rotary import rotary_reference

Store = tuple[torch.Tensor, torch.Tensor]  # keys and values [..., Nkv, D], contiguous


def place_qkv_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    pool: Store,
    arena: Store | None,
    places: torch.Tensor,
) -> None:
    """The specification of `place_qkv_`."""
    heads, size = qkv.shape[1:]
    kv_heads = pool[0].shape[-2]
    q, k, v = qkv.split((heads - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    normed = (q, k) if norms is None else (F.rms_norm(t, (size,), w, eps) for t, w in zip((q, k), norms, strict=True))
    for part, value in zip((q, k), normed, strict=True):
        part.copy_(rotary_reference(value, cos[positions], sin[positions]))
    for store, chosen in ((pool, places >= 0), (arena, places < 0)):
        if store is not None:
            at = torch.where(places < 0, ~places, places)[chosen]
            for cache, part in zip(store, (k, v), strict=True):
                cache.view(-1, kv_heads, size)[at] = part[chosen]


@jit
def place_qkv_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_weight,
    k_weight,
    k_pool,
    v_pool,
    k_arena,
    v_arena,
    places,
    eps,
    NQ,
    NKV,
    D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ARENA: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """BLOCK_N heads of one row."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_HALF)
    d_mask = d < D // 2
    mask = (head < NQ + 2 * NKV)[:, None] & d_mask[None, :]
    at = qkv + (token * (NQ + 2 * NKV) + head[:, None]) * D + d[None, :]
    turn = tl.load(positions + token).to(tl.int64) * D + d
    c = tl.load(cos + turn, mask=d_mask)[None, :]
    s = tl.load(sin + turn, mask=d_mask)[None, :]
    place = tl.load(places + token).to(tl.int64)
    wait_for_previous(WAITS)
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
    turned, turned_second = first, second
    if HAS_NORM:
        r = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        is_q = (head < NQ)[:, None]
        w = tl.where(is_q, tl.load(q_weight + d, mask=d_mask)[None, :], tl.load(k_weight + d, mask=d_mask)[None, :]).to(tl.float32)
        second_d = d + D // 2
        w_second = tl.where(is_q, tl.load(q_weight + second_d, mask=d_mask)[None, :], tl.load(k_weight + second_d, mask=d_mask)[None, :])
        turned = (first * r * w).to(qkv.dtype.element_ty).to(tl.float32)
        turned_second = (second * r * w_second.to(tl.float32)).to(qkv.dtype.element_ty).to(tl.float32)
    rotates = (head < NQ + NKV)[:, None]
    out = tl.where(rotates, turned * c - turned_second * s, first).to(qkv.dtype.element_ty)
    out_second = tl.where(rotates, turned_second * c + turned * s, second).to(qkv.dtype.element_ty)
    tl.store(at, out, mask=mask & rotates)
    tl.store(at + D // 2, out_second, mask=mask & rotates)
    if tl.program_id(1) * BLOCK_N + BLOCK_N > NQ:
        is_v = (head >= NQ + NKV)[:, None]
        k_mask = mask & (head >= NQ)[:, None] & rotates
        v_mask = mask & is_v
        inside = tl.where(is_v, head[:, None] - NQ - NKV, head[:, None] - NQ) * D + d[None, :]
        if HAS_ARENA:
            if place < 0:
                to = (-1 - place) * NKV * D + inside
                tl.store(k_arena + to, out, mask=k_mask)
                tl.store(k_arena + to + D // 2, out_second, mask=k_mask)
                tl.store(v_arena + to, out, mask=v_mask)
                tl.store(v_arena + to + D // 2, out_second, mask=v_mask)
        if place >= 0:
            to = place * NKV * D + inside
            tl.store(k_pool + to, out, mask=k_mask)
            tl.store(k_pool + to + D // 2, out_second, mask=k_mask)
            tl.store(v_pool + to, out, mask=v_mask)
            tl.store(v_pool + to + D // 2, out_second, mask=v_mask)


def _check(qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, pool: Store, arena: Store | None, places: torch.Tensor) -> None:
    tokens, heads, size = qkv.shape
    if positions.shape != (tokens,) or places.shape != (tokens,):
        raise ValueError(f"positions and places must be [T] = [{tokens}], got {tuple(positions.shape)} and {tuple(places.shape)}")
    if size % 2 or cos.shape[1] != size or cos.dtype != torch.float32:
        raise ValueError(f"cos and sin must be fp32 [positions, D] with the even head size D = {size}, got {tuple(cos.shape)} {cos.dtype}")
    for store in (pool, arena):
        for tensor in store or ():
            if tensor.shape[-1] != size or tensor.shape[-2] != pool[0].shape[-2] or not tensor.is_contiguous() or tensor.dtype != qkv.dtype:
                raise ValueError(
                    f"pool and arena must be contiguous [..., {pool[0].shape[-2]}, {size}] in {qkv.dtype}, "
                    f"got {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
                )
    if heads <= 2 * pool[0].shape[-2] or not qkv.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous [T, Nq + 2 Nkv, D], got {tuple(qkv.shape)} with Nkv = {pool[0].shape[-2]}, {qkv.stride()}"
        )


def place_qkv_(
    qkv: Float[torch.Tensor, "T N D"],
    positions: Int64[torch.Tensor, " T"],
    cos: Float[torch.Tensor, "L D"],
    sin: Float[torch.Tensor, "L D"],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    pool: Store,
    arena: Store | None,
    places: Int64[torch.Tensor, " T"],
) -> None:
    """Norm and rotate the q and k heads of qkv [T, Nq + 2 Nkv, D] in place, and copy keys and values to their places.

    `norms` are the weights [D] of the q and k head norms, or None. `arena` may be None where no place is negative. Places must be distinct
    among rows that anybody reads. No gradients. Raises ValueError where shapes, strides or dtypes do not fit.
    """
    _check(qkv, positions, cos, pool, arena, places)
    if not uses_triton(qkv):
        count("place_qkv", "reference", qkv.device.type)
        place_qkv_reference(qkv, positions, cos, sin, norms, eps, pool, arena, places)
        return
    count("place_qkv", "triton", qkv.device.type)
    tokens, heads, size = qkv.shape
    if not tokens:
        return
    kv_heads = pool[0].shape[-2]
    block = min(triton.next_power_of_2(heads), 8)
    place_qkv_kernel[(tokens, triton.cdiv(heads, block))](
        qkv,
        positions,
        cos,
        sin,
        *(norms or (qkv, qkv)),
        *pool,
        *(arena or pool),
        places,
        eps,
        heads - 2 * kv_heads,
        kv_heads,
        D=size,
        HAS_NORM=norms is not None,
        HAS_ARENA=arena is not None,
        BLOCK_N=block,
        BLOCK_HALF=triton.next_power_of_2(size // 2),
        num_warps=2,
        **overlapped(qkv.device),
    )
