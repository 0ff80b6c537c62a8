"""Statistics of routing: how evenly experts are used, how sure the router is.

All take real tokens only and give detached fp32 tensors.
"""

from __future__ import annotations

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
    return entropy / max(torch.tensor(float(counts_E.numel())).log().item(), 1e-9)


def mean_entropy(probabilities_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Average the entropy, in nats, of each token's distribution over experts."""
    entropy = torch.special.entr(probabilities_TE.detach().float()).sum(dim=-1)
    if mask_T is None:
        return entropy.sum() / max(entropy.numel(), 1)
    return (entropy * mask_T).sum() / mask_T.sum().clamp(min=1)
