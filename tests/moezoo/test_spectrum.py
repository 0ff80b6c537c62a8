"""Spectra: planted eigenvalues, covariances in parts, singular values, the picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.analysis import spectrum
from moezoo.analysis.curves import draw_spectra
from moezoo.analysis.spectrum import Covariance, spectrum_of, squared_singular_values


def covariance_of(vectors, *sizes):
    covariance = Covariance(vectors.shape[1])
    for part in vectors.split(list(sizes)) if sizes else [vectors]:
        covariance.add(part)
    return covariance


def test_planted_eigenvalues_give_planted_ranks():
    even = spectrum_of(torch.full((8,), 3.0))
    assert (even.hard_rank, even.soft_rank) == pytest.approx((8, 8))
    assert even.concentration == pytest.approx(0, abs=1e-12)
    assert even.utilization == pytest.approx(1)
    one = spectrum_of(torch.tensor([0, 0, 5.0, 0]))
    assert (one.hard_rank, one.soft_rank, one.utilization) == pytest.approx((1, 1, 1 / 4))
    assert one.concentration == pytest.approx(3 / 4)
    # Shares 1/2, 1/4, 1/8, 1/8: sum of squares 11/32, entropy 7/4 log 2.
    mixed = spectrum_of(torch.tensor([1.0, 4, 1, 2]))
    assert mixed.hard_rank == pytest.approx(32 / 11)
    assert mixed.soft_rank == pytest.approx(2**1.75)
    assert mixed.concentration == pytest.approx(2 / 4 * (0.5 + 0.75 + 0.875 + 1 - 2.5))
    assert mixed.utilization == pytest.approx(2 / (4 * 11 / 32 + 4 / 2**1.75))
    assert spectrum_of(torch.zeros(3)).soft_rank == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda v: max(v) > 1e-3))
def test_the_soft_rank_is_never_less_than_the_hard_rank(values):
    found = spectrum_of(torch.tensor(values, dtype=torch.float64))
    assert 1 - 1e-9 <= found.hard_rank <= found.soft_rank * (1 + 1e-9)
    assert found.soft_rank <= len(values) * (1 + 1e-9)
    assert -1e-9 <= found.concentration <= 1 - 1 / len(values) + 1e-9


def test_noise_in_all_directions_uses_all_and_in_one_uses_one():
    generator = torch.Generator().manual_seed(0)
    width, tokens = 20, 4000
    noise = torch.randn(tokens, width, generator=generator)
    found = spectrum_of(covariance_of(noise).eigenvalues())
    # Sampling lowers the ranks by about D / n of themselves (Marchenko and Pastur).
    assert found.hard_rank == pytest.approx(width / (1 + width / tokens), rel=0.003)
    assert found.soft_rank == pytest.approx(width, rel=0.004)
    line = 1e3 + torch.randn(300, 1, generator=generator) * torch.randn(width, generator=generator)
    found = spectrum_of(covariance_of(line.double()).eigenvalues())
    assert (found.hard_rank, found.soft_rank) == pytest.approx((1, 1), rel=1e-6)


def test_parts_add_up_to_torchs_covariance_also_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(30, 7, generator=generator, dtype=torch.float64) + 1e6
    parts = covariance_of(vectors, 1, 0, 17, 12)
    assert parts.tokens == 30
    wanted = torch.cov(vectors.t(), correction=0)
    torch.testing.assert_close(parts.scatter / 30, wanted, rtol=1e-8, atol=1e-8)
    wanted = torch.linalg.eigvalsh(wanted).flip(0)
    torch.testing.assert_close(parts.eigenvalues(), wanted, rtol=1e-7, atol=1e-8)
    # Four tokens span three directions around their mean.
    few = covariance_of(vectors[:4]).eigenvalues()
    assert (few[:3] > 0).all()
    assert (few[3:] == 0).all()
    assert covariance_of(vectors[:0]).eigenvalues().sum() == 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_singular_values_are_torchs(shape, monkeypatch):
    monkeypatch.setattr(spectrum, "_CELLS", 11)  # two rows at once
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(squared_singular_values(matrix), wanted, rtol=1e-9, atol=1e-9)


def test_the_picture_has_every_layer():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = {"layer 0": (spectrum_of(shares), shares)}
    figure = draw_spectra(drawn, {"layer 0": "layer 0: planted"}, "test")
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([100 * 2**1.75 / 4, 100 * 32 / 11 / 4])
    assert figure.axes[1].lines[0].get_ydata().tolist() == [50, 75, 87.5, 100]
