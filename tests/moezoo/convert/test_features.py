"""Random features: without bias by quadrature, and with the error that their number leaves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo import InputError
from moezoo.convert import Block
from moezoo.convert.features import (
    UniversalFeatures,
    equal_neurons,
    fit_features,
    fourier_series,
    universal,
)
from moezoo.convert.features.universal import draw, scales

D, NEURONS, REACH = 2, 5, 2.0
SERIES = fourier_series(F.silu, REACH, 1e-4)
KINDS = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def block(gated: bool, act=SERIES, d_model: int = D, dtype=torch.float64) -> Block:
    """Return a block of small weights, with all the biases that its kind may have."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, dtype=torch.float64, generator=generator)

    gate = drawn(NEURONS, d_model) if gated else None
    bias_in = None if gated else drawn(NEURONS)
    up, down = drawn(NEURONS, d_model), drawn(d_model, NEURONS)
    return Block(gate, up, down, act, bias_in, drawn(d_model)).to(dtype)


def inputs(count: int, d_model: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.5 * torch.randn(count, d_model, dtype=torch.float64, generator=generator)


def plain(dense: Block, x_TD: Tensor) -> Tensor:
    """Compute a block token by token and neuron by neuron."""
    rows = []
    for x in x_TD:
        output = dense.bias_out.clone()
        for f in range(dense.width):
            z = sum(dense.up[f] * x)
            if dense.gate is None:
                value = dense.act(z + dense.bias_in[f])
            else:
                value = dense.act(sum(dense.gate[f] * x)) * z
            output += dense.down[:, f] * value
        rows.append(output)
    return torch.stack(rows)


@pytest.mark.parametrize("act", [F.silu, F.gelu, torch.tanh, torch.relu])
def test_a_series_is_the_activation_within_its_reach(act):
    z = torch.linspace(-REACH, REACH, 301, dtype=torch.float64)
    found = fourier_series(act, REACH, 1e-2)
    assert float((found(z) - act(z)).abs().max()) < 1.1e-2 * REACH
    assert float((found(z + 4 * REACH) - found(z)).abs().max()) < 1e-9  # its period


@KINDS
def test_the_expectation_is_the_block_exactly(gated):
    """Directions at the nodes of a Gauss-Hermite rule, each with its weight, are an integral."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    weights = weights / math.sqrt(2 * math.pi)
    grid = torch.tensor(list(itertools.product(nodes, repeat=D)))
    mass = torch.tensor([math.prod(each) for each in itertools.product(weights, repeat=D)])
    terms = len(SERIES.frequency)
    frequency = SERIES.frequency.repeat_interleave(len(grid))
    coefficient = SERIES.coefficient.repeat_interleave(len(grid)) * mass.repeat(terms)
    every = UniversalFeatures(
        grid.repeat(terms, 1), frequency, coefficient, scales(frequency, 0.7, 0.6)
    )
    dense, x_TD = block(gated), inputs(7)
    torch.testing.assert_close(every.run(dense, x_TD), plain(dense, x_TD), rtol=1e-8, atol=1e-8)


@KINDS
def test_the_mean_over_seeds_is_the_block_and_errors_fall_with_the_root(gated):
    series = fourier_series(F.silu, REACH, 1e-2)  # fewer terms, which vary less
    dense, x_TD = block(gated, series), inputs(7)
    wanted = plain(dense, x_TD)
    counts, errors = (8, 32, 128, 512), []
    for pairs in counts:
        found = torch.stack(
            [draw(series, pairs, 0.7, 0.6, D, seed).run(dense, x_TD) for seed in range(60)]
        )
        errors.append(float((found - wanted).square().mean().sqrt()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35
    standard_error = found.std(dim=0) / math.sqrt(len(found))
    assert float(((found.mean(dim=0) - wanted) / standard_error).abs().max()) < 4.0


@KINDS
def test_bundled_is_unbundled(gated):
    dense, x_TD = block(gated, d_model=6), inputs(9, 6)
    drawn = draw(SERIES, 40, 1.0, 1.0, 6, 0)
    unbundled = (drawn.of(x_TD) @ drawn.weights(dense).t()) @ dense.down.t() + dense.bias_out
    torch.testing.assert_close(drawn.run(dense, x_TD), unbundled, rtol=1e-10, atol=1e-10)
    assert drawn.bundle(dense).shape == (6, 80)
    some = drawn.first(10)
    again = UniversalFeatures(
        drawn.direction[:10], drawn.frequency[:10], drawn.coefficient[:10] * 4, drawn.scale[:10]
    )
    assert torch.equal(some.run(dense, x_TD), again.run(dense, x_TD))


def test_a_block_of_the_same_features_is_found_again():
    """The fit recovers Ψ and the constant, where the dense block is one of these features."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 6, generator=generator) * 12**-0.5
    dense = Block(
        None,
        weight,
        torch.randn(6, 12, generator=torch.Generator().manual_seed(6)),
        torch.relu,
        torch.zeros(12),
        torch.arange(6.0),
    )
    x_TD = inputs(400, 6).float()
    first = torch.arange(400) % 40 == 0
    found = fit_features(dense, x_TD, 12, first, seed=5, strengths=(1e-7,))
    assert torch.equal(found.block.up, weight)
    assert found.errors[12] < 1e-4
    torch.testing.assert_close(found.block.down, dense.down, rtol=1e-2, atol=1e-2)
    assert found.errors[12] < found.errors[6] < found.errors[3]
    assert found.linear > 10 * found.errors[12]
    other = fit_features(dense, x_TD, 12, first, seed=6, strengths=(1e-7,))
    assert other.errors[12] > 100 * found.errors[12]


@KINDS
def test_errors_are_those_of_tokens_that_are_not_fitted_to(gated):
    dense, x_TD = block(gated, F.silu, 6, torch.float32), inputs(500, 6).float()
    first = torch.arange(500) % 50 == 0
    x_TD[first] = x_TD[0].clone()
    found = fit_features(dense, x_TD, 16, first, dtype=torch.bfloat16)
    assert torch.equal(found.block.up, found.block.up.bfloat16().float())
    held_out = x_TD[~first][-49:]
    wanted = plain(dense.to(torch.float64), held_out.double()).float()
    error = float((found.block.run(held_out) - wanted).norm() / wanted.norm())
    assert found.errors[16] == pytest.approx(error, rel=1e-4)
    drawn = universal(dense, x_TD[~first][:392], 16)
    error = float((drawn.run(dense, held_out) - wanted).norm() / wanted.norm())
    assert found.universal[16] == pytest.approx(error, rel=1e-6)
    assert list(found.errors) == list(found.universal) == [2, 4, 8, 16]
    assert found.exact
    near = found.block.run(x_TD[:1])
    torch.testing.assert_close(near, dense.run(x_TD[:1]), rtol=1e-3, atol=1e-3)


def test_work_and_mistakes():
    assert equal_neurons(1152, gated=True) == 768
    assert equal_neurons(768, gated=False) == 768
    few = torch.zeros(9, dtype=torch.bool)
    with pytest.raises(InputError, match="9 are too few to fit and judge"):
        fit_features(block(False, F.silu, 6, torch.float32), inputs(9, 6).float(), 4, few)
