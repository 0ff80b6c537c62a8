"""Llama and what differs from it in attention, factors or fused tensors only."""

from __future__ import annotations

from typing import Any

from transformers import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from moezoo.errors import InputError
from moezoo_models.families.family import (
    Family,
    attention_biases,
    gated_block,
    refuse,
    rope,
    windows,
)
from moezoo_models.files.layout import Rule


def _mistral(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"attention_bias": True, **windows(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, **attention_biases(config), **windows(config)}


def _smollm3(config: Any) -> dict[str, Any]:
    if not config.use_sliding_window and "sliding_attention" in config.layer_types:
        raise InputError(
            "use_sliding_window: false, but layer_types has sliding_attention; make them agree"
        )
    own = windows(config) if config.use_sliding_window else {}
    bare = [number for number, turned in enumerate(config.no_rope_layers) if not turned]
    if len(config.no_rope_layers) != config.num_hidden_layers:
        raise InputError(
            f"no_rope_layers: {len(config.no_rope_layers)} entries for num_hidden_layers "
            f"{config.num_hidden_layers}; give one per layer"
        )
    return {"nope_layers": bare, **attention_biases(config), **own}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(config.embedding_multiplier),
        "attention_multiplier": float(config.attention_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "logits_scaling": float(config.logits_scaling),
        **attention_biases(config),
    }


def _phi3(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "rope_parameters": rope(config, partial=True)}


def _phi3_layout(config: Any) -> tuple[Rule, ...]:
    """Split what is fused: queries, keys and values; gate and up."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys, width = config.num_key_value_heads * head_dim, config.intermediate_size
    attention, block = r"(model\.layers\.\d+\.self_attn)\.", r"(model\.layers\.\d+\.mlp)\."
    return (
        Rule(
            attention + r"qkv_proj\.weight",
            (r"\1.q_proj.weight", r"\1.k_proj.weight", r"\1.v_proj.weight"),
            (queries, keys, keys),
        ),
        Rule(
            block + r"gate_up_proj\.weight",
            (r"\1.gate_proj.weight", r"\1.up_proj.weight"),
            (width, width),
        ),
    )


def _stablelm(config: Any) -> dict[str, Any]:
    """Describe LayerNorm, a part of each head that turns, and perhaps blocks beside attention.

    Dropout of what blocks add is theirs in training only, and not taken over.
    """
    refuse(
        config,
        {"qk_layernorm": False},
        "is no option of this decoder; only models without it can be read",
    )
    turned = rope(config, partial=True)
    if turned.get("partial_rotary_factor") == 1.0:
        del turned["partial_rotary_factor"]
    return {
        "norm": "layer",
        "rms_norm_eps": config.layer_norm_eps,
        "attention_bias": config.use_qkv_bias,
        "parallel": "one_norm" if config.use_parallel_residual else "none",
        "rope_parameters": turned,
    }


FAMILIES = {
    "llama": Family(LlamaConfig, attention_biases, gated_block),
    "mistral": Family(MistralConfig, _mistral, gated_block),
    "qwen2": Family(Qwen2Config, _qwen2, gated_block),
    "qwen3": Family(Qwen3Config, _qwen3, gated_block),
    "granite": Family(GraniteConfig, _granite, gated_block),
    "phi3": Family(Phi3Config, _phi3, gated_block, _phi3_layout),
    "smollm3": Family(SmolLM3Config, _smollm3, gated_block),
    "stablelm": Family(StableLmConfig, _stablelm, gated_block),
}
