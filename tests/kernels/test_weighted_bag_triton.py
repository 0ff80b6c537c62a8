"""weighted_bag in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import weighted_bag
from moezoo_kernels.weighted_bag.reference import weighted_bag as reference

pytest.importorskip("triton", reason="triton is not installed")

SIZES = [(3, 5, 7, 300), (4, 1, 2, 1), (1, 9, 5, 257), (2, 0, 3, 4), (0, 2, 3, 4), (5, 3, 1, 33)]


def outputs(function, table, indices, weights, grad, **options):
    output = function(table, indices, weights, **options)
    gradients = torch.autograd.grad(output, [table, weights], grad)
    return [output.detach(), *(g.to_dense() for g in gradients)]


def problem(tokens, choices, rows, width, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    indices = torch.randint(-1, rows, (tokens, choices), device=device)
    table = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weights = torch.randn(tokens, choices, device=device).requires_grad_()
    return table, indices, weights, torch.randn(tokens, width, device=device).to(dtype)


def check(operands, digits):
    table, indices, weights, grad = operands
    exact = [t.detach().double().requires_grad_() for t in (table, weights)]
    expected = outputs(reference, exact[0], indices, exact[1], grad.double())
    for sparse in (False, True):
        with moezoo_kernels.use("triton"):
            actual = outputs(weighted_bag, *operands, sparse=sparse)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            assert (a.double() - b).norm() <= digits * b.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interpreter_equals_the_reference(sizes):
    check(problem(*sizes), 2e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels.weighted_bag import triton_bag

    data = {"source": "*bf16", "weights": "*fp32", "order": "*i64", "starts": "*i64"}
    sizes = {"width": 1000, "choices": 128, "COLUMNS": 512, "AHEAD": 4}
    compile_for(capability, triton_bag._sum_rows.fn, data | {"sums": "*bf16"}, sizes)
    data = {"table": "*bf16", "indices": "*i64", "weights": "*fp32", "output": "*bf16"}
    compile_for(capability, triton_bag._bag.fn, data, sizes)
    data = {"grad": "*bf16", "table": "*bf16", "indices": "*i64", "dots": "*fp32"}
    sizes = {"width": 1000, "choices": 128, "COLUMNS": 1024}
    compile_for(capability, triton_bag._dots, data, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("sizes", [*SIZES, (500, 33, 90, 1000)])
def test_a_gpu_equals_the_reference(dtype, digits, sizes):
    check(problem(*sizes, dtype, "cuda"), digits)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_again():
    operands = problem(500, 33, 90, 1000, torch.bfloat16, "cuda")
    with moezoo_kernels.use("triton"):
        first, second = (outputs(weighted_bag, *operands) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
