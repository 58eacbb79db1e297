"""Seeded problems with their errors against a float64 reference, for one device: shared by CPU tests, GPU tests and the bench.

Every function returns {what: max |a - b| / max |b|}; buffers that an op allocates are poisoned with NaN meanwhile.
"""

from collections.abc import Sequence

import torch

from kernels.keep import keep_rows_
from kernels.layout import SegmentLayout
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.lora_tail import LoraTails, placed_tail, tail_linear, tail_linear_reference, weight_with_tail, with_tail
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.qkv import place_qkv_, place_qkv_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm_backward, rms_norm_backward_reference
from kernels.segmented_lora import lora_gradients, lora_gradients_reference, segmented_lora_, segmented_lora_reference, shrink
from kernels.swiglu import lora_swiglu, swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference
from kernels.testing import poisoned_memory, random_table, random_tensor, relative_error, widened
from kernels.varlen_attention import varlen_attention, varlen_attention_reference

Errors = dict[str, float]


def bounds(lengths: Sequence[int], device: str) -> torch.Tensor:
    """cu_seqlens [N+1] int32 of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32).to(device)


def lora_errors(
    row_slots: Sequence[tuple[int | None, int]],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
    *,
    in_features: int = 96,
    out_features: Sequence[int] = (80, 48),
    block_rows: int | None = None,
    seed: int = 0,
) -> Errors:
    """segmented_lora_ and lora_gradients on `row_slots` with ranks[slice][slot] (0: none): y, dx, and the worst dA and dB."""
    table = random_table(in_features, out_features, ranks, dtype, device, seed)
    layout = SegmentLayout.build(row_slots, device, block_rows=block_rows)
    rows, columns = layout.num_rows, sum(out_features)
    x = random_tensor((rows, in_features), seed + 1, dtype, device)
    y = random_tensor((rows, columns), seed + 2, dtype, device)
    dy = random_tensor((rows, columns), seed + 3, dtype, device)
    with poisoned_memory():
        out = segmented_lora_(y.clone(), x, table, layout)
        dx, gradients = lora_gradients(dy, x, table, layout)
        added, _ = lora_gradients(dy, x, table, layout, into=x.clone())

    wide, cpu_layout = widened(table), SegmentLayout.build(row_slots, "cpu")
    expected = segmented_lora_reference(y.double().cpu(), x.double().cpu(), wide, cpu_layout)
    expected_dx, expected_gradients = lora_gradients_reference(dy.double().cpu(), x.double().cpu(), wide, cpu_layout, True)
    assert dx is not None
    assert expected_dx is not None
    assert gradients.keys() == expected_gradients.keys(), (gradients.keys(), expected_gradients.keys())
    errors = {"y": relative_error(out, expected), "dx": relative_error(dx, expected_dx), "da": 0.0, "db": 0.0}
    errors["dx added"] = relative_error(added, expected_dx + x.double().cpu()) if added is not None else float("inf")
    for key, (da, db) in gradients.items():
        errors["da"] = max(errors["da"], relative_error(da, expected_gradients[key][0]))
        errors["db"] = max(errors["db"], relative_error(db, expected_gradients[key][1]))
    untouched = torch.ones(rows, dtype=torch.bool)
    for _, first, count in layout.runs:
        untouched[first : first + count] = False
    assert torch.equal(out.cpu()[untouched], y.cpu()[untouched]), "a row without an adapter changed"
    return errors


def gated_errors(
    row_slots: Sequence[tuple[int | None, int]],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
    *,
    in_features: int = 96,
    width: int = 80,
    block_rows: int | None = None,
    seed: int = 0,
) -> Errors:
    """lora_swiglu with half of the rows kept: its output, the kept rows, and how far both are from the ops one after another."""
    table = random_table(in_features, (width, width), ranks, dtype, device, seed)
    layout = SegmentLayout.build(row_slots, device, block_rows=block_rows)
    rows = layout.num_rows
    x = random_tensor((rows, in_features), seed + 1, dtype, device)
    gate_up = random_tensor((rows, 2 * width), seed + 2, dtype, device)
    places = torch.where(torch.arange(rows) % 2 == 0, ~torch.arange(rows), torch.arange(rows)).to(device)
    low = shrink(x, table, layout)
    assert low is not None
    with poisoned_memory():
        kept, apart_kept = (torch.zeros_like(gate_up) for _ in range(2))
        out = lora_swiglu(gate_up.clone(), low, table, layout, kept, places)
        without = lora_swiglu(gate_up.clone(), low, table, layout)
        apart = segmented_lora_(gate_up.clone(), x, table, layout)
        keep_rows_(apart_kept, apart, places)
    total = segmented_lora_reference(gate_up.double().cpu(), x.double().cpu(), widened(table), SegmentLayout.build(row_slots, "cpu"))
    expected_kept = torch.where((torch.arange(rows) % 2 == 0)[:, None], total, 0)
    return {
        "a": relative_error(out, swiglu_reference(total)),
        "kept": relative_error(kept, expected_kept),
        "a beside the separate ops": relative_error(out, swiglu(apart)),
        "kept beside the separate ops": relative_error(kept, apart_kept),
        "a without keeping": relative_error(without, out),
    }


def tail_errors(
    row_slots: Sequence[tuple[int | None, int]],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
    *,
    columns: int = 64,
    in_features: int = 96,
    out_features: Sequence[int] = (80, 48),
    block_rows: int | None = None,
    before: Sequence[tuple[int | None, int]] = (),
    seed: int = 0,
) -> Errors:
    """tail_linear with `columns` behind the rows of the weight: its output, that of a second table filled in the same launch, and which
    share of the slots had a place. `before`: rows of a step that filled the tails earlier with a choice of its own.
    """
    tables = [random_table(in_features, out_features, ranks, dtype, device, seed + i) for i in range(2)]
    entries = torch.cat([table.entries for table in tables])
    layout = SegmentLayout.build(row_slots, device, block_rows=block_rows)
    biases = [random_tensor((sum(out_features),), seed + 8, dtype, device), None]
    weights, xs = [], []
    for i in range(2):
        weight = random_tensor((sum(out_features), in_features), seed + 2 + i, dtype, device, std=in_features**-0.5)
        weights.append(weight_with_tail(weight, columns))
        with poisoned_memory():
            xs.append(with_tail(layout.num_rows, in_features, columns, weights[i]))
        xs[i].copy_(random_tensor((layout.num_rows, in_features), seed + 4 + i, dtype, device))
    tails = LoraTails(tables, weights, entries)

    def choice(slots: Sequence[tuple[int | None, int]]) -> torch.Tensor:
        rows = {slot: sum(n for s, n in slots if s == slot) for slot, _ in slots if slot is not None}
        return torch.from_numpy(tails.choose(rows, lambda kind, slot: max(of_slice[slot] for of_slice in ranks))).to(device)

    if before:
        tails.fill_(choice(before))
    chosen = choice(row_slots)
    slots = [slot for slot, _ in row_slots if slot is not None]
    is_complete = bool((chosen[0, slots, 0] >= 0).all())
    tails.fill_(chosen)
    errors: Errors = {}
    for i, (table, weight, x, bias) in enumerate(zip(tables, weights, xs, biases, strict=True)):
        tail = tails.of(i, chosen, is_complete=is_complete)
        assert tail is not None
        with poisoned_memory():
            y = tail_linear(x, weight, bias, table, layout, tail)
        of_cpu = [None if t is None else t.double().cpu() for t in (x, weight, bias)]
        assert of_cpu[0] is not None and of_cpu[1] is not None
        expected = tail_linear_reference(of_cpu[0], of_cpu[1], of_cpu[2], widened(table), SegmentLayout.build(row_slots, "cpu"))
        errors[f"y{i}"] = relative_error(y, expected)
    return errors


def spoiled_tail(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """y of 9 rows of an adapter with one infinite weight and 20 of another, both in the tail; and y without the infinite weight."""
    found = []
    for value in (float("inf"), 1.0):
        table = random_table(48, (64,), [[8, 8]], dtype, device)
        table.weights[0, 0].b[5, 3] = value
        layout = SegmentLayout.build([(0, 9), (1, 20)], device)
        weight = weight_with_tail(random_tensor((64, 48), 1, dtype, device), 64)
        x = with_tail(29, 48, 64, weight).copy_(random_tensor((29, 48), 2, dtype, device))
        tail = placed_tail(table, weight, layout)
        found.append(tail_linear(x, weight, None, table, layout, tail))
    return found[0], found[1]


def paged_attention_errors(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    block_tokens: int = 16,
    around: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> Errors:
    """paged_attention with shuffled blocks, NaN in every KV slot that holds no token, and q a slice of a wider buffer.

    `around`: so many rows of nobody's lie before and behind the sequences'; their output must stay as it was ("others").
    """
    num_heads, kv_heads = heads
    before, behind = around
    tokens, per_sequence = before + sum(query_lens) + behind, max(1, -(-max(context_lens, default=0) // block_tokens))
    num_blocks = max(len(context_lens), 1) * per_sequence
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(num_blocks, generator=generator)[: len(context_lens) * per_sequence].view(-1, per_sequence)
    shape = (num_blocks * block_tokens, kv_heads, head_size)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    for i, context in enumerate(context_lens):
        slots = (tables[i].repeat_interleave(block_tokens) * block_tokens + torch.arange(block_tokens).repeat(per_sequence))[:context]
        for c, cache in enumerate(caches):
            cache[slots] = random_tensor((context, kv_heads, head_size), seed + 7 * i + c, dtype)
    k_cache, v_cache = (cache.view(num_blocks, block_tokens, kv_heads, head_size) for cache in caches)
    q = random_tensor((tokens, num_heads + 2 * kv_heads, head_size), seed + 1, dtype)[:, :num_heads]
    scale, cu = head_size**-0.5, bounds(query_lens, "cpu") + before
    contexts, tables = torch.tensor(context_lens, dtype=torch.int32), tables.to(torch.int32)
    with poisoned_memory():
        out = paged_attention(
            random_tensor((tokens, num_heads + 2 * kv_heads, head_size), seed + 1, dtype, device)[:, :num_heads],
            *(t.to(device) for t in (k_cache, v_cache, tables, cu, contexts)),
            max(query_lens, default=0),
            max(context_lens, default=0),
            scale,
            torch.full((tokens, num_heads, head_size), 7.0, dtype=dtype, device=device) if before or behind else None,
        )
    expected = paged_attention_reference(q.double(), k_cache.double(), v_cache.double(), tables, cu, contexts, scale)
    mine = slice(before, tokens - behind)
    others = torch.cat([out[:before], out[tokens - behind :]])
    return {"out": relative_error(out[mine], expected[mine]), "others": float((others != 7.0).any())}


def varlen_attention_errors(
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    seed: int = 0,
) -> Errors:
    """varlen_attention forward and its three gradients.

    A document of one token has one weight of 1, so its dq and dk are exactly 0: errors count against at least 1 % of the largest incoming
    gradient, not against 0.
    """
    shapes = ((sum(query_lens), heads[0]), (sum(key_lens), heads[1]), (sum(key_lens), heads[1]), (sum(query_lens), heads[0]))
    q, k, v, grad = (random_tensor((*shape, head_size), seed + i, dtype) for i, shape in enumerate(shapes))
    scale, cu_q, cu_k = head_size**-0.5, bounds(query_lens, "cpu"), bounds(key_lens, "cpu")
    ours = [t.to(device).detach().requires_grad_() for t in (q, k, v)]
    out = varlen_attention(*ours, cu_q.to(device), cu_k.to(device), max(query_lens, default=0), max(key_lens, default=0), scale)
    out.backward(grad.to(device))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = varlen_attention_reference(*wide, cu_q, cu_k, scale)
    expected.backward(grad.double())
    names = ("dq", "dk", "dv")
    floor = 1e-2 * grad.double().abs().max() if grad.numel() else 1.0
    errors = {
        name: relative_error(a.grad, b.grad, floor=float(floor))  # type: ignore[arg-type]
        for name, a, b in zip(names, ours, wide, strict=True)
    }
    return {"out": relative_error(out, expected), **errors}


def scattered_attention_errors(
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    seed: int = 0,
) -> Errors:
    """varlen_attention whose documents' keys lie somewhere in a buffer, the last one first, NaN between, and rows of nobody's."""
    starts, rows = [0] * len(key_lens), 5
    for i in reversed(range(len(key_lens))):
        starts[i], rows = rows, rows + key_lens[i] + 3
    q = random_tensor((sum(query_lens) + 4, heads[0], head_size), seed, dtype)
    k, v = (random_tensor((sum(key_lens), heads[1], head_size), seed + i, dtype) for i in (1, 2))
    caches = [torch.full((rows, heads[1], head_size), float("nan"), dtype=dtype) for _ in range(2)]
    for cache, packed in zip(caches, (k, v), strict=True):
        for start, part in zip(starts, packed.split(list(key_lens)), strict=True):
            cache[start : start + len(part)] = part
    scale, cu_q, cu_k = head_size**-0.5, bounds(query_lens, "cpu"), bounds(key_lens, "cpu")
    places, lengths = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([*starts, 0], key_lens))
    sizes = (max(query_lens, default=0), max(key_lens, default=0))
    tensors = (t.to(device) for t in (q, *caches, cu_q))
    with poisoned_memory():
        out = varlen_attention(*tensors, places, *sizes, scale, key_lens=lengths)
    expected = varlen_attention_reference(*(t.double() for t in (q, k, v)), cu_q, cu_k, scale)
    return {"out": relative_error(out[: sum(query_lens)], expected[: sum(query_lens)])}


def cross_entropy_errors(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str, *, scale: float = 0.25, seed: int = 0
) -> Errors:
    """linear_cross_entropy: loss and gradient."""
    hidden = random_tensor((rows, hidden_size), seed, dtype)
    weight = random_tensor((vocab_size, hidden_size), seed + 1, dtype, std=2 * hidden_size**-0.5)
    labels = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(seed))
    with poisoned_memory():
        loss, grad = linear_cross_entropy(hidden.to(device), weight.to(device), labels.to(device), scale, True)
    expected_loss, expected_grad = linear_cross_entropy_reference(hidden.double(), weight.double(), labels, scale, True)
    assert grad is not None
    assert expected_grad is not None
    return {"loss": relative_error(loss, expected_loss), "grad": relative_error(grad, expected_grad)}


def layer_errors(tokens: int, heads: tuple[int, int], head_size: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> Errors:
    """The ops around the linears of one layer: norms with and without a residual, SwiGLU, their gradients, head placement, kept rows."""
    (num_heads, kv_heads), width = heads, heads[0] * head_size
    x, delta, dh, above = (random_tensor((tokens, width), seed + i, dtype, device) for i in range(4))
    weight, eps = random_tensor((width,), seed + 4, dtype, device), 1e-5
    wide = [t.double().cpu() for t in (x, delta, dh, above, weight)]
    with poisoned_memory():
        found = [*add_rms_norm(x, delta, weight, eps), add_rms_norm(x, None, weight, eps)[1], rms_norm_backward(dh, x, weight, eps)]
        found += [
            rms_norm_backward(dh, x, weight, eps, above),
            swiglu(torch.cat((x, delta), 1)),
            swiglu_backward(dh, torch.cat((x, delta), 1)),
        ]
    rounded = (x + delta).double().cpu()
    expected = [rounded, add_rms_norm_reference(rounded, None, wide[4], eps)[1], add_rms_norm_reference(wide[0], None, wide[4], eps)[1]]
    expected += [rms_norm_backward_reference(wide[2], wide[0], wide[4], eps, a) for a in (None, wide[3])]
    expected += [swiglu_reference(torch.cat(wide[:2], 1)), swiglu_backward_reference(wide[2], torch.cat(wide[:2], 1))]
    names = ("sum", "norm of sum", "norm", "norm backward", "norm backward, above", "swiglu", "swiglu backward")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    return errors | _placement_errors(tokens, num_heads, kv_heads, head_size, dtype, device, seed)


def _placement_errors(tokens: int, num_heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: str, seed: int) -> Errors:
    """place_qkv_ (with and without head norms) and keep_rows_: every buffer whole, so that a row in the wrong place shows."""
    generator, errors = torch.Generator().manual_seed(seed), {}
    slots = torch.randperm(2 * tokens, generator=generator)[:tokens]
    places = torch.where(torch.rand(tokens, generator=generator) < 0.4, ~slots, slots)
    positions = torch.randint(50, (tokens,), generator=generator)
    qkv = random_tensor((tokens, num_heads + 2 * kv_heads, size), seed + 5, dtype, device)
    angles = [random_tensor((50, size // 2), seed + 6 + i, torch.float32, device).repeat(1, 2) for i in range(2)]
    weights = [random_tensor((size,), seed + 8 + i, dtype, device) for i in range(2)]
    for norms in (None, (weights[0], weights[1])):
        ours = [qkv.clone(), *(torch.zeros(2 * tokens, kv_heads, size, dtype=dtype, device=device) for _ in range(4))]
        wide = [t.double().cpu() for t in ours]
        places_there, positions_there = places.to(device), positions.to(device)
        place_qkv_(ours[0], positions_there, *angles, norms, 1e-6, (ours[1], ours[2]), (ours[3], ours[4]), places_there)
        wide_norms = None if norms is None else (weights[0].double().cpu(), weights[1].double().cpu())
        cos, sin = (a.double().cpu() for a in angles)
        place_qkv_reference(wide[0], positions, cos, sin, wide_norms, 1e-6, (wide[1], wide[2]), (wide[3], wide[4]), places)
        for name, a, b in zip(("q", "pool k", "pool v", "arena k", "arena v"), ours, wide, strict=True):
            errors[f"{name}, {'no ' if norms is None else ''}norms"] = relative_error(a, b)
    kept, rows = torch.zeros(2 * tokens, size, dtype=dtype, device=device), qkv[:, 0].contiguous()
    keep_rows_(kept, rows, places.to(device))
    expected = torch.zeros(2 * tokens, size, dtype=torch.float64)
    expected[~places[places < 0]] = rows.double().cpu()[places < 0]
    return errors | {"kept rows": relative_error(kept, expected)}
