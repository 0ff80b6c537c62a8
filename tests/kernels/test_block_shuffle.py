"""Block shuffles in one C++ call: numbers and gradients of products written out in fp64."""

import pytest
import torch

from moezoo_kernels import block_shuffle, native
from moezoo_kernels.activations import GLUOptions, gated_unit
from moezoo_kernels.block_shuffle import Factors

pytestmark = pytest.mark.skipif(
    native.unusable(torch.device("cpu"), torch.float32) is not None, reason="needs the C++ library"
)

# Blocks, tokens, inputs, between, outputs: none is a multiple of a register, one is of all.
SIZES = [
    (3, 21, 5, 7, 11),
    (4, 64, 16, 16, 48),
    (2, 1, 3, 1, 2),
    (1, 400, 33, 18, 350),
    (5, 0, 2, 3, 4),
]
LAYOUTS = {
    "tokens first": lambda x: x,
    "outputs first": lambda x: x.t().contiguous().t(),
    "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns apart": lambda x: torch.cat([x, x]).t().contiguous()[:, : len(x)].t(),
}


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def factors(size, bias, seed):
    blocks, _, inputs, between, outputs = size
    return Factors(
        drawn(blocks, between, inputs, seed=seed) / inputs**0.5,
        drawn(blocks, outputs, between, seed=seed + 1) / between**0.5,
        drawn(blocks * outputs, seed=seed + 2) if bias else None,
    )


def shuffle(x, count):
    """Move number l of block k to place k of group l, one by one."""
    size = x.shape[1] // count
    return torch.stack([x[:, k * size + place] for place in range(size) for k in range(count)], 1)


def written_out(x, of):
    """Multiply by each block, and join what they make."""
    count = len(of.first)
    for factor in of[:2]:
        parts = zip(x.chunk(count, 1), factor, strict=True)
        x = shuffle(torch.cat([part @ block.t() for part, block in parts], 1), count)
    return x if of.bias is None else x + of.bias


def wide(of):
    return Factors(*(None if t is None else t.double().requires_grad_() for t in of))


def agree(found, expected):
    if expected is None:
        assert found is None
        return
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() <= 2e-6 * (1 + expected.norm())


def memory_like(x, wanted):
    """Return memory for the gradient of x, filled with what must not stay."""
    if not wanted:
        return None
    lying = torch.empty_strided(x.shape, x.stride())
    return lying.fill_(float("nan"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope_layout", ["tokens first", "outputs first"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("wants", [(True, True, True), (False, True, True), (True, False, False)])
def test_a_product_and_its_gradients(size, layout, slope_layout, wants):
    blocks, tokens, inputs, _, outputs = size
    x, of = LAYOUTS[layout](drawn(tokens, blocks * inputs)), factors(size, bias=True, seed=2)
    made, middle = block_shuffle.product(x, of)
    wide_x, wide_of = x.double().requires_grad_(), wide(of)
    expected = written_out(wide_x, wide_of)
    assert made.is_contiguous()
    agree(made, expected)
    slope = LAYOUTS[slope_layout](drawn(tokens, blocks * outputs, seed=9))
    d_x = memory_like(x, wants[0])
    found = block_shuffle.product_backward(slope, x, middle, of, d_x, wants[1:])
    leaves = (wide_x, *wide_of[:2])
    gradients = torch.autograd.grad(expected, leaves, slope.double())
    for one, other, wanted in zip((d_x, *found[:2]), gradients, wants, strict=True):
        agree(one, other if wanted else None)


@pytest.mark.parametrize("layout", ["tokens first", "outputs first"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("silu", {}),
        ("gelu", {}),
        ("relu2", {"limit": 0.7, "up_shift": 1.0}),
        ("silu", {"limit": 0.6, "limit_after": True}),
    ],
)
def test_a_gated_unit_and_its_gradients(size, layout, bias, activation, options):
    blocks, tokens, inputs, _, outputs = size
    glu = GLUOptions(**options)
    x = LAYOUTS[layout](drawn(tokens, blocks * inputs))
    gate, up = factors(size, bias, 2), factors(size, bias, 5)
    made, *kept = block_shuffle.unit(x, gate, up, activation, glu)
    leaves = (x.double().requires_grad_(), wide(gate), wide(up))
    expected = gated_unit(
        written_out(leaves[0], leaves[1]), written_out(leaves[0], leaves[2]), activation, glu
    )
    agree(made[:, :tokens].t(), expected)
    slope = drawn(blocks * outputs, tokens, seed=9)
    d_x = memory_like(x, True)
    wants = (True, True, bias) * 2
    given = (slope, x, tuple(kept), gate, up, activation, glu, d_x, wants)
    of_gate, of_up = block_shuffle.unit_backward(*given)
    flat = [t for t in (leaves[0], *leaves[1], *leaves[2]) if t is not None]
    gradients = torch.autograd.grad(expected, flat, slope.t().double())
    found = [t for t in (d_x, *of_gate, *of_up) if t is not None]
    for one, other in zip(found, gradients, strict=True):
        agree(one, other)


@pytest.mark.parametrize("number", range(6))
def test_what_is_not_wanted_is_not_computed(number):
    size = (3, 21, 5, 7, 11)
    x, gate, up = drawn(21, 15), factors(size, True, 2), factors(size, True, 5)
    _, *kept = block_shuffle.unit(x, gate, up, "silu", GLUOptions())
    rest = (drawn(33, 21, seed=9), x, tuple(kept), gate, up, "silu", GLUOptions())
    everything = block_shuffle.unit_backward(*rest, memory_like(x, True), (True,) * 6)
    wants = tuple(place == number for place in range(6))
    found = block_shuffle.unit_backward(*rest, None, wants)
    for one, other, wanted in zip(sum(found, ()), sum(everything, ()), wants, strict=True):
        assert one is None if not wanted else torch.equal(one, other)


def test_threads_change_no_bit(threads):
    size = (4, 96, 64, 48, 200)
    x, gate, up = drawn(96, 256), factors(size, True, 2), factors(size, True, 5)

    def run(count):
        torch.set_num_threads(count)
        made, *kept = block_shuffle.unit(x, gate, up, "gelu", GLUOptions())
        d_x = memory_like(x, True)
        slope = made[:, :96].t().contiguous().t()
        wants = (True,) * 6
        found = block_shuffle.unit_backward(
            slope, x, tuple(kept), gate, up, "gelu", GLUOptions(), d_x, wants
        )
        return slope, d_x, *found[0], *found[1]

    for one, other in zip(run(1), run(3), strict=True):
        assert torch.equal(one, other)


def test_what_it_does_not_pay_for():
    x = drawn(4, 4)
    assert not block_shuffle.pays(x.double())
    assert not block_shuffle.pays(x, x.bfloat16())
    assert not block_shuffle.pays(x.to("meta"))


def test_the_choice_is_told(monkeypatch):
    x = drawn(4, 4)
    monkeypatch.setenv("MOEZOO_PRODUCTS", "own")
    assert block_shuffle.pays(x, None)
    monkeypatch.setenv("MOEZOO_PRODUCTS", "torch")
    assert not block_shuffle.pays(x, None)
