"""Losses, gradients and whole training runs against PEFT + autograd, fp32, with decodes in the same batches and cuts everywhere."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.runtime.references import (
    SMALL,
    job,
    make_adapter,
    make_base,
    random_mix,
    record_hidden,
    reference,
    reference_logits,
    request,
    rows_of,
    shake,
)
from workbench.config import LINEARS, FinetuneJob
from workbench.runtime.adapters import save_peft
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine
from workbench.runtime.finetune import learning_rate_factor


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", "qwen3")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {"other": make_adapter(folder / "other", base, rank=5, seed=3)}


def peft_copy(base, engine, adapter, folder):
    """The job's weights as they are now, in a trainable PEFT model over a separate base."""
    save_peft(engine.jobs[adapter].weights, folder, "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def lora_parameters(model) -> dict[tuple[int, str], tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    named = dict(model.named_parameters())
    found = {}
    for name, a in named.items():
        if "lora_A" in name:
            parts = name.split(".")
            found[int(parts[parts.index("layers") + 1]), parts[parts.index("lora_A") - 1]] = (a, named[name.replace("lora_A", "lora_B")])
    return found


def window_loss(model, prepared, indices) -> torch.Tensor:
    """Sum of the labelled tokens' losses over micro-batches, divided by their number."""
    total, count = torch.zeros(()), 0
    for index in indices:
        for document in prepared.documents(index):
            logits = model(torch.tensor([document.token_ids])).logits[0]
            rows = [i for i, label in enumerate(document.labels) if label is not None]
            labels = torch.tensor([document.labels[i] for i in rows])
            total = total + torch.nn.functional.cross_entropy(logits[rows], labels, reduction="sum")
            count += len(rows)
    return total / count


def run_until(driver, draw, jobs, requests, done) -> None:
    for _ in range(400):
        if done():
            return
        random_mix(driver, draw, requests, jobs)
        if driver._segments or driver._backwards:
            driver.step()
    raise AssertionError("the job did not get there in 400 steps")


def gradients_beside_peft(base, adapters, folder, seed, options, device="cpu", activations="keep") -> float:
    """The largest relative error of any LoRA gradient after two micro-batches of a window of three, cut at random, beside decodes."""
    config = replace(SMALL, activations=activations)
    engine = Engine.from_pretrained(base, adapters=adapters, device=device, dtype=torch.float32, config=config)
    j = job("mine", seed=seed, accumulation=3, max_grad_norm=None, **options)
    with Driver(engine, [j], seed=seed) as driver:
        shake(engine, j.id)
        model = peft_copy(base, engine, "mine", folder / "peft")
        state = engine._states[j.id]
        for i, name in enumerate((None, "other")):
            driver.add(request(f"r{i}", 12, name))
        run_until(driver, random.Random(seed), [j.id], ["r0", "r1"], lambda: driver.jobs[j.id].index == 2)
        labelled = [state.prepared.micro_batch(i).labelled for i in range(3)]
        loss = window_loss(model, state.prepared, [0, 1]) * (labelled[0] + labelled[1]) / sum(labelled)
        loss.backward()
        parameters = lora_parameters(model)
        assert set(parameters) == set(state.master)
        errors = []
        for key, pair in parameters.items():
            for found, parameter in zip(state.accumulated[state.index_of(key) : state.index_of(key) + 2], pair, strict=True):
                errors.append(float((found.cpu() - parameter.grad).abs().max() / parameter.grad.abs().max()))
    assert engine.adapters["mine"].version == 1, "weights are not published inside a window"
    return max(errors)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options", [{}, {"targets": ("q_proj", "o_proj", "up_proj"), "rank": 3, "use_rslora": True}, {"pack": True, "max_tokens": 50}]
)
def test_gradients_equal_peft_with_forward_and_backward_cut_anywhere_beside_decodes(base, adapters, tmp_path, seed, options):
    assert gradients_beside_peft(base, adapters, tmp_path, seed, options) <= 1e-4


def test_gradients_equal_peft_where_layers_are_recomputed_instead_of_kept(base, adapters, tmp_path):
    assert gradients_beside_peft(base, adapters, tmp_path, 0, {}, activations="recompute") <= 1e-4


def test_reported_losses_equal_peft(base, adapters, tmp_path):
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    j = job("mine", evaluation=rows_of(30, 3, 4), evaluate_every=1)
    with Driver(engine, [j]) as driver:
        shake(engine, j.id)
        model = peft_copy(base, engine, "mine", tmp_path / "peft")
        prepared = engine._states[j.id].prepared
        total, count = 0.0, 0
        driver.evaluate(j.id, 0)
        evaluated, labelled = driver.step().eval_losses[j.id]
        while not driver.finetune(j.id, 11):
            loss, n = driver.step().losses.get(j.id, (0.0, 0))
            total, count = total + loss, count + n
        loss, n = driver.step().losses[j.id]
        total, count = total + loss, count + n
        with torch.no_grad():
            assert total / count == pytest.approx(float(window_loss(model, prepared, [0])), rel=1e-4)
            held_out = SimpleNamespace(documents=prepared.evaluation_documents)
            assert evaluated / labelled == pytest.approx(float(window_loss(model, held_out, [0])), rel=1e-4)


def test_fifty_optimiser_steps_beside_serving_equal_peft_and_leave_other_adapters_alone(base, adapters, tmp_path):
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    j = job("mine", rows=12, length=12, steps=50, schedule="cosine", warmup_steps=5, weight_decay=0.01, publish="never", learning_rate=2e-3)
    draw = random.Random(0)
    probe = list(range(3, 40))
    hidden = record_hidden(engine)

    def probe_logits():
        with Driver(engine) as driver:
            driver.add(request("probe", len(probe), "other", prompt_token_ids=tuple(probe)))
            driver.prefill("probe")
            driver.step()
            return hidden[-1]

    before = probe_logits()
    with Driver(engine, [j]) as driver:
        shake(engine, j.id)
        start = {key: (b @ a).clone() for key, (a, b) in engine._states[j.id].master.items()}
        model = peft_copy(base, engine, "mine", tmp_path / "peft")
        parameters = lora_parameters(model)
        flat = [p for key in engine._states[j.id].master for p in parameters[key]]
        optimizer = torch.optim.AdamW(flat, lr=j.learning_rate, weight_decay=j.weight_decay)
        state = engine._states[j.id]
        driver.add(request("r0", 12, "other"))
        driver.add(request("r1", 7, None, output_tokens=150))
        for step in range(50):
            run_until(driver, draw, [j.id], ["r0", "r1"] if step < 40 else [], lambda step=step: state.optimizer_steps == step + 1)
            optimizer.zero_grad()
            window_loss(model, state.prepared, [2 * step, 2 * step + 1]).backward()
            torch.nn.utils.clip_grad_norm_(flat, j.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = j.learning_rate * learning_rate_factor(j, step, 50)
            optimizer.step()
        moved = torch.cat([((b @ a) - start[key]).flatten() for key, (a, b) in state.master.items()])
        expected = torch.cat([(parameters[key][1] @ parameters[key][0] - start[key]).flatten() for key in state.master]).detach()
    assert float((moved - expected).norm() / expected.norm()) <= 1e-3
    assert float(expected.norm()) > 0.1, "the run must move the weights for the comparison to mean something"
    assert torch.equal(before, probe_logits())


def test_gradients_are_zeroed_between_optimiser_steps(base, adapters):
    engine = Engine.from_pretrained(base, device="cpu", config=SMALL)
    j = job("mine")
    with Driver(engine, [j]) as driver:
        state = engine._states[j.id]
        run_until(driver, random.Random(1), [j.id], [], lambda: state.optimizer_steps == 1)
        assert all(not g.any() for g in state.accumulated) and not state.pending


@pytest.mark.parametrize("schedule, expected", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules_warm_up_and_decay(schedule, expected):
    j = FinetuneJob(adapter="a", data=[[1, 2]], steps=20, warmup_steps=4, schedule=schedule)
    assert [learning_rate_factor(j, s, 20) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate_factor(j, 12, 20) == pytest.approx(expected)


def test_dropout_is_the_same_whatever_the_schedule(base):
    found = []
    for seed in (0, 1):
        engine = Engine.from_pretrained(base, device="cpu", config=SMALL)
        j = job("mine", dropout=0.3, accumulation=4)
        draw = random.Random(seed)
        with Driver(engine, [j]) as driver:
            shake(engine, j.id)
            driver.add(request("r0", 12, None))
            losses = []
            while driver.jobs[j.id].index < 2:
                random_mix(driver, draw, ["r0"], [j.id])
                if driver._segments or driver._backwards:
                    losses += driver.step().losses.values()
            state = engine._states[j.id]
            found.append((sum(loss for loss, _ in losses), [g.clone() for g in state.accumulated]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    engine = Engine.from_pretrained(base, device="cpu", config=SMALL)
    j = job("mine", dropout=0.0, accumulation=4)
    with Driver(engine, [j]) as driver:
        shake(engine, j.id)
        driver.finetune(j.id)
        without = driver.step().losses[j.id]
    assert without[0] != pytest.approx(found[0][0] / 2, rel=1e-3), "dropout must change the loss"


def test_trained_adapter_is_published_without_disk_and_saved_adapter_loads_in_peft_with_equal_logits(base, adapters, tmp_path):
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    j = job("mine", steps=3, learning_rate=0.05, use_rslora=True, targets=LINEARS[:5])
    with Driver(engine, [j]) as driver:
        published = {}
        while driver.jobs[j.id].index < driver.shapes[j.id].num_micro_batches:
            random_mix(driver, random.Random(2), [], [j.id])
            published |= driver.step().published
        assert published == {"mine": 2} and engine.adapters["mine"].version == 2
    engine.save_adapter("mine", tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    tokens = list(range(3, 30))
    expected = reference_logits(base, tmp_path / "saved", tokens)
    with Driver(engine) as driver:
        driver.add(request("r", len(tokens), "mine", prompt_token_ids=tuple(tokens)))
        driver.prefill("r")
        token = driver.step().tokens["r"]
    assert token == int(expected[-1].argmax())
    assert float((expected - reference_logits(base, None, tokens)).abs().max()) > 0.05, "training must have moved the logits"
    found = engine.view("mine")(torch.tensor([tokens])).logits[0].detach()
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    reference.cache_clear()
