"""grouped_mlp on stacks that lie transposed in memory, as GPT-OSS and Aria have them."""

from dataclasses import replace

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import GLUOptions
from moezoo_kernels.grouped_mlp import cpu
from moezoo_kernels.grouped_mlp.direct import grouped_mlp_directly
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

GPT_OSS = {
    "activation": "quick_gelu",
    "glu": GLUOptions(limit=3.0, up_shift=1.0),
    "interleaved": True,
}


def _transposed(problem, names=("w_in", "w_out")):
    """Return the problem with leaves that are transposed in memory, and views of them."""
    leaves = {
        name: getattr(problem, name).detach().transpose(1, 2).contiguous().requires_grad_()
        for name in names
    }
    views = {name: leaf.transpose(1, 2) for name, leaf in leaves.items()}
    return replace(problem, **views), leaves


@pytest.mark.parametrize("routing", ["some_none", "one_empty", "one_expert"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_output_and_gradients(
    any_backend, poison_empty, make_problem, assert_close, routing, bias, dtype, digits
):
    exact = make_problem(routing=routing, bias=bias, **GPT_OSS)
    problem, _ = _transposed(exact.to(dtype))
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), exact.outputs(reference), digits)


@pytest.mark.parametrize("tokens", [3, 400])
def test_gradients_lie_as_the_parameters(fused_backend, make_problem, assert_close, tokens):
    exact = make_problem(tokens=tokens, experts=6, **GPT_OSS)
    expected = exact.outputs(reference)
    problem, leaves = _transposed(exact.to(torch.float32))
    made = []
    for leaf in leaves.values():
        leaf.register_hook(made.append)
    problem.run(moezoo_kernels.grouped_mlp).backward(problem.grad)
    assert len(made) == 2
    assert all(g.is_contiguous() for g in made)
    found = [leaf.grad.transpose(1, 2) for leaf in leaves.values()]
    assert_close(found, expected[2:4], 2e-6)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 9), (8, 16), (23, 33), (64, 48)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_handful_of_tokens_where_the_weights_lie(
    native_library, poison_empty, make_problem, assert_close, tokens, width, hidden, bias, dtype,
    digits, monkeypatch,
):  # fmt: skip
    sizes = {"tokens": tokens, "width": width, "hidden": hidden, "experts": 7}
    problem, _ = _transposed(make_problem(bias=bias, **sizes).to(dtype))
    problem.weights = problem.weights.detach().float()
    expected = problem.to(torch.float64).run(reference)
    assert cpu.lie_for_few(problem.w_in, problem.w_out)
    monkeypatch.setattr(cpu, "_FEW_PER_EXPERT", {dtype: 16})
    assert cpu.is_few(problem.indices.numel(), 7, dtype)
    monkeypatch.setattr(cpu, "forward", None)  # no copy, nor products by other means
    with torch.no_grad(), moezoo_kernels.use("cpu"):
        for call in (moezoo_kernels.grouped_mlp, grouped_mlp_directly):
            assert_close([problem.run(call)], [expected], digits)


@pytest.mark.parametrize("name", ["w_in", "w_out"])
def test_one_of_the_two_is_transposed(
    native_library, fused_backend, make_problem, assert_close, name
):
    exact = make_problem(tokens=3, experts=6, **GPT_OSS)
    problem, _ = _transposed(exact.to(torch.float32), (name,))
    assert not cpu.lie_for_few(problem.w_in, problem.w_out)
    expected = exact.outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 2e-6)
    with torch.no_grad():
        assert_close([problem.run(grouped_mlp_directly)], expected[:1], 2e-6)


def test_traced_gradients_lie_as_the_parameters(fused_backend, make_problem, assert_close):
    torch._dynamo.reset()
    exact = make_problem(**GPT_OSS)
    problem, leaves = _transposed(exact)

    def call(w_in, w_out):
        given = replace(problem, w_in=w_in.transpose(1, 2), w_out=w_out.transpose(1, 2))
        return given.run(moezoo_kernels.grouped_mlp)

    output = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves.values())
    found = torch.autograd.grad(output, list(leaves.values()), problem.grad)
    assert_close([g.transpose(1, 2) for g in found], exact.outputs(reference)[2:4], 1e-12)
