"""Balanced assignment, exactly: n neurons to k clusters that take the same number each.

The square assignment problem that repeats every cluster n / k times (CMoE, arXiv:2502.04416,
section 4.2, by Jonker and Volgenant's algorithm: O(n³), and a matrix of n² numbers) is a
transportation problem with only k sinks. On its residual graph, with a node per cluster and an edge
i → j for the cheapest move of one neuron from i to j, an assignment is optimal if and only if no
cycle is negative. So we start near the optimum, by prices on crowded clusters, and cancel negative
cycles until there are none. Memory is O(n k).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moezoo.errors import InputError

_Cost = NDArray[np.float64]
_Index = NDArray[np.int64]

# Gains smaller than this, over the largest difference of costs, may be rounding: going after them
# might never end.
_TOLERANCE = 1e-13
# Of the start, relative to the mean cost; they decide how fast the optimum is found, not which.
_TEMPERATURES = np.array([0.3, 0.1, 0.03, 0.01])
_ROUNDS = 10


def balanced_assignment(cost: Tensor) -> Tensor:
    """Assign n items to k clusters of size n / k at the least total cost.

    Deterministic: the same costs give the same assignment, also among equally good ones.

    Args:
        cost: ``(n, k)``, finite, of any floating or integer dtype.

    Returns:
        ``(n,)`` int64 clusters, on the CPU.

    Raises:
        InputError: k does not divide n, or a cost is not finite.
    """
    n, k = cost.shape
    if k < 1 or n % k:
        raise InputError(
            f"cost: {n} items cannot be split evenly among {k} clusters; give a divisor of {n}"
        )
    table = np.ascontiguousarray(cost.detach().to("cpu", torch.float64).numpy())
    if not np.isfinite(table).all():
        raise InputError("cost: holds NaN or infinity; check the weights and the inputs")
    if k == 1 or n == 0:
        return torch.zeros(n, dtype=torch.int64)
    table = table - table.min(axis=1, keepdims=True, initial=np.inf)
    cluster = _greedy(table + _prices(table), n // k)
    _cancel(table, cluster)
    return torch.from_numpy(cluster)


def _prices(cost: _Cost) -> _Cost:
    """Return the price of every cluster at which choices are nearly even: Sinkhorn, annealed."""
    n, k = cost.shape
    prices = np.zeros(k)
    for temperature in float(cost.mean()) * _TEMPERATURES:
        if temperature <= 0:
            break
        for _ in range(_ROUNDS):
            score = (cost + prices) / -temperature
            score -= score.max(axis=1, keepdims=True)
            share = np.exp(score)
            load = (share / share.sum(axis=1, keepdims=True)).sum(axis=0) * (k / n)
            prices += temperature * np.log(np.maximum(load, 1e-9))
    return prices


def _greedy(cost: _Cost, size: int) -> _Index:
    """Serve first the item that would lose most by its second choice."""
    n, k = cost.shape
    best_two = np.partition(cost, 1, axis=1)
    order = np.argsort(best_two[:, 0] - best_two[:, 1], kind="stable")
    preferences = np.argsort(cost, axis=1, kind="stable")
    room = [size] * k
    cluster = np.empty(n, dtype=np.int64)
    for item in order.tolist():
        for choice in preferences[item].tolist():
            if room[choice]:
                room[choice] -= 1
                cluster[item] = choice
                break
    return cluster


def _cancel(cost: _Cost, cluster: _Index) -> None:
    """Move neurons along negative cycles, in place, until there are none."""
    k = cost.shape[1]
    tolerance = _TOLERANCE * max(float(cost.max()), np.finfo(np.float64).tiny)
    members = [np.flatnonzero(cluster == i) for i in range(k)]
    moves = np.full((k, k), np.inf)
    movers = np.zeros((k, k), dtype=np.int64)
    for i in range(k):
        _cheapest_moves(cost, members[i], i, moves, movers)
    while (cycle := _negative_cycle(moves, tolerance)) is not None:
        steps = list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        items = [movers[i, j] for i, j in steps]
        for item, (_, j) in zip(items, steps, strict=True):
            cluster[item] = j
        for leaves, enters, i in zip(items, [items[-1], *items[:-1]], cycle, strict=True):
            members[i][np.searchsorted(members[i], leaves)] = enters
            members[i].sort()
            _cheapest_moves(cost, members[i], i, moves, movers)


def _cheapest_moves(cost: _Cost, items: _Index, i: int, moves: _Cost, movers: _Index) -> None:
    """Find the item of cluster i that would move to each other cluster at the least loss."""
    held = cost[items]
    loss = held - held[:, i : i + 1]
    loss[:, i] = np.inf
    who = loss.argmin(axis=0)
    moves[i] = loss[who, np.arange(len(who))]
    movers[i] = items[who]


def _negative_cycle(moves: _Cost, tolerance: float) -> list[int] | None:
    """Find a simple cycle whose weights sum to less than ``-tolerance`` (Bellman and Ford)."""
    k = len(moves)
    swap = moves + moves.T
    best = int(swap.argmin())
    if swap.flat[best] < -tolerance:  # the commonest, and cheaper to see
        return [best // k, best % k]
    distance = np.zeros(k)
    parent = np.full(k, -1)
    columns = np.arange(k)
    for _ in range(k):
        through = distance[:, None] + moves
        source = through.argmin(axis=0)
        shorter = through[source, columns]
        improved = shorter < distance - tolerance
        if not improved.any():
            return None
        distance = np.where(improved, shorter, distance)
        parent = np.where(improved, source, parent)
        cycle = _parent_cycle(parent)
        if cycle is not None:
            weight = sum(moves[i, j] for i, j in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
            # By theory less than -tolerance, but for rounding.
            return cycle if weight < -tolerance / 2 else None
    return None


def _parent_cycle(parent: _Index) -> list[int] | None:
    """Find a cycle among parents; its nodes in the direction of the edges."""
    links = parent.tolist()
    done: set[int] = set()
    for first in range(len(links)):
        path: list[int] = []
        node = first
        while node >= 0 and node not in done and node not in path:
            path.append(node)
            node = links[node]
        if node >= 0 and node in path:
            return path[path.index(node) :][::-1]
        done.update(path)
    return None
