"""The product in fp32 of narrower operands: F.linear's numbers, without saving wide copies."""

import pytest
import torch
import torch.nn.functional as F

from moezoo.routing.wide_linear import wide_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bits_are_those_of_linear_on_wide_copies(dtype, weight_dtype, with_bias):
    x = torch.randn(7, 5).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(weight_dtype).requires_grad_()
    bias = torch.randn(3).to(weight_dtype).requires_grad_() if with_bias else None
    operands = [t for t in (x, weight, bias) if t is not None]
    wide = torch.promote_types(dtype, torch.float32)
    grad = torch.randn(7, 3, dtype=wide)
    expected = F.linear(x.to(wide), weight.to(wide))
    expected = expected if bias is None else expected + bias.to(wide)
    wanted = torch.autograd.grad(expected, operands, grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = wide_linear(x, weight, bias)
    gradients = torch.autograd.grad(found, operands, grad)
    assert found.dtype == wide
    assert torch.equal(found, expected)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_operands_are_saved_as_they_are():
    x = torch.randn(7, 5).bfloat16().requires_grad_()
    weight = torch.randn(3, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        wide_linear(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_second_derivatives_and_compile():
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, 3, requires_grad=True)
    compiled = torch.compile(wide_linear, backend="aot_eager", fullgraph=True)
    for function in (wide_linear, compiled):
        assert torch.equal(function(x, weight), wide_linear(x, weight))
    (of_weight,) = torch.autograd.grad(
        wide_linear(x, weight).pow(2).sum(), weight, create_graph=True
    )
    (second,) = torch.autograd.grad(of_weight.sum(), weight)
    wide = x.detach().float()
    torch.testing.assert_close(second, (2 * wide.sum(1) @ wide).expand(2, 3))
