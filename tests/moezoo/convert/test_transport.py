"""The balanced assignment is optimal: against enumeration, a proof by prices, and scipy."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo import InputError
from moezoo.convert.carve.transport import balanced_assignment

KINDS = ("real", "ties", "flat", "dead", "crowded")


def costs(n: int, k: int, kind: str, seed: int) -> torch.Tensor:
    """Draw costs: with ties, all nearly equal, with rows of equal numbers, or all for one."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((n, k))
    if kind == "ties":
        drawn = rng.integers(0, 3, (n, k)).astype(float)
    elif kind == "flat":
        drawn = 5.0 + 1e-6 * drawn
    elif kind == "dead":
        drawn = np.where(rng.random((n, 1)) < 0.5, 1.0, 100 * drawn)
    elif kind == "crowded":
        drawn[:, 0] -= 0.7
    return torch.from_numpy(drawn)


def total(cost: torch.Tensor, labels: torch.Tensor) -> float:
    return cost.gather(1, labels.unsqueeze(1)).sum().item()


def prices(cost: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
    """Find prices at which nobody wants to move, which proves that no other assignment is better.

    They are shortest paths among clusters, where an edge is the cheapest move; None if there is a
    negative cycle.
    """
    k = cost.shape[1]
    loss = cost - cost.gather(1, labels.unsqueeze(1))
    edge = torch.stack([loss[labels == i].amin(dim=0) for i in range(k)])
    distance = torch.zeros(k, dtype=cost.dtype)
    for _ in range(k):
        distance = torch.minimum(distance, (distance.unsqueeze(1) + edge).amin(dim=0))
    after = (distance.unsqueeze(1) + edge).amin(dim=0)
    return distance if (after >= distance - 1e-9 * cost.abs().max()).all() else None


def assert_balanced(labels: torch.Tensor, k: int) -> None:
    assert labels.dtype == torch.int64
    assert torch.equal(torch.bincount(labels, minlength=k), torch.full((k,), len(labels) // k))


@given(
    size=st.sampled_from([(2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (4, 4), (5, 5), (6, 1)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_is_as_good_as_any_enumerated_assignment(size, kind, seed):
    n, k = size
    cost = costs(n, k, kind, seed)
    labels = balanced_assignment(cost)
    assert_balanced(labels, k)
    slots = [j for j in range(k) for _ in range(n // k)]
    best = min(
        sum(cost[i, j].item() for i, j in enumerate(order))
        for order in set(itertools.permutations(slots))
    )
    assert total(cost, labels) == pytest.approx(best, abs=1e-9 * max(1.0, abs(best)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(120, 5), (960, 16), (512, 64)])
def test_prices_prove_it_optimal(n, k, kind):
    for seed in range(3):
        cost = costs(n, k, kind, seed)
        labels = balanced_assignment(cost)
        assert_balanced(labels, k)
        assert prices(cost, labels) is not None
        worse = labels.clone()
        worse[[0, int((labels != labels[0]).nonzero()[0])]] = worse[
            [int((labels != labels[0]).nonzero()[0]), 0]
        ]
        if total(cost, worse) > total(cost, labels) + 1e-3:
            assert prices(cost, worse) is None  # so the proof can fail


@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipys_square_assignment(kind):
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(5):
        n, k = (90, 6) if seed % 2 else (72, 9)
        cost = costs(n, k, kind, seed)
        rows, columns = optimize.linear_sum_assignment(cost.repeat_interleave(n // k, dim=1))
        best = cost[rows, columns // (n // k)].sum().item()
        assert total(cost, balanced_assignment(cost)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("kind", ["real", "crowded", "dead"])
def test_ten_thousand_neurons_need_little_memory(kind):
    cost = costs(10_000, 16, kind, 0)
    tracemalloc.start()
    labels = balanced_assignment(cost)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prices(cost, labels) is not None
    assert peak < 50e6  # the square matrix would be 800 MB


def test_is_deterministic_and_takes_integers_and_low_precision():
    cost = costs(96, 6, "ties", 0)
    labels = balanced_assignment(cost)
    assert torch.equal(labels, balanced_assignment(cost))
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(labels, balanced_assignment(cost.to(dtype)))
    assert balanced_assignment(torch.zeros(0, 3)).shape == (0,)


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"cost: 7 items cannot be split evenly among 2"):
        balanced_assignment(torch.zeros(7, 2))
    with pytest.raises(InputError, match=r"cost: holds NaN or infinity"):
        balanced_assignment(torch.full((4, 2), torch.nan))
