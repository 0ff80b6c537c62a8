"""The two products of experts apart equal their formulas, with every gradient, in every layout."""

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from moezoo_kernels.grouped_linear import (
    assign,
    by_expert,
    by_slot,
    by_stage,
    grouped_linear,
    grouped_linear_sum,
    op,
    reference,
    sum_by_token,
)

T, K, E, A, B = 63, 3, 5, 20, 31
ROUTINGS = ("random", "some_none", "all_none", "one_expert", "one_empty", "repeated")


@pytest.fixture(params=["by_expert", "by_stage"])
def way(request, monkeypatch):
    chosen = {"by_expert": by_expert, "by_stage": by_stage}[request.param]
    monkeypatch.setattr(op, "_implementation", lambda w, order: chosen)
    return request.param


def routed(routing):
    scores = torch.rand(T, E)
    if routing == "one_empty":
        scores[:, 2] = -1
    indices = scores.topk(K, dim=-1).indices
    if routing == "some_none":
        indices[torch.rand(T, K) < 0.4] = -1
    if routing == "all_none":
        indices.fill_(-1)
    if routing == "one_expert":
        indices.fill_(E - 1)
    if routing == "repeated":
        indices = torch.randint(0, E, (T, K))
    return indices


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def matrices(transposed, height, width, dtype):
    w = leaf(*((E, width, height) if transposed else (E, height, width)), dtype=dtype)
    return w, (w.transpose(1, 2) if transposed else w)


def close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b.double()).abs().max()
            assert error <= tolerance * b.double().abs().max().clamp(min=1e-30)


def gradients(output, leaves):
    torch.manual_seed(7)
    found = torch.autograd.grad(output, leaves, torch.randn_like(output), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_products_equal_the_formulas(way, poison_empty, routing, transposed, biased):
    torch.manual_seed(0)
    indices = routed(routing)
    used = int(indices.ge(0).sum())
    weights, x = leaf(T, K), leaf(T, A)
    w_in, first = matrices(transposed, B, A, torch.float64)
    w_out, second = matrices(transposed, A, B, torch.float64)
    bias_in, bias_out = (leaf(E, B), leaf(E, A)) if biased else (None, None)
    leaves = [t for t in (x, w_in, w_out, bias_in, bias_out, weights) if t is not None]

    inner = reference.grouped_linear(x, first, indices, bias_in)
    expected = reference.grouped_linear_sum(inner.tanh(), second, weights, indices, bias_out)

    for rows in (None, used):
        assignments = assign(indices, E, rows)
        found = grouped_linear(x, first, assignments, bias_in)
        assert not found[used:].any()
        close([found[:used]], [inner], 1e-12)
        y = grouped_linear_sum(found.tanh(), second, weights, assignments, bias_out)
        close([y], [expected], 1e-12)
        wanted = gradients(expected, leaves) if used else [torch.zeros_like(t) for t in leaves]
        made = gradients(y, leaves)
        close(made, wanted, 1e-11)
        assert all(g.is_contiguous() for g in made)  # a transposed parameter's, too

        with torch.no_grad():
            again = grouped_linear(x, first, assignments, bias_in)
            again = grouped_linear_sum(again.tanh(), second, weights, assignments, bias_out)
        assert torch.equal(again, y)
        expected = reference.grouped_linear_sum(
            reference.grouped_linear(x, first, indices, bias_in).tanh(),
            second,
            weights,
            indices,
            bias_out,
        )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_are_given_and_a_sum_apart(way, poison_empty, routing, biased):
    torch.manual_seed(0)
    indices = routed(routing)
    used = int(indices.ge(0).sum())
    rows, w, weights = leaf(T * K, A), leaf(E, B, A), leaf(T, K)
    bias = leaf(E, B) if biased else None
    leaves = [t for t in (rows, w, bias, weights) if t is not None]
    product = reference.grouped_linear(rows, w, indices, bias, gather=False)
    expected = reference.sum_by_token(product.sin(), weights, indices, E)
    assignments = assign(indices, E)
    found = grouped_linear(rows, w, assignments, bias, gather=False)
    y = sum_by_token(found.sin(), weights, assignments)
    close([y], [expected], 1e-12)
    wanted = gradients(expected, leaves) if used else [torch.zeros_like(t) for t in leaves]
    close(gradients(y, leaves), wanted, 1e-11)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("absent", [-1, E])
def test_a_handful_of_slots_without_a_sort(poison_empty, transposed, biased, absent):
    torch.manual_seed(0)
    indices = routed("random")[:7]
    indices[2, 1], indices[5] = -1, -1
    x, weights = torch.randn(7, A, dtype=torch.float64), torch.rand(7, K, dtype=torch.float64)
    _, w = matrices(transposed, B, A, torch.float64)
    bias = leaf(E, B) if biased else None
    numbers = torch.where(indices < 0, absent, indices).reshape(-1).tolist()
    with torch.no_grad():
        product = reference.grouped_linear(x, w, indices, bias)
        expected = reference.sum_by_token(product.cos(), weights, indices, E)
        found = by_slot.linear_by_slot(x, w, numbers, bias, K)
        assert not found[2 * K + 1].any()
        rows = found.cos()
        rows[2 * K + 1] = torch.nan
        y = by_slot.sum_by_slot(rows, weights, numbers, E)
        again = by_slot.linear_by_slot(x.repeat_interleave(K, 0), w, numbers, bias)
    close([y, again], [expected, found], 1e-12)


def test_few_slots_are_few_and_of_inference():
    indices = torch.zeros(1, 8, dtype=torch.int64)
    assert not by_slot.is_few(indices, 64)
    with torch.no_grad():
        assert by_slot.is_few(indices, 64)
        assert not by_slot.is_few(indices, 16)
        assert not by_slot.is_few(indices.expand(9, 8), 1000)


def test_parameters_between_the_products_get_nothing_of_padding(way, poison_empty):
    torch.manual_seed(0)
    indices = routed("some_none")
    x, w_in, w_out, weights = leaf(T, A), leaf(E, B, A), leaf(E, A, B), leaf(T, K)
    shift = leaf(B)
    inner = reference.grouped_linear(x, w_in, indices)
    expected = reference.grouped_linear_sum(inner * shift.exp(), w_out, weights, indices)
    assignments = assign(indices, E)
    found = grouped_linear(x, w_in, assignments)
    y = grouped_linear_sum(found * shift.exp(), w_out, weights, assignments)
    close(gradients(y, [shift]), gradients(expected, [shift]), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_lower_precisions(way, dtype, tolerance, transposed):
    torch.manual_seed(0)
    indices = routed("some_none")
    exact = [leaf(T, A), leaf(T, K)]
    exact[0].data = exact[0].data.to(dtype).double()
    exact[1].data = exact[1].data.float().double()
    stacked = [matrices(transposed, B, A, dtype), matrices(transposed, A, B, dtype)]
    biases = [leaf(E, B, dtype=dtype), leaf(E, A, dtype=dtype)]

    def run(x, weights, first, second, bias_in, bias_out, fast):
        if not fast:
            inner = reference.grouped_linear(x, first, indices, bias_in)
            return reference.grouped_linear_sum(silu(inner), second, weights, indices, bias_out)
        assignments = assign(indices, E)
        inner = grouped_linear(x, first, assignments, bias_in)
        return grouped_linear_sum(silu(inner), second, weights, assignments, bias_out)

    leaves = [w for w, _ in stacked] + biases
    x = exact[0].detach().to(dtype).requires_grad_()
    weights = exact[1].detach().float().requires_grad_()
    y = run(x, weights, stacked[0][1], stacked[1][1], *biases, True)
    assert y.dtype == dtype
    grad = torch.randn(T, A).to(dtype)
    made = torch.autograd.grad(y, [x, weights, *leaves], grad)
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    views = [t.transpose(1, 2) if transposed else t for t in doubled[:2]]
    expected = run(*exact, *views, *doubled[2:], False)
    wanted = torch.autograd.grad(expected, [*exact, *doubled], grad.double())
    close([y, *made], [expected, *wanted], tolerance)
    assert [g.dtype for g in made] == [dtype, torch.float32, *[dtype] * 4]


def test_a_compiled_graph_is_whole_and_gives_the_same():
    torch.manual_seed(0)
    indices = routed("some_none")
    x, w_in, w_out = leaf(T, A), leaf(E, A, B), leaf(E, B, A)
    weights, bias_in, bias_out = leaf(T, K), leaf(E, B), leaf(E, A)
    leaves = [x, w_in, w_out, weights, bias_in, bias_out]

    def run(x, w_in, w_out, weights, bias_in, bias_out):
        assignments = assign(indices, E)
        inner = grouped_linear(x, w_in.transpose(1, 2), assignments, bias_in)
        return grouped_linear_sum(
            inner.sigmoid() * inner, w_out.transpose(1, 2), weights, assignments, bias_out
        )

    torch._dynamo.reset()
    expected = run(*leaves)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    close([found, *gradients(found, leaves)], [expected, *gradients(expected, leaves)], 1e-12)


def test_the_ops_keep_their_promises():
    torch.manual_seed(0)
    indices = routed("some_none")
    order, ends = op.sort.opaque(indices, E, T * K)
    torch.library.opcheck(op.sort.opaque, (indices, E, T * K))
    x, w, bias, weights = leaf(T, A), leaf(E, A, B), leaf(E, B), leaf(T, K)
    rows = leaf(T * K, A)
    transposed = w.detach().transpose(1, 2).requires_grad_()
    for given in (transposed, leaf(E, B, A)):
        torch.library.opcheck(op.linear.opaque, (x, given, bias, order, ends, K))
        torch.library.opcheck(op.linear.opaque, (rows, given, None, order, ends, 0))
        torch.library.opcheck(op.linear_sum.opaque, (rows, given, bias, weights, order, ends))


def test_flops_are_those_of_the_rows():
    indices = routed("some_none")
    used = int(indices.ge(0).sum())
    x, w, w_out, weights = leaf(T, A), leaf(E, B, A), leaf(E, A, B), leaf(T, K)
    assignments = assign(indices, E)
    with FlopCounterMode(display=False) as counter:
        inner = grouped_linear(x, w, assignments)
        y = grouped_linear_sum(inner, w_out, weights, assignments)
    assert counter.get_total_flops() == 2 * used * A * B * 2
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * used * A * B * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (T, A + 1)}, "give rows"),
        ({"bias": (E, A)}, "bias: shape"),
        ({"dtype": torch.float32}, "w: dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x = leaf(*change.get("x", (T, A)))
    w = leaf(E, B, A, dtype=change.get("dtype", torch.float64))
    bias = leaf(*change["bias"]) if "bias" in change else None
    with pytest.raises(ValueError, match=message):
        grouped_linear(x, w, assign(routed("random"), E), bias)
    with pytest.raises(ValueError, match="rows: there are 63"):
        grouped_linear_sum(leaf(T, A), leaf(E, B, A), leaf(T, K), assign(routed("random"), E))
