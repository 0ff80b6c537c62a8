"""`moezoo inspect triggers`: a planted key and value is recovered, files."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo.__main__ import main
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.triggers import find_triggers

TEXT = "equal or quite liquid, no query, a quiz; Über 素数 " * 4
NEURON, EXPERT = 5, 2


@pytest.fixture
def plant(make, rules):
    """Plant a neuron that sees q and says u, which follows it, in a model without attention."""

    def build(tokenizer, routed):
        rule = rules["rule"]
        dense = rule("DenseFFN", d_ff=12, gated=False, activation="relu")
        hashed = rule("HashLayer", num_experts=3, d_expert=12, vocab_size=257)
        model = make(
            ffn=[hashed if routed else dense],
            vocab_size=257,
            num_hidden_layers=1,
            max_position_embeddings=512,
        )
        (q,), (u,) = tokenizer.encode("q"), tokenizer.encode("u")
        with torch.no_grad():
            (block,) = model.model.layers
            block.self_attn.o_proj.weight.zero_()
            key = model.model.embed_tokens.weight[q]
            value = 5 * model.lm_head.weight[u] / model.lm_head.weight[u].norm()
            if routed:
                block.mlp.set_table(torch.full((257,), EXPERT))
                block.mlp.experts.gate_up_proj[EXPERT, NEURON] = 9 * key / key.norm()
                block.mlp.experts.down_proj[EXPERT, :, NEURON] = value
            else:
                block.mlp.up_proj.weight[NEURON] = 9 * key / key.norm()
                block.mlp.down_proj.weight[:, NEURON] = value
        return model, q, u

    return build


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("length", "batch_size"), [(16, 2), (500, 8)])
def test_a_planted_pair_is_recovered_at_rank_0(plant, byte_tokenizer, routed, length, batch_size):
    model, q, u = plant(byte_tokenizer, routed)
    tokens = byte_tokenizer.encode(TEXT)
    model.train()
    found = find_triggers(model, tokens, triggers=3, sequence_length=length, batch_size=batch_size)[
        "layer 0"
    ]
    assert model.training
    neuron = EXPERT * 12 + NEURON if routed else NEURON
    assert [tokens[place] for place in found.positions[neuron].tolist()] == [q] * 3
    assert len(set(found.positions[neuron].tolist())) == 3
    assert found.says.tokens[neuron, 0] == u
    assert found.says.ranks[neuron] == 0
    assert found.strength().argmax() == neuron
    assert found.neurons.label(neuron) == (f"expert {EXPERT}, {NEURON}" if routed else str(NEURON))
    if routed:  # nobody went to the other experts
        assert found.agreement.neurons <= 12
        assert (found.positions[:12] == -1).all()
    assert found.agreement.agree >= 1 / found.agreement.neurons


def test_the_command_prints_and_writes(plant, byte_level_tokenizer, tmp_path, capsys):
    model, _, u = plant(byte_level_tokenizer, False)
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    output = tmp_path / "new" / "triggers"
    command = ["inspect", "triggers", "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--text", str(tmp_path / "text"), "--neurons", "4", "--triggers", "3"]
    assert main([*command, "--device", "cpu"]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "triggers.csv", "triggers.json", "triggers.png", "triggers.safetensors",
    ]  # fmt: skip
    (layer,) = json.loads((output / "triggers.json").read_text(encoding="utf-8"))["layers"]
    assert len(layer["neurons"]) == 4
    best = layer["neurons"][0]
    assert (best["number"], best["says"][0]["text"]) == (NEURON, "u")
    assert all(trigger["text"].endswith("q") for trigger in best["triggers"])
    assert {trigger["next"] for trigger in best["triggers"]} == {"u"}
    with (output / "triggers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["says"].startswith("'u' ")
    assert load_file(output / "triggers.safetensors")["layer 0.says"][NEURON, 0] == u
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("0 "))
    assert shown.endswith("'u'") or "'u' '" in shown

    assert main([*command, "--top_tokens", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "top_tokens" in line
