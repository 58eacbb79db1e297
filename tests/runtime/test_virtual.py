"""Views of one base: isolated, tied to one storage, carried and attached bit for bit."""

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from workbench.runtime.adapters import init_adapter, load_peft
from workbench.runtime.virtual import CarriedAdapter, SharedWeightsError, VirtualModule, detach_adapter, has_views, pin
from workbench.runtime.weights import assert_aliases, fuse, random_base

NAMES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"]
IDS = torch.arange(3, 27)[None]  # [1, 24]


@pytest.fixture
def base() -> nn.Module:
    return random_base("tiny-llama", seed=1)


def lora(targets=("q_proj", "v_proj", "down_proj"), **overrides) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | overrides))


def adapted(view: nn.Module, seed: int = 0, **overrides) -> nn.Module:
    """A PEFT model on `view` whose adapter acts (B is not zero)."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(view, lora(init_lora_weights=False, **overrides))
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a module tree that injection could change."""
    return {
        "modules": {name: type(m) for name, m in model.named_modules()},
        "values": {n: (p.data_ptr(), p.dtype, p.requires_grad, p._version, p.detach().clone()) for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attributes": sorted(model.__dict__),
    }


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, tuple):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_view_computes_as_the_base_in_the_same_memory(name):
    base = random_base(name)
    view = VirtualModule(base)
    assert type(view) is type(base)
    assert isinstance(view, VirtualModule)
    assert not isinstance(base, VirtualModule)
    assert torch.equal(view(IDS).logits, base(IDS).logits)
    for (n, p), q in zip(base.named_parameters(), view.parameters(), strict=True):
        assert p is not q, n
        assert p.data_ptr() == q.data_ptr(), n


def test_injection_into_a_view_changes_neither_the_base_nor_another_view(base):
    base.requires_grad_(True)
    other = VirtualModule(base)
    before, other_before, logits = snapshot(base), snapshot(other), base(IDS).logits
    model = adapted(VirtualModule(base))
    model.train()
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    assert not torch.equal(model.eval()(IDS).logits, logits)
    assert_same(snapshot(base), before)
    assert_same(snapshot(other), other_before)
    assert torch.equal(base(IDS).logits, logits)
    assert torch.equal(other(IDS).logits, logits)
    assert all(p.grad is None for p in base.parameters())


def test_hooks_and_buffers_of_a_view_are_its_own(base):
    view = VirtualModule(base)
    view.model.layers[0].register_forward_hook(lambda m, a, out: out * 0)
    view.model.register_buffer("extra", torch.ones(1))
    view.model.rotary_emb.inv_freq.zero_()
    assert not base.model.layers[0]._forward_hooks
    assert "extra" not in base.model._buffers
    assert base.model.rotary_emb.inv_freq.abs().sum() > 0


def test_a_hook_of_the_base_runs_in_the_view_on_the_views_own_module(base):
    class Recorder:
        def __init__(self, module: nn.Module) -> None:
            self.module, self.calls = module, 0

        def __call__(self, module: nn.Module, args: object, out: object) -> None:
            assert module is self.module
            self.calls += 1

    recorder = Recorder(base.model)
    base.model.register_forward_hook(recorder)
    VirtualModule(base)(IDS)
    assert recorder.calls == 0
    base(IDS)
    assert recorder.calls == 1


def test_a_views_config_is_its_own_and_one_object_within_the_view(base):
    view = VirtualModule(base)
    view.config.use_cache = False
    view.config.rope_parameters["rope_theta"] = 1.0
    view.generation_config.max_new_tokens = 5
    assert base.config.use_cache
    assert base.config.rope_parameters["rope_theta"] == 1e4
    assert base.generation_config.max_new_tokens != 5
    assert view.model.config is view.config
    assert view.config is not base.config


def test_tied_embeddings_stay_tied_in_a_view():
    base = random_base("tiny-qwen2")
    view = VirtualModule(base)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert view.lm_head.weight is view.model.embed_tokens.weight
    assert len(list(view.parameters())) == len(list(base.parameters()))


def train(model: nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    """Plain AdamW steps; yields control after each through the returned generator's caller."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        yield losses


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_two_views_train_side_by_side_exactly_as_alone(base):
    ids = [torch.arange(3, 19)[None], torch.arange(40, 72)[None]]
    settings = [{"targets": ("q_proj", "v_proj")}, {"targets": ("gate_proj", "down_proj"), "r": 8}]
    alone = []
    for i in range(2):
        model = adapted(VirtualModule(base), seed=i, **settings[i])
        losses = list(train(model, ids[i], 4))[-1]
        alone.append((losses, weights_of(model)))
    models = [adapted(VirtualModule(base), seed=i, **settings[i]) for i in range(2)]
    runs = [train(model, ids[i], 4) for i, model in enumerate(models)]
    for _ in range(4):
        together = [next(run) for run in runs]
    for i in range(2):
        assert together[i] == alone[i][0]
        assert together[i][-1] < together[i][0]
        assert_same(weights_of(models[i]), alone[i][1])


@pytest.mark.parametrize("name", NAMES)
def test_detach_carry_attach_gives_bit_equal_outputs(name):
    base = random_base(name)
    plain = base(IDS).logits
    view = VirtualModule(base)
    adapted(
        view, targets=("q_proj", "k_proj", "o_proj", "up_proj"), r=3, rank_pattern={"k_proj": 7}, use_rslora=True, lora_dropout=0.5
    ).eval()
    before = view(IDS).logits
    carried = view.detach()
    assert torch.equal(view(IDS).logits, plain)
    assert {n: type(m) for n, m in view.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert not hasattr(view, "peft_config")
    again = pickle.loads(pickle.dumps(carried))
    other = VirtualModule(random_base(name))
    assert torch.equal(other.attach(again)(IDS).logits, before)
    assert torch.equal(view.attach(carried)(IDS).logits, before)


def test_a_carried_adapter_keeps_dtype_and_what_was_trained():
    base = random_base("tiny-llama", dtype=torch.bfloat16)
    view = VirtualModule(base)
    model = adapted(view)  # PEFT keeps fp32 adapters on a bf16 base
    before = model.eval()(IDS).logits
    carried = view.detach()
    assert {t.dtype for t in carried.tensors.values()} == {torch.float32}
    assert carried.trainable == frozenset(carried.tensors)
    view.attach(carried)
    assert torch.equal(view(IDS).logits, before)
    assert {n for n, p in view.named_parameters() if p.requires_grad} == {n for n, _ in view.named_parameters() if "lora_" in n}


def test_what_was_frozen_stays_frozen_through_detach_and_attach(base):
    view = VirtualModule(base)
    adapted(view)
    view.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in view.named_parameters()}
    assert set(before.values()) == {True, False}
    assert {n: p.requires_grad for n, p in view.attach(view.detach()).named_parameters()} == before


def test_training_goes_on_after_attach_as_if_the_adapter_had_stayed(base):
    stayed = adapted(VirtualModule(base))
    list(train(stayed, IDS, 2))
    view = VirtualModule(base)
    list(train(adapted(view), IDS, 2))
    moved = VirtualModule(base).attach(view.detach())
    assert list(train(moved, IDS, 2))[-1] == list(train(stayed, IDS, 2))[-1]


CHILD = """
import transformers, pickle, sys, torch
from workbench.runtime.virtual import VirtualModule
from workbench.runtime.weights import random_base
carried = pickle.load(open(sys.argv[1], "rb"))
view = VirtualModule(random_base("tiny-llama", seed=1)).attach(carried)
torch.save(view(torch.arange(3, 27)[None]).logits, sys.argv[2])
"""


def test_an_adapter_carried_to_another_process_gives_bit_equal_outputs(base, tmp_path, with_peft):
    view = VirtualModule(base)
    adapted(view, use_dora=True).eval()
    before = view(IDS).logits
    (tmp_path / "carried").write_bytes(pickle.dumps(view.detach()))
    root = Path(__file__).resolve().parents[2]
    done = with_peft.run(CHILD, tmp_path / "carried", tmp_path / "logits", path=(root,), cwd=root)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_carried_adapter_is_an_ordinary_peft_directory(base, tmp_path, use_dora):
    view = VirtualModule(base)
    adapted(view, use_dora=use_dora).eval()
    before = view(IDS).logits
    carried = view.detach()
    carried.save(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(VirtualModule(base), tmp_path).eval()(IDS).logits, before)
    assert torch.equal(VirtualModule(base).attach(CarriedAdapter.load(tmp_path))(IDS).logits, before)


def test_an_engines_adapter_attaches_as_peft_loads_it(base, tmp_path):
    weights = init_adapter(fuse(base).dims, "mine", rank=5, alpha=7, seed=3, b_std=0.1)
    carried = CarriedAdapter.of(weights)
    view = VirtualModule(base).attach(carried)
    expected = peft.PeftModel.from_pretrained(VirtualModule(base), carried.save(tmp_path)).eval()(IDS).logits
    assert torch.equal(view(IDS).logits, expected)
    assert load_peft(tmp_path, fuse(base).dims, "mine").scales == weights.scales


def test_a_named_adapter_is_detached_and_the_other_stays(base):
    view = VirtualModule(base)
    model = adapted(view)
    only = model.eval()(IDS).logits
    model.add_adapter("second", lora(("k_proj",), init_lora_weights=False))
    with pytest.raises(ValueError, match=r"exactly one, got \['default', 'second'\]"):
        view.detach()
    with pytest.raises(ValueError, match="Did you mean 'second'"):
        view.detach("secnd")
    second = view.detach("second")
    assert {key.split(".")[4] for key in second.tensors} == {"k_proj"}
    assert torch.equal(view(IDS).logits, only)


def test_an_adapter_of_another_base_is_refused_and_the_view_stays_as_it_was(base):
    view = VirtualModule(random_base("tiny-qwen3"))
    adapted(view)
    carried = view.detach()
    plain = VirtualModule(base)
    with pytest.raises(ValueError, match=r"must have shape .* Attach it to the base that it was made for"):
        plain.attach(carried)
    assert torch.equal(plain(IDS).logits, base(IDS).logits)
    assert not hasattr(plain, "peft_config")


def test_a_second_adapter_on_one_view_is_refused(base):
    view = VirtualModule(base)
    adapted(view)
    carried = view.detach()
    view.attach(carried)
    with pytest.raises(ValueError, match="one adapter at a time"):
        view.attach(carried)


def test_modules_to_save_are_isolated_but_not_carried(base):
    view = VirtualModule(base)
    before = snapshot(base)
    adapted(view, modules_to_save=["lm_head"])
    assert view.lm_head.modules_to_save["default"].weight.requires_grad
    assert_same(snapshot(base), before)
    with pytest.raises(ValueError, match="modules_to_save"):
        view.detach()


MOVES = {
    "to dtype": lambda v: v.to(torch.float64),
    "to device": lambda v: v.to("meta"),
    "half": lambda v: v.half(),
    "bfloat16": lambda v: v.bfloat16(),
    "double": lambda v: v.double(),
    "type": lambda v: v.type(torch.float16),
    "cuda": lambda v: v.cuda(),
    "to_empty": lambda v: v.to_empty(device="cpu"),
    "a part": lambda v: v.model.layers[0].mlp.half(),
}
WRITES = {
    "load_state_dict": lambda v: v.load_state_dict({n: torch.zeros_like(p) for n, p in v.state_dict().items()}),
    "load_state_dict assign": lambda v: v.load_state_dict({"lm_head.weight": torch.zeros(128, 64)}, strict=False, assign=True),
    "in place": lambda v: v.lm_head.weight.zero_(),
    "item": lambda v: v.lm_head.weight.__setitem__(0, 1.0),
    "data in place": lambda v: v.lm_head.weight.data.mul_(2),
    "data": lambda v: setattr(v.lm_head.weight, "data", torch.zeros(128, 64)),
    "initialisation": lambda v: nn.init.normal_(v.lm_head.weight),
}
RESIZES = {"resize": lambda v: v.resize_token_embeddings(130)}
TRAINS = {
    "requires_grad_": lambda v: v.requires_grad_(True),
    "requires_grad": lambda v: setattr(v.lm_head.weight, "requires_grad", True),
    "bias=all": lambda v: peft.get_peft_model(v, lora(bias="all")),
}
CASES = [(name, act, message) for cases, message in (
    (MOVES, "cannot be moved or cast through a view. Load the base"),
    (WRITES, r"cannot be written through a view .* Do it on a model of its own"),
    (RESIZES, "cannot be resized through a view. Resize a model of its own"),
    (TRAINS, "cannot be trained through a view, got requires_grad=True. Train an adapter"),
) for name, act in cases.items()]  # fmt: skip


@pytest.mark.parametrize(("act", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
def test_shared_weights_cannot_be_moved_cast_trained_or_written_through_a_view(act, message, injected):
    base = random_base("tiny-qwen2")  # has q/k/v biases
    view = VirtualModule(base)
    if injected and "bias" not in message:
        adapted(view, targets=("q_proj",))
        if act is TRAINS["bias=all"]:
            view.detach()
    before, logits = snapshot(base), view(IDS).logits
    with pytest.raises(SharedWeightsError, match=message):
        act(view)
    assert_same(snapshot(base), before)
    if act is not TRAINS["bias=all"]:
        assert torch.equal(view(IDS).logits, logits)


@pytest.mark.parametrize("act", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.cuda()], ids=["to", "half", "cuda"])
def test_the_peft_model_around_a_view_refuses_moves_before_anything_changed(base, act):
    model = adapted(VirtualModule(base))
    with pytest.raises(SharedWeightsError, match="moved or cast"):
        act(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_shared_weights_is_refused_and_leaves_them_bit_equal(base, safe):
    view = VirtualModule(base)
    model = adapted(view).eval()
    before, logits = snapshot(base), view(IDS).logits
    for act in (lambda: model.merge_adapter(safe_merge=safe), lambda: model.merge_and_unload(safe_merge=safe)):
        with pytest.raises(SharedWeightsError, match="merging"):
            act()
        assert_same(snapshot(base), before)
        assert torch.equal(view(IDS).logits, logits)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_write_into_the_base_are_refused(base, init):
    before = snapshot(base)
    view = VirtualModule(base)
    with pytest.raises(SharedWeightsError, match="PiSSA-like"):
        peft.get_peft_model(view, lora(init_lora_weights=init))
    assert_same(snapshot(base), before)
    assert torch.equal(view(IDS).logits, base(IDS).logits)


def test_a_move_that_changes_nothing_is_allowed(base):
    view = VirtualModule(base)
    assert view.to("cpu") is view
    assert view.float() is view
    adapted(view)
    assert view.to(device="cpu", dtype=torch.float32) is view


def test_a_deep_copy_of_a_view_owns_its_weights(base):
    view = VirtualModule(base)
    adapted(view).eval()
    logits = view(IDS).logits
    owned = copy.deepcopy(view)
    assert not isinstance(owned, VirtualModule)
    assert torch.equal(owned(IDS).logits, logits)
    assert not {p.data_ptr() for p in owned.parameters()} & {p.data_ptr() for p in base.parameters()}
    carried = owned.detach()
    assert torch.equal(owned(IDS).logits, base(IDS).logits)
    assert torch.equal(owned.attach(carried)(IDS).logits, logits)
    owned.requires_grad_(True).double()
    assert owned(IDS).logits.dtype == torch.float64
    assert torch.equal(view(IDS).logits, logits)


def test_a_view_is_not_pickled_but_its_adapter_is(base):
    with pytest.raises(TypeError, match=r"Carry its adapter instead: carried = view.detach\(\)"):
        pickle.dumps(VirtualModule(base))


def test_a_saved_view_is_the_base(base, tmp_path):
    VirtualModule(base).save_pretrained(tmp_path / "view")
    base.save_pretrained(tmp_path / "base")
    assert (tmp_path / "view" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_an_instance_level_forward_is_refused(base):
    base.model.layers[1].mlp.forward = base.model.layers[1].mlp.forward
    with pytest.raises(ValueError, match=r"model.layers.1.mlp must not have a forward of its own instance .* Remove what replaced it"):
        VirtualModule(base)


@pytest.mark.parametrize(
    "wrap", [lambda b: VirtualModule(b), lambda b: peft.get_peft_model(b, lora()), lambda b: adapted(b).get_base_model()]
)
def test_a_base_that_is_a_view_or_has_adapters_is_refused(base, wrap):
    with pytest.raises(ValueError, match="base must"):
        VirtualModule(wrap(base))


def test_views_generate_as_peft_does(base):
    model = adapted(VirtualModule(base)).eval()
    alone = adapted(random_base("tiny-llama", seed=1)).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), alone.generate(input_ids=IDS, **options))


def test_gradient_checkpointing_of_a_view_leaves_the_base_without(base):
    model = adapted(VirtualModule(base))
    model.gradient_checkpointing_enable()
    assert not base.is_gradient_checkpointing


def test_a_pinned_base_refuses_moves_until_released(base):
    fused = fuse(base)
    release = pin(base, "the engine runs on these weights. Make a new engine.")
    with pytest.raises(SharedWeightsError, match="Make a new engine"):
        base.half()
    with pytest.raises(SharedWeightsError, match="Make a new engine"):
        base.model.layers[0].to(torch.float64)
    assert_aliases(base, fused)
    with pytest.raises(SharedWeightsError, match="through a view"):
        VirtualModule(base).half()
    assert copy.deepcopy(base).double().dtype == torch.float64
    release()
    assert base.double().dtype == torch.float64


def test_fusing_under_live_views_is_refused(base):
    owned = copy.deepcopy(base)
    for parameter in owned.parameters():
        parameter.data = parameter.data.clone()
    view = VirtualModule(owned)
    assert has_views(owned)
    with pytest.raises(RuntimeError, match=r"fused before views .* Call fuse\(base\) first"):
        fuse(owned)
    del view
    assert not has_views(owned)
    fuse(owned)


def test_detaching_works_on_any_module_that_peft_adapted(base):
    plain = base(IDS).logits
    model = adapted(base)
    detach_adapter(model.get_base_model())
    assert torch.equal(base(IDS).logits, plain)
