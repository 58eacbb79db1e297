"""The checks before the numbers: logits and training gradients of this very engine, against fp32 arithmetic on the same weights.

Both give {what: (error, tolerance)}. An fp32 engine must equal the fp32 arithmetic. In bf16 rounding adds up over the
layers, so the error is held against the one that transformers + PEFT makes in bf16 on the same rows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.bench.session import Session
from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.seeds import generator

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

Errors = dict[str, tuple[float, float]]
CHECK_OUTPUT_TOKENS = 5
LOUD_STD = 0.04  # adapters that change the logits clearly
TIMES_THEIRS = 1.5  # of transformers' own bf16 error
GRADIENT_JOB = "bench-gradients"


def serving_errors(session: Session) -> Errors:
    """Logits of mixed requests (base alone, r8, r16; fresh random prompts) at the end of their prefill and of every decode."""
    import torch

    from workbench.runtime.driver import Driver

    engine, sizes = session.engine, session.sizes
    draw = generator("bench prompts", session.seed)
    vocab = engine.fused.dims.vocab_size
    with session.adapters((8, 16), LOUD_STD) as names, Driver(engine, seed=session.seed) as driver:
        adapters, found = {}, {}
        for i in range(sizes.check_requests):
            ids = tuple(int(t) for t in draw.integers(0, vocab, sizes.check_tokens))
            adapters[f"check-{i}"], found[f"check-{i}"] = (None, *names)[i % 3], []
            request = Request(
                request_id=f"check-{i}",
                arrival_s=0.0,
                prompt_tokens=len(ids),
                output_tokens=CHECK_OUTPUT_TOKENS,
                prompt_token_ids=ids,
                adapter=adapters[f"check-{i}"],
            )
            driver.add(request)
            driver.prefill(request.request_id)
        for _ in range(CHECK_OUTPUT_TOKENS):
            driver.step()
            for request_id, row in engine.last_logits.items():
                found[request_id].append(row.float().clone())
            driver.decode(list(driver.runs))
        sequences = {request_id: engine.tokens_of(request_id) for request_id in found}
        ours, theirs = [], []
        for name in (None, *names):
            owners = [r for r in found if adapters[r] == name]
            ids = torch.tensor([sequences[r] for r in owners], device=engine.device)
            rows = slice(sizes.check_tokens - 1, sizes.check_tokens - 1 + CHECK_OUTPUT_TOKENS)
            exact = exact_logits(engine, name, ids, rows)
            with torch.no_grad():
                view: Any = engine.view(name)
                their = view(input_ids=ids).logits[:, rows].float()
            ours.append(_distance(torch.stack([torch.stack(found[r]) for r in owners]), exact))
            theirs.append(_distance(their, exact))
    return _judged(engine, "logits", max(ours), max(theirs), 1e-4)


def _judged(engine: "Engine", what: str, ours: float, theirs: float, tolerance: float) -> Errors:
    """fp32: the errors themselves; bf16: ours over transformers' own, which must be small enough to say something."""
    if engine.dtype.itemsize == 4:
        return {f"{what} against fp32 arithmetic": (ours, tolerance), f"{what}, transformers + PEFT": (theirs, tolerance)}
    ratio = ours / theirs if theirs > 0 else float("inf")
    return {f"{what}: {ours:.3g} over transformers' own {theirs:.3g}": (ratio, TIMES_THEIRS), f"{what}, transformers + PEFT": (theirs, 0.5)}


def exact_logits(engine: "Engine", adapter: str | None, ids: Any, rows: slice) -> Any:
    """fp32 logits [N, rows, V] of token ids [N, T] under the base and one adapter, layer by layer in plain torch."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        hidden = exact_hidden(engine, {} if adapter is None else engine.adapter_weights(adapter), ids, engine.fused.dims.num_layers)
        return F.linear(_norm(hidden[:, rows], engine.fused.final_norm, engine), engine.fused.lm_head.float())


def exact_hidden(engine: "Engine", weights: Mapping[tuple[int, str], tuple[Any, Any, float]], ids: Any, num_layers: int) -> Any:
    """The residual stream [N, T, H] in fp32 behind the first `num_layers` layers. `weights`: {(layer, target): (A, B, scale)}."""
    x = engine.fused.embed[ids].float()
    for layer in range(num_layers):
        x = exact_layer(engine, weights, layer, x)
    return x


def exact_layer(engine: "Engine", weights: Mapping[tuple[int, str], tuple[Any, Any, float]], layer: int, x: Any) -> Any:
    """One decoder layer on x [N, T, H] in fp32, the formulas of the model's paper and nothing fused."""
    import torch
    import torch.nn.functional as F

    w, dims = engine.fused.layers[layer], engine.fused.dims
    cos, sin = (t[: x.shape[1]].to(x.device) for t in engine.fused.rope(x.shape[1]))

    def linear(h: Any, weight: Any, bias: Any, targets: tuple[str, ...]) -> Any:
        parts = [h.new_zeros(()) for _ in targets]
        for i, target in enumerate(targets):
            if (layer, target) in weights:
                a, b, scale = weights[layer, target]
                parts[i] = scale * F.linear(F.linear(h, a.to(h)), b.to(h))
        widths = [dims.linear(target)[1] for target in targets]
        y = F.linear(h, weight.float(), None if bias is None else bias.float())
        return torch.cat([part + lora for part, lora in zip(y.split(widths, -1), parts, strict=True)], -1)

    def rotate(t: Any) -> Any:
        half = t.shape[-1] // 2
        return t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin

    h = _norm(x, w.input_norm, engine)
    heads = linear(h, w.qkv, w.qkv_bias, ("q_proj", "k_proj", "v_proj")).view(*x.shape[:2], -1, dims.head_dim).transpose(1, 2)
    q, k, v = heads.split((dims.num_heads, dims.num_kv_heads, dims.num_kv_heads), 1)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = _norm(q, w.q_norm, engine), _norm(k, w.k_norm, engine)
    o = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    x = x + linear(o.transpose(1, 2).flatten(2), w.o, w.o_bias, ("o_proj",))
    gate, up = linear(_norm(x, w.post_norm, engine), w.gate_up, None, ("gate_proj", "up_proj")).chunk(2, -1)
    return x + linear(F.silu(gate) * up, w.down, None, ("down_proj",))


def _norm(x: Any, weight: Any, engine: "Engine") -> Any:
    import torch.nn.functional as F

    return F.rms_norm(x, (x.shape[-1],), weight.float(), engine.fused.dims.norm_eps)


def gradient_errors(session: Session) -> Errors:
    """LoRA gradients of one micro-batch (after a first optimiser step, so that neither A's nor B's vanish) of the last layer, and its loss.

    Gradients are compared as |a - b| / |b| in the Euclidean norm, all of the layer's together.
    """
    from workbench.runtime.driver import Driver

    engine, tokens = session.engine, 3 * session.sizes.check_tokens
    job = FinetuneJob(
        adapter=GRADIENT_JOB,
        data=RandomTokens(examples=8, tokens=tokens, seed=session.seed),
        batch_size=2,
        accumulation=2,
        steps=2,
        learning_rate=0.02,
        publish="step",
        max_tokens=tokens,
        max_grad_norm=None,
        seed=session.seed,
    )
    total, count = 0.0, 1
    try:
        with Driver(engine, [job], seed=session.seed) as driver:
            for _ in range(3):
                driver.finetune(job.id)
                total, count = driver.step().losses[job.id]
                driver.backward(job.id)
                driver.step()
            found = engine.jobs[job.adapter].gradients
            prepared: Any = driver.shapes[job.id]
            documents, labelled = prepared.documents(2), prepared.micro_batch(2).window_labelled
            loss, exact = _exact_gradients(engine, job.adapter, documents, labelled)
            theirs = _their_gradients(engine, job.adapter, documents, labelled)
            ours_error, their_error = (_distance(_flat(g, exact), _flat(exact, exact)) for g in (found, theirs))
    finally:
        engine.unload_adapter(job.adapter)
    errors = _judged(engine, "LoRA gradients of the last layer", ours_error, their_error, 1e-3)
    return errors | {"loss of a micro-batch": (abs(total / count - loss) / abs(loss), 1e-4 if engine.dtype.itemsize == 4 else 1e-2)}


def _flat(gradients: Mapping[Any, tuple[Any, Any]], like: Mapping[Any, tuple[Any, Any]]) -> Any:
    import torch

    return torch.cat([t.float().flatten() for key in like for t in gradients[key]])


def _loss(logits: Any, document: Any, device: Any) -> tuple[Any, int]:
    import torch
    import torch.nn.functional as F

    rows = [i for i, label in enumerate(document.labels) if label is not None]
    labels = torch.tensor([document.labels[i] for i in rows], device=device)
    return F.cross_entropy(logits[rows], labels, reduction="sum"), len(rows)


def _exact_gradients(engine: "Engine", adapter: str, documents: Any, labelled: int) -> tuple[float, dict[Any, tuple[Any, Any]]]:
    """(mean loss, {(layer, target): (dA, dB)} of the last layer) in fp32: autograd through the last layer alone."""
    import torch
    import torch.nn.functional as F

    weights, last = dict(engine.adapter_weights(adapter)), engine.fused.dims.num_layers - 1
    leaves = {}
    for key in [key for key in weights if key[0] == last]:
        a, b, scale = weights[key]
        leaves[key] = tuple(t.to(engine.device).float().detach().requires_grad_() for t in (a, b))
        weights[key] = (*leaves[key], scale)
    total, count = torch.zeros((), device=engine.device), 0
    for document in documents:
        with torch.no_grad():
            x = exact_hidden(engine, weights, torch.tensor([document.token_ids], device=engine.device), last)
        h = _norm(exact_layer(engine, weights, last, x), engine.fused.final_norm, engine)
        loss, rows = _loss(F.linear(h, engine.fused.lm_head.float())[0], document, engine.device)
        total, count = total + loss, count + rows
    flat = [t for pair in leaves.values() for t in pair]
    gradients = torch.autograd.grad(total / labelled, flat)
    return float(total.detach()) / count, {key: (gradients[2 * i], gradients[2 * i + 1]) for i, key in enumerate(leaves)}


def _their_gradients(engine: "Engine", adapter: str, documents: Any, labelled: int) -> dict[Any, tuple[Any, Any]]:
    """The same by autograd through a PEFT view of the base, in the engine's dtype."""
    import torch

    view: Any = engine.view(adapter)
    last = engine.fused.dims.num_layers - 1
    parameters = {name: p for name, p in view.named_parameters() if f".layers.{last}." in name and "lora_" in name}
    for p in parameters.values():
        p.requires_grad_(True)
    total = torch.zeros((), device=engine.device)
    for document in documents:
        logits = view(input_ids=torch.tensor([document.token_ids], device=engine.device)).logits[0].float()
        total = total + _loss(logits, document, engine.device)[0]
    gradients = dict(zip(parameters, torch.autograd.grad(total / labelled, list(parameters.values())), strict=True))
    pairs = {}
    for name in (n for n in gradients if ".lora_A." in n):
        target = name.split(".lora_A.")[0].rsplit(".", 1)[-1]
        pairs[last, target] = (gradients[name], gradients[name.replace(".lora_A.", ".lora_B.")])
    return pairs


def _distance(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())
