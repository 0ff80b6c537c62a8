"""Statistics of routing: how evenly experts are used, how sure the router is.

All take real tokens only and give detached fp32 tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_counts(indices: Tensor, num_experts: int) -> Tensor:
    """Count assignments per expert, ``(E,)`` int64; index -1 (no expert) is not counted."""
    slots = indices.reshape(-1) + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:]


def max_violation(counts_E: Tensor) -> Tensor:
    """Compute MaxVio, ``max load / mean load - 1``: 0 when even (arXiv:2408.15664, eq. 4)."""
    counts_E = counts_E.float()
    return counts_E.max() / counts_E.mean().clamp(min=1e-9) - 1


def load_entropy(counts_E: Tensor) -> Tensor:
    """Compute the entropy of the load divided by log E: 1 when even, 0 when one expert has all."""
    share = counts_E.float() / counts_E.sum().clamp(min=1)
    entropy = torch.special.entr(share).sum()
    return entropy / max(math.log(counts_E.numel()), 1e-9)


def mean_entropy(probabilities_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Average the entropy, in nats, of each token's distribution over experts."""
    entropy = torch.special.entr(probabilities_TE.detach().float()).sum(dim=-1)
    if mask_T is None:
        return entropy.sum() / max(entropy.numel(), 1)
    return (entropy * mask_T).sum() / mask_T.sum().clamp(min=1)


def slot_mass(
    indices: Tensor, weights: Tensor | None, num_slots: int, mask_T: Tensor | None = None
) -> Tensor:
    """Sum each slot's weights over the real tokens, ``(N,)`` fp32; without weights, count.

    Weights are those after the softmax (arXiv:1907.05242, section 4.4): before it they may cancel.

    Args:
        indices: ``(T, …)`` slots, -1 for none.
        weights: non-negative, shaped as the indices.
        num_slots: number of slots N.
        mask_T: true at real tokens.
    """
    # Integers add up to the same total in any order, floats do not: count in units of 2^-32.
    unit = 1.0 if weights is None else 2.0**-32
    amounts = torch.ones_like(indices)
    if weights is not None:
        amounts = (weights.detach().double() / unit).round().to(torch.int64)
    kept = indices >= 0
    if mask_T is not None:
        kept = kept & mask_T.reshape(-1, *(1,) * (indices.ndim - 1))
    total = torch.zeros(num_slots, dtype=torch.int64, device=indices.device)
    slots = indices.clamp(min=0).reshape(-1)
    total.scatter_add_(0, slots, amounts.masked_fill(~kept, 0).reshape(-1))
    return total.float() * unit


def usage(mass_N: Tensor) -> Tensor:
    """Compute the fraction of slots that were used at all."""
    return (mass_N > 0).float().mean()


def unevenness(mass_N: Tensor) -> Tensor:
    """Compute ``KL(share || uniform)`` in nats: 0 when even, log N when one slot has it all."""
    share_N = mass_N.float() / mass_N.sum().clamp(min=1e-30)
    divergence = torch.special.xlogy(share_N, share_N * share_N.numel()).sum()
    return divergence.clamp(min=0.0)


def gini(mass_N: Tensor) -> Tensor:
    """Compute the Gini coefficient: 0 when even, 1 - 1/N when one slot has it all."""
    sorted_N = mass_N.float().sort().values
    n = sorted_N.numel()
    rank_N = torch.arange(1, n + 1, device=mass_N.device, dtype=torch.float32)
    weighted = ((2 * rank_N - n - 1) * sorted_N).sum()
    return weighted / (n * sorted_N.sum()).clamp(min=1e-30)


def top_mass(mass_N: Tensor, fraction: float) -> Tensor:
    """Count the fewest slots that together hold a fraction of the mass."""
    held_N = mass_N.double().sort(descending=True).values.cumsum(0)
    # A hair less, so that rounding in the sum does not ask for one slot more.
    return (held_N < held_N[-1] * (fraction - 1e-12)).sum() + (held_N[-1] > 0)


def slot_usage(mass_N: Tensor) -> dict[str, Tensor]:
    """Summarise how a store of N slots was used; sorts them, so not meant for every step.

    Args:
        mass_N: what :func:`slot_mass` gave, possibly summed over batches.

    Returns:
        ``usage``, ``unevenness``, ``gini``, and ``top50``, ``top90``, ``top99``: how many slots
        hold that percentage of the mass.
    """
    summary = {"usage": usage(mass_N), "unevenness": unevenness(mass_N), "gini": gini(mass_N)}
    return summary | {f"top{p}": top_mass(mass_N, p / 100) for p in (50, 90, 99)}
