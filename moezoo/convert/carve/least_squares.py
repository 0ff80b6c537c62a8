"""Ridge regression by normal equations.

Shapes: P regressors, Q targets, k rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo_kernels.linear import multiply

_BLOCK = 512


class Moments:
    """Second moments of regressors and targets, from which a ridge of any strength is solved.

    Args:
        intercept: whether to fit one. It is not regularised: both sides are centred.
        scaled: penalise each regressor's weight over that regressor's own mean square.
    """

    def __init__(self, intercept: bool, scaled: bool) -> None:
        self._intercept, self._scaled = intercept, scaled
        self._scale_p: Tensor | None = None
        self._count = 0
        self.square = 0.0
        """Sum of squares of all targets."""
        self._gram = self._rhs = self._sum_p = self._sum_q = torch.empty(0)
        self._mean_p = self._mean_q = torch.empty(0)

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, Tensor]], intercept: bool, scaled: bool = False
    ) -> Moments:
        """Return those of pairs ``(t, P)`` and ``(t, Q)`` of consecutive tokens."""
        moments = cls(intercept, scaled)
        for regressors, targets in parts:
            moments._add(regressors, targets)
        moments._centre()
        return moments

    def _add(self, regressors: Tensor, targets: Tensor) -> None:
        if not self._count:
            self._gram = regressors.new_zeros(regressors.shape[1], regressors.shape[1])
            self._rhs = regressors.new_zeros(regressors.shape[1], targets.shape[1])
            self._sum_p = torch.zeros_like(self._rhs[:, 0])
            self._sum_q = torch.zeros_like(self._rhs[0])
        _add_gram(self._gram, regressors)
        self._rhs += multiply(regressors.t(), targets.t())
        self._sum_p += regressors.sum(0)
        self._sum_q += targets.sum(0)
        self.square += float(targets.double().square().sum())
        self._count += len(regressors)

    def _centre(self) -> None:
        if self._intercept:
            self._mean_p, self._mean_q = self._sum_p / self._count, self._sum_q / self._count
            self._gram.addr_(self._sum_p, self._mean_p, alpha=-1.0)
            self._rhs.addr_(self._sum_p, self._mean_q, alpha=-1.0)
        if self._scaled:
            square_p = self._gram.diagonal().clamp(min=0)
            dead = square_p <= 1e-12 * square_p.max()
            self._scale_p = square_p.sqrt().masked_fill(dead, torch.inf)  # they get no weight
            self._gram.div_(self._scale_p).div_(self._scale_p.unsqueeze(1))
            self._rhs.div_(self._scale_p.unsqueeze(1))

    def solve(self, strength: float) -> tuple[Tensor, Tensor | None]:
        """Return W ``(Q, P)`` and b ``(Q,)`` or None; arguments and errors as of :func:`ridge`."""
        diagonal = self._gram.diagonal().clone()
        weight = self._scaled_back(solve(self._gram, self._rhs, strength)).t()
        self._gram.diagonal().copy_(diagonal)
        if not self._intercept:
            return weight, None
        return weight, self._mean_q - weight @ self._mean_p

    def whiten(self, rows: Tensor, strength: float) -> Tensor:
        """Return ``(gram + strength mean(diag) I)^-1 rows^T``, ``(P, k)``, of ``(k, P)`` rows."""
        diagonal = self._gram.diagonal().clone()
        scaled = rows if self._scale_p is None else rows / self._scale_p
        answer = self._scaled_back(solve(self._gram, scaled.t(), strength))
        self._gram.diagonal().copy_(diagonal)
        return answer

    def _scaled_back(self, weight_PQ: Tensor) -> Tensor:
        return weight_PQ if self._scale_p is None else weight_PQ / self._scale_p.unsqueeze(1)


def ridge(
    parts: Iterable[tuple[Tensor, Tensor]], strength: float, intercept: bool
) -> tuple[Tensor, Tensor | None]:
    """Fit ``targets ≈ regressors @ W^T + b`` with a penalty on ``||W||²``.

    Args:
        parts: pairs ``(t, P)`` and ``(t, Q)`` of consecutive tokens; only their moments are kept.
        strength: regularisation, over the mean of the diagonal of the Gram matrix.
        intercept: whether to fit b; it is not regularised.

    Returns:
        W ``(Q, P)``, and b ``(Q,)`` or None.

    Raises:
        InputError: the Gram matrix cannot be factored, not even in fp64.
    """
    return Moments.of(parts, intercept).solve(strength)


def _add_gram(gram_PP: Tensor, regressors_TP: Tensor) -> None:
    """Add ``X^T X``, in blocks, and only those below and on the diagonal: nearly half the work."""
    for start in range(0, len(gram_PP), _BLOCK):
        end = min(start + _BLOCK, len(gram_PP))
        left, right = regressors_TP[:, start:end].t(), regressors_TP[:, :end].t()
        gram_PP[start:end, :end] += multiply(left, right)


def solve(gram: Tensor, rhs: Tensor, strength: float) -> Tensor:
    """Solve ``(gram + strength mean(diag) I) X = rhs`` by Cholesky, in fp64 where fp32 fails.

    What ``gram`` holds above the diagonal is not read, and its diagonal is overwritten.
    """
    diagonal = gram.diagonal().clone()
    size = diagonal.mean()
    if float(size) == 0.0:  # nothing varies, so there is nothing to fit
        return torch.zeros_like(rhs)
    for dtype in dict.fromkeys((gram.dtype, torch.float64)):
        wide = gram.to(dtype)
        wide.diagonal().copy_(diagonal.to(dtype) + strength * size.to(dtype))
        with _one_thread():
            factor, failed = torch.linalg.cholesky_ex(wide)
        if not failed:
            answer = torch.cholesky_solve(rhs.to(dtype), factor)
            if bool(answer.isfinite().all()):
                return answer.to(rhs.dtype)
    raise InputError(
        "ridge: the least squares have no solution, not even in fp64; raise the ridge, or give "
        "more calibration tokens"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread, so that results depend little on their number: LAPACK's blocks do.

    Matrix products and triangular solves mostly divide the rows and columns of what they compute,
    which changes no sum.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
