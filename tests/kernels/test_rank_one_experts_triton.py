"""rank_one_experts in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import rank_one_experts
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.rank_one_experts.reference import rank_one_experts as reference

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_interpreted_activations(make_rank_one, assert_near, activation, gated, poison_empty):
    problem = make_rank_one(5, 7, 6, 3, activation=activation, gated=gated, dtype=torch.float32)
    check(problem, assert_near, 2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 4), (3, 1030), (1, 33), (2, 1)])
def test_interpreted_routings(make_rank_one, assert_near, routing, tokens, width, poison_empty):
    problem = make_rank_one(tokens, width, 5, 4, routing=routing, gated=True, dtype=torch.float32)
    check(problem, assert_near, 2e-6)


@pytest.mark.interpreted
def test_interpreted_without_slots(make_rank_one, assert_near, poison_empty):
    check(make_rank_one(2, 5, 3, 0, dtype=torch.float32), assert_near, 2e-6)


def check(problem, assert_near, bound):
    expected = problem.to(torch.float64).outputs(reference)
    for sparse in (False, True):
        with moezoo_kernels.use("triton"):
            assert_near(problem.outputs(rank_one_experts, sparse=sparse), expected, bound)


@pytest.mark.parametrize(("capability", "kind"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability, kind):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels.rank_one_experts import triton_rank_one

    given = {"indices": "*i64", "weights": "*fp32", "inner": "*fp32", "coefficients": "*fp32"}
    tables = dict.fromkeys(["x", "u", "gate"], f"*{kind}")
    results = dict.fromkeys(["of_weights", "of_u", "of_gate"], "*fp32")
    backward = {"grad": "*fp32", "v": f"*{kind}"} | given | results
    for activation in range(5):
        constants = {"width": 1000, "choices": 128, "COLUMNS": 1024}
        constants |= {"ACTIVATION": activation, "GATED": activation % 2 == 1}
        compile_for(capability, triton_rank_one._answer, tables | given, constants)
        compile_for(capability, triton_rank_one._differentiate, backward, constants)


def on_gpu(problem):
    """Move every tensor of a problem."""
    for name in ("x", "u", "v", "gate", "indices", "weights", "grad"):
        tensor = getattr(problem, name)
        setattr(problem, name, None if tensor is None else tensor.detach().cuda())
    return problem


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_a_gpu_equals_the_reference(make_rank_one, assert_near, activation, gated, dtype, bound):
    for width in (31, 512, 1100):
        problem = make_rank_one(300, width, 90, 33, activation=activation, gated=gated, dtype=dtype)
        check(on_gpu(problem), assert_near, bound)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_again(make_rank_one):
    problem = on_gpu(make_rank_one(500, 512, 90, 33, gated=True, dtype=torch.bfloat16))
    with moezoo_kernels.use("triton"):
        first, second = (problem.outputs(rank_one_experts) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
