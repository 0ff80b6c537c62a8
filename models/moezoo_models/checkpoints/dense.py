"""Dense Hugging Face models as ours: the same tensors, another config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from moezoo.errors import InputError
from moezoo_models.families.family import ACTIVATIONS, rope
from moezoo_models.families.table import FAMILIES
from moezoo_models.families.unknown import instead
from moezoo_models.files.fields import check_fields
from moezoo_models.files.layout import Rule
from moezoo_models.model.config import MoezooConfig

DENSE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    kind: family.config for kind, family in FAMILIES.items()
}
"""Configuration classes of the architectures that load as they are, by ``model_type``."""

__all__ = [
    "ACTIVATIONS",
    "DENSE_CONFIGS",
    "MIXTURES",
    "WITH_MORE",
    "dense_config",
    "dense_layout",
    "dense_stock_config",
    "older_names",
]

WITH_MORE = {
    "gemma3": "model_type: 'gemma3' sees images, too; give its text model alone, a 'gemma3_text'"
}
"""Why models are not read that hold one of a family, and more."""

MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "granitemoe",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
)
"""Mixtures of transformers that are trained and run here as they are, by ``model_type``."""


def dense_config(raw: Mapping[str, Any]) -> MoezooConfig:
    """Turn the ``config.json`` of a dense model of a known family into ours.

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
        if kind in WITH_MORE:
            raise InputError(WITH_MORE[kind])
        raise InputError(f"model_type: '{kind}' cannot be loaded{instead(kind, known)}")
    check_fields(raw)
    config, family = dense_stock_config(raw), FAMILIES[kind]
    rule = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": family.block(config)}
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
        "head_dim": getattr(config, "head_dim", None),
        "max_position_embeddings": config.max_position_embeddings,
        "trained_length": raw.get("trained_length"),
        "rms_norm_eps": getattr(config, "rms_norm_eps", None),
        "attention_dropout": getattr(config, "attention_dropout", None) or 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": getattr(config, "initializer_range", None),
        "pad_token_id": _valid(config.pad_token_id, config.vocab_size),
        "bos_token_id": _valid(config.bos_token_id, config.vocab_size),
        "eos_token_id": _valid(config.eos_token_id, config.vocab_size),
        "dtype": config.dtype,
        "ffn": [rule],
    }
    if getattr(config, "rope_parameters", None) is not None:
        common["rope_parameters"] = rope(config)
    given = {name: value for name, value in common.items() if value is not None}
    return MoezooConfig(**given | family.options(config))


def dense_layout(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return what the tensors of a directory are here; nothing where they have our names.

    Args:
        raw: its parsed ``config.json``, of ours or of a dense model.
    """
    family = FAMILIES.get(str(raw.get("model_type")))
    return () if family is None else family.layout(dense_stock_config(raw))


def older_names(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return what tensors of older files are in transformers' model.

    Args:
        raw: the parsed ``config.json``.
    """
    family = FAMILIES.get(str(raw.get("model_type")))
    return () if family is None else family.older


def dense_stock_config(raw: Mapping[str, Any]) -> Any:
    """Make transformers' configuration of a dense model.

    Args:
        raw: its parsed ``config.json``.

    Raises:
        InputError: it refuses a field.
    """
    try:
        return DENSE_CONFIGS[str(raw.get("model_type"))].from_dict(dict(raw))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"config.json: {' '.join(str(error).split())}") from error


def _valid(token: Any, vocab_size: int) -> Any:
    """Drop ids outside the vocabulary, which published configs have for "no such token"."""
    if isinstance(token, list):
        return [each for each in token if 0 <= each < vocab_size]
    return token if token is not None and 0 <= token < vocab_size else None
