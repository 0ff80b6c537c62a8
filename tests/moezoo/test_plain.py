"""Every layer equals a plain reference that shares no line with it, in every gradient too."""

import sys
from pathlib import Path

import pytest
import torch

import moezoo

sys.path.insert(0, str(Path(__file__).parent))

from plain.cases import CONVENTIONS, SITUATIONS, ZOO
from plain.compare import assert_same, by_layer, by_plain, inputs


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ZOO)
def test_method_equals_its_plain_reference(name, situation, poison_empty):
    layer = ZOO[name]()
    hidden, call = inputs(layer, SITUATIONS[situation])
    assert_same(by_layer(layer, hidden, call), by_plain(layer, hidden, call))


@pytest.mark.parametrize("situation", ["train_padded", "eval_asked_padded"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_convention_equals_its_plain_reference(name, situation, poison_empty):
    layer = CONVENTIONS[name]()
    hidden, call = inputs(layer, SITUATIONS[situation])
    assert_same(by_layer(layer, hidden, call), by_plain(layer, hidden, call))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_other_paths_of_a_convention_equal_its_forward_pass(name):
    """By brute force with every gradient, and as decoding runs it."""
    layer = CONVENTIONS[name]()
    hidden, call = inputs(layer, SITUATIONS["eval_asked_padded"])
    forward = by_layer(layer, hidden, call)
    assert_same(by_layer(layer, hidden, call, brute_force=True), forward)
    call = call._replace(router_input=None, embeddings=None, router_state=None)
    forward = by_layer(layer, hidden, call)
    with torch.no_grad():
        where = {"positions": call.positions} if layer.reads_positions else {}
        found = layer.infer(hidden, token_ids=call.token_ids, mask=call.mask, **where)
    torch.testing.assert_close(found, forward["hidden"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", [*ZOO, *CONVENTIONS])
def test_one_or_two_tokens(name, count, poison_empty):
    """Of which one has no variance to normalise by, and two fill no expert."""
    layer = {**ZOO, **CONVENTIONS}[name]()
    hidden, call = inputs(layer, {"training": True, "shape": (count,)})
    assert_same(by_layer(layer, hidden, call), by_plain(layer, hidden, call))


def crowd(layer: moezoo.FeedForward) -> bool:
    """Send all tokens to the first slot, none to the last, if the layer's choice can be led so."""
    with torch.no_grad():
        if isinstance(layer, moezoo.FastFeedForward):
            layer.tree.bias.fill_(-20.0)
        elif isinstance(layer, moezoo.HashLayer) and layer.key != "position":
            layer.table.fill_(0)
            if layer.gate is not None:  # beside a lonely expert, whose weight would be one
                layer.table[0] = 1
        elif isinstance(layer, moezoo.UltraFastFFF):
            layer.in_bias.fill_(-5.0)
        elif isinstance(layer, moezoo.SparseMoE) and (
            layer.router.closed_groups == "zero" or layer.router.logits.mlp
        ):
            return False  # the worst expert is chosen in the one, the other hides the feature
        elif isinstance(layer, moezoo.SparseMoE | moezoo.SigmaMoE) and layer.eval().causal:
            layer.gate.weight[0, 0] += 9.0
            layer.gate.weight[-1, 0] -= 9.0
        else:
            return False
    return True


CROWDED = [name for name, make in {**ZOO, **CONVENTIONS}.items() if crowd(make())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CROWDED)
def test_one_slot_with_all_tokens_and_one_with_none(name, training, poison_empty):
    layer = {**ZOO, **CONVENTIONS}[name]()
    crowd(layer)
    hidden, call = inputs(layer, {"training": training, "shape": (63,)})
    expected = by_plain(layer, hidden, call)
    if not training:  # nothing random opposes
        assert expected["counts"].max() >= 57
        assert expected["counts"].min() in (0, 63)  # 63 where every slot is every token's
    assert_same(by_layer(layer, hidden, call), expected)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gshard", "sigmoid_groups_by_best"])
def test_load_balancing_knows_earlier_micro_batches_of_the_step(name):
    layer = {**ZOO, **CONVENTIONS}[name]()
    hidden, call = inputs(layer, SITUATIONS["train_padded"])
    earlier = list(range(layer.num_experts))
    layer.observe({"expert_counts": torch.tensor(earlier)})
    expected = by_plain(layer, hidden, call._replace(earlier=earlier))
    found = by_layer(layer, hidden, call)
    assert_same(found, expected)
    layer.discard()
    counted = layer.balance.scope == "global" and layer.balance.count == "selected"
    alone = by_layer(layer, hidden, call)["loss load_balancing"]
    assert torch.equal(alone, found["loss load_balancing"]) != counted


def test_plain_references_import_nothing_that_layers_compute_with():
    for file in (Path(__file__).parent / "plain").glob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.startswith(("from ", "import "))]
        allowed = ("compare.py", "cases.py")  # they build and call the layers
        assert file.name in allowed or not any("moezoo" in line for line in imports), file.name
