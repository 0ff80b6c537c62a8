"""Blocks that are fused: exactly their sum, and not the model in which they follow each other."""

from __future__ import annotations

import argparse
import inspect
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, quiet
from moezoo_models.conversion.fuse import fuse_layers
from moezoo_models.conversion.fusing import dependencies
from moezoo_models.conversion.source import open_source
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.train_tokenizer import train_tokenizer

LAYERS = 5
SIZES = {
    "vocab_size": 340,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
KINDS = {
    "llama": (LlamaConfig, SIZES),
    "gemma2": (Gemma2Config, SIZES | {"head_dim": 8, "num_key_value_heads": 1}),
    "gpt2": (GPT2Config, {"vocab_size": 340, "n_layer": 5, "n_embd": 16, "n_head": 2}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a function that writes a model whose norms' weights are powers of two."""
    folder = tmp_path_factory.mktemp("fuse")
    text = inspect.getsource(argparse)[:40_000]
    (folder / "text.txt").write_text(text)
    train_tokenizer([text], folder / "tokenizer", 340)

    def make(name: str):
        if (folder / name).is_dir():
            return folder / name
        torch.manual_seed(0)
        kind, sizes = KINDS[name]
        with quiet():
            model = AutoModelForCausalLM.from_config(
                kind(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=None)
            )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            else:
                parameter.data = 2.0 ** torch.randint(-2, 3, parameter.shape)
        model.save_pretrained(folder / name)
        load_tokenizer(folder / "tokenizer").save(folder / name)
        return folder / name

    return make


def options(dense) -> dict:
    text = str(dense("llama").parent / "text.txt")
    return {
        "calibration": text,
        "calibration_tokens": 32,
        "held_out_tokens": 32,
        "window": 16,
    }


class Beside(nn.Module):
    """Blocks that read the same."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden):
        return sum(layer.mlp(layer.post_attention_layernorm(hidden)) for layer in self.layers)


def test_a_fused_block_is_the_sum_of_the_blocks(dense, tmp_path, capsys):
    source = dense("llama")
    made = fuse_layers(source, tmp_path / "out", 1, 4, **options(dense))
    fused = load_checkpoint(tmp_path / "out")[0].double()
    assert [block.mlp.d_ff for block in fused.model.blocks()] == [24, 72, 24]
    with quiet():
        serial = AutoModelForCausalLM.from_pretrained(source).double()
        beside = AutoModelForCausalLM.from_pretrained(source).double()
    layers = beside.model.layers
    wide = Beside(
        nn.ModuleDict({"mlp": each.mlp, "post_attention_layernorm": each.post_attention_layernorm})
        for each in layers[1:4]
    )
    for each in wide.layers:
        each.mlp, each.post_attention_layernorm = each["mlp"], each["post_attention_layernorm"]
    layers[1].mlp, layers[1].post_attention_layernorm = wide, nn.Identity()
    beside.model.layers = nn.ModuleList([layers[0], layers[1], layers[4]])
    beside.config.num_hidden_layers = 3
    tokens = torch.randint(340, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected, other = (
            model(input_ids=tokens, use_cache=False).logits for model in (fused, beside, serial)
        )
    # The weight of RMSNorm is applied to rounded numbers, of fp32 in both.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, other, atol=1e-2)

    report = json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())
    assert report["dependencies"] == made.dependencies
    printed = capsys.readouterr().out
    assert "fused the blocks of layers 1 to 3" in printed
    assert f"{made.dependencies[1][3]:.3f}" in printed
    assert made.perplexity["fused"] != made.perplexity["dense"]


def test_dependencies_are_those_of_models_without_a_layer(dense):
    tokens = torch.randint(340, (2, 12), generator=torch.Generator().manual_seed(0))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(dense("llama"))
    layers = list(model.model.layers)

    def added(left_out: int | None) -> dict[int, torch.Tensor]:
        found = {}

        def note(number: int):
            def hook(_, given, out):
                out = out[0] if isinstance(out, tuple) else out
                found[number] = out - given[0]

            return hook

        hooks = [layer.register_forward_hook(note(n)) for n, layer in enumerate(layers)]
        kept = [layer for number, layer in enumerate(layers) if number != left_out]
        model.model.layers = nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    whole = added(None)
    with open_source(dense("llama")) as source:
        found = dependencies(source, tokens, torch.device("cpu"))
    assert found.shape == (LAYERS, LAYERS)
    for i in range(LAYERS):
        without = added(i)
        for j in range(LAYERS):
            if j <= i:
                assert found[i, j] == 0
                continue
            cosine = torch.cosine_similarity(whole[j], without[j], dim=-1)
            assert found[i, j] == pytest.approx(float((1 - cosine).mean()), abs=1e-4)
            assert found[i, j] > 1e-3


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("llama", (1, 2), "last: 2 does not end a run of three"),
        ("llama", (1, 5), "last: 5 does not end a run of three"),
        ("llama", (3, 1), "last: 1 does not end a run of three .* layers; give a smaller first$"),
        ("llama", (-1, 2), "first: -1 is out of range"),
        ("gemma2", (1, 3), "source: a gemma2 has other norms"),
        ("gpt2", (1, 3), "source: a gpt2 has other norms"),
    ],
)
def test_mistakes(name, run, message, dense, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        fuse_layers(dense(name), tmp_path / "out", *run, **options(dense))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
