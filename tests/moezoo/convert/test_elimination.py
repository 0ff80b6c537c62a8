"""Leaving out the neurons that the others make up for, against refitting for every candidate."""

import pytest
import torch

from moezoo.convert import CarveOptions, carve_block, prune_block
from moezoo.convert.carve import elimination
from moezoo.convert.carve.elimination import elimination_order

T, F, D = 60, 11, 5


@pytest.fixture
def activations():
    hidden = torch.randn(T, F, dtype=torch.float64) @ torch.randn(F, F, dtype=torch.float64)
    hidden[:, 4] = 0.0  # dead
    hidden[:, 7] = 3 * hidden[:, 2]  # large, and known from another
    return hidden, torch.randn(D, F, dtype=torch.float64)


def cost(hidden, down, kept):
    """Return the least ``||Y - H_kept V^T||² + λ ||V - …||²``, by the normal equations."""
    gram = hidden.t() @ hidden
    gram = gram + 0.03 * gram.diagonal().mean() * torch.eye(F, dtype=torch.float64)
    inside = gram[kept][:, kept]
    across = gram[:, kept] @ torch.linalg.solve(inside, gram[kept])
    return float(((down @ (gram - across)) * down).sum())


def test_the_order_is_that_of_trying_each(activations):
    hidden, down = activations
    kept, expected = list(range(F)), []
    for _ in range(6):
        tried = {i: cost(hidden, down, [k for k in kept if k != i]) for i in kept}
        expected.append(min(tried, key=tried.get))
        kept.remove(expected[-1])
    order = elimination_order(hidden, down, 6)
    assert sorted(order.tolist()) == list(range(F))
    assert order[F - 6 :].flip(0).tolist() == expected
    assert 4 in expected[:2]
    assert (2 in expected) != (7 in expected) or 2 in expected


def test_what_goes_together_is_judged_anew(activations, monkeypatch):
    """Of two neurons that stand in for each other not both are left out, unless in one step."""
    hidden, down = activations
    down[:, 2] = down[:, 7]
    left_out = elimination_order(hidden, down, 4)[F - 4 :].tolist()
    assert not {2, 7} <= set(left_out)
    monkeypatch.setattr(elimination, "_STEPS", 1)
    again = elimination_order(hidden, down, 4)
    assert sorted(again.tolist()) == list(range(F))


def test_dead_blocks_are_no_error():
    order = elimination_order(torch.zeros(T, F), torch.randn(D, F), 5)
    assert sorted(order.tolist()) == list(range(F))


def test_it_prunes_nearer_than_importance(planted):
    x, gate, up, down = planted(1500).weights()
    fitted, judged = x[:-300], x[-300:]
    wanted = prune_block(fitted, gate, up, down, 240).run(judged)

    def off(method):
        small = prune_block(fitted, gate, up, down, 120, method, refit_ridge=None)
        return float((small.run(judged) - wanted).norm() / wanted.norm())

    assert off("eliminated") < 0.95 * off("static_ls")


def test_shared_neurons_are_those_kept(planted):
    weights = planted(800).weights()
    options = CarveOptions(5, 1, 8, shared_by="elimination", held_out=0.0)
    plan = carve_block(*weights, options).plan
    x, gate, up, down = weights
    hidden = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    order = elimination_order(hidden, down, 90)
    assert torch.equal(plan.shared.neurons, order[:150].sort().values)
