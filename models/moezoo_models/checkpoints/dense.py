"""Dense Hugging Face models as ours: the same tensors under the same names, another config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from moezoo.errors import InputError, check_choice, nearest
from moezoo_models.files.fields import check_fields
from moezoo_models.model.config import MoezooConfig

DENSE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}
"""Configuration classes of the architectures that load as they are, by ``model_type``."""

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "flex_olmo")
"""Mixtures of transformers that are trained and run here as they are, by ``model_type``."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
    "leaky_relu": "leaky_relu",
}
"""transformers' names of activations, and ours."""


def dense_config(raw: Mapping[str, Any]) -> MoezooConfig:
    """Turn the ``config.json`` of a Llama, Mistral, Qwen2 or Qwen3 into ours.

    Args:
        raw: its parsed contents.

    Raises:
        InputError: another architecture, quantised weights, an unknown activation, or fields that
            transformers or this library refuse.
    """
    kind = str(raw.get("model_type"))
    if kind not in DENSE_CONFIGS:
        known = ("moezoo", *DENSE_CONFIGS)
        if kind in MIXTURES:
            raise InputError(
                f"model_type: '{kind}' is a stock mixture of experts, whose layers are not this "
                f"library's; give one of: {', '.join(known)}"
            )
        raise InputError(f"model_type: '{kind}' cannot be loaded{nearest(kind, known)}")
    check_fields(raw)
    try:
        config: Any = DENSE_CONFIGS[kind].from_dict(dict(raw))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"config.json: {' '.join(str(error).split())}") from error
    activation = check_choice("hidden_act", config.hidden_act, ACTIVATIONS)
    block = {
        "d_ff": config.intermediate_size,
        "activation": ACTIVATIONS[activation],
        "gated": True,
        "bias": getattr(config, "mlp_bias", False),
    }
    return MoezooConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        max_position_embeddings=config.max_position_embeddings,
        trained_length=raw.get("trained_length"),
        rope_parameters=dict(config.rope_parameters),
        rms_norm_eps=config.rms_norm_eps,
        attention_dropout=config.attention_dropout or 0.0,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        pad_token_id=_valid(config.pad_token_id, config.vocab_size),
        bos_token_id=_valid(config.bos_token_id, config.vocab_size),
        eos_token_id=_valid(config.eos_token_id, config.vocab_size),
        dtype=config.dtype,
        ffn=[{"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": block}],
        **_ATTENTION[kind](config),
    )


def _valid(token: Any, vocab_size: int) -> Any:
    """Drop ids outside the vocabulary, which published configs have for "no such token"."""
    if isinstance(token, list):
        return [each for each in token if 0 <= each < vocab_size]
    return token if token is not None and 0 <= token < vocab_size else None


def _llama(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"attention_bias": bias, "attention_output_bias": bias}


def _mistral(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"attention_bias": True, **_windows(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, **_llama(config), **_windows(config)}


def _windows(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "layer_types": list(config.layer_types)}


_ATTENTION: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""Differences of the architectures, all of them in attention."""
