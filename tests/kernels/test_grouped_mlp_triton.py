"""grouped_mlp in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS, GLUOptions
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

pytest.importorskip("triton", reason="triton is not installed")

# Padding rows hold whatever memory held: they reach no result, but the interpreter computes them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("gated", [True, False])
def test_interpreted_stages(poison_empty, make_problem, assert_close, routing, gated):
    sizes = {"tokens": 9, "width": 20, "hidden": 13, "experts": 4, "choices": 2}
    problem = make_problem(routing=routing, gated=gated, **sizes).to(torch.float32)
    _check(problem, assert_close, 2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_interpreted_activations(make_problem, assert_close, activation):
    sizes = {"tokens": 5, "width": 6, "hidden": 3, "experts": 2, "choices": 1}
    problem = make_problem(activation=activation, bias=False, **sizes).to(torch.float32)
    _check(problem, assert_close, 2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("activation", "glu"),
    [
        ("silu", GLUOptions()),
        ("quick_gelu", GLUOptions(limit=1.5, up_shift=1.0)),
        ("silu", GLUOptions(limit=1.5, limit_after=True)),
        ("silu", GLUOptions(gate_softcap=1.5, up_softcap=2.5)),
    ],
)
def test_interpreted_units(make_problem, assert_close, activation, glu, interleaved):
    sizes = {"tokens": 7, "width": 6, "hidden": 5, "experts": 2, "choices": 1}
    problem = make_problem(activation=activation, glu=glu, interleaved=interleaved, **sizes)
    with torch.no_grad():  # some neurons stand exactly at the limit
        problem.w_in[:, :2], problem.w_in[:, 5:7] = 0.0, 0.0
        problem.bias_in[:, :2], problem.bias_in[:, 5:7] = 1.5, -1.5
    _check(problem.to(torch.float32), assert_close, 2e-6)


@pytest.mark.interpreted
def test_interpreted_tiles_of_many_rows(make_problem, assert_close):
    problem = make_problem(tokens=150, width=5, hidden=3, experts=2, choices=1, bias=False)
    _check(problem.to(torch.float32), assert_close, 2e-6)


def _check(problem, assert_close, digits):
    expected = problem.to(torch.float64).outputs(reference)
    with moezoo_kernels.use("triton"):
        actual = problem.outputs(moezoo_kernels.grouped_mlp)
        assigned = int(problem.indices.ge(0).sum())
        bounded = problem.outputs(moezoo_kernels.grouped_mlp, max_assignments=assigned)
    assert_close(actual, expected, digits)
    assert_close(bounded, expected, digits)


@pytest.mark.parametrize(("capability", "kind"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile_for_ampere_and_hopper(compile_for, capability, kind):
    """Without a GPU: down to machine code, which the interpreter cannot show."""
    from moezoo_kernels.grouped_mlp import triton_matmul, triton_stages

    def pointers(names, others=""):
        return dict.fromkeys(names.split(), f"*{kind}") | dict.fromkeys(others.split(), "*i64")

    tile = {"PRECISION": "ieee", "SUMMED": 32, "height": 512, "width": 1000}
    data = pointers("data matrices product", "tokens groups firsts ends")
    data |= dict.fromkeys(("stride_group", "stride_height", "stride_width"), "i64")
    sizes = {"num_groups": 8, "GATHER": True, "ROWS": 64, "COLUMNS": 64}
    compile_for(capability, triton_matmul._matmul.fn, data, tile | sizes)
    data = pointers("left right product", "left_tokens right_tokens starts")
    sizes = {"GATHER_LEFT": True, "GATHER_RIGHT": False, "HEIGHT": 64, "WIDTH": 64}
    compile_for(capability, triton_matmul._outer.fn, data, tile | sizes)
    data = pointers("grad inner weighted grad_inner") | {
        "weights": "*fp32",
        "grad_weights": "*fp32",
    }
    for activation, bound in ((1, 0), (5, 1), (6, 2), (3, 3)):
        sizes = {"width": 1000, "ACTIVATION": activation, "GATED": True, "COLUMNS": 1024}
        sizes |= {"BOUND": bound, "GATE": 7.0, "UP": 7.0, "SHIFT": 1.0, "INTERLEAVED": bound > 0}
        compile_for(capability, triton_stages._activate, pointers("inner hidden"), sizes)
        compile_for(capability, triton_stages._activate_backward, data, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("sizes", [(20, 31), (64, 96)], ids=["odd", "aligned"])
def test_a_gpu_equals_the_reference(make_problem, assert_close, activation, dtype, digits, sizes):
    width, hidden = sizes
    problem = make_problem(tokens=500, width=width, hidden=hidden, activation=activation)
    problem = problem.to(dtype).to("cuda")
    problem.weights = problem.weights.detach().float().requires_grad_()
    _check(problem, assert_close, digits)
