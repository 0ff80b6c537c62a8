"""grouped_mlp computes its formula: outputs and all gradients, at awkward sizes and routings."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.grouped_mlp import assignments
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

ROUTINGS = ("random", "some_none", "all_none", "one_expert", "one_empty", "repeated")


def _one_by_one(problem):
    """The formula, token by token and slot by slot."""
    rows = []
    for t in range(problem.x.shape[0]):
        row = 0 * problem.x[t]
        for j, e in enumerate(problem.indices[t].tolist()):
            if e < 0:
                continue
            inner = problem.w_in[e] @ problem.x[t]
            if problem.bias_in is not None:
                inner = inner + problem.bias_in[e]
            answer = problem.w_out[e] @ activate(inner, problem.activation, problem.gated)
            if problem.bias_out is not None:
                answer = answer + problem.bias_out[e]
            row = row + problem.weights[t, j] * answer
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
def test_the_reference_is_the_formula(make_problem, assert_close, gated):
    problem = make_problem(tokens=9, gated=gated)
    formula = _one_by_one(problem)
    gradients = torch.autograd.grad(formula, problem.differentiable(), problem.grad)
    assert_close(problem.outputs(reference), [formula, *gradients], 1e-13)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    tokens=st.sampled_from([1, 2, 7, 63]),
    width=st.sampled_from([1, 3, 8, 20, 64]),
    hidden=st.sampled_from([1, 4, 31]),
    experts=st.integers(1, 6),
    data=st.data(),
    routing=st.sampled_from(ROUTINGS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_output_and_gradients_equal_the_reference(
    fused_backend, poison_empty, make_problem, assert_close, experts, data, **sizes
):
    choices = data.draw(st.integers(1, experts))
    problem = make_problem(experts=experts, choices=choices, **sizes)
    expected = problem.outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 1e-10)
    assigned = int(problem.indices.ge(0).sum())
    bounded = problem.outputs(moezoo_kernels.grouped_mlp, max_assignments=assigned)
    assert_close(bounded, expected, 1e-10)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(20, 31), (64, 32)], ids=["odd", "aligned"])
def test_fp32_equals_the_fp64_reference(
    fused_backend, poison_empty, make_problem, assert_close, activation, gated, bias, sizes
):
    width, hidden = sizes
    problem = make_problem(
        width=width, hidden=hidden, activation=activation, gated=gated, bias=bias
    ).to(torch.float32)
    expected = problem.to(torch.float64).outputs(reference)
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("sizes", [(20, 31), (64, 32)], ids=["odd", "aligned"])
def test_half_precision_is_as_near_as_its_digits(
    fused_backend, poison_empty, make_problem, assert_close, dtype, tolerance, sizes
):
    width, hidden = sizes
    problem = make_problem(width=width, hidden=hidden).to(dtype)
    problem.weights = problem.weights.detach().float().requires_grad_()
    expected = problem.to(torch.float64).outputs(reference)
    actual = problem.outputs(moezoo_kernels.grouped_mlp)
    assert [t.dtype for t in actual] == [dtype] * 4 + [torch.float32] + [dtype] * 2
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(any_backend, make_problem, dtype):
    problem = make_problem(tokens=0).to(dtype)
    output, of_x, *others = problem.outputs(moezoo_kernels.grouped_mlp)
    assert output.shape == of_x.shape == (0, 20)
    assert all(not g.any() for g in others)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bound", [False, True])
def test_the_sort_of_accelerators_gives_the_same(
    fused_backend, poison_empty, make_problem, assert_close, monkeypatch, routing, bound
):
    monkeypatch.setattr(assignments, "_sort_on_cpu", assignments._sort_on_device)
    problem = make_problem(width=64, hidden=32, routing=routing).to(torch.float32)
    bound = int(problem.indices.ge(0).sum()) if bound else None
    expected = problem.to(torch.float64).outputs(reference)
    actual = problem.outputs(moezoo_kernels.grouped_mlp, max_assignments=bound)
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize(
    ("indices", "rows", "message"),
    [
        ([[5]], 1, "give expert numbers"),
        ([[-2]], 1, "give expert numbers"),
        ([[0]], 0, "less than"),
    ],
)
def test_the_sort_of_accelerators_asserts(indices, rows, message):
    flat = torch.tensor(indices).reshape(-1)
    with pytest.raises(RuntimeError, match=message):
        assignments._sort_on_device(flat, 5, rows)


def test_unused_experts_and_slots_get_zero_gradients(any_backend, poison_empty, make_problem):
    problem = make_problem(routing="some_none")
    problem.indices[problem.indices == 2] = -1
    _, _, *parameters, of_weights, of_bias_in, of_bias_out = problem.outputs(
        moezoo_kernels.grouped_mlp
    )
    for gradient in (*parameters, of_bias_in, of_bias_out):
        assert not gradient[2].any()
        assert gradient[1].any()
    none = problem.indices < 0
    assert none.any()
    assert not of_weights[none].any()
    assert of_weights[~none].all()


def test_what_nobody_chose_is_not_computed(any_backend, make_problem):
    problem = make_problem(routing="some_none")
    problem.indices[problem.indices == 2] = -1
    problem.indices[0] = -1
    with torch.no_grad():
        problem.x[0] = torch.nan
        problem.w_in[2] = torch.nan
        problem.w_out[2] = torch.inf
        problem.weights[problem.indices < 0] = torch.nan
    output, of_x, *gradients = problem.outputs(moezoo_kernels.grouped_mlp)
    assert not output[0].any()
    assert not of_x[0].any()
    assert all(t.isfinite().all() for t in (output, of_x, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bit_identical(fused_backend, make_problem, dtype):
    problem = make_problem(tokens=500, width=32, hidden=48, routing="repeated").to(dtype)
    first = problem.outputs(moezoo_kernels.grouped_mlp)
    for _ in range(3):
        again = problem.outputs(moezoo_kernels.grouped_mlp)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_do_not_matter(fused_backend, make_problem, assert_close):
    problem = make_problem(width=16, hidden=12)
    expected = problem.outputs(reference)
    for name in ("x", "w_in", "w_out", "weights", "grad"):
        tensor = getattr(problem, name).detach()
        strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        setattr(problem, name, strided.requires_grad_(name != "grad"))
    problem.indices = problem.indices.t().contiguous().t()
    assert_close(problem.outputs(moezoo_kernels.grouped_mlp), expected, 1e-12)


def test_an_expanded_gradient_is_taken(fused_backend, make_problem, assert_close):
    problem = make_problem(width=16, hidden=12)
    problem.grad = torch.ones(1, 1, dtype=torch.float64).expand(63, 16)
    assert_close(
        problem.to(torch.float32).outputs(moezoo_kernels.grouped_mlp),
        problem.outputs(reference),
        1e-6,
    )
    problem.run(moezoo_kernels.grouped_mlp).sum().backward()
    assert_close([problem.x.grad], [problem.outputs(reference)[1]], 1e-12)


def test_few_rows_prefer_stages_and_many_a_loop(make_problem, monkeypatch):
    asked = []
    choose = moezoo_kernels.backends.choose

    def spy(*args, prefer=None):
        asked.append(prefer)
        return choose(*args, prefer=prefer)

    monkeypatch.setattr(moezoo_kernels.backends, "choose", spy)
    make_problem(tokens=10, experts=2, choices=1).run(moezoo_kernels.grouped_mlp)
    make_problem(tokens=128, experts=2, choices=1).run(moezoo_kernels.grouped_mlp)
    assert asked == ["grouped_mm", None]
    few = make_problem(tokens=10, experts=2, choices=1).to(torch.float32)
    few.run(moezoo_kernels.grouped_mlp)
    with torch.no_grad():
        few.run(moezoo_kernels.grouped_mlp)
    assert asked[2:] == ["cpu", "cpu"]
    half = {"experts": 2, "choices": 1, "dtype": torch.bfloat16}
    make_problem(tokens=63, **half).run(moezoo_kernels.grouped_mlp)
    make_problem(tokens=64, **half).run(moezoo_kernels.grouped_mlp)
    assert asked[4:] == ["grouped_mm", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation: 'swish' is not known; choose from: relu, gelu"),
        ({"x": torch.ones(2, 3, 4)}, r"give x \(T, D\), w_out \(E, D, F\), indices \(T, K\), not"),
        ({"x": torch.ones(63, 19)}, r"x: shape is \(63, 19\), the others ask for \(63, 20\)"),
        ({"x": torch.ones(62, 20)}, r"indices: shape is \(63, 3\), the others ask for \(62, 3\)"),
        ({"w_in": torch.ones(5, 31, 20)}, r"w_in: shape is .* ask for \(5, 62, 20\)"),
        ({"weights": torch.ones(63, 2)}, r"weights: shape is \(63, 2\)"),
        ({"bias_in": torch.ones(5, 31)}, r"bias_in: shape is .* ask for \(5, 62\)"),
        ({"bias_out": torch.ones(4, 20)}, r"bias_out: shape is .* ask for \(5, 20\)"),
        ({"indices": torch.zeros(63, 3).int()}, r"indices: dtype is torch.int32; give torch.int64"),
        ({"indices": torch.full((63, 3), 5)}, "indices: 5 is not an expert; give -1 .* 4"),
        ({"indices": torch.full((63, 3), -2)}, "indices: -2 is not an expert"),
        ({"w_out": torch.ones(5, 20, 31).half()}, "w_out: dtype is torch.float16, x has torch.fl"),
    ],
)
def test_mistakes_are_named(fused_backend, make_problem, change, message):
    problem = make_problem().to(torch.float32)
    for name, value in change.items():
        setattr(problem, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        problem.run(moezoo_kernels.grouped_mlp)
    assert "\n" not in str(caught.value)


def test_too_small_a_bound_is_an_error(fused_backend, make_problem):
    problem = make_problem(tokens=4, choices=2, routing="random")
    with pytest.raises(ValueError, match="max_assignments: 7 is less than the 8 indices"):
        problem.run(moezoo_kernels.grouped_mlp, max_assignments=7)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-10)]
)
def test_cuda_equals_the_reference(
    poison_empty, make_problem, assert_close, routing, dtype, tolerance
):
    for width, hidden in ((20, 31), (64, 32)):
        problem = make_problem(255, width, hidden, experts=9, routing=routing).to(dtype)
        expected = problem.to(torch.float64).outputs(reference)
        on_gpu = problem.to("cuda")
        actual = on_gpu.outputs(moezoo_kernels.grouped_mlp)
        assert_close([t.cpu() for t in actual], expected, tolerance)
        again = on_gpu.outputs(moezoo_kernels.grouped_mlp)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
