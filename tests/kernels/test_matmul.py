"""Our fp32 products of matrices against fp64, for any strides, sizes and threads."""

import itertools

import pytest
import torch

from moezoo_kernels.matmul import matmul

pytestmark = pytest.mark.usefixtures("native_library")

SIZES = [1, 2, 13, 33, 257]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
    """Return numbers in a layout; those around a view are NaN, so that reading one shows."""
    if layout == "rows":
        return torch.randn(rows, columns)
    if layout == "columns":
        return torch.randn(columns, rows).t()
    if layout == "part":
        whole = torch.full((rows + 3, columns + 5), float("nan"))
        whole[1 : rows + 1, 2 : columns + 2] = torch.randn(rows, columns)
        return whole[1 : rows + 1, 2 : columns + 2]
    if layout == "part of columns":
        return _matrix(columns, rows, "part").t()
    if layout == "every third":
        whole = torch.full((2 * rows, 3 * columns), float("nan"))
        whole[::2, ::3] = torch.randn(rows, columns)
        return whole[::2, ::3]
    return torch.randn(columns).expand(rows, columns)  # one row, again and again


def _close(actual, a, b, expected):
    """Compare relative to the sum of absolute products, of which rounding is a share."""
    bound = a.double().abs() @ b.double().abs() + 1e-30
    assert ((actual.double() - expected).abs() / bound).max() <= 1e-6


@pytest.mark.parametrize(("rows", "columns"), list(itertools.product(SIZES, SIZES)))
@pytest.mark.parametrize("depth", [1, 2, 13, 321, 700])
def test_sizes(poison_empty, rows, columns, depth):
    a, b = _matrix(rows, depth, "rows"), _matrix(depth, columns, "rows")
    _close(matmul(a, b), a, b, a.double() @ b.double())


LAYOUTS = ["rows", "columns", "part", "part of columns", "every third", "one row"]


@pytest.mark.parametrize(("left", "right"), list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize(("rows", "depth", "columns"), [(5, 19, 37), (45, 333, 70), (400, 20, 3)])
def test_layouts(poison_empty, threads, left, right, rows, depth, columns):
    a, b = _matrix(rows, depth, left), _matrix(depth, columns, right)
    _close(matmul(a, b), a, b, a.double() @ b.double())


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 96])
def test_nothing_beside_the_result_is_written(columns):
    a, b = torch.randn(29, 40), torch.randn(40, columns)
    room = torch.full((33, columns + 7), 3.0)
    out = room[2:31, 4 : columns + 4]
    assert matmul(a, b, out=out) is out
    _close(out, a, b, a.double() @ b.double())
    out.fill_(3.0)
    assert (room == 3.0).all()


@pytest.mark.parametrize("depth", [0, 7, 650])
def test_bias_and_accumulation(poison_empty, threads, depth):
    a, b, bias = torch.randn(31, depth), torch.randn(depth, 50), torch.randn(50)
    product = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs() + 10
    assert ((matmul(a, b, bias=bias).double() - product - bias).abs() <= 1e-6 * scale).all()
    before = torch.randn(31, 50)
    out = matmul(a, b, out=before.clone(), accumulate=True)
    assert ((out.double() - product - before).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("batch", [0, 1, 3, 40])
def test_batches_with_strided_results(poison_empty, threads, batch):
    """As the blocks of a block-diagonal matrix are written: side by side in each row."""
    a = torch.randn(33, batch, 20).transpose(0, 1)
    b = torch.randn(batch, 17, 20).transpose(1, 2)
    out = torch.empty(33, batch, 17).transpose(0, 1)
    matmul(a, b, out=out)
    expected = torch.einsum("bmk,bkn->bmn", a.double(), b.double())
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 5), (4, 0, 5), (4, 5, 0)])
def test_empty(poison_empty, shape):
    rows, depth, columns = shape
    out = matmul(torch.randn(rows, depth), torch.randn(depth, columns))
    assert torch.equal(out, torch.zeros(rows, columns))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(700, 900, 300), (64, 2000, 1000)])
def test_bits_depend_on_neither_threads_nor_other_rows(rows, depth, columns):
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(matmul(a, b))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(matmul(a[5:30], b[:, 3:90]), found[0][5:30, 3:90])


def test_infinities_stay_where_they_are():
    """Zeros beside a panel's numbers must not turn another row's infinity into NaN."""
    a, b = torch.ones(3, 5), torch.ones(5, 19)
    a[1, 2] = float("inf")
    b[0, 7] = float("-inf")
    assert torch.equal(matmul(a, b).isfinite(), (a @ b).isfinite())
    assert torch.equal(matmul(a, b).isnan(), (a @ b).isnan())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"a": torch.ones(3)}, "matmul: give"),
        ({"b": torch.ones(4, 2)}, "matmul: a has 5 columns, b 4 rows"),
        ({"a": torch.ones(3, 5).double()}, "matmul: a has fp32 only"),
        ({"bias": torch.ones(3)}, "bias: give"),
        ({"accumulate": True}, "accumulate: there is nothing"),
        ({"out": torch.ones(2, 3).t()}, "out: is"),
        ({"out": torch.ones(2, 2)}, "out: is"),
    ],
)
def test_bad_operands_are_named(changed, words):
    operands = {"a": torch.ones(3, 5), "b": torch.ones(5, 2)} | changed
    with pytest.raises(ValueError, match=words):
        matmul(**operands)
