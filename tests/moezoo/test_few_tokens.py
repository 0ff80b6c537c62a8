"""Experts that are called for a few tokens in inference run without an operator, as if with one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moezoo
import moezoo.experts.mlp as mlp


@pytest.fixture
def layer():
    made = moezoo.SparseMoE(
        24, num_experts=6, top_k=3, d_expert=10, bias=True, num_shared_experts=1, shared_gate=True
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.eval()


@pytest.fixture
def direct(monkeypatch, native_library):
    """Count the calls that need no operator."""
    calls, run = [], mlp.grouped_mlp_directly
    monkeypatch.setattr(
        mlp, "grouped_mlp_directly", lambda *a, **o: (calls.append(1), run(*a, **o))[1]
    )
    return calls


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_output_and_statistics_are_those_of_training(layer, direct, tokens):
    x = torch.randn(tokens, 24)
    expected = layer(x)
    assert not direct
    with torch.no_grad():
        found, brute = layer(x), layer.double().reference(x.double()).hidden
    assert direct == [1]
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(found.hidden.double(), brute, rtol=1e-5, atol=1e-5)
    for name, value in expected.stats.items():
        torch.testing.assert_close(found.stats[name], value, equal_nan=True)


def test_whoever_looks_on_sees_an_operator(layer, direct):
    x = torch.randn(2, 24)
    seen = []
    layer.experts.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        expected = layer(x).hidden
        assert (direct, seen) == ([1], [1])
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(layer(x).hidden, expected)
        indices, weights = torch.tensor([[0, 5]]), torch.ones(1, 2)
        batch = torch.randn(3, 1, 24)
        one = [layer.experts(row, indices, weights, 2) for row in batch]
    assert counter.get_total_flops() >= 2 * 3 * 6 * 24 * 10
    assert direct == [1] * 4
    assert len(one) == 3


@pytest.mark.parametrize(
    ("indices", "width", "weights"),
    [
        ([[0, 6]], 24, [[1.0, 1.0]]),
        ([[-2, 1]], 24, [[1.0, 1.0]]),
        ([[0, 1]], 23, [[1.0, 1.0]]),
        ([[0, 1]], 24, [[1.0]]),
    ],
)
@torch.no_grad()
def test_what_does_not_fit_is_refused(layer, direct, indices, width, weights):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        layer.experts(torch.randn(1, width), torch.tensor(indices), torch.tensor(weights), 2)
    assert not direct
