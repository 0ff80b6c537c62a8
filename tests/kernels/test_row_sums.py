"""Sums by table row: the sort is stable and complete, the sums are those of a dense product."""

import pytest
import torch

from moezoo_kernels.row_sums import sort_by_row, sum_rows, table_gradient


def _indices(kind: str, count: int, rows: int) -> torch.Tensor:
    if kind == "one row":
        return torch.full((count,), rows - 1)
    if kind == "none":
        return torch.full((count,), -1)
    return torch.randint(-1, rows, (count,))


@pytest.fixture(params=["C++", "torch"])
def sorting(request, monkeypatch):
    monkeypatch.setenv("MOEZOO_NATIVE", "off" if request.param == "torch" else "")
    from moezoo_kernels import native

    native.load.cache_clear()
    yield request.param
    native.load.cache_clear()


@pytest.mark.parametrize("kind", ["random", "one row", "none"])
@pytest.mark.parametrize(("count", "rows"), [(0, 3), (1, 1), (77, 5), (9000, 3000), (20000, 70001)])
def test_the_sort_is_stable_and_by_row(sorting, poison_empty, kind, count, rows):
    indices = _indices(kind, count, rows)
    assignments = sort_by_row(indices.reshape(-1, 1), rows, only_used=False)
    keys = torch.where(indices < 0, rows, indices)
    assert torch.equal(assignments.order, keys.sort(stable=True).indices)
    counts = torch.bincount(keys, minlength=rows + 1)
    assert torch.equal(torch.diff(assignments.starts), counts[:-1])
    assert assignments.starts[-1] == count - counts[-1]


@pytest.mark.parametrize("rows", [60, 200, 3000, 1 << 34])
@pytest.mark.parametrize("kind", ["random", "one row", "none"])
def test_used_rows_are_those_that_are_named(sorting, poison_empty, kind, rows):
    indices = _indices(kind, 50, rows)
    assignments = sort_by_row(indices.reshape(10, 5), rows, only_used=True)
    keys = torch.where(indices < 0, rows, indices)
    assert torch.equal(assignments.order, keys.sort(stable=True).indices)
    used, counts = indices[indices >= 0].unique(return_counts=True)
    assert torch.equal(assignments.rows, used)
    assert torch.equal(torch.diff(assignments.starts), counts)
    assert assignments.starts[0] == 0
    assert assignments.starts[-1] == (indices >= 0).sum()


def test_the_sort_depends_on_no_number_of_threads(native_library):
    indices = torch.randint(-1, 4000, (3000, 7))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(sort_by_row(indices, 4000, only_used=False)[:2])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("width", [1, 19, 64])
@pytest.mark.parametrize(
    ("source_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_sums_in_cpp_equal_a_dense_product(
    native_library, poison_empty, width, source_dtype, dtype
):
    indices = torch.randint(-1, 13, (31, 6))
    source, coefficients = torch.randn(31, width).to(source_dtype), torch.randn(31, 6)
    order, starts, _ = sort_by_row(indices, 13, only_used=False)
    dense = torch.zeros(31, 14, dtype=torch.float64)
    dense.scatter_add_(1, torch.where(indices < 0, 13, indices), coefficients.double())
    expected = (dense.t() @ source.double())[:13]
    sums = sum_rows(source, coefficients, order, starts, dtype)
    assert sums.dtype == dtype
    digits = 2e-6 if dtype == torch.float32 else 2**-8
    assert (sums - expected).norm() <= digits * expected.norm()


@pytest.mark.parametrize("only_used", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_tables_gradient_is_that_of_autograd(sorting, poison_empty, only_used, tokens):
    table = torch.randn(30, 11, requires_grad=True)
    indices, weights = torch.randint(30, (tokens, 4)), torch.randn(tokens, 4)
    source = torch.randn(tokens, 11)
    (table[indices] * weights[..., None] * source[:, None]).sum().backward()
    assignments = sort_by_row(indices, 30, only_used)
    gradient = table_gradient(table, source, weights, assignments)
    assert gradient.is_sparse == only_used
    torch.testing.assert_close(gradient.to_dense(), table.grad)


def test_a_strided_column_of_indices_is_sorted_as_its_copy():
    column = torch.randint(-1, 5, (30, 2))[:, :1]
    assert not column.reshape(-1).is_contiguous()
    for only_used in (False, True):
        order, starts, rows = sort_by_row(column, 5, only_used)
        expected = sort_by_row(column.clone(), 5, only_used)
        assert torch.equal(order, expected.order)
        assert torch.equal(starts, expected.starts)
        assert rows is None or torch.equal(rows, expected.rows)
