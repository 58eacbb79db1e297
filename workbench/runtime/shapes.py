"""Named model shapes: the configurations that random weights are drawn for. Published shapes as in the models' own config.json."""

from typing import Any

from workbench.config import did_you_mean


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


def _sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
    }


_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TINY = _sizes(vocab=128, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, positions=512)
_TINY_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_LLAMA3_IDS = {"bos_token_id": 128000, "eos_token_id": 128001}
_QWEN_IDS = {"bos_token_id": None, "eos_token_id": 151643}

# name -> (transformers model type, config fields)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": (
        "llama",
        _sizes(128256, 4096, 14336, 32, 32, 8, 8192) | {"rms_norm_eps": 1e-5, "rope_parameters": _rope(5e5)} | _LLAMA3_IDS,
    ),
    "llama3-1b": (
        "llama",
        _sizes(128256, 2048, 8192, 16, 32, 8, 131072)
        | {"rms_norm_eps": 1e-5, "head_dim": 64, "tie_word_embeddings": True, "rope_parameters": _rope(5e5, **_LLAMA3_SCALING)}
        | _LLAMA3_IDS,
    ),
    "mistral-7b": (
        "mistral",
        _sizes(32768, 4096, 14336, 32, 32, 8, 32768)
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": _rope(1e6), "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2.5-7b": (
        "qwen2",
        _sizes(152064, 3584, 18944, 28, 28, 4, 131072) | {"rms_norm_eps": 1e-6, "rope_parameters": _rope(1e6)} | _QWEN_IDS,
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        _sizes(151936, 896, 4864, 24, 14, 2, 32768)
        | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)}
        | _QWEN_IDS,
    ),
    "qwen3-8b": (
        "qwen3",
        _sizes(151936, 4096, 12288, 36, 32, 8, 40960) | {"rms_norm_eps": 1e-6, "head_dim": 128, "rope_parameters": _rope(1e6)} | _QWEN_IDS,
    ),
    "qwen3-0.6b": (
        "qwen3",
        _sizes(151936, 1024, 3072, 28, 16, 8, 40960)
        | {"rms_norm_eps": 1e-6, "head_dim": 128, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)}
        | _QWEN_IDS,
    ),
    "smollm2-135m": (
        "llama",
        _sizes(49152, 576, 1536, 30, 9, 3, 8192)
        | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_parameters": _rope(1e5), "bos_token_id": 1, "eos_token_id": 2},
    ),
    # For tests: two layers each; between them GQA, a sliding window, q/k/v bias, q/k norm with Nq * D != H, tied and untied embeddings.
    "tiny-llama": ("llama", _TINY | {"rope_parameters": _rope(1e4)} | _TINY_IDS),
    "tiny-mistral": ("mistral", _TINY | {"rope_parameters": _rope(1e4), "sliding_window": 256} | _TINY_IDS),
    "tiny-qwen2": ("qwen2", _TINY | {"rope_parameters": _rope(1e4), "tie_word_embeddings": True} | _TINY_IDS),
    "tiny-qwen3": ("qwen3", _TINY | {"rope_parameters": _rope(1e4), "head_dim": 32} | _TINY_IDS),
}


def names() -> tuple[str, ...]:
    """The named shapes."""
    return tuple(SHAPES)


def config(name: str) -> Any:
    """The transformers configuration of a named shape (a new one each time). Raises ValueError, with a did-you-mean, for another name."""
    if name not in SHAPES:
        raise ValueError(f"shape must be a named one, got {name!r}. {did_you_mean(name, names())}")
    from transformers import AutoConfig

    model_type, values = SHAPES[name]
    return AutoConfig.for_model(model_type, **{k: dict(v) if isinstance(v, dict) else v for k, v in values.items()})
