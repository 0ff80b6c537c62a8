"""Block shuffles that lie outputs first: the numbers and gradients of plain matrices."""

import pytest
import torch

import moezoo
from moezoo.matrices import BlockShuffle, build_matrix
from moezoo_kernels.activations import GLUOptions, gated_unit

LAYOUTS = {
    "tokens first": lambda x: x,
    "outputs first": lambda x: x.t().contiguous().t(),
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "one for all": lambda x: x[:1].expand(x.shape),
}


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def fill(module):
    for seed, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(drawn(*parameter.shape, seed=seed + 10))
    return module.double()


def dense(matrix):
    """Write both factors number by number, by what the paper calls a shuffle."""
    count = len(matrix.first)
    parts = []
    for factor in (matrix.first, matrix.second):
        _, height, width = factor.shape
        rows = [None] * (count * height)
        for k in range(count):
            for line in range(height):
                row = torch.zeros(count * width, dtype=torch.float64)
                at = torch.arange(k * width, (k + 1) * width)
                rows[line * count + k] = row.index_put((at,), factor[k, line])
        parts.append(torch.stack(rows))
    return parts[1] @ parts[0]


def agree(found, expected, leaves, slope):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    ours, theirs = (torch.autograd.grad(y, leaves, slope) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 128])  # 128: rows of 1 KiB, which are kept apart
@pytest.mark.parametrize("size", [(24, 36), (36, 24)])
def test_a_matrix_is_its_factors_written_out(size, tokens, layout):
    matrix = fill(build_matrix(BlockShuffle(blocks=3), *size, True))
    x = LAYOUTS[layout](drawn(tokens, size[0])).requires_grad_()
    found = matrix(x)
    assert found.is_contiguous()
    leaves = (x, *matrix.parameters())
    agree(found, x @ dense(matrix).t() + matrix.bias, leaves, drawn(tokens, size[1], seed=2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "options"),
    [("silu", {}), ("gelu", {}), ("quick_gelu", {"limit": 0.7, "up_shift": 1.0})],
)
@pytest.mark.parametrize("tokens", [5, 21, 128])
def test_a_gated_unit_is_that_of_written_out_matrices(tokens, activation, options, bias):
    glu = GLUOptions(**options)
    layer = moezoo.DenseFFN(
        24, 36, bias=bias, activation=activation, glu=glu, matrices=BlockShuffle(blocks=3)
    )
    fill(layer)
    x = drawn(tokens, 24).requires_grad_()
    parts = (layer.gate_proj, layer.up_proj)
    values = [x @ dense(part).t() + (part.bias if bias else 0.0) for part in parts]
    leaves = (x, *layer.gate_proj.parameters(), *layer.up_proj.parameters())
    expected = gated_unit(*values, activation, glu)
    agree(layer.inner(x), expected, leaves, drawn(tokens, 36, seed=2))


@pytest.mark.parametrize("frozen", ["hidden", "gate_proj.first", "up_proj.bias", "up_proj.second"])
def test_what_wants_no_gradient_gets_none(frozen):
    layer = fill(moezoo.DenseFFN(24, 36, bias=True, matrices=BlockShuffle(blocks=3)))
    x = drawn(2, 9, 24).requires_grad_(frozen != "hidden")
    if frozen != "hidden":
        layer.get_parameter(frozen).requires_grad_(False)
    leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
    values = [x @ dense(part).t() + part.bias for part in (layer.gate_proj, layer.up_proj)]
    hidden = gated_unit(*values, "silu")
    expected = hidden @ dense(layer.down_proj).t() + layer.down_proj.bias
    agree(layer(x).hidden, expected, leaves, drawn(2, 9, 24, seed=2))


def test_gradients_have_gradients():
    matrix = fill(build_matrix(BlockShuffle(blocks=2), 4, 6, False))
    x = drawn(3, 4).requires_grad_()

    def product(x, first, second):
        return torch.func.functional_call(matrix, {"first": first, "second": second}, x)

    assert torch.autograd.gradgradcheck(product, (x, *matrix.parameters()), atol=1e-6)
    layer = fill(moezoo.DenseFFN(4, 6, bias=True, matrices=BlockShuffle(blocks=2)))
    x = (0.2 * drawn(16, 4)).requires_grad_()
    leaves = (x, *layer.gate_proj.parameters(), *layer.up_proj.parameters())
    once = torch.autograd.grad(layer.inner(x).square().sum(), leaves, create_graph=True)
    found = torch.autograd.grad(sum(one.square().sum() for one in once), leaves)
    values = [x @ dense(p).t() + p.bias for p in (layer.gate_proj, layer.up_proj)]
    made = gated_unit(*values, "silu")
    once = torch.autograd.grad(made.square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(sum(one.square().sum() for one in once), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast_learn_the_same(dtype):
    """The C++ pass computes these two; a slope that lies as it is read spares its copy."""
    layer = fill(moezoo.DenseFFN(64, 96, bias=True, matrices=BlockShuffle()))
    for parameter in layer.parameters():
        parameter.data.mul_(0.2)
    x = drawn(256, 64).requires_grad_()
    expected = torch.autograd.grad(layer(x).hidden.square().sum(), (x, *layer.parameters()))
    layer, narrow = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    found = torch.autograd.grad(layer(narrow).hidden.square().sum(), (narrow, *layer.parameters()))
    near = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= near * other.norm()
    if dtype == torch.bfloat16:
        layer.float()
        with torch.autocast("cpu", dtype=dtype):
            made = layer(x.detach().float()).hidden
            assert layer.inner(x.detach().float()).dtype == dtype
        wanted = layer.double()(x).hidden
        assert (made.double() - wanted).norm() <= near * wanted.norm()


@pytest.mark.parametrize("guide", [0.0, 0.5])
def test_what_is_compiled_and_what_is_guided_is_computed_token_by_token(guide):
    layer = moezoo.DenseFFN(24, 36, bias=True, matrices=BlockShuffle(blocks=3, guide=guide))
    fill(layer).train()
    x = drawn(18, 24)
    expected = torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x)
    torch.testing.assert_close(layer.inner(x), expected, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(layer.inner, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
