"""Mixtures made of every dense family compute what transformers' dense model computes."""

import argparse
import inspect
import json

import pytest
import torch

from moezoo import InputError
from moezoo.convert.select import LayerThresholds
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.selecting import measure
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.upcycle import upcycle

from .conftest import CONFIGS

STOCK = [
    ("granite", "granitemoe"),
    ("phi3", "mixtral"),
    ("phi3", "glm4_moe"),
    ("phi3_partial", "moezoo"),
    ("phi3_long", "mixtral"),
    ("smollm3_rotary", "mixtral"),
    ("smollm3_rotary", "glm4_moe"),
    ("olmo3_full", "flex_olmo"),
]
OURS = [name for name in CONFIGS if name not in ("qwen3", "phi3_partial", "stablelm_parallel")]
CARVED = ("gemma3", "granite", "phi3_partial", "smollm3", "olmo3", "starcoder2", "gpt2", "opt_bare")


@torch.no_grad()
def logits(model):
    tokens = torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits


def assert_same(directory, dense):
    expected, found = logits(dense), logits(load_any(directory))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "to"), [*STOCK, *((name, "moezoo") for name in OURS)])
def test_copies_compute_the_same(name, to, written, tmp_path):
    dense, source = written(name)
    done = upcycle(source, tmp_path / "out", experts=4, top_k=2, to=to)
    assert done.exact
    assert_same(tmp_path / "out", dense)


@pytest.mark.parametrize("name", ["gemma2", "granite_plain", "starcoder2", "gpt2", "opt"])
def test_shards_and_a_shared_copy_compute_the_same(name, written, tmp_path):
    dense, source = written(name)
    upcycle(source, tmp_path / "out", 4, 4, 2, shared=True, to="moezoo", layers=[0, 2])
    assert_same(tmp_path / "out", dense)
    if name == "gpt2":  # by their plans, and where weights do not sum to one
        options = {"to": "moezoo", "check": "layers", "force": True}
        done = upcycle(source, tmp_path / "out", 4, 4, 2, shared=True, **options)
        assert done.drift["relative"] < 2e-6
        options |= {"weighting": "softmax", "router_std": 2**-14}
        upcycle(source, tmp_path / "out", 4, 4, 2, **options)
        expected = logits(dense)
        off = (logits(load_any(tmp_path / "out")) - expected).abs().max()
        assert off <= 2e-3 * expected.abs().max()


def test_families_go_to_their_closest_relatives(written, tmp_path):
    for name, kind in (("granite", "granitemoe"), ("phi3", "mixtral"), ("gemma3", "moezoo")):
        upcycle(written(name)[1], tmp_path / f"{name}-out", experts=2, check="layers")
        config = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert config["model_type"] == kind


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(inspect.getsource(argparse))
    return {
        "calibration": str(file),
        "calibration_tokens": 512,
        "held_out_tokens": 128,
        "window": 64,
        "split": "contiguous",
        "shared_by": "contribution",
    }


@pytest.mark.parametrize("name", CARVED)
def test_carved_blocks_are_as_planned(name, written, text, byte_level_tokenizer, tmp_path):
    dense, source = written(name, vocab_size=300)
    byte_level_tokenizer.save(source)
    whole = {"shared": 2, "active": 4, "experts": 6, "to": "moezoo", "refit": False}
    if name == "gpt2":
        whole |= {"router": "cmoe", "experts": 6}
    assert carve(source, tmp_path / "whole", **whole, **text).exact
    assert_same(tmp_path / "whole", dense)
    done = carve(
        source,
        tmp_path / "out",
        shared=1,
        active=3,
        experts=6,
        to="moezoo",
        sparsified=False,
        **text,
    )
    found = done.extra["perplexity"]
    assert found["loaded"] == pytest.approx(found["carved"], rel=1e-5)
    assert found["carved"] != pytest.approx(found["dense"], rel=1e-5)


def test_a_gated_block_of_gelu_is_carved_into_ours(written, text, byte_level_tokenizer, tmp_path):
    _, source = written("granite_plain", vocab_size=300)
    byte_level_tokenizer.save(source)
    carve(source, tmp_path / "out", shared=1, active=3, experts=6, sparsified=False, **text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ffn"][1]["init_args"]["activation"] == "gelu"


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "granite", "olmo3", "qwen3"])
def test_a_layers_cost_is_that_of_changing_it_in_the_whole_model(name, written, monkeypatch):
    """Norms after a block, factors of what it adds and soft caps of logits take part."""
    dense, source = written(name)
    tokens = torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(1))
    changed, run = [], LayerThresholds.run

    def kept(*arguments):
        changed.append(run(*arguments))
        return changed[-1]

    monkeypatch.setattr(LayerThresholds, "run", kept)
    with open_source(source) as model:
        found = measure(model, tokens, (0, 1, 2), torch.device("cpu"))
    right = dense(input_ids=tokens).logits.log_softmax(dim=-1)
    for nats, output, layer in zip(found.nats, changed, dense.model.layers, strict=True):
        hook = layer.mlp.register_forward_hook(lambda *_, y=output: y.view(*tokens.shape, -1))
        other = dense(input_ids=tokens).logits.log_softmax(dim=-1)
        hook.remove()
        expected = (right.exp() * (right - other)).sum(dim=-1).mean()
        assert nats == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


REFUSED = [
    ("gemma2", "mixtral", "to: mixtral cannot hold the attention of a gemma2; choose --to moezoo"),
    ("granite_plain", "granitemoe", "hidden_act: 'gelu' is not silu, which granitemoe's experts"),
    ("phi3_partial", "mixtral", "partial_rotary_factor: mixtral turns whole heads, not 0.5"),
    ("smollm3", "mixtral", "no_rope_layers: mixtral has rotary positions in all layers"),
    ("smollm3_windows", "mixtral", "sliding_window: mixtral attends to all positions"),
    ("smollm3_windows", "glm4_moe", "attention_bias: glm4_moe has no bias in o_proj"),
    ("olmo3", "flex_olmo", "sliding_window: flex_olmo attends to all positions; choose --to moez"),
]


@pytest.mark.parametrize(("name", "to", "message"), REFUSED)
def test_what_a_format_can_not_hold_is_refused(name, to, message, written, tmp_path):
    _, source = written(name)
    with pytest.raises(InputError) as caught:
        upcycle(source, tmp_path / "out", experts=4, to=to)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
