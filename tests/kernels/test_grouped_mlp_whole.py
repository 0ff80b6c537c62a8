"""grouped_mlp in one call of C++ with our own products: against fp64, and what it promises."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference
from moezoo_kernels.grouped_products import is_whole

ROUTINGS = ["random", "some_none", "all_none", "one_empty", "one_expert", "repeated"]


@pytest.fixture(autouse=True)
def _own(native_library, monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "own")
    assert is_whole(torch.float32)
    assert not is_whole(torch.bfloat16)
    with moezoo_kernels.use("cpu"):
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _problem(make_problem, **sizes):
    # More slots than are multiplied one by one.
    problem = make_problem(**({"tokens": 90, "choices": 3} | sizes)).to(torch.float32)
    assert problem.indices.numel() > 16 * len(problem.w_in)
    return problem


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients(
    threads, poison_empty, make_problem, assert_close, routing, gated, bias
):
    problem = _problem(make_problem, routing=routing, gated=gated, bias=bias)
    expected = problem.to(torch.float64).outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 2e-6)


@pytest.mark.parametrize(
    ("width", "hidden"), [(1, 1), (2, 13), (33, 2), (13, 33), (257, 40), (40, 257)]
)
def test_widths(threads, poison_empty, make_problem, assert_close, width, hidden):
    problem = _problem(make_problem, width=width, hidden=hidden)
    expected = problem.to(torch.float64).outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 3e-6)


@pytest.mark.parametrize("experts", [1, 2, 7, 40])
@pytest.mark.parametrize("routing", ["some_none", "one_empty"])
def test_experts_of_several_chunks_and_waves(
    threads, poison_empty, make_problem, assert_close, experts, routing
):
    """Of one expert's 2,000 rows, sums go on from wave to wave; of 40 experts', many are in one."""
    sizes = {"tokens": 2000, "choices": min(3, experts), "width": 24, "hidden": 20}
    problem = _problem(make_problem, experts=experts, routing=routing, **sizes)
    expected = problem.to(torch.float64).outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 5e-6)


@pytest.mark.parametrize("experts", [1, 6])
def test_bits_do_not_depend_on_threads(make_problem, experts):
    problem = _problem(
        make_problem, tokens=1500, choices=min(3, experts), experts=experts, width=130, hidden=70
    )
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(problem.outputs(moezoo_kernels.grouped_mlp))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("in_transposed", [True, False])
@pytest.mark.parametrize("out_transposed", [True, False])
def test_transposed_weights_get_transposed_gradients(
    threads, poison_empty, make_problem, assert_close, in_transposed, out_transposed
):
    problem = _problem(make_problem, tokens=700, routing="one_empty")
    expected = problem.to(torch.float64).outputs(reference)
    for name, wanted in (("w_in", in_transposed), ("w_out", out_transposed)):
        if wanted:
            w = getattr(problem, name).detach().transpose(1, 2).contiguous().transpose(1, 2)
            setattr(problem, name, w.requires_grad_())
    found = problem.outputs(moezoo_kernels.grouped_mlp)
    assert_close(found, expected, 3e-6)
    assert found[2].transpose(1, 2).is_contiguous() == in_transposed
    assert found[3].transpose(1, 2).is_contiguous() == out_transposed


def test_operands_of_any_strides(threads, make_problem, assert_close):
    """Tokens and gradients that are columns of others, or one number; slices of stacks."""
    problem = _problem(make_problem)
    wide = torch.randn(problem.x.shape[1], len(problem.x) + 4).t()
    stacks = {
        n: torch.randn(5, 70, 70)[:, 3 : 3 + w.shape[1], 1 : 1 + w.shape[2]]
        for n, w in (("w_in", problem.w_in), ("w_out", problem.w_out))
    }
    problem.x = wide[2:-2].detach().requires_grad_()
    for name, stack in stacks.items():
        setattr(problem, name, stack.detach().requires_grad_())
    for grad in (wide[:-4] * 0.5, torch.ones(1, 1).expand_as(problem.grad)):
        problem.grad = grad
        expected = problem.to(torch.float64).outputs(reference)
        assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 2e-6)


@pytest.mark.parametrize("name", ["x", "w_in", "w_out", "weights", "bias_in", "bias_out"])
def test_one_gradient_alone(threads, poison_empty, make_problem, assert_close, name):
    problem = _problem(make_problem)
    exact = problem.to(torch.float64)

    def only(of, function):
        output = of.run(function)
        return torch.autograd.grad(output, [getattr(of, name)], of.grad.to(output.dtype))

    for tensor in problem.differentiable():
        tensor.requires_grad_(tensor is getattr(problem, name))
    assert_close(only(problem, moezoo_kernels.grouped_mlp), only(exact, reference), 2e-6)


def test_gradients_larger_than_what_is_asked_for_at_once(poison_empty, make_problem, assert_close):
    """Pages are asked for ahead of the experts that have rows; of others they are zeros."""
    problem = _problem(make_problem, tokens=150, choices=2, width=200, hidden=150, experts=9)
    problem.indices[problem.indices == 3] = 4
    problem.indices[problem.indices >= 7] = 5
    expected = problem.to(torch.float64).outputs(reference)
    found = problem.outputs(moezoo_kernels.grouped_mlp)
    assert_close(found, expected, 3e-6)
    for gradient in found[2:4]:
        assert not gradient[[3, 7, 8]].any()


def test_inference_gives_the_bits_of_training(make_problem):
    problem = _problem(make_problem)
    with torch.no_grad():
        alone = problem.run(moezoo_kernels.grouped_mlp)
    assert torch.equal(alone, problem.run(moezoo_kernels.grouped_mlp))


def test_no_other_backend_is_preferred_for_few_rows(monkeypatch, make_problem):
    """Where one call runs all experts, small groups need no other way of computing."""
    from moezoo_kernels.grouped_mlp import _preferred

    problem = _problem(make_problem, tokens=100, choices=1)
    assert _preferred(problem.indices, 5, torch.float32, None) == "cpu"
    monkeypatch.setenv("MOEZOO_PRODUCTS", "torch")
    assert _preferred(problem.indices, 5, torch.float32, None) == "grouped_mm"
