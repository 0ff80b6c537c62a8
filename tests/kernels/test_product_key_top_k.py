"""product_key_top_k equals all n² sums, sorted by its rule: element by element, ties and all."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import moezoo_kernels
from moezoo_kernels import backends, native, product_key_top_k
from moezoo_kernels.product_key_top_k.reference import product_key_top_k as reference

INF, NAN = float("inf"), float("nan")


def _halves(tokens, heads, n, values="normal", by_head=False):
    """Draw half scores, laid out as the product of shared codebooks, or of each head's own."""
    shape = (heads, 2, tokens, n) if by_head else (2, tokens, heads, n)
    if values == "normal":
        halves = torch.randn(shape)
    elif values == "few":
        halves = torch.randint(-2, 3, shape) / 4.0
    elif values == "rounded":  # equal sums of unequal halves, by rounding
        halves = torch.randint(-2, 3, shape) * 1e-4 + torch.randint(0, 2, shape) * 1e4
    elif values == "equal":
        halves = torch.full(shape, -1.5)
    else:
        draw = torch.tensor([0.0, -0.0, 1.0, -INF] + ([NAN, -NAN, INF] if values == "nan" else []))
        halves = draw[torch.randint(0, len(draw), shape)]
        if values == "nan":  # +inf in the first half only: no sum of infinities is a NaN
            halves = torch.where(halves.abs() == INF, INF, halves)
    return halves.permute(1, 2, 0, 3) if by_head else halves


VALUES = ("normal", "few", "rounded", "equal", "masked", "nan")


def _run(function, halves, top_k, grad=None):
    """Return scores, slots and the gradient of the halves."""
    halves = halves.detach().requires_grad_()
    scores, slots = function(halves, top_k)
    if grad is None:
        grad = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view(scores.shape)
    return scores, slots, *torch.autograd.grad(scores, halves, grad)


def _assert_equal(actual, expected, gradient=2e-6):
    scores, slots, grad = actual
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(slots, expected[1])
    torch.testing.assert_close(grad, expected[2], rtol=gradient, atol=gradient)


def test_the_reference_sorts_by_the_rule():
    halves = torch.cat([_halves(6, 1, 5, "few"), _halves(6, 1, 5, "rounded")], dim=1)
    scores, slots = reference(halves, 5)
    for t in range(12):
        first, second = halves[0, t, 0].tolist(), halves[1, t, 0].tolist()
        pairs = [(i, j) for i in range(5) for j in range(5)]
        summed = (halves[0, t, 0][:, None] + halves[1, t, 0]).tolist()
        pairs.sort(key=lambda p: (-summed[p[0]][p[1]], -first[p[0]], p[0], -second[p[1]], p[1]))
        assert slots[t, 0].tolist() == [5 * i + j for i, j in pairs[:5]]
        assert scores[t, 0].tolist() == [summed[i][j] for i, j in pairs[:5]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([0, 1, 7]),
    heads=st.integers(1, 3),
    n=st.sampled_from([1, 2, 5, 16, 33, 70]),
    values=st.sampled_from(VALUES),
    by_head=st.booleans(),
    data=st.data(),
)
def test_plain_torch_equals_the_reference(tokens, heads, n, values, by_head, data):
    top_k = data.draw(st.integers(1, n))
    halves = _halves(tokens, heads, n, values, by_head).double()
    expected = _run(reference, halves, top_k)
    with moezoo_kernels.use("torch"):
        _assert_equal(_run(product_key_top_k, halves, top_k), expected, gradient=1e-12)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tokens=st.sampled_from([1, 7]),
    heads=st.integers(1, 3),
    n=st.sampled_from([1, 2, 15, 16, 33, 64, 70, 129]),
    values=st.sampled_from(VALUES),
    by_head=st.booleans(),
    data=st.data(),
)
def test_cpp_equals_the_reference(
    native_library, poison_empty, tokens, heads, n, values, by_head, data
):
    top_k = data.draw(st.integers(1, n))
    halves = _halves(tokens, heads, n, values, by_head)
    with moezoo_kernels.use("cpu"):
        actual = _run(product_key_top_k, halves, top_k)
    _assert_equal(actual, _run(reference, halves, top_k))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("n", "top_k"), [(300, 1), (300, 16), (300, 32), (300, 100), (96, 96)])
def test_cpp_is_exact_at_large_sizes(native_library, poison_empty, values, n, top_k):
    halves = _halves(5, 2, n, values)
    with moezoo_kernels.use("cpu"):
        actual = _run(product_key_top_k, halves, top_k)
    _assert_equal(actual, _run(reference, halves, top_k))


def test_a_nan_is_the_greatest_and_takes_all_pairs_with_it(native_library):
    halves = torch.tensor([[1.0, NAN, 3.0, INF], [5.0, 4.0, 6.0, -INF]]).view(2, 1, 1, 4)
    for backend in ("cpu", "torch", "reference"):
        with moezoo_kernels.use(backend):
            scores, slots = product_key_top_k(halves[..., :3], 3)
            assert scores.isnan().all()
            assert slots.tolist() == [[[5, 3, 4]]]
    with moezoo_kernels.use("cpu"):  # +inf meets -inf
        scores, slots = product_key_top_k(halves[..., 2:], 2)
    assert scores.isnan().tolist() == [[[True, False]]]
    assert slots.tolist() == [[[3, 2]]]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_lie_in_memory_as_the_halves_do(native_library, backend):
    def transposed(halves):
        return halves.transpose(0, 3).contiguous().transpose(0, 3)

    for by_head in (True, False):
        halves = _halves(4, 3, 6, by_head=by_head)
        expected = _run(reference, halves, 5)
        with moezoo_kernels.use(backend):
            _assert_equal(_run(product_key_top_k, halves, 5), expected)
            _assert_equal(_run(product_key_top_k, transposed(halves), 5), expected)
            expanded = torch.ones(()).expand(4, 3, 5)
            _assert_equal(
                _run(product_key_top_k, halves, 5, expanded), _run(reference, halves, 5, expanded)
            )
        if backend == "cpu":
            with moezoo_kernels.use("cpu"):
                gradient = _run(product_key_top_k, halves, 5)[2]
            assert gradient.permute(2, 0, 1, 3).is_contiguous() == by_head


def test_two_threads_give_the_bits_of_one(native_library):
    halves = _halves(60, 3, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with moezoo_kernels.use("cpu"):
                results.append(_run(product_key_top_k, halves, 16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_slots_are_saved(native_library):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, slots = product_key_top_k(_halves(3, 2, 9).requires_grad_(), 4)
    (tensor,) = saved
    assert tensor.data_ptr() == slots.data_ptr()


def test_plain_torch_has_second_derivatives():
    halves = _halves(2, 2, 5).double().requires_grad_()
    with moezoo_kernels.use("torch"):

        def squared(halves):
            return product_key_top_k(halves, 3)[0].square()

        assert torch.autograd.gradcheck(squared, halves)
        assert torch.autograd.gradgradcheck(squared, halves)


@pytest.mark.parametrize("by_head", [True, False])
def test_opcheck(native_library, by_head):
    halves = _halves(5, 2, 9, by_head=by_head).requires_grad_()
    op = torch.ops.moezoo
    torch.library.opcheck(op.product_key_top_k.default, (halves, 4, "cpu"))
    grad, slots = torch.randn(5, 2, 4), torch.randint(0, 81, (5, 2, 4))
    torch.library.opcheck(op.product_key_top_k_backward.default, (grad, slots, 9, by_head, "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_to_one_graph(backend):
    halves = _halves(5, 2, 9, by_head=True)
    with moezoo_kernels.use(backend):
        compiled = torch.compile(product_key_top_k, fullgraph=True, backend="aot_eager")
        _assert_equal(_run(compiled, halves, 4), _run(reference, halves, 4))


def test_checkpointing_and_autocast_change_nothing(native_library):
    def checkpointed(halves, top_k):
        return checkpoint(product_key_top_k, halves, top_k, use_reentrant=False)

    halves = _halves(5, 2, 9)
    expected = _run(reference, halves, 4)
    _assert_equal(_run(checkpointed, halves, 4), expected)
    with torch.autocast("cpu", torch.bfloat16):
        scores, slots = product_key_top_k(halves, 4)
    assert scores.dtype == torch.float32
    assert torch.equal(slots, expected[1])


def test_what_runs_where(native_library, monkeypatch):
    cpu = torch.device("cpu")
    rows = {r.backend: r for r in backends.table() if r.op == "product_key_top_k"}
    assert rows["cpu"].default
    for dtype in (torch.float64, torch.bfloat16):
        halves = _halves(2, 2, 9).to(dtype)
        assert product_key_top_k(halves, 3)[0].dtype == dtype
        with moezoo_kernels.use("cpu"), pytest.raises(ValueError, match="has fp32, not"):
            product_key_top_k(halves, 3)
    monkeypatch.setenv("MOEZOO_NATIVE", "off")
    native.load.cache_clear()
    chosen = backends.choose("product_key_top_k", cpu, torch.float32)
    assert chosen is backends._BACKENDS["product_key_top_k"]["torch"].function
    halves = _halves(3, 2, 20, "few")
    _assert_equal(_run(product_key_top_k, halves, 6), _run(reference, halves, 6))


@pytest.mark.parametrize(
    ("halves", "top_k", "message"),
    [
        (torch.ones(2, 3, 4), 1, r"halves: shape is \(2, 3, 4\); give \(2, T, H, n\)"),
        (torch.ones(3, 1, 1, 4), 1, r"halves: shape is \(3, 1, 1, 4\); give"),
        (torch.ones(2, 1, 1, 4).long(), 1, "halves: dtype is torch.int64; give a floating dtype"),
        (torch.ones(2, 1, 1, 4), 0, "top_k: 0 is out of range; give 1 to n = 4"),
        (torch.ones(2, 1, 1, 4), 5, "top_k: 5 is out of range; give 1 to n = 4"),
    ],
)
def test_mistakes_are_named(halves, top_k, message):
    with pytest.raises(ValueError, match=message) as caught:
        product_key_top_k(halves, top_k)
    assert "\n" not in str(caught.value)
