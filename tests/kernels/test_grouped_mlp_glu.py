"""Bounded gated linear units of grouped_mlp, and interleaved rows, on every backend.

What is expected is written out here as the models write it, and differentiated by autograd.
"""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, activate
from moezoo_kernels.grouped_mlp import cpu
from moezoo_kernels.grouped_mlp.direct import grouped_mlp_directly
from moezoo_kernels.grouped_mlp.rowwise import RowPasses

LIMIT, GATE_CAP, UP_CAP = 3.0, 1.5, 2.5


def _gpt_oss(gate, up):
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(min=-LIMIT, max=LIMIT) + 1)


def _deepseek_v4(gate, up):
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(gate) * up.clamp(min=-LIMIT, max=LIMIT)


def _step(gate, up):
    return (gate * torch.sigmoid(gate)).clamp(max=LIMIT) * up.clamp(min=-LIMIT, max=LIMIT)


def _inkling(gate, up):
    linear = torch.tanh(gate / GATE_CAP) * GATE_CAP
    return linear * torch.sigmoid(gate) * (torch.tanh(up / UP_CAP) * UP_CAP)


UNITS = {
    "plain": ("silu", PLAIN_GLU, lambda gate, up: gate * torch.sigmoid(gate) * up),
    "gpt_oss": ("quick_gelu", GLUOptions(limit=LIMIT, up_shift=1.0), _gpt_oss),
    "deepseek_v4": ("silu", GLUOptions(limit=LIMIT), _deepseek_v4),
    "step": ("silu", GLUOptions(limit=LIMIT, limit_after=True), _step),
    "inkling": ("silu", GLUOptions(gate_softcap=GATE_CAP, up_softcap=UP_CAP), _inkling),
    "shift": ("relu", GLUOptions(up_shift=-0.5), lambda gate, up: gate.relu() * (up - 0.5)),
}
EVERY_UNIT = pytest.mark.parametrize("unit", sorted(UNITS))
BOTH_LAYOUTS = pytest.mark.parametrize("interleaved", [False, True])


def _problem(make_problem, unit, interleaved, dtype=torch.float64, **sizes):
    activation, glu, _ = UNITS[unit]
    problem = make_problem(activation=activation, glu=glu, interleaved=interleaved, **sizes)
    with torch.no_grad():
        # Neurons 0 to 3 of each expert stand exactly at a limit, or at zero, in both factors.
        hidden = problem.w_out.shape[2]
        for neuron, value in enumerate((LIMIT, -LIMIT, 0.0, 2 * LIMIT)):
            rows = (neuron, hidden + neuron)
            if interleaved:
                rows = (2 * neuron, 2 * neuron + 1)
            for row in rows:
                problem.w_in[:, row] = 0.0
                problem.bias_in[:, row] = value
    problem = problem.to(dtype)
    if dtype != torch.float64:
        problem.weights = problem.weights.detach().float().requires_grad_()
    return problem


def _expected(problem, unit):
    """Return output and gradients, slot by slot, from the formula."""
    problem = problem.to(torch.float64)
    formula = UNITS[unit][2]
    output = torch.zeros_like(problem.x)
    for e in range(len(problem.w_in)):
        inner = problem.x @ problem.w_in[e].T + problem.bias_in[e]
        if problem.interleaved:
            gate, up = inner.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            gate, up = inner.unflatten(-1, (2, -1)).unbind(-2)
        answer = formula(gate, up) @ problem.w_out[e].T + problem.bias_out[e]
        weight = (problem.weights * (problem.indices == e)).sum(-1, keepdim=True)
        output = output + weight * answer
    gradients = torch.autograd.grad(output, problem.differentiable(), problem.grad)
    return [output.detach(), *gradients]


@EVERY_UNIT
@BOTH_LAYOUTS
@pytest.mark.parametrize("routing", ["some_none", "one_empty", "one_expert"])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_output_and_all_gradients_are_the_formulas(
    any_backend, poison_empty, make_problem, assert_close, unit, interleaved, routing, dtype, digits
):
    problem = _problem(make_problem, unit, interleaved, dtype, routing=routing)
    actual = problem.outputs(moezoo_kernels.grouped_mlp)
    assert_close(actual, _expected(problem, unit), digits)


@EVERY_UNIT
@BOTH_LAYOUTS
@pytest.mark.parametrize("hidden", [1, 4, 5, 16, 19, 33])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_cpp_passes_at_every_rest_of_a_register(
    native_library, poison_empty, assert_close, unit, interleaved, hidden, dtype, digits
):
    """On the same rounded operands: beyond a limit or not is no matter of rounding then."""
    activation, glu, formula = UNITS[unit]
    torch.manual_seed(0)
    inner = (4 * torch.randn(11, 2 * hidden)).to(dtype)
    inner[0], inner[1], inner[2, ::2] = LIMIT, -LIMIT, 0.0
    grad, weights = torch.randn(11, hidden).to(dtype), torch.randn(11)
    passes = RowPasses(dtype, activation, True, glu, interleaved)
    assert passes.native
    actual = [passes.activate(inner), *passes.backward(grad, inner, weights)]

    exact = inner.double().requires_grad_()
    gate, up = exact.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else exact.chunk(2, dim=-1)
    value, scale = formula(gate, up), weights.double()[:, None]
    (of_inner,) = torch.autograd.grad(value, exact, scale * grad.double())
    of_weights = (value * grad.double()).sum(-1)
    assert_close(actual, [value, scale * value, of_inner, of_weights], digits)


@EVERY_UNIT
@BOTH_LAYOUTS
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_handful_of_tokens(
    native_library, poison_empty, make_problem, assert_close, unit, interleaved, dtype, digits
):
    problem = _problem(make_problem, unit, interleaved, dtype, tokens=3, experts=6, hidden=19)
    with torch.no_grad(), moezoo_kernels.use("cpu"):
        assert cpu.is_few(problem.indices.numel(), 6, dtype)
        answers = [problem.run(moezoo_kernels.grouped_mlp), problem.run(grouped_mlp_directly)]
    for answer in answers:
        assert_close([answer], _expected(problem, unit)[:1], digits)


@EVERY_UNIT
def test_halves_and_pairs_give_the_same_bits(fused_backend, make_problem, unit):
    problem = _problem(make_problem, unit, False, torch.float32)
    hidden = problem.w_out.shape[2]
    order = torch.arange(2 * hidden).view(2, hidden).T.flatten()
    halves = problem.outputs(moezoo_kernels.grouped_mlp)
    with torch.no_grad():
        problem.w_in.copy_(problem.w_in[:, order].clone())
        problem.bias_in.copy_(problem.bias_in[:, order].clone())
    problem.interleaved = True
    pairs = problem.outputs(moezoo_kernels.grouped_mlp)
    for place, (half, pair) in enumerate(zip(halves, pairs, strict=True)):
        if place in (2, 5):  # w_in and bias_in
            half = half[:, order]
        torch.testing.assert_close(pair, half, rtol=1e-5, atol=1e-6 * float(half.abs().max()))


def test_far_limits_change_nothing(assert_close):
    inner = torch.randn(7, 12, dtype=torch.float64) * 5
    for far in (GLUOptions(limit=1e30), GLUOptions(limit=1e30, limit_after=True)):
        found = activate(inner, "silu", True, far)
        assert_close([found], [activate(inner, "silu", True)], 1e-14)


def test_it_traces_into_one_graph(fused_backend, make_problem, assert_close):
    torch._dynamo.reset()
    problem = _problem(make_problem, "gpt_oss", True)
    call = torch.compile(moezoo_kernels.grouped_mlp, fullgraph=True, backend="aot_eager")
    assert_close(problem.outputs(call), _expected(problem, "gpt_oss"), 1e-12)


@pytest.mark.parametrize("options", [UNITS[unit][1] for unit in sorted(UNITS)])
def test_codes_are_read_back(options):
    assert GLUOptions.decode(options.encode()) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"glu": GLUOptions(limit=1.0), "gated": False}, "glu: bounds a gated linear unit"),
        ({"glu": GLUOptions(limit=0.0)}, "glu.limit: 0.0 is not a number > 0"),
        ({"glu": GLUOptions(limit=float("nan"))}, "glu.limit: nan is not"),
        ({"glu": GLUOptions(up_shift=float("inf"))}, "glu.up_shift: inf is not"),
        ({"glu": GLUOptions(limit_after=True)}, "glu.limit_after: there is no limit"),
        ({"glu": GLUOptions(1.0, "no")}, "glu.limit_after: 'no' is neither true nor false"),
        ({"glu": GLUOptions(gate_softcap=1.0)}, "glu.gate_softcap: goes with up_softcap"),
        (
            {"glu": GLUOptions(limit=1.0, gate_softcap=1.0, up_softcap=1.0)},
            "glu.gate_softcap: replaces the limit",
        ),
        (
            {"glu": GLUOptions(gate_softcap=1.0, up_softcap=1.0), "activation": "relu"},
            "glu.gate_softcap: is defined for the activation silu, not relu",
        ),
        ({"interleaved": True, "gated": False}, "interleaved: there is no gate"),
    ],
)
def test_contradictions_are_refused(make_problem, options, message):
    problem = make_problem(gated=options.get("gated", True))
    for name, value in options.items():
        setattr(problem, name, value)
    with pytest.raises(ValueError, match=message):
        problem.run(moezoo_kernels.grouped_mlp)
