"""Adapters as values: PEFT directories in and out with equal logits; every directory that PEFT would serve otherwise refused."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.config import LINEARS
from workbench.runtime.adapters import AdapterWeights, init_adapter, load_peft, module_path, save_peft
from workbench.runtime.virtual import VirtualModule
from workbench.runtime.weights import Dims, fuse, random_base

NAMES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"]
IDS = torch.arange(3, 27)[None]  # [1, 24]
BASE = random_base("tiny-llama")
DIMS = fuse(BASE).dims
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def made_by_peft(folder: Path, base=BASE, **options) -> torch.Tensor:
    """Save a PEFT adapter that acts; its logits [1, 24, V]."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    torch.manual_seed(0)
    model = peft.get_peft_model(VirtualModule(base), peft.LoraConfig(**options)).eval()
    model.save_pretrained(folder)
    return model(IDS).logits


def merged_logits(base, weights: AdapterWeights) -> torch.Tensor:
    """Logits of the base with W + scale B A written out: an oracle that knows nothing of PEFT."""
    model = copy.deepcopy(base).double()
    for key, (a, b) in weights.tensors.items():
        linear = model.get_submodule(module_path(key))
        linear.weight.data += weights.scales[key] * (b.double() @ a.double())
    return model(IDS).logits.float()


OPTIONS = {
    "plain": {},
    "all linears": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.1\..*(k_proj|gate_proj)"},
    "rsLoRA": {"use_rslora": True, "r": 5},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 9}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.q_proj": 40}},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["model.layers.0.mlp.down_proj"]},
    "rank 1": {"r": 1},
    "rank 256": {"r": 256},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_directory_loads_with_equal_logits_in_every_family(name, tmp_path):
    base = random_base(name)
    expected = made_by_peft(tmp_path, base, target_modules=list(LINEARS))
    weights = load_peft(tmp_path, fuse(base).dims, "mine")
    torch.testing.assert_close(merged_logits(base, weights), expected, rtol=1e-4, atol=1e-5)
    assert weights.targets == LINEARS


@pytest.mark.parametrize("option", OPTIONS)
def test_every_lora_option_means_what_it_means_in_peft(option, tmp_path):
    expected = made_by_peft(tmp_path, **OPTIONS[option])
    weights = load_peft(tmp_path, DIMS, "mine")
    torch.testing.assert_close(merged_logits(BASE, weights), expected, rtol=1e-4, atol=1e-5)
    assert weights.rank == max(a.shape[0] for a, _ in weights.tensors.values())
    assert not torch.allclose(expected, BASE(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_saved_adapter_is_a_peft_directory_with_equal_logits_and_unscaled_b(option, tmp_path):
    made_by_peft(tmp_path / "peft", **OPTIONS[option])
    weights = load_peft(tmp_path / "peft", DIMS, "mine")
    save_peft(weights, tmp_path / "ours", "base-name")
    again = load_peft(tmp_path / "ours", DIMS, "mine")
    assert again.scales == weights.scales
    assert again.base == "base-name"
    first, second = load_file(tmp_path / "peft" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    logits = [peft.PeftModel.from_pretrained(VirtualModule(BASE), tmp_path / folder).eval()(IDS).logits for folder in ("peft", "ours")]
    assert torch.equal(*logits)


def test_an_adapter_of_the_first_layers_only_keeps_to_them(tmp_path):
    """Not every layer of the base is adapted: PEFT must not find the short names in the others."""
    weights = init_adapter(DIMS, "mine", rank=2, b_std=0.1)
    partial = replace(weights, tensors={key: pair for key, pair in weights.tensors.items() if key[0] == 0})
    save_peft(partial, tmp_path)
    assert set(load_peft(tmp_path, DIMS, "mine").tensors) == set(partial.tensors)
    model = peft.PeftModel.from_pretrained(VirtualModule(BASE), tmp_path)
    adapted = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(adapted) == 7
    assert all(".layers.0." in n for n in adapted)


def test_a_new_adapter_starts_as_pefts_and_changes_nothing():
    dims = Dims.of(BASE.config)
    weights = init_adapter(dims, "new", rank=64, alpha=16, seed=5)
    assert len(weights.tensors) == 7 * dims.num_layers
    reference = peft.get_peft_model(VirtualModule(BASE), peft.LoraConfig(r=64, target_modules=["down_proj"]))
    theirs = next(p for n, p in reference.named_parameters() if "down_proj.lora_A" in n)
    ours, b = weights.tensors[0, "down_proj"]
    bound = 128**-0.5  # K of down_proj
    for a in (ours, theirs):
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not b.any()
    assert torch.equal(merged_logits(BASE, weights), merged_logits(BASE, replace(weights, tensors={})))


def test_new_adapters_repeat_by_seed_and_differ_between_seeds():
    a, b, c = (init_adapter(DIMS, "x", seed=s).tensors[1, "up_proj"][0] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_size_of_an_adapter_is_what_its_copy_takes():
    weights = init_adapter(DIMS, "x", rank=4, targets=("q_proj",))
    assert weights.num_parameters == 2 * (4 * 64 + 64 * 4)
    assert weights.info(3).bytes == 4 * weights.num_parameters
    assert weights.info(3, torch.bfloat16).bytes == 2 * weights.num_parameters
    assert (weights.info(3).version, weights.info(3).rank, weights.info(3).name) == (3, 4, "x")


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        flat = load_file(folder / WEIGHTS)
        change(flat)
        save_file(flat, folder / WEIGHTS)

    return act


def key(layer: int, target: str, letter: str) -> str:
    return f"base_model.model.{module_path((layer, target))}.lora_{letter}.weight"


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def link_out(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        os.symlink(os.path.join("..", f"outside-{name}"), folder / name)

    return act


def give(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda flat: flat.update({name: tensor}))


def rename(new: str) -> Callable[[Path], None]:
    return tensors(lambda flat: flat.update({new: flat.pop(Q_A)}))


Q_A, Q_B = key(0, "q_proj", "A"), key(0, "q_proj", "B")
MERGE = "Merge it into a copy of the base"
BAD = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), FileNotFoundError, "must be a directory"),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "must hold adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "must hold adapter_model.safetensors"),
    "pickle": (to_pickle, ValueError, r"must be safetensors, got 'adapter_model.bin' \(a pickle can run code\). Save it again"),
    "link out (weights)": (link_out(WEIGHTS), ValueError, "must lie inside its folder, got a link to .* Copy the file there"),
    "link out (config)": (link_out(CONFIG), ValueError, "must lie inside its folder"),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{"), ValueError, "must be a JSON object"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "must be a JSON object, got: not an object"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ValueError, "must be a complete safetensors file"),
    "another method": (config(peft_type="IA3"), ValueError, f"peft_type must be 'LORA', got 'IA3'. {MERGE}"),
    "DoRA": (config(use_dora=True), ValueError, f"DoRA is not supported, got use_dora=True. {MERGE}"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), ValueError, r"modules_to_save .* is not supported"),
    "bias": (config(bias="all"), ValueError, "bias must be 'none', got 'all'"),
    "bias on B": (config(lora_bias=True), ValueError, "a bias on B is not supported"),
    "fan_in_fan_out": (config(fan_in_fan_out=True), ValueError, "fan_in_fan_out .* is not supported"),
    "layer replication": (config(layer_replication=[[0, 2]]), ValueError, "layer replication is not supported"),
    "trained tokens": (config(trainable_token_indices=[3]), ValueError, "trained token embeddings is not supported"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights='pissa_niter_4' changed it. Save with"),
    "unknown variant": (config(use_newlora=True), ValueError, "use_newlora=True is not supported"),
    "lm_head": (config(target_modules=["q_proj", "down_proj", "lm_head"]), ValueError, f"seven linears, got 'lm_head'. {MERGE}"),
    "embeddings": (config(target_modules=["embed_tokens"]), ValueError, "seven linears, got 'model.embed_tokens'"),
    "misspelt target": (config(target_modules=["q_proj", "down_proj", "o_prj"]), ValueError, "got 'o_prj'. Did you mean 'o_proj'"),
    "no targets": (config(target_modules=[]), ValueError, r"must name the adapted linears, got \[\]"),
    "rank 0": (config(r=0), ValueError, r"r must be a whole number in 1..256, got 0"),
    "rank 257": (config(r=257), ValueError, "got 257"),
    "rank missing": (config(r=None), ValueError, "got None"),
    "alpha": (config(lora_alpha="big"), ValueError, "lora_alpha must be a number above 0, got 'big'"),
    "alpha infinite": (config(lora_alpha=float("inf")), ValueError, "lora_alpha must be a number above 0, got inf"),
    "rank of another": (config(r=8), ValueError, r"rank of model.layers.0.self_attn.q_proj must be 8 as in .* got 4"),
    "target without tensors": (config(target_modules=["q_proj", "k_proj", "down_proj"]), ValueError, "k_proj has no tensors"),
    "tensors without target": (config(target_modules=["q_proj"]), ValueError, "down_proj has tensors but is not in target_modules"),
    "NaN": (tensors(lambda t: t[Q_B][3].fill_(float("nan"))), ValueError, "must be finite, got NaN or infinity in .*q_proj.lora_B"),
    "infinity": (tensors(lambda t: t[Q_A][0].fill_(float("inf"))), ValueError, "must be finite, .* Take an earlier checkpoint"),
    "missing B": (tensors(lambda t: t.pop(Q_B)), ValueError, "needs A and B, but lora_B of model.layers.0.self_attn.q_proj is missing"),
    "missing A": (tensors(lambda t: t.pop(Q_A)), ValueError, "lora_A of model.layers.0.self_attn.q_proj is missing"),
    "another base (width)": (give(Q_A, torch.ones(4, 32)), ValueError, r"shapes \(r, 64\) and \(64, r\), got \(4, 32\)"),
    "wrong shape of B": (give(Q_B, torch.ones(64, 3)), ValueError, r"got \(4, 64\) and \(64, 3\). Load it on the base"),
    "not a matrix": (give(Q_A, torch.ones(256)), ValueError, r"got \(256,\)"),
    "another base (depth)": (rename(key(7, "q_proj", "A")), ValueError, r"layers must lie in 0..1, got .*layers.7"),
    "another module": (rename(Q_A.replace("q_proj", "qkv")), ValueError, "must belong to one of q_proj, .*qkv"),
    "wrong parent": (rename(Q_A.replace("self_attn", "mlp")), ValueError, "must belong to one of"),
    "magnitudes": (give(Q_A.replace("lora_A", "lora_magnitude_vector"), torch.ones(64)), ValueError, "must belong to"),
    "integers": (give(Q_A, torch.ones(4, 64, dtype=torch.int32)), ValueError, "must be fp32, bf16 or fp16, got torch.int32"),
    "fp64": (give(Q_A, torch.ones(4, 64, dtype=torch.float64)), ValueError, "got torch.float64"),
    "empty": (tensors(lambda t: t.clear()), ValueError, "at least one A and B, got none"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    made_by_peft(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_cannot_be_served_exactly_is_refused(case, good, tmp_path):
    damage, error, message = BAD[case]
    folder = Path(shutil.copytree(good, tmp_path / "mine"))
    load_peft(folder, DIMS, "mine")
    damage(folder)
    with pytest.raises(error, match=message):
        load_peft(folder, DIMS, "mine")


def test_an_adapter_of_another_family_is_refused(tmp_path):
    other = random_base("tiny-qwen3")
    made_by_peft(tmp_path, other)
    with pytest.raises(ValueError, match="Load it on the base that it was made for"):
        load_peft(tmp_path, DIMS, "mine")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "adapter must be a non-empty name, got ''"),
        ({"rank": 0}, r"rank must lie in 1..256, got 0"),
        ({"rank": 257}, r"rank must lie in 1..256, got 257"),
        ({"targets": ()}, r"at least one linear, got \(\)"),
        ({"targets": ("qproj",)}, "got 'qproj'. Did you mean 'q_proj'"),
    ],
)
def test_a_new_adapter_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        init_adapter(DIMS, **({"name": "x"} | values))
