"""Tiny directories to start from: dense, upcycled and carved."""

import argparse
import inspect
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from moezoo_models.checkpoints.directory import quiet
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.train_tokenizer import train_tokenizer

DENSE = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
}
UPCYCLED = {
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "glm4_moe": "llama",
    "granitemoe": "llama",
    "flex_olmo": "olmo2",
}
VOCABULARY = 300


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a folder of small documents of words in random order."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "bread", "over")
    generator = random.Random(0)
    for number in range(30):
        text = " ".join(generator.choice(words) for _ in range(120))
        (folder / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


@pytest.fixture(scope="session")
def directory(tmp_path_factory, corpus):
    """Return a function that gives the directory of a name, made once, with a tokenizer."""
    folder = tmp_path_factory.mktemp("directories")
    tokenizer = folder / "tokenizer"
    train_tokenizer((f.read_text() for f in sorted(corpus.iterdir())), tokenizer, VOCABULARY)

    @cache
    def make(name: str) -> Path:
        target = folder / name
        if name in DENSE:
            torch.manual_seed(0)
            config = DENSE[name](
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=48,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=None,
            )
            with quiet():
                AutoModelForCausalLM.from_config(config).save_pretrained(target)
            load_tokenizer(tokenizer).save(target)
        elif name == "carved":
            text = folder / "text.txt"
            text.write_text(inspect.getsource(argparse))
            options = {"calibration_tokens": 512, "held_out_tokens": 128, "window": 32}
            options["sparsified"] = False
            split = {"split": "cmoe", "router": "cmoe", "refit": False, "to": "moezoo"}
            carve(make("llama"), target, 1, 3, 6, calibration=str(text), **options, **split)
        elif name == "ours":
            upcycle(make("llama"), target, experts=4, top_k=2, to="moezoo")
        else:
            upcycle(make(UPCYCLED[name]), target, experts=4, top_k=2, to=name)
        return target

    return make


@pytest.fixture
def copy_of(directory, tmp_path):
    """Return a function that gives a copy of a directory, to change."""
    return lambda name: Path(shutil.copytree(directory(name), tmp_path / name))


@pytest.fixture
def command(corpus, tmp_path):
    """Return a function that gives the arguments of a run of six steps from a directory."""

    def build(name: str, start: Path, **changes) -> list[str]:
        options = {
            "output": tmp_path / name,
            "checkpoint_every": 2,
            "loggers": "[csv]",
            "sample_tokens": 0,
            "trainer.max_steps": 6,
            "trainer.accelerator": "cpu",
            "trainer.val_check_interval": 4,
            "trainer.limit_val_batches": 2,
            "trainer.log_every_n_steps": 2,
            "trainer.enable_progress_bar": "false",
            "data.source": corpus,
            "data.data_dir": tmp_path / "data",
            "data.sequence_length": 16,
            "data.batch_size": 2,
            "model.initialize_from": start,
            "model.optimizer.lr": 1e-2,
            "model.schedule.name": "constant",
            "model.schedule.warmup_steps": 1,
        }
        return ["fit", *(f"--{key}={value}" for key, value in (options | changes).items())]

    return build
