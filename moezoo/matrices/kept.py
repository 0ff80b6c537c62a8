"""How many weights of a matrix count, at every share of a run."""

from __future__ import annotations

from moezoo.matrices.masked import Latent, NMMatrix, SoftNMMatrix, TransposableMatrix
from moezoo.matrices.options import NM
from moezoo.matrices.pruned import PrunedMatrix
from moezoo.matrices.schedules import cubic, stages

_POINTS = 1000
"""At which a schedule is looked at for its mean."""


def kept_share(matrix: Latent, progress: float) -> float:
    """Return the share of a matrix's weights that are not zero in its product.

    By its options, so that neither masks nor the number of a row's weights, which is whole, matter.

    Args:
        matrix: with a mask or thresholds.
        progress: optimizer steps done over steps planned.
    """
    if isinstance(matrix, PrunedMatrix):
        rule = matrix.options
        if rule.dense_from is not None and progress >= rule.dense_from:
            return 1.0
        return 1.0 - cubic(progress, rule.start, rule.end, rule.sparsity)
    if isinstance(matrix, TransposableMatrix):
        dense_from = matrix.options.dense_from
        return 1.0 if dense_from is not None and progress >= dense_from else 0.5
    if isinstance(matrix, NMMatrix):
        return _n_of_m(matrix.options, progress)
    assert isinstance(matrix, SoftNMMatrix)
    return matrix.options.n / matrix.options.m


def _n_of_m(rule: NM, progress: float) -> float:
    done = (progress - rule.start) / (rule.end - rule.start)
    if rule.leak is not None:  # what leaks is not zero
        return rule.n / rule.m if done >= 1.0 else 1.0
    if rule.stages is None:
        return rule.n / rule.m
    if done < 0.0:
        return 1.0
    patterns = stages(rule.n, rule.m, rule.stages)
    n, m = patterns[min(int(done * len(patterns)), len(patterns) - 1)]
    return n / m


def mean_kept_share(matrix: Latent) -> float:
    """Return the mean of :func:`kept_share` over a run."""
    points = ((number + 0.5) / _POINTS for number in range(_POINTS))
    return sum(kept_share(matrix, point) for point in points) / _POINTS
