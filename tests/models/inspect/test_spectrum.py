"""`moezoo inspect spectrum`: planted ranks in a model, portions, files."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo.__main__ import main
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.spectrum import measure_spectra

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 8


@pytest.fixture
def planted(make, rules):
    """Layer 0 reads two directions and writes one; only expert 1 of layer 1 is ever chosen."""
    rule = rules["rule"]
    ffn = [
        rule("DenseFFN", d_ff=12, gated=False, activation="relu"),
        rule("HashLayer", 1, num_experts=3, d_expert=6, vocab_size=257),
        rule("PEER", 2, num_experts=16, num_heads=1, top_k=2),
    ]
    model = make(ffn=ffn, vocab_size=257, num_hidden_layers=3, max_position_embeddings=512)
    with torch.no_grad():
        block = model.model.layers[0].mlp
        block.up_proj.weight.copy_(torch.randn(12, 2) @ torch.randn(2, 32))
        block.down_proj.weight.copy_(torch.randn(32, 1) @ torch.randn(1, 12))
        model.model.layers[1].mlp.set_table(torch.ones(257).long())
    return model


def by_name(spectra):
    return {(one.layer, one.what): one for one in spectra}


@pytest.mark.parametrize(("length", "batch_size"), [(16, 3), (500, 8)])
def test_planted_ranks_are_found(planted, byte_tokenizer, length, batch_size):
    tokens = byte_tokenizer.encode(TEXT)
    options = {"sequence_length": length, "batch_size": batch_size}
    spectra = measure_spectra(planted, tokens, **options)
    found = by_name(spectra)
    before = found["layer 0", "before activation"]
    assert before.tokens.tolist() == [len(tokens)]
    values = before.eigenvalues[0]
    assert values[2] < 1e-9 * values[1]
    assert 1 < before.summary().soft_rank <= 2
    # ReLU leads out of the plane.
    after = found["layer 0", "after activation"].eigenvalues[0]
    assert after[2] > 1e-6 * after[0]
    for what in ("output", "down_proj.weight"):
        assert found["layer 0", what].summary().hard_rank == pytest.approx(1, abs=1e-5)
    assert found["layer 0", "up_proj.weight"].summary().soft_rank <= 2 + 1e-5

    hashed = found["layer 1", "after activation"]
    assert hashed.tokens.tolist() == [0, len(tokens), 0]
    assert hashed.eigenvalues[[0, 2]].sum() == 0
    assert hashed.summary().soft_rank > 1  # of the one expert that has any variance
    assert hashed.shares().sum() == pytest.approx(1)
    assert found["layer 1", "experts.gate_up_proj"].eigenvalues.shape == (3, 6)
    peer = {what for layer, what in found if layer == "layer 2"}
    assert {"output", "experts.u", "experts.v"} <= peer
    assert "after activation" not in peer

    portions = measure_spectra(planted, tokens, most_bytes=1, **options)
    assert by_name(portions).keys() == found.keys()
    for one, other in zip(spectra, portions, strict=True):
        assert torch.equal(one.eigenvalues, other.eigenvalues)


def test_the_command_prints_and_writes(planted, byte_level_tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "c", planted, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    output = tmp_path / "new" / "spectrum"
    command = ["inspect", "spectrum", "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--text", str(tmp_path / "text"), "--device", "cpu"]
    assert main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "spectrum.csv", "spectrum.json", "spectrum.png", "spectrum.safetensors",
    ]  # fmt: skip
    first = json.loads((output / "spectrum.json").read_text())["spectra"][0]
    assert (first["layer"], first["what"]) == ("layer 0", "before activation")
    assert 1 < first["hard_rank"] <= first["soft_rank"] <= 2 + 1e-6
    with (output / "spectrum.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["hard_rank"]) == pytest.approx(first["hard_rank"])
    values = load_file(output / "spectrum.safetensors")
    assert values["layer 1.after activation"].shape == (3, 6)
    out = capsys.readouterr().out
    assert "have fewer than 10 tokens per direction" in out  # two experts got none

    assert main([*command, "--batch_size", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch_size" in line
