"""The checks before the numbers: served tokens and training gradients of this very engine against transformers + PEFT on its weights.

Both give {what: (error, tolerance)}. In bf16 the two sides round differently in every layer: over 30 layers the served tokens were seen
to differ by 0.004 and gradients by 0.06, so its tolerances are wide; a wrong adapter, row, mask or scale is off by about 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.bench.session import Session
from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.policies import FCFS
from workbench.replay import replay
from workbench.seeds import generator

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

Errors = dict[str, tuple[float, float]]
CHECK_OUTPUT_TOKENS = 5
LOUD_STD = 0.06  # adapters that change the logits about as much as the base makes them
GRADIENT_JOB = "bench-gradients"


def serving_errors(session: Session) -> Errors:
    """Greedy tokens of mixed requests (base alone, r8, r16; fresh random prompts) through the replay, prefill and decodes.

    The error is how far the reference's logit of a served token lies under its best one, over the largest logit.
    """
    engine, sizes = session.engine, session.sizes
    draw = generator("bench prompts", session.seed)
    vocab = engine.fused.dims.vocab_size
    with session.adapters((8, 16), LOUD_STD) as names, engine.uncalibrated():
        requests = [
            Request(
                request_id=f"check-{i}",
                arrival_s=0.0,
                prompt_tokens=sizes.check_tokens,
                output_tokens=CHECK_OUTPUT_TOKENS,
                prompt_token_ids=tuple(int(t) for t in draw.integers(0, vocab, sizes.check_tokens)),
                adapter=(None, *names)[i % 3],
            )
            for i in range(sizes.check_requests)
        ]
        outputs = replay(requests, executor=engine, policy=FCFS(), progress=False).outputs
        errors = []
        for name in (None, *names):
            rows = [r for r in requests if r.adapter == name]
            errors.append(_worst_regret(engine, name, [(*(r.prompt_token_ids or ()), *outputs[r.request_id]) for r in rows]))
    return {"served tokens under the reference's best logit": (max(errors), 1e-3 if _is_fp32(engine) else 5e-2)}


def _worst_regret(engine: "Engine", adapter: str | None, sequences: Sequence[tuple[int, ...]]) -> float:
    """Over the last tokens of sequences of one length: (best logit - the token's logit) / largest logit, by transformers."""
    import torch

    ids = torch.tensor(sequences, device=engine.device)
    with torch.no_grad():
        logits: Any = engine.view(adapter)(input_ids=ids).logits[:, -CHECK_OUTPUT_TOKENS - 1 : -1].float()
    chosen = logits.gather(-1, ids[:, -CHECK_OUTPUT_TOKENS:, None])[..., 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


def gradient_errors(session: Session) -> Errors:
    """Loss and LoRA gradients of one micro-batch (after a first optimiser step, so that neither A's nor B's vanish) against autograd.

    The gradients of the last layer are compared, each as |a - b| / |b| in the Euclidean norm.
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
            loss, expected = _reference_gradients(engine, job, prepared, index=2)
            worst = max(_distance(found[key][i].float(), pair[i].float()) for key, pair in expected.items() for i in (0, 1))
    finally:
        engine.unload_adapter(job.adapter)
    fp32 = _is_fp32(engine)
    return {
        "loss of a micro-batch": (abs(total / count - loss) / abs(loss), 1e-4 if fp32 else 1e-2),
        "LoRA gradients of the last layer": (worst, 1e-3 if fp32 else 0.15),
    }


def _reference_gradients(engine: "Engine", job: FinetuneJob, prepared: Any, index: int) -> tuple[float, dict[Any, Any]]:
    """(mean loss, {(layer, target): (dA, dB)} of the last layer) of a micro-batch, by autograd through a PEFT view of the base."""
    import torch
    import torch.nn.functional as F

    view = engine.view(job.adapter)
    last = engine.fused.dims.num_layers - 1
    parameters = {name: p for name, p in view.named_parameters() if f".layers.{last}." in name and "lora_" in name}
    for p in parameters.values():
        p.requires_grad_(True)
    total, count = torch.zeros((), device=engine.device), 0
    for document in prepared.documents(index):
        logits = view(input_ids=torch.tensor([document.token_ids], device=engine.device)).logits[0].float()
        rows = [i for i, label in enumerate(document.labels) if label is not None]
        labels = torch.tensor([document.labels[i] for i in rows], device=engine.device)
        total, count = total + F.cross_entropy(logits[rows], labels, reduction="sum"), count + len(rows)
    scaled = total / prepared.micro_batch(index).window_labelled
    gradients = dict(zip(parameters, torch.autograd.grad(scaled, list(parameters.values())), strict=True))
    pairs = {}
    for name in (n for n in gradients if ".lora_A." in n):
        target = name.split(".lora_A.")[0].rsplit(".", 1)[-1]
        pairs[last, target] = (gradients[name], gradients[name.replace(".lora_A.", ".lora_B.")])
    return float(total.detach()) / count, pairs


def _distance(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


def _is_fp32(engine: "Engine") -> bool:
    return engine.dtype.itemsize == 4
