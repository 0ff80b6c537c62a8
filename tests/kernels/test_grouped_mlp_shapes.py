"""grouped_mlp in bf16 and fp16 on a CPU: products of few shapes, whatever the routing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moezoo_kernels
from moezoo_kernels.grouped_mlp import cpu
from moezoo_kernels.grouped_mlp.assignments import sort_by_expert
from moezoo_kernels.grouped_mlp.operands import Experts, Needs, Unit
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

HALF = [torch.bfloat16, torch.float16]
DIGITS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


class Products(TorchDispatchMode):
    """Collects the shapes of the products that run inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.add(tuple(tuple(t.shape) for t in args if isinstance(t, torch.Tensor))[-2:])
        return function(*args, **(kwargs or {}))


def shapes_of(problem):
    """Return the shapes of the products of a forward and a backward pass."""
    weights = problem.weights.detach()
    experts = Experts(
        *(t.detach() for t in (problem.w_in, problem.w_out, problem.bias_in, problem.bias_out)),
        Unit(problem.activation, problem.gated),
    )
    rows = problem.indices.numel()
    assignments = sort_by_expert(problem.indices, len(problem.w_in), rows)
    x, products = problem.x.detach(), Products()
    with products:
        _, inner = cpu.forward(x, experts, weights, assignments, True)
        grad = problem.grad.to(x.dtype)
        cpu.backward(grad, inner, x, experts, weights, assignments, Needs(*[True] * 6))
    return products.shapes


@pytest.mark.parametrize("dtype", HALF)
def test_shapes_recur_when_routing_changes(make_problem, dtype, native_library, monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "torch")  # in fp32, too
    sizes = {"tokens": 150, "width": 24, "hidden": 40, "experts": 3, "choices": 2}
    found = [shapes_of(make_problem(seed=seed, **sizes).to(dtype)) for seed in range(30)]
    exact = [shapes_of(make_problem(seed=seed, **sizes).to(torch.float32)) for seed in range(30)]
    # Each expert has 43 to 73 rows: products of 48, 64 and 80.
    assert len(set.union(*found)) <= 3 * len(found[0]) <= len(set.union(*exact)) / 3
    assert {side % 16 for shape in set.union(*found) for side in shape[0]} <= {0, 24 % 16}


def test_rows_multiplied():
    for dtype in HALF:
        rows = [cpu.rows_multiplied(n, dtype) for n in range(1, 4097)]
        assert all(n <= r <= n + max(15, n / 16) for n, r in enumerate(rows, 1))
        assert [cpu.rows_multiplied(r, dtype) for r in rows] == rows == sorted(rows)
        assert len(set(rows)) == 16 + 16 * 4  # to 256; then 16 for each doubling
    for dtype in (torch.float32, torch.float64):
        assert all(cpu.rows_multiplied(n, dtype) == n for n in range(1, 4097))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("routing", ["random", "one_empty", "one_expert", "some_none", "repeated"])
@pytest.mark.parametrize("tokens", [63, 64, 150])
@pytest.mark.parametrize("bias", [True, False])
def test_all_gradients_equal_the_reference(
    native_library, poison_empty, make_problem, assert_close, dtype, routing, tokens, bias
):
    problem = make_problem(tokens=tokens, routing=routing, bias=bias).to(dtype)
    problem.weights = problem.weights.detach().float().requires_grad_()
    expected = problem.to(torch.float64).outputs(reference)
    with moezoo_kernels.use("cpu"):
        assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, DIGITS[dtype])


@pytest.mark.parametrize("dtype", HALF)
def test_infinite_tokens_reach_no_expert_but_their_own(make_problem, dtype, native_library):
    problem = make_problem(routing="random", choices=1).to(dtype)
    lost = int(problem.indices[0])
    with torch.no_grad():
        problem.x[0] = problem.grad[0] = torch.inf
    with moezoo_kernels.use("cpu"):
        output, of_x, of_w_in, of_w_out, *_ = problem.outputs(moezoo_kernels.grouped_mlp)
    assert output[1:].isfinite().all()
    assert of_x[1:].isfinite().all()
    for gradient in (of_w_in, of_w_out):
        finite = gradient.isfinite().flatten(1).all(1)
        assert finite.tolist() == [e != lost for e in range(5)]
