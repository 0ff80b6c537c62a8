"""Inspecting how a mixture of transformers uses its experts, through the layers that adopt it."""

import json

import pytest
import torch
import transformers

from moezoo.__main__ import main
from moezoo_models.adopt import adopt, adopted_layers
from moezoo_models.inspect.specialization import inspect_experts
from moezoo_models.inspect.usage import count_usage, inspect_usage

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 5


@pytest.fixture
def mixtral(tmp_path, byte_level_tokenizer):
    """Save a Mixtral with a tokenizer; return it and its directory."""
    config = transformers.MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            torch.nn.init.normal_(parameter, mean=0.05)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer.save(tmp_path / "model")
    return model.eval(), tmp_path / "model"


def choices(model, tokens, length):
    """Count how often each layer's own router chooses each expert."""
    counts = torch.zeros(3, 8, dtype=torch.int64)
    for window in torch.tensor(tokens).split(length):
        logits = model.model(window[None], output_router_logits=True).router_logits
        for layer, found in enumerate(logits):
            counts[layer] += torch.bincount(found.topk(2).indices.flatten(), minlength=8)
    return counts


@pytest.mark.parametrize(("length", "batch_size"), [(16, 1), (16, 4), (7, 3), (64, 8)])
def test_counts_are_those_of_its_own_routers(mixtral, byte_level_tokenizer, length, batch_size):
    model, _ = mixtral
    tokens = byte_level_tokenizer.encode(TEXT)
    wanted = choices(model, tokens, length)
    adopt(model)
    usage = count_usage(model, tokens, sequence_length=length, batch_size=batch_size)
    assert list(usage.loads) == ["layer 0", "layer 1", "layer 2"]
    assert list(adopted_layers(model)) == [f"model.layers.{i}.mlp" for i in range(3)]
    for counts, load in zip(wanted, usage.loads.values(), strict=True):
        assert torch.equal(load.counts, counts)
        assert load.mass.sum().item() == pytest.approx(len(tokens), rel=1e-6)


def test_the_commands_take_a_directory_of_transformers(mixtral, byte_level_tokenizer, tmp_path):
    model, directory = mixtral
    text = tmp_path / "text"
    text.write_text(TEXT, encoding="utf-8", newline="")
    options = {"device": "cpu", "dtype": "float32", "sequence_length": 32}
    found = inspect_usage(directory, text, tmp_path / "usage", **options)
    wanted = choices(model, byte_level_tokenizer.encode(TEXT), 32)
    for counts, load in zip(wanted, found.loads.values(), strict=True):
        assert torch.equal(load.counts, counts)
    report = json.loads((tmp_path / "usage" / "usage.json").read_text())
    assert [entry["method"] for entry in report["layers"]] == ["SparseMoE"] * 3
    experts = inspect_experts(directory, text, tmp_path / "experts", **options)
    for counts, layer in zip(wanted, experts.counts.values(), strict=True):
        assert torch.equal(layer.sum(dim=0).long(), counts)


def test_neurons_of_a_directory_of_transformers_are_not_read(mixtral, tmp_path, capsys):
    _, directory = mixtral
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    for command in ("sparsity", "triggers", "spectrum"):
        arguments = ["--checkpoint", str(directory), "--text", str(tmp_path / "text")]
        output = tmp_path / command
        assert main(["inspect", command, *arguments, "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert "it is a MixtralForCausalLM of transformers" in said
        assert said.count("\n") == 1
        assert not output.exists()
