"""Problems for grouped_mlp: sizes, routings, and the comparison of every gradient."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import moezoo_kernels
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what needs Triton's interpreter to the process that test_triton.py starts for it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="run by test_triton.py"))


@pytest.fixture
def compile_for():
    """Compile a kernel without a GPU, down to the machine code of a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_kernel(capability, kernel, signature, constants):
        types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        assert types.keys() == signature.keys() | constants.keys()
        source = ASTSource(kernel, types, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]

    return compile_kernel


@dataclass
class Problem:
    """Operands of one call, and a gradient to send back."""

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    weights: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    indices: Tensor
    grad: Tensor
    activation: str
    gated: bool
    glu: GLUOptions = PLAIN_GLU
    interleaved: bool = False

    def differentiable(self) -> list[Tensor]:
        tensors = (self.x, self.w_in, self.w_out, self.weights, self.bias_in, self.bias_out)
        return [t for t in tensors if t is not None]

    def to(self, *args: object) -> Problem:
        """Convert every floating tensor, into fresh leaves."""
        names = ("x", "w_in", "w_out", "weights", "bias_in", "bias_out", "grad")
        tensors = {name: getattr(self, name) for name in names}
        moved = {
            name: None if t is None else t.detach().to(*args).requires_grad_(name != "grad")
            for name, t in tensors.items()
        }
        device = next(t for t in moved.values() if t is not None).device
        return replace(self, **moved, indices=self.indices.to(device))

    def run(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        return function(
            self.x,
            self.w_in,
            self.w_out,
            self.indices,
            self.weights,
            activation=self.activation,
            gated=self.gated,
            bias_in=self.bias_in,
            bias_out=self.bias_out,
            glu=self.glu,
            interleaved=self.interleaved,
            **options,
        )

    def outputs(self, function: Callable[..., Tensor], **options: object) -> list[Tensor]:
        """Return the output and all gradients."""
        output = self.run(function, **options)
        gradients = torch.autograd.grad(output, self.differentiable(), self.grad.to(output.dtype))
        return [output.detach(), *gradients]


def _indices(routing: str, tokens: int, experts: int, choices: int) -> Tensor:
    scores = torch.rand(tokens, experts)
    if routing == "one_empty" and experts > choices:
        scores[:, experts // 2] = -1
    indices = scores.topk(choices, dim=-1).indices
    if routing == "some_none":
        indices[torch.rand(indices.shape) < 0.4] = -1
    if routing == "all_none":
        indices.fill_(-1)
    if routing == "one_expert":
        indices.fill_(experts - 1)
    if routing == "repeated":
        indices = torch.randint(0, experts, indices.shape)
    return indices


def _make_problem(
    tokens: int = 63,
    width: int = 20,
    hidden: int = 31,
    experts: int = 5,
    choices: int = 3,
    *,
    routing: str = "some_none",
    activation: str = "silu",
    gated: bool = True,
    bias: bool = True,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    torch.manual_seed(seed)
    inner = 2 * hidden if gated else hidden

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    return Problem(
        x=parameter(tokens, width),
        w_in=parameter(experts, inner, width),
        w_out=parameter(experts, width, hidden),
        weights=parameter(tokens, choices),
        bias_in=parameter(experts, inner) if bias else None,
        bias_out=parameter(experts, width) if bias else None,
        indices=_indices(routing, tokens, experts, choices),
        grad=torch.randn(tokens, width, dtype=dtype),
        activation=activation,
        gated=gated,
        glu=glu,
        interleaved=interleaved,
    )


def _assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, relative to the largest element of what is expected."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"tensor {i}"
        if b.numel() == 0:
            continue
        error = (a.double() - b.double()).abs().max()
        assert error <= tolerance * b.double().abs().max(), f"tensor {i} is off by {error:.2e}"


@pytest.fixture
def make_problem():
    return _make_problem


@pytest.fixture
def assert_close():
    return _assert_close


@dataclass
class RankOneProblem:
    """Operands of one call of rank_one_experts, and a gradient to send back."""

    x: Tensor
    u: Tensor
    v: Tensor
    gate: Tensor | None
    indices: Tensor
    weights: Tensor
    grad: Tensor
    activation: str

    def to(self, dtype: torch.dtype) -> RankOneProblem:
        """Convert every floating tensor; the weights stay at least fp32."""
        names = ("x", "u", "v", "gate", "grad")
        tensors = {name: getattr(self, name) for name in names}
        moved = {name: None if t is None else t.detach().to(dtype) for name, t in tensors.items()}
        weights = self.weights.detach().to(torch.promote_types(dtype, torch.float32))
        return replace(self, **moved, weights=weights)

    def run(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        operands = (self.x, self.u, self.v, self.indices, self.weights)
        return function(*operands, activation=self.activation, gate=self.gate, **options)

    def outputs(self, function: Callable[..., Tensor], **options: object) -> dict[str, Tensor]:
        """Return the output and all gradients."""
        names = ["x", "u", "v", "weights"] + ([] if self.gate is None else ["gate"])
        for name in names:
            getattr(self, name).requires_grad_()
        output = self.run(function, **options)
        operands = [getattr(self, name) for name in names]
        gradients = torch.autograd.grad(output, operands, self.grad.to(output.dtype))
        return {"y": output.detach(), **dict(zip(names, gradients, strict=True))}


def _make_rank_one(
    tokens: int = 63,
    width: int = 29,
    experts: int = 41,
    choices: int = 6,
    *,
    routing: str = "some_none",
    activation: str = "gelu",
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> RankOneProblem:
    """Few rows, so that a token often has one twice; the upper half of them unused."""
    torch.manual_seed(seed)
    indices = torch.randint(-1, max(1, experts // 2), (tokens, choices))
    if routing == "all_none":
        indices.fill_(-1)
    if routing == "one_expert":
        indices.fill_(experts - 1)
    if routing == "repeated":
        indices.clamp_(min=0)

    def table() -> Tensor:
        return torch.randn(experts, width, dtype=torch.float64) * width**-0.5

    problem = RankOneProblem(
        x=torch.randn(tokens, width, dtype=torch.float64),
        u=table(),
        v=table(),
        gate=table() if gated else None,
        indices=indices,
        weights=torch.rand(tokens, choices, dtype=torch.float64) + 0.1,
        grad=torch.randn(tokens, width, dtype=torch.float64),
        activation=activation,
    )
    return problem.to(dtype)


def _assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Compare tensor by tensor, relative to the norm of what is expected."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name].to_dense()
        assert found.shape == value.shape, name
        error = (found.double() - value.to_dense().double()).norm()
        assert error <= bound * value.to_dense().double().norm(), f"{name} is off by {error:.2e}"


@pytest.fixture
def make_rank_one():
    return _make_rank_one


@pytest.fixture
def assert_near():
    return _assert_near


@pytest.fixture(params=["cpu", "grouped_mm"])
def fused_backend(request):
    with moezoo_kernels.use(request.param):
        yield request.param


@pytest.fixture(params=["cpu", "grouped_mm", "reference"])
def any_backend(request):
    with moezoo_kernels.use(request.param):
        yield request.param
