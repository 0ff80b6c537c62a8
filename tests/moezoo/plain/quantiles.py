"""Balancing by quantiles, one expert at a time from sorted lists: no histogram, no rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantile_bias(scores: list[Tensor], bias_E: Tensor, top_k: int) -> Tensor:
    """``b_e = -Q(s_e - α)``, α a token's (k+1)-th largest ``s + b``; centred (Su 2026).

    Q is the smallest number that at most a share k / E of the tokens exceed.
    """
    experts = len(bias_E)
    alphas = [sorted((s_E + bias_E).tolist(), reverse=True)[top_k] for s_E in scores]
    moved = []
    for e in range(experts):
        residuals = [s_E[e].item() - alpha for s_E, alpha in zip(scores, alphas, strict=True)]
        moved.append(-upper_quantile(residuals, top_k / experts))
    mean = math.fsum(moved) / experts
    return torch.tensor([b - mean for b in moved], dtype=torch.float64)


def upper_quantile(values: list[float], share: float) -> float:
    """Return the smallest value that at most a share of the values exceed."""
    ranked = sorted(values, reverse=True)
    return ranked[min(math.floor(share * len(ranked)), len(ranked) - 1)]
