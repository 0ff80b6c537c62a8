"""GRIFFIN: neurons chosen by a prompt, against the paper's formula token by token."""

import pytest
import torch

from moezoo import InputError
from moezoo.convert.select.prompt import kept_count, prompt_neurons, prompt_statistic


def hidden(tokens: int = 13, width: int = 31) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return z * torch.randn(width, generator=generator, dtype=torch.float64).exp()


def test_the_statistic_is_the_length_of_a_column_of_normalized_rows():
    z = hidden()
    expected = [
        sum((float(z[t, j]) / sum(float(v) ** 2 for v in z[t]) ** 0.5) ** 2 for t in range(13))
        ** 0.5
        for j in range(31)
    ]
    assert torch.allclose(
        prompt_statistic(z), torch.tensor(expected, dtype=torch.float64), rtol=1e-12
    )


def test_a_token_of_large_activations_counts_like_any_other():
    z = hidden()
    loud = z.clone()
    loud[0] *= 1e6
    assert torch.allclose(prompt_statistic(z), prompt_statistic(loud), rtol=1e-12)
    assert not torch.equal(loud.norm(dim=0).argsort(), prompt_statistic(loud).argsort())


def test_a_token_without_activations_adds_nothing():
    z = hidden()
    padded = torch.cat([z, torch.zeros(2, 31, dtype=z.dtype)])
    assert torch.equal(prompt_statistic(z), prompt_statistic(padded))
    assert bool(prompt_statistic(torch.zeros(3, 5)).eq(0).all())


def test_half_precision_is_summed_in_single():
    z = hidden(2000, 8).to(torch.bfloat16)
    found = prompt_statistic(z)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), prompt_statistic(z.double()), rtol=1e-5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 16), (1.0, 31), (0.001, 1)])
def test_the_largest_are_kept(share, count):
    z = hidden()
    kept = prompt_neurons(z, share)
    assert len(kept) == count == kept_count(31, share)
    assert torch.equal(kept, kept.sort().values)
    statistic = prompt_statistic(z)
    rest = torch.ones(31, dtype=torch.bool)
    rest[kept] = False
    assert statistic[kept].min() >= statistic[rest].max() if rest.any() else True


def test_equals_are_kept_in_their_order():
    assert prompt_neurons(torch.ones(4, 6), 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("share", "message"), [(0.0, "griffin: 0 keeps no"), (1.1, "griffin: 1.1")]
)
def test_bad_shares_are_refused(share, message):
    with pytest.raises(InputError, match=message):
        prompt_neurons(hidden(), share)
    with pytest.raises(InputError, match="prompt: it has no token"):
        prompt_neurons(hidden()[:0], 0.5)
