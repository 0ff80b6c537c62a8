"""Sparsified checkpoints compute what was calibrated, and every command reads them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import moezoo
from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models import conversion
from moezoo_models.conversion import sparsify as command
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.selecting import measure, selected_nats, trial_tokens
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.sparsify import sparsify

SHARES = ("input", "gate", "up_input", "hidden")


@pytest.mark.parametrize(
    ("family", "method", "work"),
    [
        ("llama_heads", "mix", 0.57),
        ("qwen2_window", "teal", 0.6),
        ("mistral", "chess", 0.7),
        ("qwen3", "wina", 0.8),
    ],
)
def test_the_checkpoint_computes_what_was_calibrated(
    family, method, work, readable, text, tmp_path, capsys
):
    source = readable(family)
    done = sparsify(source, tmp_path / "out", method, work, **text)
    # Attention over a text's first token, which is dense, included.
    assert done.perplexity["loaded"] == pytest.approx(done.perplexity["sparse"], rel=1e-5)
    assert done.perplexity["sparse"] != pytest.approx(done.perplexity["dense"], rel=1e-4)
    assert done.work <= work + 0.01
    assert done.work >= work - (0.1 if method == "mix" else 0.02)
    model = load_any(tmp_path / "out")
    found = dict(load_file(tmp_path / "out" / "model.safetensors"))
    old = load_file(source / "model.safetensors")
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in old.items())
    for layer, block in enumerate(model.model.blocks()):
        assert isinstance(block.mlp, moezoo.SelectiveFFN)
        for name in (*SHARES, "shares"):
            buffer = found.pop(f"model.layers.{layer}.mlp.selector.{name}")
            assert torch.equal(buffer, getattr(block.mlp.selector, name))
        shares = block.mlp.selector.calibrated()
        assert shares == pytest.approx([done.layers[str(layer)][name] for name in SHARES])
        assert min(shares) < 1
    assert not found
    printed = capsys.readouterr().out
    assert f"{done.perplexity['loaded'] / done.perplexity['dense']:.3f}" in printed
    assert (
        json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())["work"] == done.work
    )


def test_some_layers_stay_dense_and_bf16_stays_bf16(readable, text, tmp_path):
    source = readable("llama", torch.bfloat16)
    done = sparsify(source, tmp_path / "out", "teal", 0.5, layers=[1], check="none", **text)
    assert "loaded" not in done.perplexity
    assert done.work == pytest.approx((1 + 0.5 + 1) / 3, abs=0.01)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    selectors = {name: t for name, t in tensors.items() if ".selector." in name}
    assert {t.dtype for t in selectors.values()} == {torch.float32}
    assert {name.split(".")[2] for name in selectors} == {"1"}
    model = load_any(tmp_path / "out")
    kinds = [type(block.mlp).__name__ for block in model.model.blocks()]
    assert kinds == ["DenseFFN", "SelectiveFFN", "DenseFFN"]
    assert model.model.layers[1].mlp.selector.input.dtype == torch.float32


def test_an_interrupted_run_goes_on_where_it_was(readable, text, tmp_path, monkeypatch):
    source = readable()
    expected = sparsify(source, tmp_path / "whole", work=0.6, **text)
    save, saved = conversion.selecting.save_thresholds, []

    def interrupted(file, found):
        save(file, found)
        saved.append(file.name)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.selecting, "save_thresholds", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        sparsify(source, tmp_path / "out", work=0.6, **text)
    assert not (tmp_path / "out").exists()
    done = sparsify(source, tmp_path / "out", work=0.6, **text)
    assert len(saved) == len(set(saved)) == 3
    assert done == expected
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


def test_every_command_reads_it(readable, text, tmp_path, capsys):
    out = tmp_path / "out"
    sparsify(readable(), out, work=0.6, check="none", **text)
    capsys.readouterr()
    file = text["calibration"]
    assert main(["evaluate", "--checkpoint", str(out), "--text", file, "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
    prompt = ["--prompt", "def ", "--max_new_tokens", "5", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(out), *prompt]) == 0
    usage = ["--text", file, "--output", str(tmp_path / "usage"), "--device", "cpu"]
    assert main(["inspect", "usage", "--checkpoint", str(out), *usage]) == 0
    assert "SelectiveFFN" in capsys.readouterr().out


def test_a_layers_cost_is_what_it_alone_does_to_the_model(readable, text, tmp_path):
    """A layer whose output is nothing costs nothing; trials change one layer each."""
    source = readable("llama_heads")
    tensors = load_file(source / "model.safetensors")
    from safetensors.torch import save_file

    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with open_source(source) as dense:
        words = calibrate(dense, text["calibration"], 768, 256, 64, 0)
        found = measure(dense, trial_tokens(words, 256), (0, 1, 2), torch.device("cpu"))
        assert found.nats[1] == pytest.approx(0.0, abs=1e-9)
        assert min(found.nats[0], found.nats[2]) > 1e-6
        assert not found.curves[1].input.any()
        shares = [0.8, 0.6]
        nats = selected_nats(dense, words, "teal", shares, tmp_path / "states")
        assert [each.shape for each in nats] == [(4, 63)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"work": 0.3, "method": "cats"}, "work: cats computes the whole gate"),
        ({"work": 1.5}, "work: 1.5 is out of range"),
        ({"work": 0.01, "method": "teal"}, "work: 0.01 is out of range; give a number from 0.05"),
        ({"work": 0.1}, "work: 0.1 is out of range for mix"),
        ({"work": 0.5, "read": 0.5}, "read: work is given too"),
        ({"method": "carts"}, "method: 'carts' is not known; did you mean 'cats'"),
        ({"layers": [7]}, "layers: there is no layer 7"),
        ({"calibration_tokens": 10**9}, "calibration"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(options, message, readable, text, tmp_path):
    source = readable()
    with pytest.raises(InputError, match=message):
        sparsify(source, tmp_path / "out", **{**text, **options})
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_is_read_counts_whole_rows(readable, text, tmp_path):
    done = sparsify(readable(), tmp_path / "out", read=0.6, check="none", **text)
    assert done.read <= 0.61
    assert done.work <= done.read + 1e-9
    assert math.isfinite(done.perplexity["sparse"])
    assert command.summary(done, tmp_path).count("0.") > 6
