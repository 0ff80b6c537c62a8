"""grouped_mlp in Triton: in the interpreter on tiny problems, compiled, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

triton = pytest.importorskip("triton", reason="triton is not installed")

# Padding rows hold whatever memory held: they reach no result, but the interpreter computes them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_interpreter_equals_the_reference():
    """In a process of its own, as triton looks at TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
@pytest.mark.parametrize("routing", ["some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("gated", [True, False])
def test_interpreted_stages(poison_empty, make_problem, assert_close, routing, gated):
    sizes = {"tokens": 9, "width": 20, "hidden": 13, "experts": 4, "choices": 2}
    problem = make_problem(routing=routing, gated=gated, **sizes).to(torch.float32)
    _check(problem, assert_close, 2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_interpreted_activations(make_problem, assert_close, activation):
    sizes = {"tokens": 5, "width": 6, "hidden": 3, "experts": 2, "choices": 1}
    problem = make_problem(activation=activation, bias=False, **sizes).to(torch.float32)
    _check(problem, assert_close, 2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "kind"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile_for_ampere_and_hopper(capability, kind):
    """Without a GPU: down to machine code, which the interpreter can not show."""
    from moezoo_kernels.grouped_mlp import triton_matmul, triton_stages

    def pointers(names, others=""):
        return dict.fromkeys(names.split(), f"*{kind}") | dict.fromkeys(others.split(), "*i64")

    tile = {"PRECISION": "ieee", "SUMMED": 32, "height": 512, "width": 1000}
    data = pointers("data matrices product", "tokens groups firsts ends")
    data |= dict.fromkeys(("stride_group", "stride_height", "stride_width"), "i64")
    sizes = {"num_groups": 8, "GATHER": True, "ROWS": 64, "COLUMNS": 64}
    _compile(capability, triton_matmul._matmul.fn, data, tile | sizes)
    data = pointers("left right product", "left_tokens right_tokens starts")
    sizes = {"GATHER_LEFT": True, "GATHER_RIGHT": False, "HEIGHT": 64, "WIDTH": 64}
    _compile(capability, triton_matmul._outer.fn, data, tile | sizes)
    sizes = {"width": 1000, "ACTIVATION": 1, "GATED": True, "COLUMNS": 1024}
    _compile(capability, triton_stages._activate, pointers("inner hidden"), sizes)
    data = pointers("grad inner weighted grad_inner") | {
        "weights": "*fp32",
        "grad_weights": "*fp32",
    }
    _compile(capability, triton_stages._activate_backward, data, sizes)


def _compile(capability, kernel, signature, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


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
