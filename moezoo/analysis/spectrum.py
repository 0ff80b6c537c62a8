"""Spectra: the directions that a layer uses (Jha and Reagen 2025, arXiv:2510.00537).

Of the eigenvalues λ of a covariance, with shares p = λ / Σλ of D directions::

    hard rank = (Σλ)² / Σλ²        soft rank = exp(-Σ p log p)

The first is the participation ratio, which counts the strong directions; the second counts the
tail too and is never less. The same is asked of weights, with squared singular values for λ.

Shapes: n tokens, D directions, A x B a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CELLS = 2**24  # of a large matrix, turned to fp64 at once


@dataclass(frozen=True)
class Spectrum:
    """The spread of a variance over directions.

    Attributes:
        width: number of directions D.
        hard_rank: participation ratio, 1 to D.
        soft_rank: exponential of the entropy, from the hard rank to D.
        concentration: ``(2 / D) Σ_j (Σ_{i <= j} p_i - j / D)``, p descending: twice the area
            between cumulative shares and diagonal; 0 when even, 1 - 1 / D for one direction.
        utilization: harmonic mean of hard rank / D and soft rank / D.
    """

    width: int
    hard_rank: float
    soft_rank: float
    concentration: float
    utilization: float


def spectrum_of(eigenvalues_D: Tensor) -> Spectrum:
    """Summarise the eigenvalues of a covariance matrix.

    Args:
        eigenvalues_D: ``(D,)`` in any order; what rounding made negative counts as zero.

    Returns:
        The figures; without any variance, all of them are 0.
    """
    values = eigenvalues_D.double().clamp(min=0.0).sort(descending=True).values
    width, total = len(values), float(values.sum())
    if total == 0:
        return Spectrum(width, 0.0, 0.0, 0.0, 0.0)
    p = values / total
    hard = 1.0 / float(p.square().sum())
    soft = float(torch.special.entr(p).sum().exp())
    even = torch.arange(1, width + 1, dtype=torch.float64, device=p.device) / width
    concentration = 2 / width * float((p.cumsum(0) - even).sum())
    utilization = 2 / (width / hard + width / soft)
    return Spectrum(width, hard, soft, concentration, utilization)


class Covariance:
    """The centred covariance of vectors that come in parts, in fp64 on the CPU.

    Args:
        width: D.

    Attributes:
        tokens: vectors so far, n.
    """

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, vectors_RD: Tensor) -> None:
        """Add vectors; means are merged, so that a large mean costs no digits."""
        number = len(vectors_RD)
        if not number:
            return
        vectors = vectors_RD.detach().to("cpu", torch.float64)
        mean = vectors.mean(dim=0)
        centred = vectors - mean
        shift = mean - self.mean
        total = self.tokens + number
        self.scatter.addmm_(centred.t(), centred)
        self.scatter.addr_(shift, shift, alpha=self.tokens * number / total)
        self.mean += shift * (number / total)
        self.tokens = total

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues, descending, ``(D,)`` fp64; at most n - 1 are not zero."""
        values = torch.linalg.eigvalsh(self.scatter / max(self.tokens, 1)).flip(0).clamp(min=0.0)
        # What rounding left of directions that so few tokens cannot span.
        values[max(self.tokens - 1, 0) :] = 0.0
        return values


@torch.no_grad()
def squared_singular_values(matrix_AB: Tensor) -> Tensor:
    """Return σ² of a matrix, descending, ``(min(A, B),)`` fp64, through its smaller Gram matrix."""
    tall = matrix_AB if matrix_AB.shape[0] >= matrix_AB.shape[1] else matrix_AB.t()
    width = tall.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    for rows in tall.detach().split(max(_CELLS // width, 1)):
        part = rows.to("cpu", torch.float64)
        gram.addmm_(part.t(), part)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0)
