"""R-Sparse: strong inputs pass the matrix, the others its low-rank factors."""

import pytest
import torch

from moezoo import InputError
from moezoo.convert import Block
from moezoo.convert.select import calibrate, keys_of
from moezoo.convert.select.guess import GuessOptions, LayerRemainder, guess
from moezoo.convert.select.r_sparse import (
    Split,
    channel_thresholds,
    low_rank,
    r_sparse_linear,
    split_budget,
)
from moezoo.selection import Shares


def problem(tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with unequal columns, and skewed inputs whose mean is not zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 33, generator=generator, dtype=torch.float64)
    weight *= torch.randn(33, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(tokens, 33, generator=generator, dtype=torch.float64).exp() - 1
    return weight, x


def test_every_input_is_decided_by_its_score():
    weight, x = problem(11)
    limits = channel_thresholds(weight, x, 10).double()
    factors = low_rank(weight, 4)
    approximate = factors[0] @ factors[1]
    expected = torch.zeros(11, 19, dtype=torch.float64)
    for t in range(11):
        for j in range(33):
            strong = abs(float(x[t, j])) > float(limits[j])
            expected[t] += x[t, j] * (weight if strong else approximate)[:, j]
    output = r_sparse_linear(x, weight, limits, factors)
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 10, 25])
def test_as_many_inputs_pass_as_were_asked_for_on_skewed_inputs(channels):
    weight, x = problem()
    limits = channel_thresholds(weight, x, channels)
    passed = (x.abs() > limits).sum() / len(x)
    assert float(passed) == pytest.approx(channels, abs=0.05)
    scores = x.abs() * weight.norm(dim=0)
    kept = x.abs() > limits
    assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)


def test_all_inputs_or_the_full_rank_are_the_matrix():
    weight, x = problem()
    dense = x @ weight.t()
    every = channel_thresholds(weight, x, 33)
    assert torch.allclose(r_sparse_linear(x, weight, every, None), dense, rtol=1e-12)
    full = low_rank(weight, 19)
    none = torch.full((33,), torch.inf, dtype=torch.float64)
    for limits in (channel_thresholds(weight, x, 7), none):
        assert torch.allclose(r_sparse_linear(x, weight, limits, full), dense, atol=1e-9)


def test_the_remainder_at_low_rank_is_nearer_than_none():
    weight, x = problem()
    limits = channel_thresholds(weight, x, 8)
    dense = x @ weight.t()
    dropped = (r_sparse_linear(x, weight, limits, None) - dense).norm()
    ranked = (r_sparse_linear(x, weight, limits, low_rank(weight, 6)) - dense).norm()
    assert ranked < 0.9 * dropped


def test_factors_are_the_best_of_their_rank():
    weight, _ = problem()
    left, right = low_rank(weight, 5)
    assert left.shape == (19, 5)
    assert right.shape == (5, 33)
    expected = torch.linalg.svdvals(weight)[5:].norm()
    assert float((weight - left @ right).norm()) == pytest.approx(float(expected), rel=1e-10)


def test_a_column_of_zeros_never_passes():
    weight, x = problem()
    weight[:, 3] = 0
    limits = channel_thresholds(weight, x, 10)
    assert limits[3] == torch.finfo(torch.float32).max
    assert float(limits[torch.arange(33) != 3].max()) < 1e3


def test_the_budget_is_the_paper_s():
    assert split_budget(1536, 576, 0.5, 1.0) == Split(288, 0)
    assert split_budget(1536, 576, 0.5, 0.0) == Split(0, 209)  # .5 · 576 · 1536 / 2112 = 209.45
    both = split_budget(1536, 576, 0.4, 0.75)
    read = both.channels * 1536 + both.rank * (1536 + 576)
    assert read == pytest.approx(0.6 * 576 * 1536, rel=5e-3)


@pytest.mark.parametrize(
    ("sparsity", "share", "message"),
    [
        (1.0, 1.0, "sparsity: 1 leaves nothing"),
        (0.99, 0.5, "sparsity: 0.99 leaves nothing"),
        (0.5, 1.5, "share: 1.5 is out of range"),
        (-0.1, 0.5, "sparsity: -0.1 is out of range"),
    ],
)
def test_bad_budgets_are_refused(sparsity, share, message):
    with pytest.raises(InputError, match=message):
        split_budget(8, 8, sparsity, share)


def test_without_factors_it_is_a_threshold_on_scores():
    """With its whole budget on inputs R-Sparse is WINA's rule; with full rank it is dense."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    block = Block(normal(40, 16), normal(40, 16), normal(16, 40))
    x, none = normal(300, 16), torch.zeros(300, dtype=torch.bool)
    alone = guess("r_sparse", block, x, 0.5, GuessOptions(inputs=1.0))
    wina = calibrate(block, x, keys_of("wina", block, x), Shares(0.5, 1.0, 0.5, 0.5))
    assert torch.allclose(alone.run(block, x, none), wina.run(block, x, none), atol=1e-3)
    assert alone.shares == pytest.approx(wina.shares, abs=1e-3)
    ranked = guess("r_sparse", block, x, 0.5, GuessOptions(inputs=0.6))
    assert ranked.factors["gate"][0].shape == (40, 2)  # .5 · .4 · 16 · 40 / 56 = 2.3
    full = {
        n: low_rank(w, 16)
        for n, w in zip(("gate", "up", "down"), (block.gate, block.up, block.down), strict=True)
    }
    whole = LayerRemainder(ranked.limits, full, ranked.shares)
    assert torch.allclose(whole.run(block, x, none), block.run(x), atol=1e-3)
    every = ranked.run(block, x, ~none)
    assert torch.allclose(every, block.run(x), atol=1e-3)
