"""Fitting scaling laws to runs, by Huber's loss on the logarithm of the loss.

As in arXiv:2203.15556, section 3.3, and arXiv:2309.08520: δ = 1e-3. For given exponents a law is
linear in its other numbers, so those of a grid of exponents are solved for, none below zero, and
the best of the grid are refined by Levenberg and Marquardt's method. Nothing is drawn at random.

Shapes: R runs, K coefficients, X exponents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_train.plan.laws import (
    LAWS,
    AverageLaw,
    FinalCount,
    Law,
    MeanCount,
    Reach,
    SparseLaw,
)

Floats = NDArray[np.float64]

DELTA = 1e-3
_GRID = (0.05, 0.12, 0.25, 0.45, 0.8, 1.5)
_SPARSITY_GRID = (0.3, 0.8, 2.0)
_STARTS = 4
_EXPONENTS = (math.log(0.01), math.log(4.0))
_FLOOR = 1e-6  # of a coefficient, which has a logarithm, over the mean loss


@dataclass(frozen=True)
class Observation:
    """A run that has ended.

    Attributes:
        name: of the run.
        mean: N of the average law.
        final: N and S of the sparse law.
        tokens: D.
        loss: at the end, in nats per token.
    """

    name: str
    mean: MeanCount
    final: FinalCount
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """A law, and how well it says the loss of the runs that it was fitted to.

    Attributes:
        law: with its coefficients.
        reach: what the runs span.
        errors: of each run, predicted over measured loss less 1.
        left_out: likewise, predicted by the law that is fitted to all others.
    """

    law: Law
    reach: Reach
    errors: tuple[float, ...]
    left_out: tuple[float, ...]


def fit(observations: Sequence[Observation], name: str) -> Fit:
    """Fit a law to runs.

    Args:
        observations: the runs.
        name: a key of :data:`moezoo_train.plan.laws.LAWS`.

    Raises:
        InputError: the runs are too few, or too much alike to tell its coefficients apart.
    """
    check(observations, name)
    runs = _Runs.of(observations, name)
    numbers = _best(runs)
    law = runs.law(numbers)
    errors = np.exp(runs.residual(numbers)) - 1.0
    left_out = []
    for place in range(len(observations)):
        others = runs.without(place)
        predicted = runs.predict(_refine(others.residual, numbers))[place]
        left_out.append(float(predicted / runs.loss_R[place] - 1.0))
    return Fit(law, runs.reach(), tuple(map(float, errors)), tuple(left_out))


def check(observations: Sequence[Observation], name: str) -> None:
    """Raise :class:`InputError` unless runs can tell a law's coefficients apart."""
    sparse = LAWS[name] is SparseLaw
    least = 8 if sparse else 6
    if len(observations) < least:
        raise InputError(
            f"runs: the {name} law has {least - 1} coefficients and takes {least} runs or more, "
            f"not {len(observations)}; add runs of other sizes and lengths"
        )
    counts = [one.final.value if sparse else one.mean.value for one in observations]
    spread: dict[str, list[float]] = {
        "parameters": counts,
        "tokens": [one.tokens for one in observations],
    }
    if sparse:
        spread["sparsity"] = [one.final.sparsity for one in observations]
    for what, values in spread.items():
        if (different := _different(values, what == "sparsity")) < 3:
            raise InputError(
                f"runs: the {name} law wants three values of {what} or more, and these have "
                f"{different}; add some"
            )
    ratios = [one.tokens / count for one, count in zip(observations, counts, strict=True)]
    if max(ratios) < 1.2 * min(ratios):
        raise InputError(
            f"runs: all have about {ratios[0]:.3g} tokens per parameter, so that the effects of "
            "both cannot be told apart; add longer or shorter runs"
        )


def _different(values: Sequence[float], absolute: bool) -> int:
    """Count values that are 2 % apart, or 0.02."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value - found[-1] > 0.02 * (1.0 if absolute else found[-1]):
            found.append(value)
    return len(found)


@dataclass(frozen=True)
class _Runs:
    """Runs as arrays, scaled to be around 1.

    Its numbers are logarithms: of K coefficients, then of X exponents: of N, of D and of 1 - S.
    """

    count_R: Floats
    tokens_R: Floats
    dense_R: Floats
    loss_R: Floats
    scale: tuple[float, float]
    sparse: bool

    @classmethod
    def of(cls, observations: Sequence[Observation], name: str) -> _Runs:
        sparse = LAWS[name] is SparseLaw
        counts = np.array([o.final.value if sparse else o.mean.value for o in observations])
        tokens = np.array([o.tokens for o in observations], dtype=np.float64)
        scale = float(np.exp(np.log(counts).mean())), float(np.exp(np.log(tokens).mean()))
        dense = np.array([1.0 - o.final.sparsity for o in observations])
        losses = np.array([o.loss for o in observations])
        return cls(counts / scale[0], tokens / scale[1], dense, losses, scale, sparse)

    def without(self, place: int) -> _Runs:
        return replace(
            self,
            count_R=np.delete(self.count_R, place),
            tokens_R=np.delete(self.tokens_R, place),
            dense_R=np.delete(self.dense_R, place),
            loss_R=np.delete(self.loss_R, place),
        )

    def terms(self, exponents_X: Floats) -> Floats:
        """Return what the coefficients multiply, ``(R, K)``."""
        size, data = self.count_R ** -exponents_X[0], self.tokens_R ** -exponents_X[1]
        columns = [np.ones_like(size), data, size]
        if self.sparse:
            columns.append(size * self.dense_R ** exponents_X[2])
        return np.stack(columns, axis=1)

    def predict(self, numbers: Floats) -> Floats:
        coefficients, exponents = self._split(np.exp(numbers))
        predicted: Floats = self.terms(exponents) @ coefficients
        return predicted

    def residual(self, numbers: Floats) -> Floats:
        """Return log(predicted / measured), ``(R,)``."""
        found: Floats = np.log(self.predict(numbers)) - np.log(self.loss_R)
        return found

    def cost(self, numbers: Floats) -> float:
        return _huber(self.residual(numbers))

    def start(self, exponents_X: Floats) -> Floats:
        """Return the numbers of the least squares of relative errors for these exponents."""
        weighted = self.terms(exponents_X) / self.loss_R[:, None]
        solved = _least_squares(weighted, np.ones_like(self.loss_R))
        floor = _FLOOR * float(self.loss_R.mean())
        return np.log(np.concatenate([np.maximum(solved, floor), exponents_X]))

    def grid(self) -> list[Floats]:
        axes = [_GRID, _GRID, *([_SPARSITY_GRID] if self.sparse else [])]
        return [self.start(np.array(point)) for point in itertools.product(*axes)]

    def law(self, numbers: Floats) -> Law:
        """Return the law in parameters and tokens."""
        coefficients, exponents = self._split(np.exp(numbers))
        floor, data, size = (float(value) for value in coefficients[:3])
        alpha, beta = float(exponents[0]), float(exponents[1])
        size, data = size * self.scale[0] ** alpha, data * self.scale[1] ** beta
        if not self.sparse:
            return AverageLaw(E=floor, A=size, alpha=alpha, B=data, beta=beta)
        return SparseLaw(
            a_S=float(coefficients[3]) * self.scale[0] ** alpha,
            b_S=float(exponents[2]),
            c_S=size,
            b_N=alpha,
            a_D=data ** (1.0 / beta),
            b_D=beta,
            c=floor,
        )

    def reach(self) -> Reach:
        """Return what they span."""
        counts, tokens = self.count_R * self.scale[0], self.tokens_R * self.scale[1]
        sparsity = 1.0 - self.dense_R
        spans = ((float(a.min()), float(a.max())) for a in (counts, tokens, sparsity))
        return Reach(*spans)

    def _split(self, values: Floats) -> tuple[Floats, Floats]:
        count = 4 if self.sparse else 3
        return values[:count], values[count:]


def _best(runs: _Runs) -> Floats:
    starts = sorted(runs.grid(), key=lambda p: float(np.square(runs.residual(p)).sum()))
    refined = [_refine(runs.residual, start) for start in starts[:_STARTS]]
    return min(refined, key=runs.cost)


def _least_squares(matrix_RK: Floats, values_R: Floats) -> Floats:
    """Return the least squares with none below zero, the best of all subsets of columns."""
    count = matrix_RK.shape[1]
    best, least = np.zeros(count), math.inf
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            columns = list(chosen)
            found = np.linalg.lstsq(matrix_RK[:, columns], values_R, rcond=None)[0]
            error = float(np.square(matrix_RK[:, columns] @ found - values_R).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[columns] = found
    return best


def _huber(residual_R: Floats) -> float:
    size = np.abs(residual_R)
    return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum())


def _refine(residual: Callable[[Floats], Floats], numbers: Floats, steps: int = 150) -> Floats:
    """Lower Huber's loss by damped steps of reweighted least squares, until they gain nothing."""
    exponents = 3 if len(numbers) == 7 else 2
    damping, found = 1e-3, residual(numbers)
    cost = _huber(found)
    for _ in range(steps):
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(found), 1e-300))
        slope = _slope(residual, numbers)
        normal = slope.T @ (weights[:, None] * slope)
        gradient = slope.T @ (weights * found)
        scaled = normal + damping * np.diag(np.diag(normal) + 1e-12)
        moved = numbers - np.linalg.solve(scaled, gradient)
        moved[-exponents:] = moved[-exponents:].clip(*_EXPONENTS)
        moved = moved.clip(-30.0, 30.0)
        tried = residual(moved)
        if _huber(tried) < cost:
            gain = cost - _huber(tried)
            numbers, found, cost, damping = moved, tried, _huber(tried), damping / 3
            if gain < 1e-10 * cost:
                break
        elif damping > 1e8:
            break
        else:
            damping *= 4
    return numbers


def _slope(residual: Callable[[Floats], Floats], numbers: Floats) -> Floats:
    """Return the derivatives ``(R, K + X)`` by central differences."""
    columns = []
    for place in range(len(numbers)):
        step = np.zeros_like(numbers)
        step[place] = 1e-5
        columns.append((residual(numbers + step) - residual(numbers - step)) / 2e-5)
    return np.stack(columns, axis=1)
