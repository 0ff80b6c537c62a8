"""`moezoo inspect experts`: a model in which the tokens decide, files, bounded tables, mistakes."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo.__main__ import main
from moezoo.routing.stats import expert_counts
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.specialization import count_choices

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 8


@pytest.fixture
def planted(make, rules):
    """Layer 1 sends letter groups to experts of their own; layer 2 looks at the position only."""
    rule = rules["rule"]
    hashed = {"num_experts": 4, "d_expert": 8, "vocab_size": 257}
    ffn = [
        rule("DenseFFN", d_ff=16),
        rule("HashLayer", 1, **hashed),
        rule("HashLayer", 2, key="position", **hashed),
        rule("HashLayer", 3, **hashed),
    ]
    model = make(ffn=ffn, vocab_size=257, num_hidden_layers=4, max_position_embeddings=512)
    table = torch.arange(257) % 4
    model.model.layers[1].mlp.set_table(table)
    model.model.layers[3].mlp.set_table(3 - table)
    return model


@pytest.mark.parametrize(("length", "batch_size"), [(16, 1), (7, 3), (500, 8)])
def test_planted_experts_are_explained_and_positions_are_not(
    planted, byte_tokenizer, length, batch_size
):
    tokens = torch.tensor(byte_tokenizer.encode(TEXT))
    planted.train()
    found = count_choices(planted, tokens, sequence_length=length, batch_size=batch_size)
    assert planted.training
    assert list(found.layers) == ["layer 1", "layer 2", "layer 3"]
    ids, times = found.token_ids, found.counts["layer 1"].sum(dim=1)
    assert sorted(ids.tolist()) == tokens.unique().tolist()
    assert torch.equal(times.long(), (tokens == ids[:, None]).sum(dim=1))
    wanted = torch.nn.functional.one_hot(ids % 4, 4) * times[:, None]
    assert torch.equal(found.counts["layer 1"], wanted.int())
    assert found.layers["layer 1"].explained == pytest.approx(1.0, rel=1e-9)
    assert found.layers["layer 2"].choices == len(tokens)
    position = torch.arange(len(tokens)) % length % 4
    assert torch.equal(found.counts["layer 2"].sum(0).long(), expert_counts(position, 4))
    if length == 16:  # the text repeats every 43 tokens, windows every 4: all combinations occur
        assert found.layers["layer 2"].explained < 0.05

    # From layer 1 to 3 the token says all; by way of positions, little.
    assert found.paths.ways.total() == len(tokens)
    assert {(a, c) for a, _, c in found.paths.ways} == {(0, 3), (1, 2), (2, 1), (3, 0)}
    table = torch.zeros(4, 4).long()
    for a, b in zip((tokens % 4).tolist(), position.tolist(), strict=True):
        table[a, b] += 1
    assert torch.equal(found.paths.tables["layer 1", "layer 2"], table)


def test_rare_tokens_are_counted_together_where_there_is_no_room(planted, byte_tokenizer):
    tokens = byte_tokenizer.encode(TEXT)
    whole = count_choices(planted, tokens)
    few = count_choices(planted, tokens, most_cells=12 * 5)
    assert few.token_ids.tolist() == [*whole.token_ids[:4].tolist(), -1]
    for name, counts in few.counts.items():
        assert torch.equal(counts[:4], whole.counts[name][:4])
        assert torch.equal(counts[4], whole.counts[name][4:].sum(0).int())
        assert few.layers[name].information <= whole.layers[name].information


def test_the_command_prints_and_writes(planted, byte_level_tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "c", planted, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    output = tmp_path / "new" / "experts"
    command = ["inspect", "experts", "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--text", str(tmp_path / "text"), "--sequence_length", "32", "--device", "cpu"]
    assert main([*command, "--top_tokens", "3", "--slots", "2"]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "experts.csv", "experts.json", "experts.png", "experts.safetensors", "paths.png",
    ]  # fmt: skip
    report = json.loads((output / "experts.json").read_text(encoding="utf-8"))
    first = report["layers"][0]
    assert (first["layer"], first["method"]) == ("layer 1", "HashLayer")
    assert first["explained"] == pytest.approx(1.0, rel=1e-9)
    assert len(first["slots"]) == 2
    for slot in first["slots"]:
        assert 1 <= len(slot["tokens"]) <= 3
        for token in slot["tokens"]:
            assert token["token"] % 4 == slot["slot"]
            assert token["share_of_token"] == 1.0
            text = byte_level_tokenizer.decode([token["token"]])
            assert token["text"] == repr(text)[1:-1]
    way = report["paths"]["commonest"][0]
    assert way["slots"][0] + way["slots"][2] == 3
    with (output / "experts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert int(rows[0]["choices"]) == first["slots"][0]["choices"]
    sums = load_file(output / "experts.safetensors")
    assert sums["layer 1.counts"].sum() == report["tokens"]
    assert sums["layer 1 to layer 2.counts"].shape == (4, 4)
    for name in ("experts.png", "paths.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    (shown,) = (line for line in out.splitlines() if line.startswith("1      HashLayer"))
    assert "100.0%" in shown


def test_mistakes_are_one_line(make, rules, byte_level_tokenizer, tmp_path, capsys):
    dense = make(ffn=[rules["rule"]("DenseFFN", d_ff=48)], vocab_size=257)
    checkpoint = save_checkpoint(tmp_path / "c", dense, byte_level_tokenizer)
    (tmp_path / "text").write_text("abc")
    command = ["inspect", "experts", "--checkpoint", str(checkpoint)]
    command += ["--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    for extra, message in (
        ([], "has no layer that routes tokens, only DenseFFN"),
        (["--slots", "0"], "slots"),
        (["--top_tokens", "-1"], "top_tokens"),
    ):
        assert main([*command, *extra]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
