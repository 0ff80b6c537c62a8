"""The products of all experts in one call of C++, against their formulas in fp64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moezoo_kernels.grouped_linear import assign, grouped_linear, grouped_linear_sum, reference
from moezoo_kernels.grouped_matmul import grouped_matmul, grouped_outer
from moezoo_kernels.grouped_products import is_whole

ROUTINGS = ("random", "some_none", "all_none", "one_expert", "one_empty")


@pytest.fixture(autouse=True)
def _own(native_library, monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "own")
    assert is_whole(torch.float32)
    assert not is_whole(torch.float64)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def routed(routing, tokens, experts, choices):
    scores = torch.rand(tokens, experts)
    if routing == "one_empty":
        scores[:, experts // 2] = -1
    indices = scores.topk(choices, dim=-1).indices
    if routing == "some_none":
        indices[torch.rand(indices.shape) < 0.4] = -1
    if routing in ("all_none", "one_expert"):
        indices.fill_(-1 if routing == "all_none" else experts - 1)
    return indices


def operands(shapes, transposed=False):
    """Return leaves in fp32, stacks perhaps as transposed views, and the same in fp64."""
    made = []
    for shape in shapes:
        if transposed and len(shape) == 3:
            turned = torch.randn(shape[0], shape[2], shape[1])
            made.append(turned.transpose(1, 2).requires_grad_())
        else:
            made.append(torch.randn(shape).requires_grad_())
    return made, [t.detach().double().requires_grad_() for t in made]


def close(found, expected, tolerance=3e-6):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b).abs().max()
            assert error <= tolerance * b.abs().max(), f"tensor {i} is off by {error:.1e}"


def gradients(y, leaves, grad):
    """Return gradients, zeros of what nothing was computed of."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


SIZES = [(63, 5, 20, 31), (63, 5, 1, 13), (70, 3, 33, 2), (1500, 3, 40, 24), (900, 30, 18, 257)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "a", "b"), SIZES)
def test_products_of_gathered_tokens(
    threads, poison_empty, routing, transposed, tokens, experts, a, b
):
    indices = routed(routing, tokens, experts, 2)
    leaves, exact = operands([(tokens, a), (experts, b, a), (experts, b)], transposed)
    used = int(indices.ge(0).sum())
    x, w, bias = leaves
    product = grouped_linear(x, w, assign(indices, experts), bias)
    expected = reference.grouped_linear(exact[0], exact[1], indices, exact[2])
    close([product[:used]], [expected])
    assert not product[used:].any()
    grad = torch.randn(product.shape)
    close(gradients(product, leaves, grad), gradients(expected, exact, grad[:used]))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "a", "b"), SIZES)
def test_weighted_sums_of_given_rows(
    threads, poison_empty, routing, biased, transposed, tokens, experts, a, b
):
    indices = routed(routing, tokens, experts, 2)
    used = int(indices.ge(0).sum())
    shapes = [(tokens * 2, a), (experts, b, a), (tokens, 2)] + [(experts, b)] * biased
    leaves, exact = operands(shapes, transposed)
    y = grouped_linear_sum(*leaves[:3], assign(indices, experts), *leaves[3:])
    rows, w, weights, *bias = exact
    expected = reference.grouped_linear_sum(rows[:used], w, weights, indices, *bias)
    close([y], [expected])
    grad = torch.randn(y.shape)
    close(gradients(y, leaves, grad), gradients(expected, exact, grad))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_alone(poison_empty, wanted):
    indices = routed("one_empty", 50, 4, 2)
    leaves, exact = operands([(100, 9), (4, 14, 9), (50, 2), (4, 14)])
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    rows, w, weights, bias = leaves
    y = grouped_linear_sum(rows, w, weights, assign(indices, 4), bias)
    rows, w, weights, bias = exact
    expected = reference.grouped_linear_sum(rows, w, weights, indices, bias)
    grad = torch.randn(y.shape)
    found = torch.autograd.grad(y, [leaves[wanted]], grad)
    close(found, torch.autograd.grad(expected, [exact[wanted]], grad.double()))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_are_given_are_multiplied_where_they_lie(poison_empty, transposed):
    indices = routed("some_none", 40, 4, 2)
    used = int(indices.ge(0).sum())
    leaves, exact = operands([(80, 11), (4, 6, 11), (4, 6)], transposed)
    product = grouped_linear(leaves[0], leaves[1], assign(indices, 4), leaves[2], gather=False)
    expected = reference.grouped_linear(exact[0], exact[1], indices, exact[2], gather=False)
    close([product[:used]], [expected])
    grad = torch.randn(product.shape)
    close(gradients(product, leaves, grad), gradients(expected, exact, grad[:used]))


@pytest.mark.parametrize("ends", [[3, 3, 7], [0, 0, 0], [10, 10, 10], [0, 400, 1000]])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(threads, poison_empty, ends, transposed):
    count = max(10, ends[-1])
    left, right = torch.randn(count, 21), torch.randn(2 * count, 18)[::2]
    matrices = torch.randn(3, 34, 21).transpose(1, 2) if transposed else torch.randn(3, 21, 34)
    found = grouped_matmul(left, matrices, torch.tensor(ends))
    outer = grouped_outer(left, right, torch.tensor(ends))
    assert found.shape == (count, 34)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        close([found[start:end]], [left[start:end].double() @ matrices[group].double()])
        close([outer[group]], [left[start:end].double().t() @ right[start:end].double()])


def test_bits_do_not_depend_on_threads():
    indices = routed("random", 1200, 6, 3)
    leaves, _ = operands([(1200, 65), (6, 70, 65), (6, 70), (6, 65, 70), (1200, 3)])
    x, w, bias, w_out, weights = leaves
    grad, before, found = torch.randn(1200, 65), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assignments = assign(indices, 6)
        inner = grouped_linear(x, w, assignments, bias)
        y = grouped_linear_sum(inner.tanh(), w_out, weights, assignments)
        found.append([y.detach(), *gradients(y, leaves, grad)])
    torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_flops_are_counted_in_inference_too():
    indices = routed("some_none", 40, 4, 2)
    (x, w), _ = operands([(40, 11), (4, 6, 11)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        grouped_linear(x, w, assign(indices, 4))
    assert counter.get_total_flops() == 2 * int(indices.ge(0).sum()) * 6 * 11
