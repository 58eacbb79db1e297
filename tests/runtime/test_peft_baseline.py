"""The baseline is what it stands for: transformers and PEFT, static padded batches, an ordinary training loop."""

from functools import cache
from pathlib import Path

import pandas as pd
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from workbench.config import EngineConfig, FinetuneJob
from workbench.core import Executor, Request, Sampling
from workbench.policies import PeftSequential
from workbench.replay import replay
from workbench.runtime import peft_baseline
from workbench.runtime.adapters import init_adapter, load_peft, save_peft
from workbench.runtime.driver import Driver
from workbench.runtime.finetune import learning_rate_factor
from workbench.runtime.peft_baseline import PeftBaseline, padded
from workbench.runtime.weights import Dims, random_base
from workbench.traces import Trace

CONFIG = EngineConfig(max_model_len=128, max_batch_tokens=1024, activation_tokens=512)
ADAPTERS = {"one": {"rank": 4, "targets": ("q_proj", "v_proj")}, "two.b": {"rank": 9, "use_rslora": True}}
DOCUMENTS = [[5, 9, 17, 33, 65], [70, 71, 72], [8, 16, 24, 32, 40, 48, 56, 64, 72], [3, 5, 7, 11], [90, 80, 70, 60, 50, 40]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """A model whose logits spread enough for a clear greedy choice, and two adapters that act."""
    folder = tmp_path_factory.mktemp("model")
    base = random_base("tiny-qwen3", seed=1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    base.save_pretrained(folder)
    for i, (name, values) in enumerate(ADAPTERS.items()):
        save_peft(init_adapter(Dims.of(base.config), name, seed=i, b_std=0.5, **values), folder / "adapters" / name)
    return folder


@pytest.fixture
def baseline(model_path) -> PeftBaseline:
    return PeftBaseline.from_pretrained(model_path, {n: model_path / "adapters" / n for n in ADAPTERS}, device="cpu", config=CONFIG)


def request(name: str, length: int, adapter: str | None = None, **values) -> Request:
    generator = torch.Generator().manual_seed(length)
    ids = tuple(torch.randint(3, 128, (length,), generator=generator).tolist())
    values = {"output_tokens": None, "max_tokens": 20, "arrival_s": 0.0} | values
    return Request(request_id=name, prompt_tokens=length, adapter=adapter, prompt_token_ids=ids, **values)


@cache
def alone(model_path: Path, adapter: str | None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, model_path / "adapters" / adapter).eval()


def generated(model_path: Path, asked: Request, tokens: int) -> list[int]:
    """The same request alone, by transformers' own generate."""
    model = alone(model_path, asked.adapter)
    ids = torch.tensor([asked.prompt_token_ids])
    out = model.generate(input_ids=ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


class Recorder(Driver):
    """Collects what each request got."""

    def step(self):
        self.outputs = getattr(self, "outputs", {})
        result = super().step()
        for name, token in result.tokens.items():
            self.outputs.setdefault(name, []).append(token)
        return result


def test_it_is_an_executor_that_mixes_and_cuts_nothing(baseline):
    assert isinstance(baseline, Executor)
    assert baseline.info.can == frozenset()
    assert baseline.info.max_batch_adapters == 1
    assert baseline.adapter_infos["two.b"].rank == 9
    assert baseline.info.eos_token_ids == {2}


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_a_static_batch_gives_the_tokens_of_transformers_generate(baseline, model_path, adapter):
    driver = Recorder(baseline)
    asked = [request(f"r{n}", n, adapter) for n in (3, 11, 7)]
    for r in asked:
        driver.add(r)
        driver.prefill(r.request_id)
    driver.step()
    for _ in range(5):
        driver.decode([r.request_id for r in asked])
        driver.step()
    for r in asked:
        assert driver.outputs[r.request_id] == generated(model_path, r, 6)


def test_the_requests_of_these_tests_get_varied_tokens(model_path):
    outputs = [generated(model_path, request("r", 11, adapter), 6) for adapter in (None, *ADAPTERS)]
    assert len({tuple(o) for o in outputs}) == 3
    assert all(len(set(o)) >= 3 for o in outputs)


def test_adapters_and_the_base_take_turns_without_touching_one_another(baseline, model_path):
    driver = Recorder(baseline)
    asked = [request(f"r{i}", 4 + i, adapter) for i, adapter in enumerate([None, "one", "two.b", "one"])]
    for r in asked:
        driver.add(r)
        driver.prefill(r.request_id)
        driver.step()
    for _ in range(3):
        for r in asked:
            driver.decode([r.request_id])
            driver.step()
    for r in asked:
        assert driver.outputs[r.request_id] == generated(model_path, r, 4)


def test_rows_that_sit_out_a_step_or_have_ended_change_nothing_for_the_others(baseline, model_path):
    driver = Recorder(baseline)
    asked = [request(f"r{n}", n, "one") for n in (3, 9, 5)]
    for r in asked:
        driver.add(r)
        driver.prefill(r.request_id)
    driver.step()
    for names in (["r3", "r9", "r5"], ["r3"], ["r9", "r5"]):
        driver.decode(names)
        driver.step()
    driver.release("r9")
    for names in (["r3", "r5"], ["r5"], ["r3"]):
        driver.decode(names)
        driver.step()
    for r, tokens in zip(asked, (5, 3, 5), strict=True):
        assert driver.outputs[r.request_id] == generated(model_path, r, tokens)


def test_a_preempted_request_goes_on_from_a_prefill_of_prompt_and_output(baseline, model_path):
    driver = Recorder(baseline)
    asked = request("r", 6, "one")
    driver.add(asked)
    driver.prefill("r")
    driver.step()
    driver.decode(["r"])
    driver.step()
    driver.runs["r"].cached = 0  # what preemption by recomputation leaves
    driver.prefill("r")
    driver.step()
    driver.decode(["r"])
    driver.step()
    assert driver.outputs["r"] == generated(model_path, asked, 4)


def test_sampled_tokens_depend_on_seed_and_request_not_on_the_batch(baseline):
    options = {"adapter": "one", "sampling": Sampling(temperature=1.5, top_p=0.9, seed=3)}
    outputs = []
    for together in (True, False):
        driver = Recorder(baseline, seed=1)
        for n in (4, 8):
            driver.add(request(f"r{n}", n, **options))
            driver.prefill(f"r{n}")
            if not together:
                driver.step()
        if together:
            driver.step()
        outputs.append(driver.outputs)
    assert outputs[0] == outputs[1]


def test_padding_puts_labels_on_their_own_tokens():
    from workbench.examples import Document

    ids, mask, labels = padded([Document.of([5, 6, 7, 8], [False, False, True, True]), Document.of([9, 4], [True, True])])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]


def make_job(**values) -> FinetuneJob:
    return FinetuneJob(
        **({"adapter": "new", "data": DOCUMENTS, "rank": 3, "alpha": 6, "learning_rate": 1e-2, "epochs": 2, "seed": 4} | values)
    )


def plain_loop(model_path: Path, job: FinetuneJob, prepared) -> tuple[list[float], dict[str, torch.Tensor], list[torch.Tensor]]:
    """The training loop written out, one unpadded document at a time: micro-batch losses, final weights, first window's gradients."""
    base = AutoModelForCausalLM.from_pretrained(model_path)
    config = peft.LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules=list(job.targets))
    model = peft.get_peft_model(base, config)
    start = init_adapter(Dims.of(base.config), "new", rank=job.rank, alpha=job.alpha, targets=job.targets, seed=job.seed)
    names = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.split(".")
            pair = start.tensors[int(parts[4]), parts[6]]
            parameter.data.copy_(pair["lora_B" in name])
            names[int(parts[4]), parts[6], "lora_B" in name] = parameter
    optimizer = torch.optim.AdamW(names.values(), lr=job.learning_rate, weight_decay=job.weight_decay)
    losses, step, first = [], 0, []
    num_steps = -(-prepared.num_micro_batches // job.accumulation)
    for index in range(prepared.num_micro_batches):
        shape = prepared.micro_batch(index)
        total = 0.0
        for document in prepared.documents(index):
            logits = model(torch.tensor([document.token_ids])).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, torch.tensor(document.labels[:-1]), reduction="sum")
            (loss / shape.window_labelled).backward()
            total += loss.item()
        losses.append(total)
        if shape.ends_window:
            first = first or [p.grad.clone() for p in names.values()]
            nn.utils.clip_grad_norm_(names.values(), job.max_grad_norm)
            optimizer.param_groups[0]["lr"] = job.learning_rate * learning_rate_factor(job, step, num_steps)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return losses, {key: p.detach() for key, p in names.items()}, first


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"accumulation": 2, "schedule": "linear", "warmup_steps": 1},
        {"targets": ("q_proj",), "weight_decay": 0.1, "max_grad_norm": 0.05},
    ],
    ids=["plain", "accumulation", "clipping"],
)
def test_losses_gradients_and_weights_equal_a_plain_training_loop(baseline, model_path, values, monkeypatch):
    job = make_job(epochs=4, **values)
    driver = Driver(baseline, [job])
    gradients = []
    original = PeftBaseline._optimizer_step
    monkeypatch.setattr(
        PeftBaseline, "_optimizer_step", lambda self, s: (gradients.append([p.grad.clone() for p in s.flat]), original(self, s))[1]
    )
    prepared = driver.shapes[job.id]
    losses = []
    for _ in range(prepared.num_micro_batches):
        driver.finetune(job.id)
        result = driver.step()
        losses.append(result.losses[job.id][0])
        assert result.losses[job.id][1] == prepared.micro_batch(len(losses) - 1).labelled
        driver.backward(job.id)
        assert driver.step().layers_done == {job.id: 2}
    expected_losses, expected, expected_gradients = plain_loop(model_path, job, prepared)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients[0], expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * max(g.abs().max() for g in expected_gradients)
    trained = baseline.trained_weights(job.id).tensors
    for (layer, target, is_b), weight in expected.items():
        torch.testing.assert_close(trained[layer, target][is_b], weight, rtol=1e-3, atol=1e-4)
    assert sum(losses[5:]) < sum(losses[:5])  # the same documents, two epochs later


def test_training_is_undisturbed_by_serving_between_forward_and_backward(baseline):
    trained = []
    for is_serving in (False, True):
        job = make_job()
        driver = Driver(baseline, [job])
        if is_serving:
            for name, adapter in (("a", "one"), ("b", None)):
                driver.add(request(name, 5, adapter))
                driver.prefill(name)
                driver.step()
        for _ in range(3):
            driver.finetune(job.id)
            driver.step()
            if is_serving:
                driver.decode(["a"])
                driver.step()
                driver.decode(["b"])
                driver.step()
            driver.backward(job.id)
            driver.step()
        trained.append(baseline.trained_weights(job.id).tensors)
    for key, pair in trained[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, trained[1][key], strict=True))


def test_evaluation_has_the_loss_of_the_held_out_documents(baseline, model_path):
    job = make_job(evaluation=DOCUMENTS[:3])
    driver = Driver(baseline, [job])
    driver.evaluate(job.id, 0)
    loss, count = driver.step().eval_losses[job.id]
    base = AutoModelForCausalLM.from_pretrained(model_path)
    expected = sum(base(torch.tensor([d]), labels=torch.tensor([d])).loss.item() * (len(d) - 1) for d in DOCUMENTS[:2])
    assert count == 6
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_published_version_serves_new_requests_and_those_in_flight_keep_theirs(baseline, tmp_path):
    job = make_job(publish="step", learning_rate=0.3)
    driver = Recorder(baseline, [job])
    driver.add(request("old", 5, "new"))
    driver.prefill("old")
    driver.step()
    driver.finetune(job.id)
    driver.step()
    driver.backward(job.id)
    assert driver.step().published == {"new": 2}
    driver.add(request("new", 5, "new"))
    driver.prefill("new")
    driver.step()
    for _ in range(4):
        for name in ("old", "new"):
            driver.decode([name])
            driver.step()
    plain = Recorder(baseline, [])
    plain.add(request("base", 5))
    plain.prefill("base")
    plain.step()
    for _ in range(4):
        plain.decode(["base"])
        plain.step()
    assert driver.outputs["old"] == plain.outputs["base"]  # B was zero when it was admitted
    assert driver.outputs["new"] != plain.outputs["base"]
    baseline.save_adapter("new", tmp_path)
    assert load_peft(tmp_path, baseline.dims, "new").rank == 3


def test_a_step_that_fails_leaves_everything_as_it_was(baseline, model_path, monkeypatch):
    driver = Recorder(baseline)
    asked = [request(f"r{n}", n, "one") for n in (3, 9)]
    for r in asked:
        driver.add(r)
        driver.prefill(r.request_id)
    original = peft_baseline.sample

    def fails(*args, **kwargs):
        raise MemoryError("simulated")

    for act in (lambda: None, lambda: driver.decode(["r3", "r9"]), lambda: driver.decode(["r9"])):
        act()
        batch = driver.take()
        known = set(baseline._sequences)
        monkeypatch.setattr(peft_baseline, "sample", fails)
        with pytest.raises(MemoryError, match="simulated"):
            baseline.step(batch)
        assert set(baseline._sequences) == known
        for group in {q.group for q in baseline._sequences.values()}:
            assert group.cache.get_seq_length() == group.mask.shape[1]
        monkeypatch.setattr(peft_baseline, "sample", original)
        for name, token in baseline.step(batch).tokens.items():
            driver.outputs = getattr(driver, "outputs", {})
            driver.outputs.setdefault(name, []).append(token)
    for r, tokens in zip(asked, (2, 3), strict=True):
        assert driver.outputs[r.request_id] == generated(model_path, r, tokens)


@pytest.mark.parametrize("place", ["grad", "optimizer"])
def test_a_backward_that_fails_can_be_run_again(baseline, monkeypatch, place):
    trained = []
    for should_fail in (False, True):
        job = make_job()
        driver = Driver(baseline, [job])
        driver.finetune(job.id)
        driver.step()
        driver.backward(job.id)
        batch = driver.take()
        if should_fail:
            with monkeypatch.context() as patch:
                target = (torch.autograd, "grad") if place == "grad" else (PeftBaseline, "_optimizer_step")
                patch.setattr(*target, lambda *args: (_ for _ in ()).throw(MemoryError("simulated")))
                with pytest.raises(MemoryError, match="simulated"):
                    baseline.step(batch)
        baseline.step(batch)
        trained.append(baseline.trained_weights(job.id).tensors)
    for key, pair in trained[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, trained[1][key], strict=True))


def test_a_replay_serves_and_trains_under_the_sequential_policy(baseline, model_path):
    asked = [request(f"r{i}", 4 + i, [None, "one", "two.b"][i % 3], arrival_s=0.01 * i, output_tokens=4) for i in range(6)]
    job = make_job(epochs=None, steps=3)
    names = ("request_id", "arrival_s", "prompt_token_ids", "output_tokens", "adapter")
    frame = pd.DataFrame([{name: getattr(r, name) for name in names} for r in asked])
    result = replay(Trace.from_frame(frame), executor=baseline, policy=PeftSequential(batch_size=2), jobs=[job])
    assert (result.requests["outcome"] == "finished").all()
    for r in asked:
        assert list(result.outputs[r.request_id]) == generated(model_path, r, 4)
    assert (result.events["kind"] == "optimizer_step").sum() == 3
    assert (result.events["kind"] == "published").sum() == 1
    assert not baseline._sequences


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "tow.b"}, "no adapter is called 'tow.b'. Did you mean 'two.b'"),
        ({"prompt_tokens": 0}, "r: a prompt must have at least 1 token, got 0"),
        ({"prompt_tokens": 128}, "r: prompt and output must fit 128 tokens, got 129. Raise EngineConfig.max_model_len"),
        ({"prompt_tokens": 100, "output_tokens": 40}, "must fit 128 tokens, got 140"),
        ({"prompt_tokens": 100, "max_tokens": 40}, r"max_tokens must lie in 1..28 \(the context's rest\), got 40"),
        ({"prompt": "text"}, "a text prompt needs a tokenizer"),
        ({"prompt_token_ids": (5, 128)}, r"must lie in 0..127 \(the vocabulary\), got 128"),
    ],
)
def test_a_request_that_could_never_run_is_refused(baseline, values, message):
    values = {"prompt_tokens": 5, "output_tokens": None} | values
    with pytest.raises(ValueError, match=message):
        baseline.admissible(Request(request_id="r", arrival_s=0.0, **values))


def test_what_the_baseline_cannot_do_is_said(baseline, model_path, tmp_path):
    with pytest.raises(ValueError, match=r"starts jobs at their beginning, got a checkpoint. Resume it on an Engine"):
        baseline.begin([make_job(checkpoint=tmp_path)], seed=0)
    with pytest.raises(ValueError, match="jobs must have different ids"):
        baseline.begin([make_job(), make_job()], seed=0)
    with pytest.warns(UserWarning, match="deterministic=True has no effect on PeftBaseline"):
        PeftBaseline.random("tiny-llama", config=EngineConfig(deterministic=True), device="cpu")
    with pytest.raises(ValueError, match=r"different last folders.* Pass \{name: directory\}"):
        PeftBaseline.from_pretrained(model_path, [tmp_path / "x", tmp_path / "y" / "x"], device="cpu")
    assert baseline.begin([], seed=0) == {}


def test_a_random_baseline_has_adapters_that_act():
    baseline = PeftBaseline.random("tiny-llama", adapters=[2, 5], device="cpu", config=CONFIG)
    assert {name: info.rank for name, info in baseline.adapter_infos.items()} == {"adapter-0": 2, "adapter-1": 5}
    assert repr(baseline) == "PeftBaseline('tiny-llama', device='cpu', dtype=torch.float32, adapters=['adapter-0', 'adapter-1'])"
