"""Which entries masks keep, against sorting in Python; and an unbiased draw of two of four."""

import itertools

import pytest
import torch

from moezoo.matrices import rules
from moezoo.matrices.sampling import inclusion, two_of_four
from moezoo.matrices.schedules import cosine, cubic, leak, stages


def scores(*shape, ties=True):
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (4 * drawn).round() if ties else drawn


def best(values, count):
    """Places of the best, of equals the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 16), (16, 32), (5, 6)])
def test_n_of_every_m_are_kept_and_of_equals_the_first(n, m, ties):
    values = scores(7, 2 * m, ties=ties)
    mask = rules.best_of_group(values, n, m)
    assert mask.dtype == torch.bool
    for row, kept in zip(values.reshape(-1, m).tolist(), mask.reshape(-1, m).tolist(), strict=True):
        assert [i for i in range(m) if kept[i]] == sorted(best(row, n))


@pytest.mark.parametrize("count", [0, 1, 9, 20])
def test_so_many_of_a_row_are_kept_and_of_equals_the_first(count):
    values = scores(7, 20)
    mask = rules.best_of_row(values, count)
    for row, kept in zip(values.tolist(), mask.tolist(), strict=True):
        assert [i for i in range(20) if kept[i]] == sorted(best(row, count))


def test_a_transposable_mask_is_the_best_of_all_ninety():
    found = {
        bits
        for bits in itertools.product((0, 1), repeat=16)
        if all(sum(bits[4 * i : 4 * i + 4]) == 2 == sum(bits[i::4]) for i in range(4))
    }
    patterns = rules.transposable_patterns()
    assert {tuple(p.flatten().int().tolist()) for p in patterns} == found
    assert len(found) == len(patterns) == 90
    values = scores(8, 12, ties=False)
    mask = rules.transposable(values)
    blocks = [
        (values[i : i + 4, j : j + 4].flatten(), mask[i : i + 4, j : j + 4].flatten())
        for i in range(0, 8, 4)
        for j in range(0, 12, 4)
    ]
    for block, kept in blocks:
        assert tuple(kept.int().tolist()) in found
        most = max(
            sum(v for v, bit in zip(block.tolist(), bits, strict=True) if bit) for bits in found
        )
        assert block[kept].sum().item() == pytest.approx(most)


def test_a_transposable_mask_keeps_less_than_one_of_rows():
    torch.manual_seed(0)
    size = torch.randn(512, 512).abs()
    both, rows = rules.transposable(size), rules.best_of_group(size, 2, 4)
    assert both.reshape(-1, 4).sum(1).unique().tolist() == [2]
    assert both.t().reshape(-1, 4).sum(1).unique().tolist() == [2]
    assert (size[both].sum() / size.sum()).item() == pytest.approx(0.704, abs=0.005)
    assert (size[rows].sum() / size.sum()).item() == pytest.approx(0.747, abs=0.005)


def test_norms_of_blocks():
    values = scores(6, 9, ties=False) - 0.5
    norms = rules.block_norms(values, 3)
    assert norms.shape == (2, 3)
    assert norms[1, 2].item() == pytest.approx(values[3:, 6:].norm().item())
    assert torch.equal(rules.block_norms(values, 1), values.abs())
    mask = rules.in_blocks(norms > norms.median(), 3)
    assert torch.equal(mask[::3, ::3], norms > norms.median())
    assert mask[3:, 6:].unique().numel() == 1


def test_inclusion_adds_up_to_two_and_caps_at_one():
    values = torch.tensor(
        [[1.0, 1, 1, 1], [9, 1, 1, 1], [3, 2, 2, 1], [0, 0, 5, 5], [0, -7, 0, 0], [0, 0, 0, 0]]
    ).unsqueeze(-1)
    expected = torch.tensor(
        [
            [0.5, 0.5, 0.5, 0.5],
            [1, 1 / 3, 1 / 3, 1 / 3],
            [0.75, 0.5, 0.5, 0.25],
            [0, 0, 1, 1],
            [0, 1, 0, 0],
            [0, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(inclusion(values).squeeze(-1), expected)


def test_two_of_four_are_kept_without_bias():
    generator = torch.Generator().manual_seed(0)
    four = torch.tensor([3.0, -0.4, 1.1, 0.2, 2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    draws = 20_000
    values = four.reshape(2, 4, 1).expand(2, 4, draws).reshape(8, draws)
    uniform = torch.rand(2, draws, generator=generator, dtype=torch.float64)
    found = two_of_four(values, uniform)
    counts = (found.reshape(2, 4, draws) != 0).sum(1)
    assert counts.unique().tolist() == [2]
    error = found.mean(1) - four
    assert (error.abs() <= 3.5 * found.std(1) / draws**0.5 + 1e-12).all()
    share = inclusion(four.reshape(2, 4, 1)).flatten()
    variance = four.square() * (1 / share - 1)
    torch.testing.assert_close(found.var(1), variance, rtol=0.06, atol=1e-12)
    rest = torch.randn(3, draws, dtype=torch.float64)
    assert torch.equal(two_of_four(torch.cat([values, rest]), uniform)[8:], rest)


def test_schedules():
    assert [cosine(p, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1, 0.5, 0, 0])
    steps = 100_000
    density = sum(1 - cubic((s + 0.5) / steps, 0.25, 0.75, 0.8) for s in range(steps)) / steps
    assert density == pytest.approx(1 - 0.625 * 0.8, abs=1e-6)
    assert [cubic(p, 0.25, 0.75, 0.8) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0, 0.7, 0.8, 0.8]
    )
    assert cubic(0.0, 0.0, 0.0, 0.8) == 0.8
    at = torch.tensor([0.0, 0.1, 0.35, 0.6, 1.0])
    linear, exponential = (leak(at, 0.1, 0.6, kind).tolist() for kind in ("linear", "exponential"))
    assert linear == pytest.approx([1, 1, 0.5, 0, 0])
    assert exponential == pytest.approx([1, 1, 0.0820850, 0, 0])


@pytest.mark.parametrize(
    ("n", "m", "kind", "expected"),
    [
        (2, 4, "step", [(3, 4), (2, 4)]),
        (1, 16, "step", [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]),
        (3, 4, "step", [(3, 4)]),
        (1, 2, "step", [(1, 2)]),
        (1, 4, "step", [(3, 4), (2, 4), (1, 4)]),
        (2, 4, "fine", [(16, 32), (8, 16), (4, 8), (2, 4)]),
    ],
)
def test_stages_that_lead_to_n_of_m(n, m, kind, expected):
    assert stages(n, m, kind) == expected
