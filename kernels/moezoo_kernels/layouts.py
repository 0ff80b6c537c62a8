"""The layouts of stacked matrices: a transposed view has a gradient that is one."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import fresh


def is_transposed(w: Tensor) -> bool:
    """Return whether matrices ``(E, B, A)`` lie in memory as ``(E, A, B)``."""
    return w.ndim == 3 and not w.is_contiguous() and w.transpose(1, 2).is_contiguous()


def is_column_major(w: Tensor) -> bool:
    """Return whether a matrix ``(B, A)`` lies in memory as ``(A, B)``."""
    return w.ndim == 2 and not w.is_contiguous() and w.t().is_contiguous()


def column_major(w: Tensor) -> Tensor:
    """Return a matrix of the same numbers whose columns lie side by side in memory."""
    return w if is_column_major(w) else w.t().contiguous().t()


def like(tensor: Tensor) -> Tensor:
    """Return an uninitialised gradient of a tensor, in its layout if that is a transposed one."""
    if is_transposed(tensor):
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class StackedGradient:
    """A gradient of stacked matrices ``(E, B, A)``, in their layout; zeros of unused experts.

    Args:
        w: the matrices.
        ends: ``(E,)`` int64, non-decreasing: where each expert's rows end.
    """

    def __init__(self, w: Tensor, ends: Tensor) -> None:
        self._transposed = is_transposed(w)
        shape = w.transpose(1, 2).shape if self._transposed else w.shape
        self._stacked = fresh.stacked(shape, w.dtype, ends)
        self._parts = fresh.Parts(self._stacked, ends)

    def write(self, expert: int, grad_nB: Tensor, rows_nA: Tensor) -> None:
        """Write an expert's gradient, the sum of its n rows' outer products; experts in order."""
        left, right = (rows_nA, grad_nB) if self._transposed else (grad_nB, rows_nA)
        torch.mm(left.t(), right, out=self._parts[expert])

    @property
    def whole(self) -> Tensor:
        """``(E, B, A)``."""
        return self._stacked.transpose(1, 2) if self._transposed else self._stacked
