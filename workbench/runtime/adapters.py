"""LoRA adapters as values: read and write ordinary PEFT directories, draw new ones.

y = W x + scale * B (A x), with scale = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2106.09685, 2312.03732).
Legend: K input and N output features of a linear, r its rank, L layers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.config import LINEARS, did_you_mean, require
from workbench.core import AdapterInfo
from workbench.runtime.packed import Key, PackedTensors, Pairs, Shape, shapes_of
from workbench.runtime.weights import Dims

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 256

_PARENT = {t: "mlp" if t in ("gate_proj", "up_proj", "down_proj") else "self_attn" for t in LINEARS}
_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights:
    """One adapter's weights: `tensors[layer, target]` = (A [r, K], B [N, r]), B unscaled, contiguous, as saved (dtype, CPU).

    `rank` is the largest rank; a linear's own rank is its A's. `alphas` holds only the linears whose alpha differs from `alpha`.
    `base` is the name of the base model that the directory records, if any. `packed` is the same adapter in one buffer and in an
    engine's dtype, once an engine serves it (`slots.AdapterTable.admit`); where the dtypes agree, `tensors` are views of that buffer.
    """

    name: str
    rank: int
    alpha: float
    tensors: Pairs = field(repr=False)
    alphas: Mapping[Key, float] = field(default_factory=dict, repr=False)
    use_rslora: bool = False
    base: str | None = None
    packed: PackedTensors | None = field(default=None, repr=False)

    @cached_property
    def shapes(self) -> dict[Key, tuple[Shape, Shape]]:
        """The shapes (r, K) and (N, r) of each linear."""
        return shapes_of(self.tensors)

    @cached_property
    def scales(self) -> dict[Key, float]:
        """The factor on B A x of each linear."""
        ranks = {key: a[0] for key, (a, _) in self.shapes.items()}
        return {key: self.alphas.get(key, self.alpha) / (r**0.5 if self.use_rslora else r) for key, r in ranks.items()}

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that it adapts in at least one layer."""
        return tuple(t for t in LINEARS if any(target == t for _, target in self.tensors))

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for pair in self.shapes.values() for shape in pair)

    def info(self, version: int = 0, dtype: torch.dtype | None = None) -> AdapterInfo:
        """What scheduling needs to know of it; bytes in `dtype`, or as saved."""
        if dtype is not None:
            size = self.num_parameters * dtype.itemsize
        else:
            size = sum(t.numel() * t.element_size() for pair in self.tensors.values() for t in pair)
        return AdapterInfo(name=self.name, version=version, rank=self.rank, bytes=size)


def module_path(key: Key) -> str:
    """Where a linear lives in the base: `model.layers.3.self_attn.q_proj`."""
    layer, target = key
    return f"model.layers.{layer}.{_PARENT[target]}.{target}"


def init_adapter(
    dims: Dims,
    name: str,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = LINEARS,
    seed: int = 0,
    use_rslora: bool = False,
    b_std: float = 0.0,
) -> AdapterWeights:
    """A new adapter, fp32: A kaiming-uniform as PEFT's default, U(-1/sqrt(K), 1/sqrt(K)); B zero, or N(0, `b_std`) for one that acts.

    Equal for equal arguments on every machine. Raises ValueError for a rank outside 1..256 or an unknown target.
    """
    require(bool(name), "adapter must be a non-empty name", name)
    require(1 <= rank <= MAX_RANK, f"rank must lie in 1..{MAX_RANK}", rank)
    require(len(targets) > 0, "targets must name at least one linear", targets)
    for target in targets:
        if target not in LINEARS:
            raise ValueError(f"targets must be among the seven linears, got {target!r}. {did_you_mean(target, LINEARS)}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(dims.num_layers):
        for target in (t for t in LINEARS if t in targets):
            width_in, width_out = dims.linear(target)
            a = torch.empty(rank, width_in).uniform_(-(width_in**-0.5), width_in**-0.5, generator=generator)
            b = torch.zeros(width_out, rank)
            tensors[layer, target] = (a, b.normal_(0.0, b_std, generator=generator) if b_std else b)
    return AdapterWeights(name=name, rank=rank, alpha=alpha, tensors=tensors, use_rslora=use_rslora)


def random_adapter(dims: Dims, name: str, rank: int, generator: torch.Generator, dtype: torch.dtype, std: float) -> AdapterWeights:
    """An adapter on all seven linears whose A and B are drawn from N(0, `std`) on the generator's device; alpha is twice the rank.

    Raises ValueError for a rank outside 1..256.
    """
    require(1 <= rank <= MAX_RANK, f"rank must lie in 1..{MAX_RANK}", rank)

    def draw(*shape: int) -> torch.Tensor:
        return (std * torch.randn(shape, device=generator.device, generator=generator)).to(dtype)

    tensors = {}
    for layer in range(dims.num_layers):
        for target in LINEARS:
            width_in, width_out = dims.linear(target)
            tensors[layer, target] = (draw(rank, width_in), draw(width_out, rank))
    return AdapterWeights(name=name, rank=rank, alpha=2.0 * rank, tensors=tensors)


def load_peft(directory: str | Path, dims: Dims, name: str) -> AdapterWeights:
    """The LoRA adapter in a PEFT directory (`adapter_config.json` + `adapter_model.safetensors`), checked against the base's sizes.

    Raises FileNotFoundError for a missing file, ValueError for what this engine would not serve exactly as PEFT does: pickles, DoRA
    and other variants, targets outside the seven linears, biases, NaN or infinity, shapes of another base, a missing A or B.
    """
    require(bool(name), "adapter must be a non-empty name", name)
    folder = Path(directory)
    config = read_config(inside(folder, CONFIG_FILE))
    where = folder / CONFIG_FILE
    _check_config(config, where)
    file = inside(folder, WEIGHTS_FILE)
    tensors = _pairs(read_tensors(file), dims, file)
    _check_coverage(config, set(tensors), dims, where)
    alphas = {}
    for key, (a, _) in tensors.items():
        rank = _by_pattern(config.get("rank_pattern"), key, config["r"])
        if a.shape[0] != rank:
            raise ValueError(f"{file}: the rank of {module_path(key)} must be {rank} as in {CONFIG_FILE}, got {a.shape[0]}. Save it again.")
        alphas[key] = float(_by_pattern(config.get("alpha_pattern"), key, config["lora_alpha"]))
    alpha = float(config["lora_alpha"])
    return AdapterWeights(
        name=name,
        rank=max(a.shape[0] for a, _ in tensors.values()),
        alpha=alpha,
        tensors=tensors,
        alphas={key: value for key, value in alphas.items() if value != alpha},
        use_rslora=bool(config.get("use_rslora", False)),
        base=config.get("base_model_name_or_path"),
    )


def save_peft(weights: AdapterWeights, directory: str | Path, base_model_name: str | None = None) -> Path:
    """Write an ordinary PEFT directory: unscaled B, `adapter_config.json`, safetensors. It loads in PEFT with equal logits.

    `base_model_name` is recorded for PEFT's `AutoPeftModel`; None keeps the name that the weights record.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = peft_config(weights, base_model_name)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def peft_config(weights: AdapterWeights, base_model_name: str | None = None) -> dict[str, Any]:
    """What `adapter_config.json` says of these weights."""
    ranks = {key: a.shape[0] for key, (a, _) in weights.tensors.items()}
    layers = sorted({layer for layer, _ in ranks})
    is_product = len(ranks) == len(layers) * len(weights.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name or weights.base,
        "inference_mode": True,
        "r": weights.rank,
        "lora_alpha": weights.alpha,
        "lora_dropout": 0.0,
        "use_rslora": weights.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(weights.targets) if is_product else [module_path(key) for key in ranks],
        "layers_to_transform": layers if is_product else None,
        "rank_pattern": {module_path(key): rank for key, rank in ranks.items() if rank != weights.rank},
        "alpha_pattern": {module_path(key): alpha for key, alpha in weights.alphas.items()},
        "modules_to_save": None,
    }


def peft_tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    """The weights under the names of `adapter_model.safetensors`, on the CPU; they may be views of a larger buffer."""
    return {
        f"base_model.model.{module_path(key)}.lora_{letter}.weight": tensor.detach().cpu().contiguous()
        for key, pair in weights.tensors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def inside(folder: Path, name: str) -> Path:
    """The file `name` of an adapter's folder, if it is there and really lies inside. Raises FileNotFoundError, ValueError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"an adapter must be a directory, got {str(folder)!r}. Pass the folder that PEFT's save_pretrained wrote.")
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{file}: an adapter's files must lie inside its folder, got a link to {file.resolve()}. Copy the file there.")
    if not file.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if name == WEIGHTS_FILE and pickles:
            raise ValueError(
                f"{folder}: an adapter's weights must be safetensors, got {pickles[0]!r} (a pickle can run code). "
                "Save it again with PEFT's save_pretrained(..., safe_serialization=True)."
            )
        raise FileNotFoundError(f"an adapter directory must hold {name}, got {str(folder)!r}. Pass the folder that save_pretrained wrote.")
    return file


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{file}: must be a JSON object, got: {error}. Save the adapter again.") from error
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError for a damaged one."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: must be a complete safetensors file, got: {error}. Save the adapter again.") from error


# Fields that leave the result as it is, or that are read here; and those that change it in a way that only PEFT implements.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
_READ |= {"layers_to_transform", "layers_pattern", "base_model_name_or_path", "bias", "init_lora_weights"}
_HARMLESS = {"task_type", "inference_mode", "lora_dropout", "peft_version", "auto_mapping", "revision", "runtime_config", "megatron_core"}
_HARMLESS |= {"megatron_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"}
_VARIANTS = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (a full copy of a base module)",
    "fan_in_fan_out": "fan_in_fan_out (Conv1D bases)",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "target_parameters",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE_ADVICE = "Merge it into a copy of the base with PEFT's merge_and_unload() and serve that, or train a plain LoRA."


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be 'LORA', got {config.get('peft_type')!r}. {MERGE_ADVICE}")
    for name, words in _VARIANTS.items():
        if config.get(name):
            raise ValueError(f"{where}: {words} is not supported, got {name}={config[name]!r}. {MERGE_ADVICE}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias must be 'none', got {config['bias']!r}. {MERGE_ADVICE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"{where}: the base must be the original one, but init_lora_weights={init!r} changed it. "
            "Save with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    for name, value in config.items():
        if name not in _READ | _HARMLESS | set(_VARIANTS) and value:
            raise ValueError(f"{where}: {name}={value!r} is not supported. {MERGE_ADVICE}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for value in (rank, *(config.get("rank_pattern") or {}).values()):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
            raise ValueError(f"{where}: r must be a whole number in 1..{MAX_RANK}, got {value!r}. Save the adapter again.")
    for value in (alpha, *(config.get("alpha_pattern") or {}).values()):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: lora_alpha must be a number above 0, got {value!r}. Save the adapter again.")


def _pairs(flat: Mapping[str, Tensor], dims: Dims, file: Path) -> dict[Key, tuple[Tensor, Tensor]]:
    """A and B of every adapted linear, each checked."""
    found: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[4] not in LINEARS or _PARENT[match[4]] != match[3]:
            raise ValueError(f"{file}: tensors must belong to one of {', '.join(LINEARS)}, got {name!r}. {MERGE_ADVICE}")
        key = (int(match[2]), match[4])
        if key[0] >= dims.num_layers:
            raise ValueError(
                f"{file}: layers must lie in 0..{dims.num_layers - 1}, got {name!r}. Load it on the base that it was made for."
            )
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize not in (2, 4):
            raise ValueError(f"{file}: {name} must be fp32, bf16 or fp16, got {tensor.dtype}. Save the adapter again in one of these.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: weights must be finite, got NaN or infinity in {name!r}. Take an earlier checkpoint.")
        found.setdefault(key, {})[match[5]] = tensor
    if not found:
        raise ValueError(f"{file}: an adapter must hold at least one A and B, got none. Save the adapter again.")
    return {key: _pair(key, parts, dims, file) for key, parts in sorted(found.items(), key=lambda i: (i[0][0], LINEARS.index(i[0][1])))}


def _pair(key: Key, parts: Mapping[str, Tensor], dims: Dims, file: Path) -> tuple[Tensor, Tensor]:
    for letter in "AB":
        if letter not in parts:
            raise ValueError(f"{file}: every linear needs A and B, but lora_{letter} of {module_path(key)} is missing. Save it again.")
    a, b = parts["A"], parts["B"]
    width_in, width_out = dims.linear(key[1])
    rank = a.shape[0] if a.ndim == 2 else 0
    if tuple(a.shape) != (rank, width_in) or tuple(b.shape) != (width_out, rank):
        raise ValueError(
            f"{file}: A and B of {module_path(key)} must have shapes (r, {width_in}) and ({width_out}, r), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}. Load it on the base that it was made for."
        )
    return a.contiguous(), b.contiguous()


def _check_coverage(config: Mapping[str, Any], found: set[Key], dims: Dims, where: Path) -> None:
    """The tensors must be those that PEFT would load: no linear that the configuration names without weights, none beyond it."""
    named = config.get("target_modules")
    if not named:
        raise ValueError(f"{where}: target_modules must name the adapted linears, got {named!r}. Save the adapter again.")
    for extra in ("lm_head", "model.embed_tokens"):
        if _is_target(config, extra):
            raise ValueError(f"{where}: target_modules must be among the seven linears, got {extra!r}. {MERGE_ADVICE}")
    expected = {key for layer in range(dims.num_layers) for key in ((layer, t) for t in LINEARS) if _is_target(config, module_path(key))}
    order = sorted(expected ^ found)
    if order:
        lacking = "has no tensors" if order[0] in expected else "has tensors but is not in target_modules"
        raise ValueError(
            f"{where}: target_modules and the tensors must name the same linears, but {module_path(order[0])} {lacking}. "
            "Load it on the base that it was made for, or save it again."
        )
    if not isinstance(named, str):
        known = [module_path(key) for key in expected]
        for target in named:
            if not any(path == target or path.endswith(f".{target}") for path in known):
                raise ValueError(
                    f"{where}: target_modules must be among the seven linears, got {target!r}. {did_you_mean(target, LINEARS)}"
                )


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT puts an adapter at `path`: a list matches whole names or their ends, a string is a regular expression."""
    excluded, named = config.get("exclude_modules"), config["target_modules"]
    if excluded and _matches(excluded, path):
        return False
    if named == "all-linear":
        return path != "lm_head" and not path.endswith("embed_tokens")
    if not _matches(named, path):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(named, str) or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if match:
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def _matches(rule: str | Sequence[str], path: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in rule)


def _by_pattern(patterns: Mapping[str, Any] | None, key: Key, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first pattern that matches the end of the linear's path."""
    path = module_path(key)
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
