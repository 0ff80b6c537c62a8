"""What saving costs in each layer, and how experts per token are shared out."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models.conversion import carving
from moezoo_models.conversion.budgets import layer_costs, share_out
from moezoo_models.conversion.carve import _sizes, carve
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.source import open_source

CPU = torch.device("cpu")


def test_a_layers_cost_is_the_divergence_with_that_layer_pruned(readable):
    source = readable()
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with open_source(source) as dense:
        found = layer_costs(dense, tokens, (0, 2), 30, CPU)
    assert set(found) == {0, 2}
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        expected = model(tokens).logits[:, 1:].log_softmax(-1)
        for layer in found:
            mlp = model.model.layers[layer].mlp
            seen = []
            hook = mlp.down_proj.register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
            model(tokens)
            hook.remove()
            size = seen[0][:, 1:].abs().flatten(0, 1).mean(0) * mlp.down_proj.weight.norm(dim=0)
            weight = mlp.down_proj.weight.clone()
            # Needed at the first tokens alone, whose output would else be lost.
            first = seen[0][:, 0].abs().amax(0) * weight.norm(dim=0)
            usual = F.linear(seen[0][:, 1:], weight).norm(dim=-1).mean()
            size = torch.where(first > usual, torch.inf, size)
            mlp.down_proj.weight[:, size.argsort()[:18]] = 0.0
            other = model(tokens).logits[:, 1:].log_softmax(-1)
            mlp.down_proj.weight.copy_(weight)
            nats = (expected.exp() * (expected - other)).sum(-1).mean()
            assert found[layer] == pytest.approx(float(nats), rel=1e-3)


@pytest.mark.parametrize(("active", "routed"), [(3, 5), (12, 36), (2, 8)])
def test_shares_add_up_and_dear_layers_save_less(active, routed):
    costs = dict(enumerate([9.0, 4.0, 0.3, 0.2, 0.5, 2.0, 0.25]))
    found = share_out(costs, active, routed)
    assert sum(found.values()) == active * len(costs)
    assert all(1 <= each <= routed for each in found.values())
    by_cost = sorted(costs, key=costs.get)
    left = [routed - found[layer] for layer in by_cost]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_shares_are_the_best_there_are():
    costs = {0: 3.0, 1: 1.0, 2: 0.7, 3: 1.6}
    found = share_out(costs, 5, 9)

    def loss(left):
        return sum(c * x * x for c, x in zip(costs.values(), left, strict=True))

    every = (x for x in itertools.product(range(9), repeat=4) if sum(x) == 16)
    best = min(every, key=loss)
    assert loss([9 - each for each in found.values()]) <= 1.02 * loss(best)


@pytest.mark.parametrize("costs", [{0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0}])
def test_equal_costs_share_equally(costs):
    assert set(share_out(costs, 4, 9).values()) == {4}


def test_each_layer_has_its_own_number_of_experts(readable, text, tmp_path, monkeypatch):
    costs = {0: 4.0, 1: 1.0, 2: 1.0}
    monkeypatch.setattr(carving, "layer_costs", lambda *_: costs)
    sizes = {"shared": 2, "active": 2, "experts": 6, "to": "moezoo"}
    done = carve(readable(), tmp_path / "out", **sizes, **text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = {
        layer: rule["init_args"]["top_k"] for rule in config["ffn"][1:] for layer in rule["layers"]
    }
    assert found == share_out(costs, 2, 4)
    assert len(set(found.values())) > 1
    assert done.extra["costs"] == {str(layer): cost for layer, cost in costs.items()}
    figures = done.extra["perplexity"]
    assert figures["loaded"] == pytest.approx(figures["carved"], rel=1e-5)
    # Two thirds of the neurons and the router: 4 rows of 32 inputs and 16 shared neurons.
    assert done.extra["work"] == pytest.approx((4 * 8 + 4 * 48 / 96) / 48)
    layers = load_any(tmp_path / "out").model.layers
    assert [layer.mlp.top_k for layer in layers] == [found[n] for n in range(3)]


def test_an_interrupted_run_measures_costs_once(readable, text, tmp_path, monkeypatch):
    calls, measure, original = [], carving.layer_costs, carving.carve_layer

    def counted(*arguments):
        calls.append("costs")
        return measure(*arguments)

    def interrupted(layer, *arguments):
        calls.append(layer)
        if calls == ["costs", 0, 1]:
            raise KeyboardInterrupt
        return original(layer, *arguments)

    options = {"shared": 2, "active": 2, "experts": 6, "to": "moezoo", **text}
    source = readable()
    carve(source, tmp_path / "whole", **options)
    monkeypatch.setattr(carving, "layer_costs", counted)
    monkeypatch.setattr(carving, "carve_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carve(source, tmp_path / "out", **options)
    carve(source, tmp_path / "out", **options)
    assert calls == ["costs", 0, 1, 1, 2]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("behind", ["dense", None])
def test_a_variant_follows_the_dense_states(behind, readable, text, tmp_path):
    """The target is what brings this variant's states to where the dense model's are."""
    source, seen = readable(), {}

    def convert(layer, x, block, *target):
        seen[layer] = target
        if not target:
            return lambda x: block.run(x) / 2
        return lambda x: target[0] if x.shape == target[0].shape else block.run(x) / 2

    with open_source(source) as dense:
        from moezoo_models.conversion.carve import calibrate

        words = calibrate(dense, text["calibration"], 768, 256, 64, 0)
        variants = [Variant("dense", None), Variant("half", convert, behind)]
        Propagation(dense, words, variants, (0, 1, 2), tmp_path / "s", CPU).run()
    if behind is None:
        assert seen == {0: (), 1: (), 2: ()}
        return
    # Following exactly, its states are the dense ones, and each target is the dense output.
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    outputs = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _, __, y, n=number: outputs.update({n: y}))
    with torch.no_grad():
        model(words.fitted)
    for number in range(3):
        expected = outputs[number].flatten(0, 1)
        torch.testing.assert_close(seen[number][0], expected, rtol=1e-4, atol=1e-4)
    assert not [p for p in (tmp_path / "s").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1536, (60, 12, 96)), (11008, (20, 4, 32)), (14336, (80, 16, 128)), (48, (5, 1, 8))],
)
def test_default_sizes_leave_a_quarter_idle_in_parts_that_kernels_take(width, expected):
    shared, active, experts = _sizes(width, None, None, None)
    assert (shared, active, experts) == expected
    assert 4 * (shared + active) == 3 * experts
    assert width < 100 or (width // experts) % 8 == 0
    assert _sizes(width, 1, None, 8) == (1, 5, 8)


def test_widths_without_parts_are_refused():
    with pytest.raises(InputError, match="experts: no default divides the block's 46 neurons"):
        _sizes(46, None, None, None)
