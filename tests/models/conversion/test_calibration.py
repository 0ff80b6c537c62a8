"""Calibration text, and one decoder layer at a time."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models.conversion.calibration import read_calibration
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.source import open_source

from .conftest import configurations

CPU = torch.device("cpu")


@pytest.fixture
def lines(tmp_path):
    """A file in which every line is different."""
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {number} of this text\n" for number in range(2000)))
    return str(file)


@pytest.fixture
def read(byte_tokenizer, lines):
    def calibrate(sources=None, **changes):
        options = {"vocab_size": 257, "tokens": 1024, "held_out_tokens": 256, "window": 64}
        return read_calibration(sources or [lines], byte_tokenizer, **{**options, **changes})

    return calibrate


def test_windows_are_full_and_nothing_held_out_is_fitted_to(read, byte_tokenizer):
    text = read()
    assert text.fitted.shape == (16, 64)
    assert text.held_out.shape == (4, 64)
    found = [
        set(byte_tokenizer.decode(part.flatten().tolist()).split("\n")[1:-1])
        for part in (text.fitted, text.held_out)
    ]
    assert len(found[0]) > 30
    assert not {line for line in found[0] & found[1] if line.startswith("line")}


def test_other_seeds_take_other_passages_and_hold_out_the_same(read):
    one, same, other = read(), read(), read(seed=1)
    assert one.describe() == same.describe()
    assert not torch.equal(one.fitted, other.fitted)
    assert torch.equal(one.held_out, other.held_out)
    assert torch.equal(one.held_out, read(tokens=2048).held_out)


def test_windows_begin_as_texts_do(read, byte_tokenizer):
    byte_tokenizer.bos_id = 255
    text = read()
    assert text.skipped == 1
    assert text.fitted.shape == (16, 64)
    for part in (text.fitted, text.held_out):
        assert (part[:, 0] == 255).all()
        assert (part[:, 1:] != 255).all()


def test_the_standard_library_is_always_there(read):
    assert read(["stdlib"], tokens=4096).fitted.shape == (64, 64)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"too short", {}, "too little text for 1,024 . 256 tokens; give more, or lower"),
        (b"", {}, "too little text"),
        (b"\0\1", {}, "is a binary file"),
        (b"\xff\xfe\xfd", {}, "is not UTF-8 text"),
        (b"some text\n" * 1000, {"vocab_size": 50}, "tokenizer: it gave token 256, and the mode"),
        (b"some text\n" * 1000, {"window": 1}, "window: 1 is out of range"),
        (b"some text\n" * 1000, {"held_out_tokens": 0}, "held_out_tokens: 0 is out of range"),
    ],
)
def test_text_that_does_not_do_is_refused(content, changes, message, read, tmp_path):
    file = tmp_path / "some.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        read([str(file)], **changes)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named(read):
    with pytest.raises(InputError, match=r"calibration: 'nowhere\.txt' does not exist"):
        read(["nowhere.txt"])


@pytest.mark.parametrize("family", configurations())
def test_layers_one_at_a_time_are_the_model(family, dense, read, tmp_path):
    # Windows, biases, norms and every kind of rotary embedding: all is transformers' own.
    text = read(tokens=128)
    tokens = text.held_out % 97
    text = type(text)(text.fitted % 97, tokens, 0, [], 0)
    directory = dense(family)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    with open_source(directory) as source:
        halves = Variant("halves", lambda layer, x, block: lambda x: block.run(x) / 2)
        variants = [Variant("dense", None), halves]
        found = {
            layers: Propagation(
                source, text, variants, layers, tmp_path / f"states{len(layers)}", CPU
            ).run()
            for layers in ((), (0, 1, 2))
        }
    for nats in (found[()]["dense"], found[()]["halves"], found[0, 1, 2]["dense"]):
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight /= 2
        logits = model(tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(found[0, 1, 2]["halves"], expected, rtol=0, atol=1e-5)


def test_blocks_are_converted_on_inputs_behind_the_converted_ones(dense, read, tmp_path):
    text = read(tokens=128)
    text = type(text)(text.fitted % 97, text.held_out % 97, 0, [], 0)
    seen = {}

    def zero(layer, x, block):
        seen[layer] = x
        return torch.zeros_like

    directory = dense("llama")
    with open_source(directory) as source:
        Propagation(source, text, [Variant("zero", zero)], (0, 1, 2), tmp_path / "s", CPU).run()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = {}
    for number, layer in enumerate(model.model.layers):
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        layer.mlp.register_forward_hook(lambda _, args, __, n=number: inputs.update({n: args[0]}))
    with torch.no_grad():
        model(text.fitted)
    for number in range(3):
        expected = inputs[number].flatten(0, 1)
        torch.testing.assert_close(seen[number], expected, rtol=0, atol=1e-5)
