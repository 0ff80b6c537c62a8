"""grouped_mlp inside torch: autograd, memory, autocast, checkpointing, compile, FLOP counting."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moezoo_kernels
from moezoo_kernels.grouped_mlp import op
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

OPERANDS = ("x", "w_in", "w_out", "weights", "bias_in", "bias_out")


def _saved(problem, **options):
    """Run forward; give (shape, dtype) of every saved tensor that is not an operand."""
    operands = {t.data_ptr() for t in problem.differentiable()}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in operands:
            saved.append((tuple(tensor.shape), tensor.dtype, tensor.untyped_storage().nbytes()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = problem.run(moezoo_kernels.grouped_mlp, **options)
    return output, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_assignments", [None, 189, 150])
def test_only_pre_activations_and_indices_are_saved(
    fused_backend, make_problem, dtype, max_assignments
):
    problem = make_problem(routing="some_none").to(dtype)
    rows = 189 if max_assignments is None else max_assignments
    _, saved = _saved(problem, max_assignments=max_assignments)
    assert saved == [
        ((rows, 62), dtype, rows * 62 * dtype.itemsize),
        ((rows,), torch.int64, rows * 8),
        ((5,), torch.int64, 5 * 8),
    ]


def test_nothing_is_kept_without_gradients(fused_backend, make_problem, monkeypatch):
    problem = make_problem()
    expected, _ = _saved(problem)
    kept = []

    def spy(*arguments):
        results = forward(*arguments)
        kept.append(results[1].shape[0])
        return results

    forward = op.forward
    monkeypatch.setattr(op, "forward", spy)
    with torch.no_grad():
        assert torch.equal(problem.run(moezoo_kernels.grouped_mlp), expected)
    for tensor in problem.differentiable():
        tensor.requires_grad_(False)
    assert torch.equal(problem.run(moezoo_kernels.grouped_mlp), expected)
    assert kept == [0, 0]


@pytest.mark.parametrize("wanted", OPERANDS)
def test_each_gradient_can_be_had_alone(fused_backend, make_problem, assert_close, wanted):
    problem = make_problem()
    expected = dict(zip(OPERANDS, problem.outputs(reference)[1:], strict=True))
    for name in OPERANDS:
        getattr(problem, name).requires_grad_(name == wanted)
    problem.run(moezoo_kernels.grouped_mlp).backward(problem.grad)
    for name in OPERANDS:
        gradient = getattr(problem, name).grad
        if name == wanted:
            assert_close([gradient], [expected[name]], 1e-12)
        else:
            assert gradient is None


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(fused_backend, make_problem, gated):
    problem = make_problem(4, 3, 2, experts=3, choices=2, gated=gated, activation="gelu")

    def call(x, w_in, w_out, weights, bias_in, bias_out):
        return moezoo_kernels.grouped_mlp(
            x,
            w_in,
            w_out,
            problem.indices,
            weights,
            activation="gelu",
            gated=gated,
            bias_in=bias_in,
            bias_out=bias_out,
        )

    assert torch.autograd.gradcheck(call, problem.differentiable())


def test_second_derivatives_are_refused_not_wrong(fused_backend, make_problem):
    problem = make_problem()
    output = problem.run(moezoo_kernels.grouped_mlp).sum()
    (gradient,) = torch.autograd.grad(output, problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_autocast_casts_products_but_not_the_router(fused_backend, make_problem):
    problem = make_problem(routing="some_none").to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = problem.outputs(moezoo_kernels.grouped_mlp)
    assert [t.dtype for t in actual] == [torch.bfloat16] + [torch.float32] * 6
    half = problem.to(torch.bfloat16)
    half.weights = problem.weights
    expected = half.outputs(moezoo_kernels.grouped_mlp)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.float(), b.float())


def test_autocast_leaves_fp64_alone(fused_backend, make_problem):
    problem = make_problem()
    expected = problem.run(moezoo_kernels.grouped_mlp)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.run(moezoo_kernels.grouped_mlp), expected)


def test_answers_in_bf16_are_combined_in_fp32(any_backend):
    """Zero input weights leave only the output biases, so each answer is known exactly."""
    experts, width = 16, 8
    bias = torch.randn(experts, width).to(torch.bfloat16)
    weights = torch.rand(32, experts)
    zeros = torch.zeros(experts, 6, width, dtype=torch.bfloat16)
    output = moezoo_kernels.grouped_mlp(
        torch.randn(32, width).to(torch.bfloat16),
        zeros,
        torch.randn(experts, width, 3).to(torch.bfloat16),
        torch.arange(experts).expand(32, experts),
        weights,
        bias_out=bias,
    )
    exact = weights.double() @ bias.double()
    half_a_digit = torch.finfo(torch.bfloat16).eps / 2
    error = (output.double() - exact).abs()
    assert (error <= half_a_digit * exact.abs() + 1e-5).all()


def test_checkpointing_recomputes_the_same_bits(fused_backend, make_problem):
    problem = make_problem()
    expected = problem.outputs(moezoo_kernels.grouped_mlp)
    calls = 0

    def block(x):
        nonlocal calls
        calls += 1
        problem.x = x
        return problem.run(moezoo_kernels.grouped_mlp)

    x = problem.x
    output = checkpoint(block, x, use_reentrant=False)
    problem.x = x
    gradients = torch.autograd.grad(output, problem.differentiable(), problem.grad)
    assert calls == 2
    for a, b in zip([output, *gradients], expected, strict=True):
        assert torch.equal(a, b)


def _compiled(problem, compiler, assert_close, fullgraph=True):
    torch._dynamo.reset()
    call = torch.compile(moezoo_kernels.grouped_mlp, fullgraph=fullgraph, backend=compiler)
    assert_close(problem.outputs(call), problem.outputs(moezoo_kernels.grouped_mlp), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_into_one_graph(fused_backend, make_problem, assert_close, dtype):
    _compiled(make_problem().to(dtype), "aot_eager", assert_close)


def test_one_graph_serves_other_numbers_of_tokens(fused_backend, make_problem, assert_close):
    torch._dynamo.reset()
    call = torch.compile(
        moezoo_kernels.grouped_mlp, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (63, 17, 100):
        problem = make_problem(tokens)
        expected = problem.outputs(moezoo_kernels.grouped_mlp)
        with torch.compiler.set_stance("default" if tokens == 63 else "fail_on_recompile"):
            assert_close(problem.outputs(call), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_to_machine_code(make_problem, assert_close):
    """With one backend: the compiler sees the same operator whichever computes it."""
    _compiled(make_problem().to(torch.float32), "inductor", assert_close)


def test_a_compiled_call_follows_a_change_of_backend(make_problem):
    torch._dynamo.reset()
    problem = make_problem().to(torch.float32)
    call = torch.compile(moezoo_kernels.grouped_mlp, backend="aot_eager")
    for name in ("grouped_mm", "cpu", "grouped_mm"):
        with moezoo_kernels.use(name):
            assert torch.equal(problem.run(call), problem.run(moezoo_kernels.grouped_mlp))


def test_opcheck(fused_backend, make_problem):
    problem = make_problem(6, 5, 3, experts=3, choices=2, routing="random")
    torch.library.opcheck(
        torch.ops.moezoo.grouped_mlp,
        (
            problem.x,
            problem.w_in,
            problem.w_out,
            problem.indices,
            problem.weights,
            problem.bias_in,
            problem.bias_out,
            "silu",
            True,
            [1, 1.5, 1.5, 1.0],
            True,
            12,
            True,
            fused_backend,
        ),
    )


def _flops(problem, function):
    with FlopCounterMode(display=False) as counter:
        problem.run(function).backward(problem.grad)
    return counter.get_total_flops()


@pytest.mark.parametrize("routing", ["some_none", "all_none"])
@pytest.mark.parametrize(
    ("frozen", "up_products", "down_products"),
    [
        ((), 3, 3),
        (("x",), 2, 3),
        (("w_in", "w_out"), 2, 2),
        (("x", "w_in", "w_out"), 1, 2),
    ],
)
def test_flops_are_those_of_the_active_rows(
    fused_backend, make_problem, routing, frozen, up_products, down_products
):
    problem = make_problem(routing=routing, bias=False)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    assigned = int(problem.indices.ge(0).sum())
    up, down = problem.w_in[0].numel(), problem.w_out[0].numel()
    expected = 2 * assigned * (up_products * up + down_products * down)
    assert _flops(problem, moezoo_kernels.grouped_mlp) == expected


def test_flops_equal_what_torch_counts_in_the_reference(fused_backend, make_problem):
    problem = make_problem(bias=False)
    assert _flops(problem, moezoo_kernels.grouped_mlp) == _flops(problem, reference) > 0


def test_flops_of_shapes_alone_are_an_upper_bound():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        moezoo_kernels.grouped_mlp(
            torch.empty(10, 8),
            torch.empty(4, 6, 8),
            torch.empty(4, 8, 3),
            torch.empty(10, 2, dtype=torch.int64),
            torch.empty(10, 2),
            max_assignments=15,
        )
    assert counter.get_total_flops() == 2 * 15 * (6 * 8 + 8 * 3)
