"""Where schedules stand at a share of the run, ``progress`` in [0, 1].

Every function is of progress alone, so that a resumed run goes on where it stood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPONENT = 5.0
"""Of an exponential leak where it ends: e^-5, 0.7 %, is then cut off."""


def cosine(progress: float, end: float) -> float:
    """Return half a cosine from 1 at the start to 0 at ``end``, and 0 from there."""
    return 0.5 * (1.0 + math.cos(math.pi * min(progress / end, 1.0))) if progress < end else 0.0


def cosine_tensor(progress: Tensor, end: float) -> Tensor:
    """Return the same of a scalar tensor, at every progress."""
    return 0.5 * (1.0 + torch.cos(torch.pi * (progress / end).clamp(0.0, 1.0)))


def cubic(progress: float, start: float, end: float, final: float) -> float:
    """Return the sparsity of gradual pruning, ``S (1 - (1 - r)³)``, r from 0 at start to 1 at end.

    Zhu and Gupta 2017 (arXiv:1710.01878, eq. 1) from zero. Its mean over the run is
    ``S (1 - end + 3/4 (end - start))``.
    """
    if progress >= end:
        return final
    done = max(progress - start, 0.0) / (end - start)
    return final * (1.0 - (1.0 - done) ** 3)


def leak(progress: Tensor, start: float, end: float, shape: str) -> Tensor:
    """Return the factor δ on the weights outside a mask: 1 until ``start``, 0 from ``end``."""
    done = ((progress - start) / (end - start)).clamp(0.0, 1.0)
    if shape == "linear":
        return 1.0 - done
    return torch.where(done < 1.0, torch.exp(-EXPONENT * done), torch.zeros_like(done))


def stages(n: int, m: int, kind: str) -> list[tuple[int, int]]:
    """Return the patterns that lead to N:M.

    ``fine``: 8N:8M, 4N:4M, 2N:2M, N:M, all as dense. ``step``: (M-1):M, M/2:M, M/4:M, …, N:M.
    """
    if kind == "fine":
        return [(n * scale, m * scale) for scale in (8, 4, 2, 1)]
    kept, found = m // 2, [(m - 1, m)] if n < m - 1 else []
    while kept > n:
        if kept < m - 1:
            found.append((kept, m))
        kept //= 2
    return [*found, (n, m)]
