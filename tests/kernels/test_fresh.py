"""Stacked results in fresh memory: zeros where nothing was written, whatever was there before."""

import pytest
import torch

from moezoo_kernels import fresh, native


@pytest.fixture(params=["library", "plain"])
def with_and_without_the_library(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv("MOEZOO_NATIVE", "off")
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("with_and_without_the_library", "poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
# A part smaller than a page, one of no whole pages that is large, and one of many pages.
@pytest.mark.parametrize("shape", [(7, 3), (5, 601, 1021), (3, 1024, 1024)])
def test_groups_without_rows_are_zeros_and_no_others_are_touched(dtype, shape):
    rows = torch.tensor([0, 2, 0, 0, 1, 0, 3])[: shape[0]]
    stacked = fresh.stacked(shape, dtype, rows.cumsum(0))
    assert stacked.shape == shape
    assert stacked.dtype == dtype
    for part, count in zip(stacked, rows, strict=True):
        assert part.isnan().all() if count else not part.any()


@pytest.mark.usefixtures("native_library")
def test_every_library_zeroes_memory_that_was_written_before():
    for _ in range(3):
        torch.ones(5, 601, 1021)  # freed: the next buffer of this size may well lie here
        stacked = fresh.stacked((5, 601, 1021), torch.float32, torch.zeros(5, dtype=torch.int64))
        assert not stacked.any()
        for part in stacked:
            fresh.about_to_write(part).fill_(1.0)
        assert stacked.eq(1.0).all()
        assert fresh.about_to_write(stacked[1:4]).eq(1.0).all()


def test_no_groups_and_no_numbers():
    ends = torch.zeros(0, dtype=torch.int64)
    assert fresh.stacked((0, 4), torch.float32, ends).shape == (0, 4)
    assert fresh.stacked((2, 0), torch.float32, ends.new_zeros(2)).shape == (2, 0)


@pytest.mark.parametrize("width", [3, 90, 401, 1021])
@pytest.mark.parametrize("empty", [(), (0, 3, 4, 9), range(1, 10)])
def test_parts_are_asked_for_before_they_are_given_and_empty_ones_never(monkeypatch, width, empty):
    """Whatever their size: all in less than is worth it, some to a stretch, one larger than it."""
    asked = []
    monkeypatch.setattr(
        fresh, "about_to_write", lambda part: asked.append((part.data_ptr(), part.nbytes))
    )
    wanted = [e for e in range(10) if e not in empty]
    ends = torch.tensor([e + 1 if e in wanted else 0 for e in range(10)]).cumsum(0)
    stacked = fresh.stacked((10, 301, width), torch.float32, ends)
    parts = fresh.Parts(stacked, ends)
    for e in wanted:
        part = parts[e]
        assert (part.data_ptr(), part.shape) == (stacked[e].data_ptr(), stacked[e].shape)
        if worth := stacked.nbytes >= fresh._LARGE and fresh._has_library():
            begin, size = asked[-1]
            assert begin <= part.data_ptr() <= begin + size - part.nbytes
        part.fill_(e + 1.0)
    assert sum(size for _, size in asked) == worth * len(wanted) * stacked[0].nbytes
    expected = torch.tensor([float(e + 1) if e in wanted else 0.0 for e in range(10)])
    assert stacked.eq(expected[:, None, None]).all()
