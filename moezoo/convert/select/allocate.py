"""Budgets of all layers under one total, by how much each error costs the model.

The sum of errors, each times its layer's weight, is made least for a share of the work. A price per
unit of work, the Lagrange multiplier, makes that a choice of every layer for itself, and
bisection finds the price at which the choices come to the share.

Shapes: N shares of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo.convert.select.budget import COUNTS, Count
from moezoo.convert.select.curves import GRID, Curves
from moezoo.errors import InputError
from moezoo.selection import Shares

_STEPS = 80


def allocate(
    curves: Sequence[Curves], weights: Sequence[float], share: float, count: Count = "work"
) -> list[Shares]:
    """Return what each layer keeps, all layers weighing alike in the total.

    Args:
        curves: the error of each layer's choices.
        weights: cost of one unit of each layer's error to the model.
        share: of the work (or of what is read) that is left, in all.
        count: what the share is of.

    Raises:
        InputError: the share is below what the smallest choices need.
    """
    check_share(share, count)
    amounts = torch.tensor([COUNTS[count](each) for each in _choices()], dtype=torch.float64)
    errors = [
        _errors(curve) * max(weight, 0.0) for curve, weight in zip(curves, weights, strict=True)
    ]

    def chosen(price: float) -> list[int]:
        return [int((error + price * amounts).argmin()) for error in errors]

    def amount(places: list[int]) -> float:
        return float(amounts[places].mean())

    low, high = 0.0, max(float(error[error.isfinite()].max()) for error in errors) * 100 + 1e-12
    best = chosen(high)
    for _ in range(_STEPS):
        # Prices span many powers of ten.
        price = (max(low, high * 1e-12) * high) ** 0.5
        places = chosen(price)
        if amount(places) <= share:
            best, high = places, price
        else:
            low = price
    return [_shares(place) for place in best]


def check_share(share: float, count: Count = "work") -> None:
    """Refuse a share that no choice of the grid comes to.

    Raises:
        InputError: names the least share.
    """
    if not can_leave(share, count):
        least = _least(count)
        raise InputError(
            f"{count}: {share:g} is out of range for mix; give a number above {least:.2f} and "
            "below 1"
        )


def can_leave(share: float, count: Count = "work") -> bool:
    """Return whether some choice of the grid comes to a share."""
    return _least(count) < share < 1


def _least(count: Count) -> float:
    return COUNTS[count](Shares(*(min(GRID),) * 4))


def _choices() -> list[Shares]:
    return [_shares(place) for place in range(len(GRID) ** 4)]


def _shares(place: int) -> Shares:
    size = len(GRID)
    digits = [place // size**power % size for power in (3, 2, 1, 0)]
    return Shares(*(GRID[digit] for digit in digits))


def _errors(curve: Curves) -> Tensor:
    """Return the error of every choice, in the order of :func:`_choices`."""
    by_input = curve.input[:, None, None, None]
    by_up = curve.up_input[None, None, :, None]
    neurons = curve.neurons[None, :, None, :]
    return (by_input + by_up + neurons).flatten()
