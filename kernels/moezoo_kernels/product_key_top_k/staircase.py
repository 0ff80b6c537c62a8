"""The pairs that can be among the K best sums: K (1 + 1/2 + … + 1/K) instead of K².

With both halves in order, best first, the pair of ranks (r, s) is preceded by every other pair of
ranks up to r and up to s, which are (r + 1)(s + 1) - 1; so it takes part only if
``(r + 1)(s + 1) <= K``. Rounding keeps the order of sums, if not strictly, and equal sums are
ordered by ranks, so this is exact in floating point too.

Shapes: T tokens, H heads, n half scores per codebook, K choices, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_key_top_k(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Sort each half, then the pairs; see the package's ``product_key_top_k``.

    Plain torch on any device. In the backward every element is written at most once before sums
    over a whole dimension, so it is deterministic.
    """
    n = halves.shape[-1]
    with torch.no_grad():
        rows_2THK = halves.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    best_2THK = halves.gather(-1, rows_2THK)
    pairs_P = torch.tensor(pairs(top_k), device=halves.device)
    sums_THKK = best_2THK[0].unsqueeze(-1) + best_2THK[1].unsqueeze(-2)
    with torch.no_grad():
        sums_THP = sums_THKK.flatten(-2)[..., pairs_P]
        order_THK = sums_THP.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        pairs_THK = pairs_P[order_THK]
        first_THK = rows_2THK[0].gather(-1, pairs_THK // top_k)
        slots_THK = first_THK * n + rows_2THK[1].gather(-1, pairs_THK % top_k)
    return sums_THKK.flatten(-2).gather(-1, pairs_THK), slots_THK


def pairs(top_k: int) -> list[int]:
    """List the pairs that can be among the best, as ``r K + s``, by r, then s."""
    return [r * top_k + s for r in range(top_k) for s in range(top_k // (r + 1))]
