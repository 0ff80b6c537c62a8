"""Layers that are left out: measured like the model that is written, under new numbers."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
)

from moezoo import InputError
from moezoo_models.checkpoints.directory import quiet
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.drop import choose, drop_layers
from moezoo_models.conversion.dropping import Start, angular_distance
from moezoo_models.conversion.recovery import trained_weights
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.train_tokenizer import train_tokenizer

LAYERS = 4
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 2}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0]}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 8}),
    "phi3": (Phi3Config, {}),
    "gpt2": (GPT2Config, {"n_layer": LAYERS, "n_embd": 16, "n_head": 2, "n_positions": 32}),
    "opt": (OPTConfig, {"ffn_dim": 24, "word_embed_proj_dim": 16}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("drop")
    text = inspect.getsource(argparse)[:40_000]
    (made / "text.txt").write_text(text)
    train_tokenizer([text], made / "tokenizer", 340)
    return made


@pytest.fixture(scope="module")
def dense(folder):
    """Return a function that writes a dense model of a family, once."""

    @cache
    def make(name: str):
        torch.manual_seed(0)
        kind, own = FAMILIES[name]
        common = {
            "vocab_size": 340,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
        }
        if name == "gpt2":
            common = {"vocab_size": 340}
        if name == "opt":
            del common["num_key_value_heads"]
        with quiet():
            model = AutoModelForCausalLM.from_config(
                kind(**common | own, bos_token_id=0, eos_token_id=1, pad_token_id=None)
            )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
        load_tokenizer(folder / "tokenizer").save(folder / name)
        return folder / name

    return make


def options(folder) -> dict:
    return {
        "calibration": str(folder / "text.txt"),
        "calibration_tokens": 48,
        "held_out_tokens": 32,
        "window": 16,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_the_stock_model_without_the_layers(name, dense, folder, tmp_path):
    source = dense(name)
    drop_layers(source, tmp_path / "out", 2, first=1, check="none", **options(folder))
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(source)
        fewer = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inner = whole.base_model
    inner = getattr(inner, "decoder", inner)
    place = "h" if name == "gpt2" else "layers"
    blocks = getattr(inner, place)
    kept = torch.nn.ModuleList([blocks[0], blocks[3]])
    setattr(inner, place, kept)
    config = inner.config
    assert config is whole.config
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0], config.layer_types[3]]
    tokens = torch.randint(340, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(input_ids=tokens, use_cache=False).logits
        found = fewer(input_ids=tokens, use_cache=False).logits
    assert torch.equal(found, expected)
    assert type(fewer) is type(whole)
    # What a recovery would train.
    parts = ("fc1", "fc2") if name == "opt" else ("mlp",)
    inner = getattr(fewer.base_model, "decoder", fewer.base_model)
    blocks = [getattr(each, part) for each in getattr(inner, place) for part in parts]
    wanted = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert {id(parameter) for parameter in trained_weights(fewer).values()} == wanted


def test_measured_losses_are_those_of_what_is_written(dense, folder, tmp_path, capsys):
    source = dense("llama")
    again = options(folder) | {"held_out_tokens": 48, "calibration_tokens": 48}
    first = drop_layers(source, tmp_path / "loss", 1, check="none", **again)
    assert first.first == min(first.starts, key=lambda start: start.nats).first
    printed = capsys.readouterr().out
    assert all(f"{start.nats:.4f}" in printed for start in first.starts)
    assert all(f"{start.distance:.4f}" in printed for start in first.starts)
    by_angle = drop_layers(source, tmp_path / "angle", 1, by="angle", check="none", **again)
    assert by_angle.first == min(by_angle.starts, key=lambda start: start.distance).first
    report = json.loads((tmp_path / "angle" / "moezoo_conversion.json").read_text())
    assert report["first"] == by_angle.first

    # The same text once more, as what is held out.
    from moezoo_models.conversion import drop
    from moezoo_models.conversion.calibration import Calibration

    read = drop.calibrate

    def same(*arguments):
        text = read(*arguments)
        return Calibration(text.fitted, text.fitted, text.skipped, text.source, text.seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop, "calibrate", same)
        start = by_angle.starts[1]
        made = drop_layers(source, tmp_path / "1", 1, first=1, **again)
        assert math.log(made.perplexity["dropped"]) == pytest.approx(start.nats, rel=1e-5)
        assert math.log(made.perplexity["dense"]) == pytest.approx(made.dense_nats, rel=1e-5)


def test_angles():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3e-3, 4e-3]])
    after = torch.tensor([[0.0, 2.0], [-1.0, 0.0], [3.0, 4.0]])
    found = [angular_distance(before[n : n + 1], after[n : n + 1]) for n in range(3)]
    assert found == pytest.approx([0.5, 1.0, 0.0], abs=1e-3)
    assert angular_distance(before, after) == pytest.approx(0.5, abs=1e-3)
    rows = torch.randn(64, 300)
    assert angular_distance(rows.bfloat16(), rows.bfloat16()) == pytest.approx(0.0, abs=1e-3)


def test_rules():
    starts = [Start(0, 0.3, 2.0), Start(1, 0.1, 3.0), Start(2, 0.1, 2.5), Start(3, 0.2, 2.1)]
    assert [choose(starts, by) for by in ("loss", "angle", "deepest")] == [0, 2, 2]
    assert choose(starts[:1], "deepest") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 4}, "count: the model has 4 layers; drop fewer"),
        ({"count": 0}, "count: 0 is out of range"),
        ({"first": 3}, "first: 3 is out of range"),
        ({"by": "size"}, "by: 'size'"),
        ({"check": "all"}, "check: 'all'"),
        ({"max_shard_size": "5"}, "max_shard_size: '5' is no size"),
        ({"recover": -1}, "recover: -1 is out of range"),
        ({"recovery": RecoveryOptions(lr=1e-3)}, "recovery: nothing is recovered; give recover"),
    ],
)
def test_mistakes(changes, message, dense, folder, tmp_path):
    given = {"count": 2} | options(folder) | changes
    with pytest.raises(InputError, match=message) as caught:
        drop_layers(dense("llama"), tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
