"""Tiny dense checkpoints of every family, with random weights that are not small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def configurations() -> dict[str, PreTrainedConfig]:
    """One per family, and what is special in each."""
    return {
        "llama": LlamaConfig(**SIZES),
        "llama_heads": LlamaConfig(
            **SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
        ),
        "llama_linear": LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
        "llama_bias": LlamaConfig(**SIZES, attention_bias=True),
        "mistral": MistralConfig(**SIZES, sliding_window=None),
        "mistral_window": MistralConfig(**SIZES, sliding_window=16),
        "qwen2": Qwen2Config(**SIZES),
        "qwen2_window": Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**SIZES, head_dim=16),
        "olmo2": Olmo2Config(**SIZES),
    }


def write_dense(directory: Path, config: PreTrainedConfig, dtype=torch.float32, **options) -> Path:
    """Save a model whose weights, biases and norms are all random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(directory, **options)
    return directory


@pytest.fixture
def dense(tmp_path):
    """Write the dense checkpoint of a name and return its directory."""

    def write(name="llama", dtype=torch.float32, **options) -> Path:
        return write_dense(tmp_path / name, configurations()[name], dtype, **options)

    return write
