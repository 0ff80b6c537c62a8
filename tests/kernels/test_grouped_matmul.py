"""The wrapper gives right products where torch's grouped_mm refuses, and still needs wrapping."""

import pytest
import torch
import torch.nn.functional as F

from moezoo_kernels.grouped_matmul import grouped_matmul, grouped_outer

ENDS = torch.tensor([3, 3, 7])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _tolerance(dtype):
    return 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 15, 1])
@pytest.mark.parametrize("height", [24, 23, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_products(poison_empty, dtype, width, height, transposed):
    rows = torch.randn(10, width).to(dtype)
    shape = (3, height, width) if transposed else (3, width, height)
    matrices = torch.randn(shape).to(dtype)
    matrices = matrices.transpose(1, 2) if transposed else matrices
    product = grouped_matmul(rows, matrices, ENDS)
    assert product.shape == (10, height)
    assert product.is_contiguous()
    expected = torch.cat([rows[:3] @ matrices[0], rows[3:7] @ matrices[2]])
    torch.testing.assert_close(product[:7], expected, rtol=0, atol=_tolerance(dtype) * width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 15, 1])
@pytest.mark.parametrize("height", [24, 23, 1])
def test_outer_products(poison_empty, dtype, width, height):
    left, right = torch.randn(10, height).to(dtype), torch.randn(10, width).to(dtype)
    left[7:] = torch.nan
    product = grouped_outer(left, right, ENDS)
    assert product.shape == (3, height, width)
    assert product.is_contiguous()
    assert not product[1].any()
    for group, rows in ((0, slice(0, 3)), (2, slice(3, 7))):
        expected = left[rows].t() @ right[rows]
        torch.testing.assert_close(product[group], expected, rtol=0, atol=40 * _tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    ends = torch.zeros(3, dtype=torch.int64)
    assert (
        grouped_matmul(torch.ones(0, 16).to(dtype), torch.ones(3, 16, 8).to(dtype), ends).numel()
        == 0
    )
    product = grouped_outer(torch.ones(0, 16).to(dtype), torch.ones(0, 8).to(dtype), ends)
    assert product.shape == (3, 16, 8)
    assert not product.any()


def test_aligned_operands_take_the_fused_product(monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "torch")
    calls = []
    fused = F.grouped_mm

    def spy(*args, **options):
        calls.append(args[0].shape)
        return fused(*args, **options)

    monkeypatch.setattr(F, "grouped_mm", spy)
    matrices = torch.randn(3, 24, 16).transpose(1, 2)
    grouped_matmul(torch.randn(10, 16), matrices, ENDS)
    grouped_outer(torch.randn(10, 24), torch.randn(10, 16), ENDS)
    assert calls == [(10, 16)]  # on a CPU, outer products are a loop with cheaper memory
    grouped_matmul(torch.randn(10, 15), torch.randn(3, 15, 8), ENDS)
    grouped_matmul(torch.randn(10, 16).double(), matrices.double(), ENDS)
    assert len(calls) == 1


def test_rows_nobody_owns_are_uninitialised_in_grouped_mm(poison_empty):
    """The reason why nothing here may read them: if torch ever fills them, masking can go."""
    matrices = torch.randn(3, 16, 24)
    product = F.grouped_mm(torch.randn(10, 16), matrices, offs=ENDS.int())
    assert product[:7].isfinite().all()
    assert product[7:].isnan().all()
