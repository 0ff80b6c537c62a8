"""Isotropy: whether hidden states point in all directions, or in much the same one.

The mean cosine of all pairs of n vectors is ``(‖Σ u_i‖² − Σ ‖u_i‖²) / (n (n − 1))`` with
``u = x / ‖x‖``, so that no pair has to be looked at. It is 0 where directions are drawn evenly and
1 where all are the same (Ethayarajh 2019, arXiv:1909.00512).

Shapes: T vectors, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MeanCosine:
    """The mean cosine of all pairs of vectors that come in parts, in fp64 on the CPU.

    A vector without a length is orthogonal to all.

    Args:
        width: D.

    Attributes:
        vectors: how many so far, n.
    """

    def __init__(self, width: int) -> None:
        self.vectors = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = 0.0

    def add(self, vectors_TD: Tensor) -> None:
        """Add vectors, of any dtype and device."""
        vectors = vectors_TD.detach().to("cpu", torch.float64)
        units = torch.nn.functional.normalize(vectors, dim=-1, eps=1e-300)
        self.vectors += len(units)
        self._sum += units.sum(dim=0)
        self._squares += float(units.square().sum())

    def value(self) -> float:
        """Return the mean; 0 of fewer than two vectors."""
        pairs = self.vectors * (self.vectors - 1)
        return (float(self._sum.square().sum()) - self._squares) / pairs if pairs else 0.0
