"""Inspecting a checkpoint's usage: sums against the layers' own counts, files, mistakes."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo import InputError
from moezoo.__main__ import main
from moezoo.analysis.usage import usage_of
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.usage import count_usage

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 5


@pytest.fixture
def model(make, rules):
    rule = rules["rule"]
    memory = {"num_keys": 6, "num_heads": 2, "top_k": 3, "value_pool": "p"}
    ffn = [
        rule("DenseFFN"),
        rule("SparseMoE", 1, num_experts=4, top_k=2, d_expert=16),
        rule("PEER", 2, num_experts=36, num_heads=2, top_k=4),
        rule("MemoryPlus", [3, 5], **memory),
        rule("HashLayer", 4, num_experts=4, vocab_size=257, key="bigram"),
    ]
    return make(ffn=ffn, vocab_size=257, num_hidden_layers=6, max_position_embeddings=512)


@pytest.mark.parametrize(("length", "batch_size"), [(16, 1), (16, 4), (7, 3), (500, 8)])
def test_every_token_counts_once_and_padding_never(model, byte_tokenizer, length, batch_size):
    tokens = byte_tokenizer.encode(TEXT)
    model.train()
    usage = count_usage(model, tokens, sequence_length=length, batch_size=batch_size)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert usage.tokens == len(tokens)
    assert usage.sequence_length == min(length, len(tokens))
    wanted = {}
    for window in torch.tensor(tokens).split(length):
        stats = model.eval().model(window[None], use_cache=False).ffn_stats
        for layer in (1, 2, 3, 4, 5):
            wanted[layer] = wanted.get(layer, 0) + stats[layer]["expert_counts"]
    for layer, counts in wanted.items():
        assert torch.equal(usage.loads[f"layer {layer}"].counts, counts), layer
    shared = usage.loads["layers 3 + 5"]
    assert torch.equal(shared.counts, wanted[3] + wanted[5])
    assert list(usage.methods.values()) == [
        "SparseMoE", "PEER", "MemoryPlus", "HashLayer", "MemoryPlus", "shared values",
    ]  # fmt: skip
    # Two heads' weights add up to one each, the experts' to one per token.
    assert usage.loads["layer 2"].mass.sum().item() == pytest.approx(2 * len(tokens), rel=1e-6)
    assert usage.loads["layer 1"].mass.sum().item() == pytest.approx(len(tokens), rel=1e-6)


def test_the_command_prints_and_writes(model, byte_level_tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    output = tmp_path / "new" / "usage"
    command = ["inspect", "usage", "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--text", str(tmp_path / "text"), "--sequence_length", "32", "--batch_size", "3"]
    assert main([*command, "--device", "cpu"]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "collisions.png", "usage.csv", "usage.json", "usage.png", "usage.safetensors",
    ]  # fmt: skip
    wanted = count_usage(model, byte_level_tokenizer.encode(TEXT), sequence_length=32)

    report = json.loads((output / "usage.json").read_text())
    assert report["tokens"] == wanted.tokens
    assert [entry["layer"] for entry in report["layers"]] == list(wanted.loads)
    peer = wanted.usages["layer 2"]
    entry = report["layers"][1]
    assert (entry["method"], entry["shape"], entry["num_slots"]) == ("PEER", [6, 6], 36)
    assert entry["by_weight"]["unevenness"] == pytest.approx(peer.by_weight.unevenness, rel=1e-6)
    assert entry["by_first_choice"]["dead"] == peer.by_first_choice.dead
    assert report["layers"][0]["by_first_choice"] is None

    with (output / "usage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(wanted.loads)
    assert float(rows[1]["gini_w"]) == pytest.approx(peer.by_weight.gini, rel=1e-6)
    assert rows[0]["gini_first"] == ""

    sums = load_file(output / "usage.safetensors")
    assert torch.equal(sums["layer 2.choice"].flatten(), wanted.loads["layer 2"].counts)
    assert sums["layers 3 + 5.weight"].shape == (6, 6)
    assert (output / "usage.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{checkpoint}: {wanted.tokens} tokens in windows of 32"
    (shown,) = (line.split() for line in lines if line.split()[:2] == ["2", "PEER"])
    weight = peer.by_weight
    assert shown[2:6] == ["36", "weight", f"{weight.usage:.2%}", f"{weight.unevenness:.3f}"]
    assert shown[-1] == str(weight.dead)
    pairs = wanted.collisions["layer 4"]["bigrams"]
    assert report["collisions"]["layer 4, bigrams"]["foreign"] == pytest.approx(pairs.foreign)
    (shared,) = (line.split() for line in lines if line.split()[:2] == ["4", "bigrams"])
    assert shared[2:5] == [f"{pairs.owners}", "4", f"{pairs.foreign:.2%}"]
    hashed = [line for line in lines if "HashLayer" in line]
    assert len(hashed) == 1  # its weights are its choices: said once
    assert usage_of(wanted.loads["layer 4"]).by_weight == wanted.usages["layer 4"].by_choice


@pytest.fixture
def fail(capsys, tmp_path, make, rules, byte_level_tokenizer):
    def run(ffn="moe", text="abc", output="usage"):
        checkpoint = tmp_path / "c"
        if not checkpoint.exists():
            save_checkpoint(checkpoint, make(ffn=rules[ffn], vocab_size=257), byte_level_tokenizer)
        if text is not None:
            (tmp_path / "text").write_text(text)
        argv = ["--checkpoint", str(checkpoint), "--text", str(tmp_path / "text")]
        assert main(["inspect", "usage", *argv, "--output", str(tmp_path / output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    return run


def test_mistakes_are_one_line(fail, tmp_path, rules):
    assert fail(text="").endswith("text is empty; give a file with text in it")
    (tmp_path / "text").unlink()
    assert "text cannot be read: No such file" in fail(text=None)
    (tmp_path / "file").touch()
    assert fail(output="file").endswith(
        "file cannot be written: file exists; free space or give another directory"
    )
    assert "file/below cannot be written: not a directory" in fail(output="file/below")
    assert not (tmp_path / "usage").exists()


def test_a_model_that_chooses_nothing_is_refused(fail, rules, tmp_path):
    rules["dense"] = [rules["rule"]("DenseFFN", d_ff=48)]
    assert fail(ffn="dense").endswith(
        "c has no layer that routes tokens, only DenseFFN; give a model with e.g. SparseMoE or PEER"
    )
    assert not (tmp_path / "usage").exists()


def test_options_out_of_range_and_foreign_tokens_are_named(model):
    with pytest.raises(InputError, match="batch_size: 0 is out of range"):
        count_usage(model, [1, 2], batch_size=0)
    with pytest.raises(InputError, match="sequence_length: 0 is out of range"):
        count_usage(model, [1, 2], sequence_length=0)
    with pytest.raises(InputError, match="text: it has no tokens"):
        count_usage(model, [])
    with pytest.raises(InputError, match="token id 257 is outside the model's vocabulary of 257"):
        count_usage(model, [257])
