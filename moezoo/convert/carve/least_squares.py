"""Ridge regression by normal equations, and the refit of ``down`` with it.

Shapes: T tokens, D d_model, F neurons, P regressors, Q targets, N routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moezoo.errors import InputError

_BLOCK = 512


def ridge(
    parts: Iterable[tuple[Tensor, Tensor]], strength: float, intercept: bool
) -> tuple[Tensor, Tensor | None]:
    """Fit ``targets ≈ regressors @ W^T + b`` with a penalty on ``||W||²``.

    The intercept is not regularised: it is fitted by centring both sides.

    Args:
        parts: pairs ``(t, P)`` and ``(t, Q)`` of consecutive tokens; only their moments are kept.
        strength: regularisation, over the mean of the diagonal of the Gram matrix.
        intercept: whether to fit b.

    Returns:
        W ``(Q, P)``, and b ``(Q,)`` or None.

    Raises:
        InputError: the Gram matrix cannot be factored, not even in fp64.
    """
    gram = rhs = sum_p = sum_q = torch.empty(0)
    count = 0
    for regressors, targets in parts:
        if not count:
            gram = regressors.new_zeros(regressors.shape[1], regressors.shape[1])
            rhs = regressors.new_zeros(regressors.shape[1], targets.shape[1])
            sum_p, sum_q = torch.zeros_like(rhs[:, 0]), torch.zeros_like(rhs[0])
        _add_gram(gram, regressors)
        rhs.addmm_(regressors.t(), targets)
        sum_p += regressors.sum(0)
        sum_q += targets.sum(0)
        count += len(regressors)
    if not intercept:
        return solve(gram, rhs, strength).t(), None
    mean_p, mean_q = sum_p / count, sum_q / count
    gram.addr_(sum_p, mean_p, alpha=-1.0)
    weight = solve(gram, rhs.addr_(sum_p, mean_q, alpha=-1.0), strength).t()
    return weight, mean_q - weight @ mean_p


def _add_gram(gram_PP: Tensor, regressors_TP: Tensor) -> None:
    """Add ``X^T X``, in blocks, and only those below and on the diagonal: nearly half the work."""
    for start in range(0, len(gram_PP), _BLOCK):
        end = min(start + _BLOCK, len(gram_PP))
        gram_PP[start:end, :end].addmm_(regressors_TP[:, start:end].t(), regressors_TP[:, :end])


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


def refit_down(
    hidden_TF: Tensor,
    scale_TN: Tensor,
    labels_F: Tensor,
    down_DF: Tensor,
    output_TD: Tensor,
    strength: float,
    bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Correct ``down`` for what is left out: ``R = argmin ||Y - H' (down + R)^T||² + λ ||R||²``.

    H' are the activations that count, zero where their expert is not chosen. Where nothing is left
    out there is no residual, and R is zero.

    Args:
        hidden_TF: all activations.
        scale_TN: what each expert's output is multiplied with at each token; 0 if not chosen.
        labels_F: each neuron's expert; -1 for the shared one.
        down_DF: the dense block's.
        output_TD: its outputs Y, without its bias.
        strength: λ over the mean square of H'.
        bias: fit a constant too, for activations whose mean is not zero.

    Returns:
        The new ``down``, ``(D, F)``, and the constant ``(D,)`` or None.
    """
    parts = (
        (counted, y - counted @ down_DF.t())
        for counted, y in _counted_parts(hidden_TF, scale_TN, labels_F, output_TD)
    )
    change, constant = ridge(parts, strength, bias)
    return down_DF + change, constant


def _counted_parts(
    hidden_TF: Tensor, scale_TN: Tensor, labels_F: Tensor, output_TD: Tensor, size: int = 4096
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield the activations that count and the dense outputs, of some tokens at a time."""
    everywhere = scale_TN.new_ones(len(scale_TN), 1)
    scale_TE = torch.cat([scale_TN, everywhere], dim=1)  # label -1 is the last column
    pieces = zip(hidden_TF.split(size), scale_TE.split(size), output_TD.split(size), strict=True)
    for hidden, scale, output in pieces:
        yield hidden * scale[:, labels_F], output
