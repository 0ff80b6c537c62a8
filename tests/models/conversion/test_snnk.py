"""Checkpoints of random features compute what was fitted, and every command reads them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

import moezoo
from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models import conversion
from moezoo_models.checkpoints.directory import load_checkpoint, quiet, save_checkpoint
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.snnk import snnk

BLOCK = ("up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias")


@pytest.fixture
def gpt2(tmp_path, byte_level_tokenizer):
    """Write a dense model whose blocks are plain, with biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    with quiet():
        model = AutoModelForCausalLM.from_config(GPT2Config(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "gpt2")
    byte_level_tokenizer.save(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("family", ["llama_heads", "olmo2", "gpt2"])
def test_the_checkpoint_computes_what_was_fitted(family, readable, request, text, tmp_path, capsys):
    source = request.getfixturevalue("gpt2") if family == "gpt2" else readable(family)
    made = snnk(source, tmp_path / "out", layers=[1, 2], **text)
    features = 64 if family == "gpt2" else 36
    assert made.options["features"] == features
    assert made.work == pytest.approx(0.5)
    # Attention over a text's first token, which is fitted apart, included.
    assert made.perplexity["loaded"] == pytest.approx(made.perplexity["features"], rel=1e-5)
    for name in ("features", "pruned"):
        assert made.perplexity[name] != pytest.approx(made.perplexity["dense"], rel=1e-4)
    assert list(made.layers) == ["1", "2"]
    for errors in made.layers.values():
        assert list(errors.fitted)[-1] == str(features)
        assert 0 < errors.fitted[str(features)] < 1.5

    model = load_any(tmp_path / "out")
    kinds = [(type(block.mlp), block.mlp.d_ff) for block in model.model.blocks()]
    assert kinds[1:] == [(moezoo.DenseFFN, features)] * 2
    assert kinds[0] != kinds[1]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".mlp.")[1] for name in tensors if ".2.mlp." in name} == set(BLOCK)
    assert not tensors["model.layers.1.mlp.up_proj.bias"].any()
    if family == "llama_heads":
        old = load_file(source / "model.safetensors")
        replaced = ("model.layers.1.mlp.", "model.layers.2.mlp.")
        kept = {name: tensor for name, tensor in old.items() if not name.startswith(replaced)}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())
        assert len(tensors) == len(kept) + 2 * len(BLOCK)
    printed = capsys.readouterr().out
    ratio = made.perplexity["pruned"] / made.perplexity["dense"]
    assert "pruned to the same work" in printed
    assert f"× {ratio:.3f}" in printed
    report = json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())
    assert report["layers"]["1"]["fitted"] == made.layers["1"].fitted


def test_it_is_saved_again_bit_for_bit_and_bf16_stays_bf16(readable, text, tmp_path):
    source = readable("llama", torch.bfloat16)
    snnk(source, tmp_path / "out", 8, layers=[1], check="none", **text)
    model, tokenizer = load_checkpoint(tmp_path / "out", dtype="auto")
    save_checkpoint(tmp_path / "again", model, tokenizer)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}


def test_an_interrupted_run_goes_on_where_it_was(readable, text, tmp_path, monkeypatch):
    source = readable()
    expected = snnk(source, tmp_path / "whole", 8, check="none", **text)
    save, saved = conversion.featuring.save_block, []

    def interrupted(directory, layer, block):
        save(directory, layer, block)
        saved.append(layer)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.featuring, "save_block", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        snnk(source, tmp_path / "out", 8, check="none", **text)
    assert not (tmp_path / "out").exists()
    assert snnk(source, tmp_path / "out", 8, check="none", **text) == expected
    assert saved == [0, 1, 1, 2]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


def test_other_commands_read_it(readable, text, tmp_path, capsys):
    out, file = tmp_path / "out", text["calibration"]
    sizes = ["--features", "8", "--layers", "[1]", "--check", "none", "--window", "64"]
    sizes += ["--calibration_tokens", "256", "--held_out_tokens", "64", "--calibration", file]
    assert main(["snnk", str(readable()), str(out), *sizes]) == 0
    assert "as r^-1/2" in capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", str(out), "--text", file, "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
    prompt = ["--prompt", "def ", "--max_new_tokens", "5", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(out), *prompt]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "features: 1 is out of range"),
        ({"features": 500}, "features: 500 cannot be fitted to 768 tokens; lower features"),
        ({"layers": [7]}, "layers: there is no layer 7"),
        ({"calibration_tokens": 10**9}, "calibration"),
        ({"check": "some"}, "check: 'some' is not known"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(options, message, readable, text, tmp_path):
    source = readable()
    with pytest.raises(InputError, match=message) as caught:
        snnk(source, tmp_path / "out", **{**text, **options})
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
