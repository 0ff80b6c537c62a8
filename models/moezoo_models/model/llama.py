"""Which fields of a configuration make the decoder another one than a Llama."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moezoo_models.model.config import MoezooConfig

_LLAMA: dict[str, Any] = {
    "positions": "rotary",
    "nope_layers": [],
    "norm": "rms",
    "norm_placement": "pre",
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "qk_norm_over": "head",
    "latent_attention": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
    "memory": [],
    "parallel": "none",
    "attention_experts": None,
}
"""Fields as a Llama has them; what Mistral, Qwen2 and Qwen3 have otherwise is not among them."""


def beyond_llama(config: MoezooConfig, allowed: Collection[str] = ()) -> str | None:
    """Name the first field by which a model is no Llama; None if there is none.

    Args:
        config: of the model.
        allowed: fields that may be otherwise.
    """
    for field, value in _LLAMA.items():
        if field not in allowed and getattr(config, field) != value:
            return field
    rope = config.rope_parameters
    if "rope_parameters" in allowed and "rope_type" in rope:
        return None
    whole = "rope_type" in rope and rope.get("partial_rotary_factor", 1.0) == 1.0
    return None if whole else "rope_parameters"
