"""Tiny dense checkpoints of every family, with random weights that are not small."""

from __future__ import annotations

import argparse
import inspect
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


def configurations(**changes) -> dict[str, PreTrainedConfig]:
    """One per family, and what is special in each."""
    sizes = SIZES | changes
    return {
        "llama": LlamaConfig(**sizes),
        "llama_heads": LlamaConfig(
            **sizes, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
        ),
        "llama_linear": LlamaConfig(**sizes, rope_parameters=LINEAR_ROPE),
        "llama_bias": LlamaConfig(**sizes, attention_bias=True),
        "mistral": MistralConfig(**sizes, sliding_window=None),
        "mistral_window": MistralConfig(**sizes, sliding_window=16),
        "qwen2": Qwen2Config(**sizes),
        "qwen2_window": Qwen2Config(
            **sizes, use_sliding_window=True, sliding_window=16, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**sizes, head_dim=16),
        "olmo2": Olmo2Config(**sizes),
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


@pytest.fixture
def readable(tmp_path, byte_level_tokenizer):
    """Write a dense checkpoint with a tokenizer, and return its directory."""

    def write(name="llama", dtype=torch.float32, **changes) -> Path:
        config = configurations(vocab_size=300, **changes)[name]
        directory = write_dense(tmp_path / name, config, dtype)
        byte_level_tokenizer.save(directory)
        return directory

    return write


@pytest.fixture
def text(tmp_path):
    """Return what `carve` needs to calibrate quickly."""
    file = tmp_path / "text.txt"
    file.write_text(inspect.getsource(argparse))
    return {
        "calibration": str(file),
        "calibration_tokens": 768,
        "held_out_tokens": 256,
        "window": 64,
    }


RECIPE = Path(__file__).parents[3] / "configs" / "dense_small.yaml"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train a small Llama on the standard library's source: about a minute of one core."""
    from moezoo_models.checkpoints.export import export
    from moezoo_train.run.cli import run

    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "output": folder / "run",
        "data.data_dir": folder / "data",
        "data.max_bytes": 4_000_000,
        "model.d_model": 64,
        "model.num_heads": 2,
        "model.ffn.init_args.d_ff": 256,
        "trainer.max_steps": 400,
        "trainer.accelerator": "cpu",
    }
    run(["fit", "--config", str(RECIPE), *(f"--{key}={value}" for key, value in changes.items())])
    return export(folder / "run" / "model", folder / "llama")
