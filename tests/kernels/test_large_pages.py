"""Copies in large pages hold the same numbers, wherever the system has such pages."""

import gc

import pytest
import torch

from moezoo_kernels import large_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (1031, 1025), (0, 4)])
@pytest.mark.parametrize("advice", ["as it is", None, 10_000])  # none, or one that is refused
def test_a_copy_has_the_same_numbers(monkeypatch, shape, dtype, advice):
    if advice != "as it is":
        monkeypatch.setattr(large_pages, "_ADVICE", advice)
    values = torch.randn(shape).mul(100).to(dtype).requires_grad_(dtype.is_floating_point)
    copy = large_pages.copied(values.t())
    wanted = values.detach().t().clone()
    with torch.no_grad():
        values.zero_()
    gc.collect()  # the memory lives as long as the tensor
    assert copy.is_contiguous()
    assert not copy.requires_grad
    assert torch.equal(copy, wanted)
