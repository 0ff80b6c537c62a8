"""Triggers against brute force, what values say, agreement."""

import pytest
import torch

import moezoo
from moezoo.analysis.curves import draw_agreement
from moezoo.analysis.neurons import neurons_of
from moezoo.analysis.triggers import Agreement, TriggerKeeper, agreement, sayings

D = 16
LAYERS = {
    "dense": lambda: moezoo.DenseFFN(D, d_ff=11),
    "experts": lambda: moezoo.SparseMoE(D, num_experts=6, top_k=2, d_expert=3),
    "PEER": lambda: moezoo.PEER(D, num_experts=36, num_heads=2, top_k=3, query_norm="none"),
    "tree": lambda: moezoo.UltraFastFFF(D, depth=3),
    "memory": lambda: moezoo.ProductKeyMemory(D, num_keys=6, num_heads=1, top_k=3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("keep", [1, 4])
def test_the_largest_coefficients_are_kept_with_their_places(name, keep):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    hidden = torch.randn(40, D)
    (neurons,) = neurons_of(layer)
    dense = torch.full((40, neurons.number), -torch.inf)
    keeper = TriggerKeeper(neurons.number, keep)
    with torch.no_grad():
        for block in neurons.read(hidden, {}):
            columns = block.neurons.expand_as(block.activations)
            found = block.activations * block.weights
            for row, numbers, values in zip(block.rows, columns, found, strict=True):
                dense[row, numbers[numbers >= 0]] = values[numbers >= 0]
        for start in range(0, 40, 17):
            keeper.add(neurons.read(hidden[start : start + 17], {}), start)
    best = dense.topk(keep, dim=0)
    torch.testing.assert_close(keeper.coefficients, best.values.t(), rtol=1e-5, atol=1e-6)
    real = best.values.t() > -torch.inf
    assert torch.equal(keeper.positions[real], best.indices.t()[real])
    assert (keeper.positions[~real] == -1).all()
    assert real.any()


def test_values_say_tokens(monkeypatch):
    monkeypatch.setattr("moezoo.analysis.triggers._CELLS", 60)  # three neurons at once
    torch.manual_seed(0)
    embedding, values = torch.randn(20, D), torch.randn(7, D)
    asked = torch.tensor([3, -1, 0, 19, 5, 5, 5])
    said = sayings(lambda ids: values[ids], torch.arange(7), embedding, asked, 4)
    wanted = (values @ embedding.t()).softmax(-1)
    torch.testing.assert_close(said.probabilities, wanted.topk(4).values)
    assert torch.equal(said.tokens, wanted.topk(4).indices)
    torch.testing.assert_close(said.lengths, values.norm(dim=-1))
    for neuron, token in enumerate(asked.tolist()):
        order = wanted[neuron].argsort(descending=True).tolist()
        assert said.ranks[neuron] == (-1 if token < 0 else order.index(token))


def test_agreement_counts_neurons_that_say_what_follows():
    top, asked = torch.tensor([1, 1, 2, 3, 0]), torch.tensor([1, 2, 2, -1, 1])
    result = agreement(top, asked, torch.tensor([0, 7, 0, -1, 3]))
    # Tops 1, 1, 2, 0 against followers 1, 2, 2, 1: 2 x 2 + 1 x 2 of 16 pairs are equal.
    assert result == Agreement(neurons=4, agree=0.5, by_chance=6 / 16, median_rank=0.0)
    assert agreement(top, torch.full((5,), -1), top).neurons == 0


def test_the_picture_has_every_layer():
    agreements = {"layer 0": Agreement(5, 0.2, 0.1, 3.0), "layer 1": Agreement(5, 0.4, 0.1, 1.0)}
    strengths = {"layer 0": torch.rand(5), "layer 1": torch.zeros(700)}
    figure = draw_agreement(agreements, strengths, {n: n for n in agreements}, "test")
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == pytest.approx([20.0, 40.0])
    assert len(figure.axes[1].lines) == 2
