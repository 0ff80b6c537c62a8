"""A tiny model of each dense family, with what is special in it, and random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **IDS,
}
GATED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **IDS}
SOME_SLIDE = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.1, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}

CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "gemma3": lambda **v: Gemma3TextConfig(
        **GATED | v | SOME_SLIDE,
        head_dim=16,
        query_pre_attn_scalar=24,
        final_logit_softcapping=3.0,
        attention_bias=True,
        rope_parameters=GEMMA3_ROPE,
    ),
    "gemma2": lambda **v: Gemma2Config(
        **GATED | v | SOME_SLIDE,
        head_dim=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
        tie_word_embeddings=False,
    ),
    "granite": lambda **v: GraniteConfig(
        **GATED | v,
        embedding_multiplier=12.5,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=3.0,
        attention_bias=True,
    ),
    "granite_plain": lambda **v: GraniteConfig(**GATED | v, hidden_act="gelu"),
    "phi3": lambda **v: Phi3Config(**GATED | v, tie_word_embeddings=True),
    "phi3_partial": lambda **v: Phi3Config(
        **GATED | v, sliding_window=9, partial_rotary_factor=0.5
    ),
    "phi3_long": lambda **v: Phi3Config(
        **GATED | v, original_max_position_embeddings=24, rope_parameters=dict(LONG_ROPE)
    ),
    "smollm3": lambda **v: SmolLM3Config(**GATED | v, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda **v: StableLmConfig(**GATED | v, use_qkv_bias=True),
    "stablelm_parallel": lambda **v: StableLmConfig(
        **GATED | v, use_parallel_residual=True, partial_rotary_factor=1.0, layer_norm_eps=1e-3
    ),
    "smollm3_windows": lambda **v: SmolLM3Config(
        **GATED | v,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
    ),
    "smollm3_rotary": lambda **v: SmolLM3Config(**GATED | v, no_rope_layers=[1, 1, 1]),
    "olmo2": lambda **v: Olmo2Config(**GATED | v, attention_bias=True),
    "olmo3": lambda **v: Olmo3Config(**GATED | v | SOME_SLIDE),
    "olmo3_full": lambda **v: Olmo3Config(**GATED | v, layer_types=["full_attention"] * 3),
    "starcoder2": lambda **v: Starcoder2Config(**GATED | v, sliding_window=8, norm_epsilon=1e-3),
    "starcoder2_bare": lambda **v: Starcoder2Config(**GATED | v, use_bias=False, hidden_act="relu"),
    "gpt2": lambda **v: GPT2Config(**GPT2 | v, n_inner=48, layer_norm_epsilon=1e-3),
    "gpt2_unscaled": lambda **v: GPT2Config(
        **GPT2 | v, scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False
    ),
    "opt": lambda **v: OPTConfig(**SIZES | v, ffn_dim=48),
    "opt_bare": lambda **v: OPTConfig(
        **SIZES | v, ffn_dim=48, enable_bias=False, activation_function="gelu_new"
    ),
    # Known before the others; for what goes through the same code.
    "qwen3": lambda **v: Qwen3Config(**GATED | v, head_dim=16),
}


def stock(name: str, vocab_size: int = 101) -> Any:
    """Make transformers' model, all of whose tensors matter to the output."""
    torch.manual_seed(0)
    config = CONFIGS[name](vocab_size=vocab_size)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + 0.5 * (parameter.ndim == 1))
    return model.eval()


@pytest.fixture
def written(tmp_path) -> Callable[..., tuple[Any, Path]]:
    """Write the model of a name; return it and its directory."""

    def write(name: str, vocab_size: int = 101) -> tuple[Any, Path]:
        model = stock(name, vocab_size)
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return write
