"""`moezoo inspect sparsity`: planted neurons in a model, files, mistakes."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo.__main__ import main
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.sparsity import measure_sparsity

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 4


@pytest.fixture
def planted(make, rules):
    """Of layer 0 only neurons 3 and 5 can fire, of layer 1 all of one expert."""
    rule = rules["rule"]
    ffn = [
        rule("DenseFFN", d_ff=8, gated=False, activation="relu", bias=True),
        rule("SparseMoE", 1, num_experts=4, top_k=2, d_expert=6, num_shared_experts=1),
    ]
    model = make(ffn=ffn, vocab_size=257, num_hidden_layers=2, max_position_embeddings=512)
    with torch.no_grad():
        block = model.model.layers[0].mlp
        block.up_proj.weight.zero_()
        block.up_proj.bias.fill_(-1.0)
        block.up_proj.bias[[3, 5]] = torch.tensor([1.0, 0.001])
    return model


@pytest.mark.parametrize(("length", "batch_size"), [(16, 3), (500, 8)])
def test_planted_neurons_are_found(planted, byte_tokenizer, length, batch_size):
    tokens = byte_tokenizer.encode(TEXT)
    found = measure_sparsity(planted, tokens, sequence_length=length, batch_size=batch_size)
    assert list(found.summaries) == ["layer 0", "layer 1", "layer 1, shared expert"]
    n = len(tokens)
    assert found.nonzero["layer 0"].tolist() == [0, 0, 0, n, 0, n, 0, 0]
    assert found.strong["layer 0"].tolist() == [0, 0, 0, n, 0, 0, 0, 0]
    assert found.summaries["layer 0"].nonzero == pytest.approx(2 / 8)
    assert found.summaries["layer 1"].computed == pytest.approx(2 / 4)
    assert found.summaries["layer 1, shared expert"].computed == 1.0
    assert found.summaries["layer 1"].tokens == n
    everything = measure_sparsity(planted, tokens, threshold=0.0, sequence_length=length)
    assert torch.equal(everything.strong["layer 0"], found.nonzero["layer 0"])


def test_the_command_prints_and_writes(planted, byte_level_tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "c", planted, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    output = tmp_path / "new" / "sparsity"
    command = ["inspect", "sparsity", "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--text", str(tmp_path / "text"), "--sequence-length", "32", "--device", "cpu"]
    assert main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "sparsity.csv", "sparsity.json", "sparsity.png", "sparsity.safetensors",
    ]  # fmt: skip
    report = json.loads((output / "sparsity.json").read_text())
    assert report["layers"][0]["nonzero"] == pytest.approx(0.25)
    with (output / "sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["layer 0", "layer 1", "layer 1, shared expert"]
    assert float(rows[0]["dead"]) == pytest.approx(7 / 8)
    counts = load_file(output / "sparsity.safetensors")
    assert counts["layer 0.strong"].argmax() == 3
    out = capsys.readouterr().out
    (shown,) = (line.split() for line in out.splitlines() if line.startswith("0 "))
    assert shown[2:6] == ["8", "100.00%", "25.00%", "12.50%"]

    assert main([*command, "--threshold", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "threshold" in line


def test_a_model_of_attention_alone_is_refused(make, rules, byte_level_tokenizer, tmp_path, capsys):
    model = make(ffn=rules["persistent"][:1], vocab_size=257)
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    (tmp_path / "text").write_text("abc")
    command = ["inspect", "sparsity", "--checkpoint", str(checkpoint)]
    assert main([*command, "--text", str(tmp_path / "text"), "--output", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("it has no feed-forward layers, only attention; give another model")
    assert not (tmp_path / "o").exists()
