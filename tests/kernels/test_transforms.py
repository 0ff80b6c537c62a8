"""Ops under `torch.func` and dual tensors: the derivatives of `backward`, and none dropped."""

import pytest
import torch
from torch.autograd import forward_ad

import moezoo_kernels
from moezoo_kernels import backends, grouped_mlp, transforms, weighted_bag
from moezoo_kernels.grouped_mlp import direct

# torch itself scripts decompositions when a function is first differentiated forwards.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T, K, E, D, F = 5, 2, 4, 6, 3


def operands(tokens=T):
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, D), (E, 2 * F, D), (E, D, F), (tokens, K))
    x, w_in, w_out, weights = (torch.randn(s, generator=generator).double() for s in shapes)
    indices = torch.rand(tokens, E, generator=generator).topk(K).indices
    return x, w_in, w_out, weights, indices


def experts(x, w_in, w_out, weights, indices):
    return grouped_mlp(x, w_in, w_out, indices, weights)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("tokens", [1, T])
def test_tangents_are_those_that_backward_says(learned, tokens):
    *values, indices = operands(tokens)
    values = [value.requires_grad_(learned) for value in values]
    directions = [torch.randn_like(value) for value in values]
    _, tangent = torch.func.jvp(lambda *v: experts(*v, indices), tuple(values), tuple(directions))
    seen = torch.randn_like(tangent)
    copies = [value.detach().requires_grad_() for value in values]
    gradients = torch.autograd.grad((experts(*copies, indices) * seen).sum(), copies)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close((tangent.detach() * seen).sum(), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, directions, strict=True)]
        found = forward_ad.unpack_dual(experts(*duals, indices)).tangent
    torch.testing.assert_close(found, tangent)


def test_gradients_of_a_function_are_those_of_backward_and_have_gradients():
    x, *others, indices = operands()

    def loss(x):
        return experts(x, *others, indices).square().sum()

    copy = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(copy), copy)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    hessian = torch.func.hessian(loss)(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.any()


@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("learned", [False, True])
def test_entries_of_a_vmap_are_computed_one_by_one(learned, tokens):
    x, *others, indices = operands(tokens)
    many = torch.randn(3, *x.shape, dtype=x.dtype)
    with torch.set_grad_enabled(learned):
        found = torch.vmap(lambda x: experts(x, *others, indices))(many)
        for one, of_one in zip(many, found, strict=True):
            torch.testing.assert_close(of_one, experts(one, *others, indices))


def test_other_ops_drop_no_tangent_either():
    table = torch.randn(7, 4, dtype=torch.float64)
    indices, weights = torch.tensor([[0, 3], [6, 3]]), torch.randn(2, 2, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda t: weighted_bag(t, indices, weights), (table,), (table,))
    torch.testing.assert_close(tangent, weighted_bag(table, indices, weights))


def test_the_reference_runs_whatever_is_forced_and_nothing_goes_straight_to_a_kernel():
    x, w_in, *_, indices = operands(1)
    chosen = []

    def look(x):
        # A tensor of `vmap` has no memory that a kernel could read.
        assert not direct.is_direct(x, indices, w_in)
        chosen.append(backends.choose("grouped_mlp", x.device, x.dtype))
        return x.sum()

    reference = backends._BACKENDS["grouped_mlp"]["reference"].function
    with torch.no_grad(), moezoo_kernels.use("grouped_mm"):
        torch.func.grad(look)(x)
        torch.vmap(look)(x)
        torch.func.jvp(look, (x,), (x,))
    assert [function is reference for function in chosen] == [True, False, True]
    assert not transforms.is_transformed()
    assert not transforms.is_differentiated()
