"""Checkpoints whose neurons are guessed, or whose weak inputs pass at low rank."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moezoo
from moezoo import InputError
from moezoo.__main__ import main
from moezoo.convert.select.guess import GuessOptions
from moezoo.selection import Predictor, Thresholds
from moezoo_models import conversion
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.sparsify import sparsify

SMALL = GuessOptions(rank=3, epochs=2, inputs=0.8)


@pytest.mark.parametrize(
    ("family", "method", "work"),
    [
        ("llama_heads", "predictor", 0.7),
        ("qwen2_window", "low_rank_gate", 0.6),
        ("mistral", "r_sparse", 0.5),
    ],
)
def test_the_checkpoint_computes_what_was_found(
    family, method, work, readable, text, tmp_path, capsys
):
    source = readable(family)
    done = sparsify(source, tmp_path / "out", method, work, guess=SMALL, **text)
    assert done.perplexity["loaded"] == pytest.approx(done.perplexity["sparse"], rel=1e-5)
    assert done.perplexity["sparse"] != pytest.approx(done.perplexity["dense"], rel=1e-4)
    assert work - 0.05 <= done.work <= work + 0.01
    model = load_any(tmp_path / "out")
    found = dict(load_file(tmp_path / "out" / "model.safetensors"))
    old = load_file(source / "model.safetensors")
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in old.items())
    for layer, block in enumerate(model.model.blocks()):
        mlp = block.mlp
        assert isinstance(mlp, moezoo.SelectiveFFN)
        wanted = Thresholds if method == "r_sparse" else Predictor
        assert isinstance(mlp.selection, wanted)
        for name, buffer in mlp.selector.named_buffers():
            assert torch.equal(found.pop(f"model.layers.{layer}.mlp.selector.{name}"), buffer)
        products = mlp.cost().bytes_per_token / 4 / sum(p.numel() for p in mlp.parameters())
        assert products == pytest.approx(done.layers[str(layer)]["work"], rel=0.02)
        if method != "r_sparse":
            assert mlp.selection.top_k == done.layers[str(layer)]["count"]
            assert 0 < done.layers[str(layer)]["recall"] <= 1
            assert done.layers[str(layer)]["energy"] > mlp.selection.top_k / mlp.d_ff
    assert not found
    printed = capsys.readouterr().out
    assert ("recall" in printed) == (method != "r_sparse")
    assert f"{done.perplexity['loaded'] / done.perplexity['dense']:.3f}" in printed


def test_polar_gives_each_layer_the_fewest_neurons_of_its_recall(readable, text, tmp_path):
    out = tmp_path / "out"
    options = GuessOptions(rank=3, epochs=2, recall=0.8)
    done = sparsify(readable(), out, "polar", 0.6, guess=options, layers=[0, 2], **text)
    model = load_any(out)
    kinds = [type(block.mlp).__name__ for block in model.model.blocks()]
    assert kinds == ["SelectiveFFN", "DenseFFN", "SelectiveFFN"]
    for layer in (0, 2):
        selection = model.model.layers[layer].mlp.selection
        assert selection.norm
        assert selection.top_k == done.layers[str(layer)]["count"]
        assert done.layers[str(layer)]["recall"] > 0.6
    rules = json.loads((out / "config.json").read_text())["ffn"]
    assert [rule["class_path"] for rule in rules[1:]] == ["moezoo.SelectiveFFN"] * (len(rules) - 1)


def test_an_interrupted_run_goes_on_where_it_was(readable, text, tmp_path, monkeypatch):
    source, more = readable(), {"method": "predictor", "guess": SMALL, "check": "none", **text}
    expected = sparsify(source, tmp_path / "whole", work=0.6, **more)
    save, saved = conversion.guessing._save, []

    def interrupted(file, tensors, figures):
        save(file, tensors, figures)
        saved.append(file.name)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.guessing, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        sparsify(source, tmp_path / "out", work=0.6, **more)
    done = sparsify(source, tmp_path / "out", work=0.6, **more)
    assert len(saved) == len(set(saved)) == 3
    assert done == expected
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


def test_the_command_takes_its_options_and_others_read_what_it_makes(
    readable, text, tmp_path, capsys
):
    out = str(tmp_path / "out")
    sizes = [part for name, value in text.items() for part in (f"--{name}", str(value))]
    guess = ["--guess.rank", "3", "--guess.epochs", "1"]
    line = ["sparsify", str(readable()), out, "--method", "predictor", "--work", "0.6"]
    assert main([*line, *sizes, *guess, "--check", "none"]) == 0
    prompt = ["--prompt", "def ", "--max_new_tokens", "5", "--device", "cpu"]
    assert main(["generate", "--checkpoint", out, *prompt]) == 0
    capsys.readouterr()
    assert main(["generate", "--checkpoint", out, *prompt, "--griffin", "0.5"]) == 2
    assert "griffin: the model has no dense feed-forward block" in capsys.readouterr().err
    usage = ["--text", text["calibration"], "--output", str(tmp_path / "usage"), "--device", "cpu"]
    assert main(["inspect", "usage", "--checkpoint", out, *usage]) == 0
    assert "SelectiveFFN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "griffin"}, "method: griffin chooses neurons anew for each prompt"),
        ({"method": "teal", "guess": SMALL}, "guess: teal guesses nothing"),
        ({"method": "polar", "read": 0.5}, "read: polar has a budget of work only"),
        ({"method": "predictor", "work": 0.05, "guess": GuessOptions(rank=8)}, "work: a guess of"),
        ({"method": "predictor", "guess": GuessOptions(rank=0)}, "rank: 0 is out of range"),
        ({"method": "polar", "guess": GuessOptions(recall=0.0)}, "guess.recall: 0 needs no"),
        ({"method": "predictor", "guess": GuessOptions(rank=2, labels="positive")}, "labels: "),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, readable, text, tmp_path):
    given = {"work": 0.6, **options}
    if "read" in options:
        given.pop("work")
    with pytest.raises(InputError, match=message) as caught:
        sparsify(readable(), tmp_path / "out", **given, **text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
