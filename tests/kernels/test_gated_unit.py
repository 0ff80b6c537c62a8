"""Gated units in one pass: numbers and gradients of torch's operators in fp64."""

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from moezoo_kernels import activations, native
from moezoo_kernels.activations import ACTIVATIONS, GLUOptions
from moezoo_kernels.gated_unit import gated_unit

native_only = pytest.mark.skipif(
    native.unusable(torch.device("cpu"), torch.float32) is not None, reason="needs the C++ library"
)
PLAIN = GLUOptions()
BOUNDS = [
    {"limit": 0.7, "up_shift": 1.0},
    {"limit": 0.5, "limit_after": True},
    {"gate_softcap": 1.5, "up_softcap": 2.0},
]
CASES = [(name, {}) for name in ACTIVATIONS] + [("silu", options) for options in BOUNDS]


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator)


def agree(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@native_only
@pytest.mark.parametrize("shape", [(3, 7, 11), (64, 512), (0, 5), (1,)])
@pytest.mark.parametrize(("activation", "options"), CASES)
def test_values_and_gradients(shape, activation, options):
    glu = GLUOptions(**options)
    gate, up = (drawn(*shape, seed=seed).requires_grad_() for seed in (1, 2))
    slope = drawn(*shape, seed=3)
    found = gated_unit(gate, up, activation, glu)
    assert type(found.grad_fn).__name__ == "_UnitBackward"
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    expected = activations.gated_unit(*wide, activation, glu)
    agree(found, expected)
    gradients = torch.autograd.grad(found, (gate, up), slope)
    for one, other in zip(
        gradients, torch.autograd.grad(expected, wide, slope.double()), strict=True
    ):
        agree(one, other)


@native_only
def test_what_lies_apart_and_what_is_expanded():
    gate, up = drawn(9, 14)[:, ::2].requires_grad_(), drawn(7, 9).t().requires_grad_()
    made = gated_unit(gate, up, "silu", PLAIN)
    found = torch.autograd.grad(made.sum(), (gate, up))
    expected = torch.autograd.grad(activations.gated_unit(gate, up, "silu").sum(), (gate, up))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@native_only
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_both_wants_no_gradient(frozen):
    pair = [drawn(5, 6, seed=seed).requires_grad_(seed != frozen) for seed in (0, 1)]
    gated_unit(*pair, "gelu", PLAIN).sum().backward()
    assert pair[frozen].grad is None
    agree(pair[1 - frozen].grad, _slope(pair, 1 - frozen))


def _slope(pair, number):
    wide = [t.detach().double().requires_grad_() for t in pair]
    (found,) = torch.autograd.grad(activations.gated_unit(*wide, "gelu").sum(), wide[number])
    return found


@native_only
def test_gradients_have_gradients():
    pair = [drawn(5, 6, seed=seed).requires_grad_() for seed in (1, 2)]

    def twice(function):
        once = torch.autograd.grad(
            function(*pair, "silu", PLAIN).square().sum(), pair, create_graph=True
        )
        return torch.autograd.grad(sum(one.square().sum() for one in once), pair)

    for one, other in zip(twice(gated_unit), twice(activations.gated_unit), strict=True):
        torch.testing.assert_close(one, other)


def test_everything_else_is_left_to_torch():
    gate, up = drawn(4, 6), drawn(4, 6, seed=2)
    for dtype in (torch.float64, torch.bfloat16):
        pair = gate.to(dtype), up.to(dtype)
        found = gated_unit(*pair, "silu", PLAIN)
        assert torch.equal(found, activations.gated_unit(*pair, "silu"))
    expected = activations.gated_unit(gate, up, "silu")
    mapped = torch.func.vmap(lambda g, u: gated_unit(g, u, "silu", PLAIN))(gate, up)
    torch.testing.assert_close(mapped, expected)
    slope = torch.func.grad(lambda g: gated_unit(g, up, "silu", PLAIN).sum())(gate)
    torch.testing.assert_close(slope, up * torch.func.grad(lambda g: silu(g).sum())(gate))
    compiled = torch.compile(gated_unit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up, "silu", PLAIN), expected)
    with FlopCounterMode(display=False):
        assert torch.equal(gated_unit(gate, up, "silu", PLAIN), expected)
