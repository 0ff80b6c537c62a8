"""FastFeedForward against the authors' package, weights copied across."""

import pytest
import torch

from moezoo import FastFeedForward

package = pytest.importorskip("fastfeedforward")

D, F = 12, 5


def pair(depth: int, dropout: float = 0.0, **arguments):
    """Build both, with the same weights."""
    theirs = package.FFF(D, F, D, depth, dropout=dropout)
    arguments |= {"leaf_dropout": dropout}
    ours = FastFeedForward(D, depth=depth, d_leaf=F, hardening=1.0, **arguments)
    with torch.no_grad():
        ours.tree.weight.copy_(theirs.node_weights)
        ours.tree.bias.copy_(theirs.node_biases.squeeze(-1))
        ours.leaves.gate_up_proj.copy_(theirs.w1s.transpose(1, 2))
        ours.leaves.gate_up_bias.copy_(theirs.b1s)
        ours.leaves.down_proj.copy_(theirs.w2s.transpose(1, 2))
        ours.leaves.down_bias.copy_(theirs.b2s)
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_soft_output_and_gradients_agree(depth, dropout):
    ours, theirs = pair(depth, dropout)
    hidden, direction = torch.randn(2, 40, D), torch.randn(2, 40, D)
    found = []
    for call in (lambda x: ours(x).hidden, theirs):
        torch.manual_seed(3)  # both drop the same neurons
        x = hidden.clone().requires_grad_()
        y = call(x)
        (y * direction).sum().backward()
        found.append([y.detach(), x.grad])
    found[0] += [ours.tree.weight.grad, ours.leaves.gate_up_proj.grad, ours.leaves.down_bias.grad]
    found[1] += [theirs.node_weights.grad, theirs.w1s.grad.transpose(1, 2), theirs.b2s.grad]
    for mine, other in zip(*found, strict=True):
        if other is None:
            assert depth == 0  # no node, nothing to learn
        else:
            assert (mine - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_mean_entropy_agrees(depth):
    ours, theirs = pair(depth, hardening_reduction="mean")
    hidden = torch.randn(64, D)
    _, entropies = theirs(hidden, return_entropies=True)
    loss = ours(hidden).losses["hardening"]
    torch.testing.assert_close(loss, entropies.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_hard_output_agrees_but_for_the_output_bias_that_the_package_drops(depth):
    ours, theirs = pair(depth)
    hidden = torch.randn(64, D)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        complete, without_bias = ours(hidden).hidden, theirs(hidden)
        bias = ours.leaves.down_bias
        assert (complete - without_bias).abs().max() <= bias.abs().max() + 1e-6
        assert (complete - without_bias).abs().max() > 0.1
        bias.zero_()
        torch.testing.assert_close(ours(hidden).hidden, without_bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_hard_output_agrees_with_the_option_that_drops_it_too(depth):
    ours, theirs = pair(depth, compat="upstream_eval")
    hidden = torch.randn(64, D)
    with torch.no_grad():
        expected = theirs.eval_forward(hidden)
        for call in (ours.eval(), ours.reference):
            torch.testing.assert_close(call(hidden).hidden, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_hard_training_output_agrees(depth, dropout):
    ours, theirs = pair(depth, dropout, hard=True)
    hidden = torch.randn(64, D)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = theirs(hidden, use_hard_decisions=True)
        torch.manual_seed(3)
        torch.testing.assert_close(ours(hidden).hidden, expected, rtol=0, atol=1e-6)
