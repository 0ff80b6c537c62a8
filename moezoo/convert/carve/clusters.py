"""Balanced k-means: clusters of equal size, each step's assignment exact.

Shapes: n points, d dimensions, k clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.activity import mark_distances, rates
from moezoo.convert.carve.transport import balanced_assignment


def balanced_kmeans(points_nd: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Cluster points into equal parts, near the least sum of squared distances to the means.

    Both steps, assigning by transport and averaging, never raise the sum. The start is drawn by
    k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        points_nd: n is a multiple of the number of clusters.
        clusters: k.
        iterations: at most so many; fewer where nothing changes any more.
        seed: of the start.

    Returns:
        ``(n,)`` int64 labels, on the CPU.
    """
    means_kd = points_nd[_plus_plus(points_nd, clusters, seed)]
    labels: Tensor | None = None
    for _ in range(iterations):
        # ||p - m||² less ||p||² and ||m||², neither of which a balanced assignment can change.
        cost_nk = -2.0 * points_nd @ means_kd.t()
        found = balanced_assignment(cost_nk)
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        members_nk = F.one_hot(labels, clusters).to(points_nd)
        means_kd = members_nk.t() @ points_nd / (len(points_nd) // clusters)
    assert labels is not None
    return labels


def _plus_plus(points_nd: Tensor, clusters: int, seed: int) -> Tensor:
    """Draw the first means: each with a probability that grows with its distance to the others."""
    generator = torch.Generator().manual_seed(seed)
    square_n = points_nd.double().square().sum(dim=1).cpu()
    chosen: list[int] = []
    nearest_n = square_n
    for _ in range(clusters):
        weight_n = nearest_n * (square_n > 0)  # a dead neuron is no start
        if not (weight_n > 0).any():  # fewer different points than clusters
            weight_n = torch.ones_like(nearest_n)
        chosen.append(int(torch.multinomial(weight_n, 1, generator=generator)))
        last = points_nd[chosen[-1]]
        distance_n = (points_nd - last).double().square().sum(dim=1).cpu()
        nearest_n = distance_n if len(chosen) == 1 else torch.minimum(nearest_n, distance_n)
    return torch.tensor(chosen, device=points_nd.device)


def cluster_marks(
    marks_TK: Tensor, width: int, candidates: Tensor, clusters: int, iterations: int, metric: str
) -> Tensor:
    """Cluster neurons by the tokens that mark them, as CMoE does (arXiv:2502.04416, section 4.2).

    The first means are the marks of the most active neurons.

    Args:
        marks_TK: the neurons each token marks.
        width: number of neurons F.
        candidates: ``(n,)`` the neurons to cluster, ascending.
        clusters: k, which divides n.
        iterations: at most so many; the authors' code has 1.
        metric: ``l1`` or ``l2``.

    Returns:
        ``(n,)`` int64 labels, on the CPU.
    """
    rate_n = rates(marks_TK, width)[candidates]
    seeds = candidates[rate_n.argsort(descending=True, stable=True)[:clusters]]
    member_F = torch.full((width,), -1, device=marks_TK.device)
    member_F[seeds] = torch.arange(clusters, device=marks_TK.device)
    labels: Tensor | None = None
    for _ in range(iterations):
        found = balanced_assignment(
            mark_distances(marks_TK, member_F, clusters, metric)[candidates]
        )
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        member_F.fill_(-1)
        member_F[candidates] = labels.to(member_F.device)
    assert labels is not None
    return labels
