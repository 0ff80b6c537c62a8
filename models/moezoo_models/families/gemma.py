"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786)."""

from __future__ import annotations

from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig

from moezoo_models.families.family import (
    Family,
    activation,
    attention_biases,
    refuse,
    windows,
)


def _gemma(config: Any) -> dict[str, Any]:
    """Describe what both have: norms on both sides, embeddings times the root of their width."""
    refuse(
        config,
        {"use_bidirectional_attention": None},
        "lets tokens see later ones; only causal models are read, so set it to false",
    )
    return {
        "norm": "rms_offset",
        "norm_placement": "both",
        "attention_multiplier": config.query_pre_attn_scalar**-0.5,
        "embedding_multiplier": config.hidden_size**0.5,
        "final_logit_softcapping": config.final_logit_softcapping,
        **attention_biases(config),
        **windows(config),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    refuse(
        config,
        {"attn_logit_softcapping": None},
        "is not applied by transformers' Gemma 3; set it to null",
    )
    own = {kind: dict(config.rope_parameters[kind]) for kind in dict.fromkeys(config.layer_types)}
    return {"qk_norm": True, "rope_parameters": own, **_gemma(config)}


def _gemma2(config: Any) -> dict[str, Any]:
    return {"attn_logit_softcapping": config.attn_logit_softcapping, **_gemma(config)}


def _block(config: Any) -> dict[str, Any]:
    return {
        "d_ff": config.intermediate_size,
        "activation": activation("hidden_activation", config.hidden_activation),
        "gated": True,
        "bias": False,
    }


FAMILIES = {
    "gemma2": Family(Gemma2Config, _gemma2, _block),
    "gemma3_text": Family(Gemma3TextConfig, _gemma3, _block),
}
