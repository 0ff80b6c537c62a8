"""Architectures that are not known: their name is what is wrong, and no other one is offered."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, PhiConfig

from moezoo.__main__ import main

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("command", ["upcycle", "generate", "export"])
@pytest.mark.parametrize("kind", ["bert", "phi"])
def test_its_name_is_refused_before_its_tensors(command, kind, tmp_path, capsys):
    if kind == "bert":
        model = AutoModelForMaskedLM.from_config(BertConfig(**SIZES))
    else:
        model = AutoModelForCausalLM.from_config(PhiConfig(**SIZES))
    source = tmp_path / kind
    model.save_pretrained(source)
    capsys.readouterr()
    words = ["--checkpoint", str(source)] if command == "generate" else [str(source), "out"]
    assert main([command, *words]) == 2
    said = capsys.readouterr().err
    assert f"model_type: '{kind}' cannot be " in said
    assert "; choose from: " in said
    assert "llama" in said
    assert said.count("\n") == 1
