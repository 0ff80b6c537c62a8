"""grouped_mlp in C++: the passes between the products, and the path for a handful of tokens."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU
from moezoo_kernels.grouped_mlp import cpu, op
from moezoo_kernels.grouped_mlp.direct import grouped_mlp_directly
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

DIGITS = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request, native_library):
    with moezoo_kernels.use("cpu"):
        yield request.param


def _small(make_problem, dtype, **sizes):
    problem = make_problem(**({"width": 37, "hidden": 19, "experts": 6} | sizes)).to(dtype)
    problem.weights = problem.weights.detach().float().requires_grad_()
    return problem


@pytest.fixture(params=["few", "whole", "together", "alone"])
def path(request, monkeypatch):
    """How experts run: slot by slot; all in one call; or by torch's products, some together."""
    monkeypatch.setenv("MOEZOO_PRODUCTS", "own" if request.param == "whole" else "torch")
    most = 1 << 20 if request.param == "few" else 0
    if request.param == "alone":
        monkeypatch.setattr(cpu, "_CACHE", 0)
    per_expert = {torch.float32: most, torch.bfloat16: most}
    monkeypatch.setattr(cpu, "_FEW_PER_EXPERT", per_expert)
    return request.param


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_all_gradients_equal_the_reference(
    dtype, path, poison_empty, make_problem, assert_close, activation, gated
):
    problem = _small(make_problem, dtype, activation=activation, gated=gated)
    expected = problem.to(torch.float64).outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, DIGITS[dtype])


def _few(problem, **options):
    with torch.no_grad():
        assert cpu.is_few(problem.indices.numel(), len(problem.w_in), problem.x.dtype)
        return problem.run(moezoo_kernels.grouped_mlp, **options)


@pytest.mark.parametrize("name", ["w_out", "bias_in", "bias_out"])
def test_weights_of_two_dtypes_are_refused(dtype, make_problem, name):
    """The kernel would read the bytes of one as numbers of the other."""
    problem = _small(make_problem, dtype, tokens=1)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    setattr(problem, name, getattr(problem, name).detach().to(other))
    for run in (moezoo_kernels.grouped_mlp, grouped_mlp_directly):
        with torch.no_grad(), pytest.raises(ValueError, match=f"{name}: dtype is"):
            problem.run(run)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("routing", ["random", "some_none", "all_none", "one_expert", "repeated"])
def test_what_a_few_tokens_keep_is_what_a_loop_keeps(
    dtype, poison_empty, make_problem, assert_close, monkeypatch, tokens, routing
):
    """Pre-activations by expert, of no more rows than there may be, and the same gradients."""
    problem = _small(make_problem, dtype, tokens=tokens, routing=routing)
    rows = int(problem.indices.ge(0).sum())
    kept = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(cpu, "_FEW_PER_EXPERT", {dtype: most})
        operands = [t.detach() for t in (problem.x, problem.w_in, problem.w_out)]
        chosen = (problem.indices, problem.weights.detach())
        biases = [None if t is None else t.detach() for t in (problem.bias_in, problem.bias_out)]
        unit = (problem.activation, problem.gated, list(PLAIN_GLU.encode()), False)
        options = (*unit, rows, True, "cpu")
        kept.append(op.forward(*operands, *chosen, *biases, *options))
        assert kept[-1][1].shape == (rows, problem.w_in.shape[1])
        assert kept[-1][1].dtype == dtype
    assert_close(kept[0][:2], kept[1][:2], DIGITS[dtype])
    assert all(map(torch.equal, kept[0][2:], kept[1][2:]))
    monkeypatch.setattr(cpu, "_FEW_PER_EXPERT", {dtype: 1 << 20})
    expected = problem.to(torch.float64).outputs(reference)
    found = problem.outputs(moezoo_kernels.grouped_mlp, max_assignments=rows)
    assert_close(found, expected, DIGITS[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 4, 16])
@pytest.mark.parametrize("routing", ["random", "some_none", "all_none", "one_expert", "repeated"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_handful_of_tokens(
    dtype, poison_empty, make_problem, assert_close, monkeypatch, tokens, routing, bias
):
    """Whatever number of rows is the turning point to products of matrices in this dtype."""
    monkeypatch.setattr(cpu, "_FEW_PER_EXPERT", {dtype: 1 << 20})
    for gated in (True, False):
        sizes = {"tokens": tokens, "routing": routing, "bias": bias, "gated": gated}
        problem = _small(make_problem, dtype, activation="gelu", **sizes)
        expected = problem.to(torch.float64).run(reference)
        found = _few(problem)
        assert found.dtype == dtype
        assert_close([found], [expected], {torch.float32: 2e-6, torch.bfloat16: 5e-3}[dtype])


@pytest.mark.parametrize("tokens", [4, 300])
def test_threads_change_no_bit(dtype, make_problem, tokens):
    problem = _small(make_problem, dtype, tokens=tokens, width=400, hidden=336, routing="repeated")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if tokens == 4:
            results.append([_few(problem), problem.run(moezoo_kernels.grouped_mlp)])
        else:
            results.append(_without_products(problem))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def _without_products(problem):
    """The passes on their own: matrix products are torch's, and may depend on the threads."""
    from moezoo_kernels.grouped_mlp.rowwise import RowPasses

    torch.manual_seed(1)
    passes = RowPasses(problem.x.dtype, "silu", True)
    inner = torch.randn(900, 272).to(problem.x.dtype)
    grad, weights = torch.randn(900, 136).to(inner.dtype), torch.randn(900)
    output = torch.zeros(300, 272)
    passes.combine(output, torch.randint(300, (900,)).sort().values, inner, weights)
    return [passes.activate(inner), *passes.backward(grad, inner, weights), output]


def test_nothing_is_kept_and_nothing_sorted_for_a_handful(make_problem, monkeypatch):
    problem = _small(make_problem, torch.float32, tokens=4)
    expected = problem.run(moezoo_kernels.grouped_mlp)
    monkeypatch.setattr(op, "sort_by_expert", None)
    if cpu.native.unusable(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no C++ library")
    assert (_few(problem) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        (6, {}, "indices: 6 is not an expert"),
        (-2, {}, "indices: -2 is not an expert"),
        (0, {"max_assignments": 2}, "max_assignments: 2 is less than the 12"),
    ],
)
def test_a_handful_is_checked_too(dtype, make_problem, wrong, options, message):
    problem = _small(make_problem, dtype, tokens=4, routing="random")
    problem.indices[1, 1] = wrong
    with pytest.raises(ValueError, match=message):
        _few(problem, **options)


def test_a_handful_traces_into_one_graph(dtype, make_problem):
    torch._dynamo.reset()
    problem = _small(make_problem, dtype, tokens=4)
    call = torch.compile(moezoo_kernels.grouped_mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(problem.run(call), _few(problem))
