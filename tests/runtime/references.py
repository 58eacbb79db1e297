"""Tiny models of every family, adapters made by PEFT, and their logits and gradients by transformers + PEFT alone."""

import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from workbench.config import LINEARS, EngineConfig, FinetuneJob
from workbench.core import Request
from workbench.runtime.adapters import save_peft
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine

VOCAB = 128
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=24, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "smollm2": lambda: LlamaConfig(
        **(SIZES | dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=48)), tie_word_embeddings=True
    ),
}
SMALL = EngineConfig(max_model_len=192, num_blocks=64, block_tokens=16, num_slots=4, max_jobs=3, activation_tokens=512, warm_up=False)


def make_base(folder: Path, family: str, seed: int = 0) -> Path:
    """A directory with a tiny random model whose biases and norms are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, *, rank: int, targets=LINEARS, seed: int = 0, **options) -> Path:
    """A PEFT directory with random A and B."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=1.5 * rank, target_modules=list(targets), init_lora_weights=False, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def make_family(folder: Path, family: str) -> tuple[Path, Path, dict[str, Path]]:
    """A base and three adapters of different ranks and targets: (folder, base, {name: directory})."""
    base = make_base(folder / "base", family)
    adapters = {
        "all": make_adapter(folder / "all", base, rank=3, seed=1),
        "wide": make_adapter(folder / "wide", base, rank=17, targets=("q_proj", "down_proj"), seed=2, use_rslora=True),
        "mlp": make_adapter(folder / "mlp", base, rank=8, targets=("gate_proj", "up_proj", "down_proj"), seed=3),
    }
    return folder, base, adapters


@cache
def reference(base: Path, adapter: Path | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    return model.to(device, dtype)


@torch.no_grad()
def reference_logits(base: Path, adapter: Path | None, token_ids, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[T, V] in `dtype` of one sequence alone."""
    return reference(base, adapter, device, dtype)(torch.tensor([list(token_ids)], device=device)).logits[0]


def request(request_id: str, prompt_tokens: int, adapter: str | None, output_tokens: int = 64, **options) -> Request:
    return Request(
        request_id=request_id, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens, adapter=adapter, **options
    )


def rows_of(length: int, count: int, seed: int) -> list[list[int]]:
    """Token-id documents of ragged lengths up to `length`."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(max(2, length // 2), length))] for _ in range(count)]


def job(adapter: str, *, seed: int = 0, length: int = 24, rows: int = 8, **options) -> FinetuneJob:
    values = dict(rank=4, alpha=8.0, batch_size=2, accumulation=2, steps=4, learning_rate=5e-3, max_tokens=64, seed=seed)
    return FinetuneJob(adapter=adapter, data=rows_of(length, rows, seed), **(values | options))


def shake(engine: Engine, job_id: str, seed: int = 5) -> None:
    """Give a job's adapter a random B, so that its logits and gradients of A are not trivially those of the base."""
    state = engine._states[job_id]
    generator = torch.Generator().manual_seed(seed)
    for key, (_, b) in state.master.items():
        b.copy_(0.1 * torch.randn(b.shape, generator=generator))
        state.compute[key][1].copy_(b)


def record_hidden(engine: Engine) -> list[torch.Tensor]:
    """The last layer's output behind the final norm [T, H] of every forward from now on."""
    seen: list[torch.Tensor] = []
    forward = engine.runner.forward

    def recording(step, dropout):
        out = forward(step, dropout)
        seen.append(out.hidden.clone())
        return out

    engine.runner.forward = recording  # type: ignore[method-assign]
    return seen


def mixed_rows(engine: Engine, folder: Path, adapters: dict, jobs: list[FinetuneJob], seed: int, steps: int = 9):
    """Random mixes of all four kinds: yields (segment, its logits [t, V], the function that gives the reference's logits of these rows).

    The function takes (base, device, dtype) and runs transformers + PEFT on each sequence or document alone.
    """
    draw = random.Random(seed)
    hidden = record_hidden(engine)
    with Driver(engine, jobs, seed=seed) as driver:
        saved = {}
        for j in jobs:
            shake(engine, j.id)
            saved[j.id] = save_peft(engine.jobs[j.adapter].weights, folder / f"{j.adapter}-{seed}", "base")
        for i, name in enumerate([None, *adapters, None, next(iter(adapters))]):
            driver.add(request(f"r{i}", draw.randint(1, 45), name))
        for step in range(steps):
            if step == 0:
                driver.evaluate(jobs[0].id)
            random_mix(driver, draw, list(driver.runs), [j.id for j in jobs[step == 0 :]])
            driver._backwards.clear()  # weights change at the end of a window; here they stay
            if not driver._segments:
                continue
            driver.step()
            is_decode = all(s.kind == "decode" for s in driver.batch.segments)  # such a step may be one graph, which leaves logits alone
            logits = torch.stack(list(engine.last_logits.values())) if is_decode else F.linear(hidden[-1], engine.fused.lm_head)
            first = 0
            for segment in driver.batch.segments:
                found = logits[first : first + segment.tokens]
                first += segment.tokens
                if segment.kind in ("prefill", "decode"):
                    sequences = [engine._sequences[segment.owner].tokens[: segment.end]]
                    adapter = adapters.get(segment.adapter)
                else:
                    sequences, adapter = [d.token_ids for d in engine._documents(segment)], saved[segment.owner]

                def expected(base, device="cpu", dtype=torch.float32, *, sequences=sequences, adapter=adapter, segment=segment):
                    rows = torch.cat([reference_logits(base, adapter, tokens, device, dtype) for tokens in sequences])
                    return rows[segment.start : segment.end]

                yield segment, found, expected


def random_mix(driver: Driver, draw: random.Random, requests: list[str], jobs: list[str]) -> None:
    """Collect one step of random work of every kind that is possible now: cut prefills, decodes, cut forwards, cut backwards."""
    for request_id in requests:
        run = driver.runs[request_id]
        if run.length - run.cached > 1 or not run.is_known:
            if draw.random() < 0.7:
                driver.prefill(request_id, draw.randint(1, 20))
        elif run.length < SMALL.max_model_len and draw.random() < 0.8:
            driver.decode([request_id])
    for job_id in jobs:
        state = driver.jobs[job_id]
        if state.index >= driver.shapes[job_id].num_micro_batches:
            continue
        if state.layers_left:
            driver.backward(job_id, draw.randint(1, 2))
        elif state.offset == 0 and driver.shapes[job_id].evaluation() and draw.random() < 0.3:
            driver.evaluate(job_id)
        else:
            driver.finetune(job_id, draw.randint(1, 30))
