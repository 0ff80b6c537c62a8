"""Means over seeds, and confidence intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its standard error: None for a single seed."""

    value: float
    error: float | None
    count: int

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return f"{self.value:.3f}{error}"


def mean(values: Sequence[float]) -> Mean | None:
    """Average; the error is the sample's standard deviation over the root of its size."""
    if not values:
        return None
    value = sum(values) / len(values)
    if len(values) == 1:
        return Mean(value, None, 1)
    variance = sum((v - value) ** 2 for v in values) / (len(values) - 1)
    return Mean(value, math.sqrt(variance / len(values)), len(values))


Verdict = Literal["holds", "fails", "undecided"]


QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, by degrees of freedom from one; more than ten are taken for ten.

That widens intervals of many seeds by 14 % at most, and so decides nothing too early. Scipy, which
has the exact function, is no dependency, and torch has no inverse of it.
"""


def confidence(value: Mean) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two seeds."""
    if value.error is None:
        return None
    half = QUANTILES[min(value.count - 1, len(QUANTILES)) - 1] * value.error
    return value.value - half, value.value + half
