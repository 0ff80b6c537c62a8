"""Activations above a row's threshold: every backend against the formula written out."""

import pytest
import torch
from torch.library import opcheck

import moezoo_kernels
from moezoo_kernels import native, statistical_top_k
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.statistical_top_k import op
from moezoo_kernels.statistical_top_k.reference import statistical_top_k as reference


def drawn(shape, dtype=torch.float64, gated=True):
    """Pre-activations that are skewed and far from zero, the linear branch, and a gradient."""
    torch.manual_seed(sum(shape))
    pre = (torch.randn(shape, dtype=torch.float64) + 0.5).exp() - 3
    up = torch.randn(shape, dtype=torch.float64) if gated else None
    tensors = (pre, up, torch.randn(shape, dtype=torch.float64))
    return [None if t is None else t.to(dtype) for t in tensors]


def outputs(function, pre, up, grad, **options):
    leaves = [t.detach().requires_grad_() for t in (pre, up) if t is not None]
    hidden = function(*leaves, *([None] if up is None else []), **options)
    return [hidden.detach(), *torch.autograd.grad(hidden, leaves, grad)]


def assert_near(found, exact, bound):
    for one, other in zip(found, exact, strict=True):
        difference = (one.double() - other.double()).norm()
        assert difference <= bound * max(1.0, float(other.double().norm()))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(63, 29), (2, 5, 1), (0, 7), (3, 0)])
def test_torch_gives_the_formula_and_its_gradients(shape, activation, gated):
    pre, up, grad = drawn(shape, gated=gated)
    options = {"quantile": 0.7, "activation": activation}
    with moezoo_kernels.use("torch"):
        found = outputs(statistical_top_k, pre, up, grad, **options)
    assert_near(found, outputs(reference, pre, up, grad, **options), 1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_library_computes_every_activation(
    native_library, poison_empty, activation, dtype, gated
):
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-6
    for shape in ((63, 29), (7, 9, 165), (1, 1), (5, 64), (0, 8), (4, 0)):
        for quantile in (1.3, -0.4):
            operands = drawn(shape, dtype, gated)
            options = {"quantile": quantile, "activation": activation}
            exact = [None if t is None else t.double() for t in operands]
            wanted = outputs(reference, *exact, **options)
            with moezoo_kernels.use("cpu"):
                found = outputs(statistical_top_k, *operands, **options)
            assert all(t.dtype == dtype and t.shape == shape for t in found)
            # What lies at the threshold may pass in one precision and not in the other: few do.
            assert_near(found, wanted, bound)


def test_a_row_of_equals_and_one_that_is_not_finite(native_library):
    pre = torch.full((3, 37), 1.5)
    pre[1, 5] = float("nan")
    pre[2] = torch.randn(37)
    up = torch.randn(3, 37)
    options = {"quantile": 0.5, "activation": "gelu"}
    results = []
    for name in ("cpu", "torch"):
        with moezoo_kernels.use(name):
            results.append(outputs(statistical_top_k, pre, up, torch.ones(3, 37), **options))
    assert not results[0][0][0].any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits(native_library):
    operands = drawn((1000, 272), torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        found.append(outputs(statistical_top_k, *operands, quantile=1.0, activation="silu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_rows_need_not_lie_side_by_side():
    pre, up, grad = drawn((63, 30), torch.float32)
    options = {"quantile": 0.3, "activation": "relu2"}
    whole = outputs(statistical_top_k, pre, up, grad, **options)
    transposed = [t.t().contiguous().t() for t in (pre, up, grad)]
    assert all(map(torch.equal, whole, outputs(statistical_top_k, *transposed, **options)))


def test_saved_are_the_inputs_alone():
    pre, up, _ = (t.requires_grad_() for t in drawn((9, 16), torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        statistical_top_k(pre, up, quantile=0.5, activation="gelu")
    assert {t.data_ptr() for t in saved} == {pre.data_ptr(), up.data_ptr()}


@pytest.mark.skipif(isinstance(native.load(), str), reason="no C++ library")
def test_op_and_compiler():
    pre, up, _ = (t.requires_grad_() for t in drawn((9, 16), torch.float32))
    for linear in (up, None):
        opcheck(op.forward, (pre, linear, 0.5, "gelu"))
        detached = None if linear is None else linear.detach()
        opcheck(op.backward, (torch.randn(9, 16), pre.detach(), detached, 0.5, "gelu"))
    compiled = torch.compile(statistical_top_k, fullgraph=True, backend="aot_eager")
    options = {"quantile": 0.5, "activation": "gelu"}
    assert torch.equal(compiled(pre, up, **options), statistical_top_k(pre, up, **options))


def test_what_does_not_fit_is_named():
    pre = torch.randn(3, 4)
    with pytest.raises(ValueError, match="activation: 'softsign' is not known"):
        statistical_top_k(pre, quantile=0.5, activation="softsign")
    with pytest.raises(ValueError, match=r"up: \(3, 5\)"):
        statistical_top_k(pre, torch.randn(3, 5), quantile=0.5, activation="relu")
    with pytest.raises(ValueError, match=r"up: .*float64"):
        statistical_top_k(pre, pre.double(), quantile=0.5, activation="relu")
