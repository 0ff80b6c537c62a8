"""Verdicts on claims by differences between paired runs: holds, fails, or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moezoo_train.experiments.common.statistics import Mean, Verdict, confidence, mean


@dataclass(frozen=True)
class JudgedDifference:
    """One claim, and what was measured of it.

    Attributes:
        claim: in words.
        difference: mean over pairs of runs with the same seed, and its standard error.
        outcome: whether it holds.
    """

    claim: str
    difference: Mean
    outcome: Verdict

    def __str__(self) -> str:
        return f"{self.claim}: {self.outcome} ({signed(self.difference)})"


def is_positive(claim: str, differences: Sequence[float]) -> JudgedDifference:
    """Judge the claim that a difference is above zero, by its 95 % interval.

    Args:
        claim: in words.
        differences: one per seed, at least one; a single one decides nothing.
    """
    found = _mean(differences)
    low, high = _interval(found)
    return JudgedDifference(
        claim, found, "holds" if low > 0 else "fails" if high < 0 else "undecided"
    )


def is_small(claim: str, differences: Sequence[float], margin: float) -> JudgedDifference:
    """Judge the claim that a difference is within a margin of zero, on either side.

    That no difference was found does not make two things equal: the claim holds if the 95 %
    interval is within the margin, and fails if no part of it is.

    Args:
        claim: in words.
        differences: one per seed, at least one; a single one decides nothing.
        margin: the largest difference that does not count.
    """
    found = _mean(differences)
    low, high = _interval(found)
    if -margin < low and high < margin:
        return JudgedDifference(claim, found, "holds")
    return JudgedDifference(
        claim, found, "fails" if low > margin or high < -margin else "undecided"
    )


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Subtract runs from others of the same seed: ``others - ours``."""
    return [others[seed] - ours[seed] for seed in ours if seed in others]


def signed(value: Mean) -> str:
    """Write a difference with its sign."""
    text = str(value)
    return text.replace("-", "−", 1) if text.startswith("-") else f"+{text}"


def _mean(values: Sequence[float]) -> Mean:
    found = mean(values)
    assert found is not None
    return found


def _interval(found: Mean) -> tuple[float, float]:
    """Return the 95 % interval; for a single seed it is everything."""
    return confidence(found) or (-math.inf, math.inf)
