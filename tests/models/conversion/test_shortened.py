"""Recovery of a checkpoint with fewer layers: it learns, resumes, and its blocks alone move."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moezoo.errors import InputError
from moezoo_models.conversion import distillation, drop, recovery
from moezoo_models.conversion.convert import REPORT
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.drop import drop_layers
from moezoo_models.conversion.fuse import fuse_layers

STEPS = 24
OPTIONS = {"recover": STEPS * 64, "recovery": RecoveryOptions(lr=2e-3, save_every=5)}


@pytest.fixture
def text(text):
    return text | {"calibration_tokens": 64, "held_out_tokens": 128}


def shorten(source, target, how, **options):
    """Leave the middle layer out, or attention of the middle one."""
    if how == "drop":
        return drop_layers(source, target, 1, first=1, **options)
    return fuse_layers(source, target, 0, 2, **options)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.mark.parametrize(("how", "dtype"), [("drop", torch.bfloat16), ("fuse", torch.float32)])
def test_blocks_alone_move_and_predict_more_like_the_dense_model(
    how, dtype, readable, text, tmp_path, capsys
):
    source, out = readable(dtype=dtype), tmp_path / "out"
    plain = shorten(source, tmp_path / "plain", how, **text)
    made = shorten(source, out, how, **text, **OPTIONS)
    assert made.perplexity == plain.perplexity
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert {name: t.dtype for name, t in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    files, others = contents(tmp_path / "plain"), contents(out)
    assert files.keys() == others.keys()
    for name in files.keys() - {"model.safetensors", REPORT}:
        assert files[name] == others[name], name
    assert not [path.name for path in tmp_path.iterdir() if "recovery" in path.name]

    report = json.loads(others[REPORT])
    assert plain.recovery is None
    losses = report["recovery"]["losses"]
    assert len(losses) == STEPS
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert report["target"]["sha256"] != json.loads(files[REPORT])["target"]["sha256"]
    found = report["recovery"]["figures"]["recovered"]
    assert found["perplexity"] != made.perplexity[made.verb]
    assert report["recovery"]["dense"] == pytest.approx(made.perplexity["dense"], rel=1e-6)
    printed = capsys.readouterr().out
    assert f"{found['perplexity']:.4g}" in printed.split("the same, recovered")[1]
    if how == "drop":
        model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told.values()), told
        assert model.config.num_hidden_layers == 2


def test_what_was_interrupted_goes_on_with_equal_bits(readable, text, tmp_path, monkeypatch):
    """Between two states: what was measured and written is taken as it is."""
    source, out, calls, at = readable(), tmp_path / "out", [], 12
    shorten(source, tmp_path / "whole", "drop", **text, **OPTIONS)
    original = distillation.backward_divergence

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(distillation, "backward_divergence", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        shorten(source, out, "drop", **text, **OPTIONS)
    assert json.loads((out / REPORT).read_text())["recovery"] is None
    with pytest.raises(InputError, match=r"target: .* is not empty"):
        shorten(source, out, "drop", **text | {"seed": 1}, **OPTIONS)
    monkeypatch.setattr(drop, "measure_starts", None)
    shorten(source, out, "drop", **text, **OPTIONS)
    assert len(calls) == at + STEPS - (at - 1) // 5 * 5
    found, expected = contents(out), contents(tmp_path / "whole")
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert json.loads(found[REPORT]) == json.loads(expected[REPORT])
    with pytest.raises(InputError, match=r"target: .* is not empty"):
        shorten(source, out, "drop", **text, **OPTIONS)


def test_too_little_memory_is_refused(readable, text, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"recover: the dense model, the one made of it and Adam"):
        shorten(readable(), tmp_path / "out", "fuse", **text, **OPTIONS)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
