"""Linear maps by the faster library, against formulas in fp64, with each library forced."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moezoo_kernels import linear as maps
from moezoo_kernels import product_libraries

linear, Linear = maps.linear, maps.Linear

needs_onednn = pytest.mark.skipif(
    not product_libraries.has_onednn(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    """Run a test with each library, whichever is faster here; gives its name."""
    if request.param == "onednn" and not product_libraries.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    faster = request.param == "onednn"
    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: faster)
    return request.param


def operands(shape, outputs, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).float()

    x, weight = draw(*shape), draw(outputs, shape[-1])
    return x, weight, draw(outputs) if bias else None, draw(*shape[:-1], outputs)


def by_formula(x, weight, bias, grad):
    """Return output and gradients in fp64, a sum of products each."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    y = torch.einsum("...i,oi->...o", x, weight)
    found = [y if bias is None else y + bias.double()]
    found += [torch.einsum("...o,oi->...i", grad, weight)]
    found += [torch.einsum("ri,ro->oi", x.flatten(0, -2), grad.flatten(0, -2))]
    return found if bias is None else [*found, grad.flatten(0, -2).sum(0)]


def by_function(function, x, weight, bias, grad):
    leaves = [t for t in (x, weight, bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_near(found, expected, bound=1e-5):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, i
        assert (a.double() - b).norm() <= bound * b.norm(), i


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((64, 256), 256),
        ((101, 259), 263),
        ((3, 47, 301), 257),
        ((2, 3, 5, 256), 1100),
        ((1000, 400), 401),
        ((256, 64), 300),
        ((17, 640), 640),
        ((600, 33), 500),
    ],
    ids=str,
)
def test_output_and_every_gradient_are_those_of_formulas(library, shape, outputs, bias):
    parts = operands(shape, outputs, bias)
    assert_near(by_function(linear, *parts), by_formula(*parts))


@needs_onednn
@pytest.mark.parametrize(
    ("shape", "outputs", "rows"),
    [
        ((64, 256), 256, 64),
        ((101, 259), 263, 104),
        ((3, 47, 301), 257, 144),
        ((1000, 400), 401, 1000),
    ],
    ids=str,
)
def test_large_products_go_to_onednn_with_few_numbers_of_rows(onednn, shape, outputs, rows):
    by_function(linear, *operands(shape, outputs))
    inputs = shape[-1]
    assert onednn == [(rows, inputs, outputs), (rows, outputs, inputs), (outputs, rows, inputs)]


@needs_onednn
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((8, 1024), 1024), ((64, 128), 128), ((4096, 16), 400), ((4096, 400), 1), ((333, 64), 700)],
    ids=str,
)
def test_products_that_do_not_pay_stay_with_torch(onednn, shape, outputs):
    parts = operands(shape, outputs)
    found = by_function(linear, *parts)
    assert onednn == []
    expected = by_function(F.linear, *parts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_numbers_of_rows_have_few_fillings():
    filled = {rows: maps._filled(rows, 1e7) for rows in range(1, 4097)}
    assert all(rows <= to < rows + max(8, rows / 8) for rows, to in filled.items())
    assert len(set(filled.values())) == 16 + 5 * 8
    assert all(filled[rows] == rows for rows in (8, 16, 64, 128, 144, 192, 256, 512, 1536, 4096))
    assert maps._filled(4001, 2e8) == 4001


@needs_onednn
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("which", ["x", "weight", "x_rows", "weight_rows", "x_expanded", "grad"])
def test_operands_of_any_layout(onednn, which):
    x, weight, bias, grad = operands((90, 260), 270)
    expected = by_formula(x, weight, bias, grad)
    wide = torch.full((270, 600), float("nan"))
    match which:
        case "x":
            x = x.t().contiguous().t()
        case "weight":
            weight = weight.t().contiguous().t()
        case "x_rows":
            wide[:90, 7:267] = x
            x = wide[:90, 7:267]
        case "weight_rows":
            wide[:, 7:267] = weight
            weight = wide[:, 7:267]
        case "x_expanded":
            x = x[:1].expand(90, -1)
            expected = by_formula(x, weight, bias, grad)
        case "grad":
            grad = torch.ones(1, 1).expand(90, 270)
            expected = by_formula(x, weight, bias, grad)
    x, weight = x.detach(), weight.detach()
    assert_near(by_function(linear, x, weight, bias, grad), expected)
    assert len(onednn) == 3


def test_no_rows_and_no_columns(library):
    weight, bias = torch.randn(512, 512), torch.randn(512)
    parts = (torch.randn(2, 0, 512), weight, bias, torch.randn(2, 0, 512))
    found = by_function(linear, *parts)
    assert [tuple(t.shape) for t in found] == [(2, 0, 512), (2, 0, 512), (512, 512), (512,)]
    assert all(t.count_nonzero() == 0 for t in found)
    assert linear(torch.randn(512, 0), torch.randn(512, 0), bias).equal(bias.expand(512, -1))
    assert linear(torch.randn(512), weight, bias).shape == (512,)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_what_is_needed_is_saved_and_computed(library, needed):
    x, weight, bias, grad = operands((2, 64, 256), 256)
    parts = {"x": x, "weight": weight, "bias": bias}
    parts[needed].requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear(**parts)
    held = {"x": [weight], "weight": [x], "bias": []}[needed]
    assert saved == [t.untyped_storage().data_ptr() for t in held]
    place = {"x": 1, "weight": 2, "bias": 3}[needed]
    found = torch.autograd.grad(y, parts[needed], grad)
    assert_near(found, [by_formula(x.detach(), weight.detach(), bias.detach(), grad)[place]])


def test_second_derivatives(library):
    x, weight, bias, grad = (t.requires_grad_() for t in operands((64, 256), 260))

    def second(function, *parts):
        first = torch.autograd.grad(function(*parts[:3]), parts[:2], parts[3], create_graph=True)
        loss = sum((t.tanh() * t).sum() for t in first)
        return torch.autograd.grad(loss, (parts[0], parts[1], parts[3]))

    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias, grad)]
    expected = second(lambda x, w, b: x @ w.T + b, *wide)
    assert_near(second(linear, x, weight, bias, grad), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype, library):
    x, weight, bias, _ = (t.to(dtype) for t in operands((64, 256), 256))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_onednn
def test_autocast_is_obeyed(onednn):
    x, weight, bias, _ = operands((64, 256), 256)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert onednn == []


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("off", ["mkldnn", "precision"])
def test_settings_of_torch_are_obeyed(onednn, off):
    x, weight, bias, _ = operands((64, 256), 256)
    before = torch.get_float32_matmul_precision()
    try:
        if off == "precision":
            torch.set_float32_matmul_precision("medium")
        with torch.backends.mkldnn.flags(enabled=off != "mkldnn"):
            linear(x, weight, bias)
    finally:
        torch.set_float32_matmul_precision(before)
    assert onednn == []


@needs_onednn
def test_flops_are_counted(onednn):
    x, weight, bias, grad = operands((64, 256), 256)
    counted = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            by_function(function, x, weight, bias, grad)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@needs_onednn
def test_functions_of_torch_see_operators_that_they_know(onednn):
    x, weight, bias, grad = operands((64, 256), 256)
    vectors = torch.func.vmap(lambda row: linear(row.expand(64, -1), weight, bias))(x)
    assert_near([vectors[:, 0]], [by_formula(x, weight, bias, grad)[0]])
    pulled = torch.func.grad(lambda w: (linear(x, w, bias) * grad).sum())(weight)
    assert_near([pulled], [by_formula(x, weight, bias, grad)[2]])
    pushed = torch.func.jvp(lambda w: linear(x, w, bias), (weight,), (weight,))[1]
    assert_near([pushed], [by_formula(x, weight, None, grad)[0]])
    assert onednn == []


@needs_onednn
def test_gradients_of_several_outputs_at_once(onednn):
    x, weight, bias, grad = operands((64, 256), 256)
    y = linear(x.requires_grad_(), weight, bias)
    (found,) = torch.autograd.grad(y, x, torch.stack([grad, 2 * grad]), is_grads_batched=True)
    expected = by_formula(x.detach(), weight, bias, grad)[1]
    assert_near(list(found), [expected, 2 * expected])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@needs_onednn
def test_forward_mode_is_left_to_torch(onednn):
    x, weight, bias, grad = operands((64, 256), 256)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        y = linear(dual, weight, bias)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_near([tangent], [by_formula(x, weight, None, grad)[0]])


@needs_onednn
def test_results_may_be_written_into(onednn):
    for shape in ((64, 256), (3, 37, 256)):
        x, weight, bias, grad = operands(shape, 270)
        y = linear(x.requires_grad_(), weight.requires_grad_(), bias)
        assert y._base is None
        y.add_(1.0)
        y.backward(grad)
        expected = by_formula(x.detach(), weight.detach(), bias, grad)
        assert_near([y.detach() - 1.0, x.grad, weight.grad], expected[:3])
    assert len(onednn) == 6


def test_a_changed_weight_is_noticed_by_the_backward(library):
    x, weight, bias, grad = operands((64, 256), 256)
    y = linear(x.requires_grad_(), weight, bias)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_recomputed_blocks_have_the_same_bits(library):
    x, weight, bias, grad = operands((3, 67, 260), 264)
    found = by_function(linear, x, weight, bias, grad)
    again = by_function(
        lambda *parts: checkpoint(linear, *parts, use_reentrant=False), x, weight, bias, grad
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_compiled_and_exported_functions_hold_torchs_operators(library):
    module = Linear(256, 256)
    x = torch.randn(64, 256)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, module.weight, module.bias))
    exported = torch.export.export(module, (x,))
    assert "mkldnn" not in str(exported.graph)
    assert "aten.linear" in str(exported.graph)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_holds_torchs_operators(library):
    module = Linear(256, 256).requires_grad_(False)
    traced = torch.jit.trace(module, torch.randn(64, 256))
    assert "mkldnn" not in str(traced.inlined_graph)


def test_a_module_is_a_linear_layer_of_torch(library):
    torch.manual_seed(0)
    ours, theirs = Linear(256, 300), torch.nn.Linear(256, 300)
    assert isinstance(ours, torch.nn.Linear)
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, 256)
    assert_near([ours(x).detach()], [theirs(x).detach().double()])
    assert type(copy.deepcopy(ours)) is Linear
    assert maps.is_plain_linear(ours)
    assert maps.is_plain_linear(theirs)
    assert not maps.is_plain_linear(torch.nn.Bilinear(1, 1, 1))


def test_meta_and_fake_tensors_need_no_numbers(library):
    with torch.device("meta"):
        assert Linear(512, 512)(torch.empty(64, 512)).shape == (64, 512)
