"""Expert capacity: who is served when an expert has more tokens than room."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_capacity(
    tokens: Tensor | int, num_experts: int, top_k: int, factor: float, minimum: int
) -> Tensor | int:
    """Compute ``max(minimum, ceil(factor * top_k * tokens / num_experts))``.

    ``tokens`` may be a tensor (the number of real tokens), so that no device has to wait.
    """
    share = factor * top_k * tokens / num_experts
    if isinstance(share, Tensor):
        return share.ceil().clamp(min=minimum).long()
    return max(minimum, -int(-share // 1))


def within_capacity(indices_TK: Tensor, num_experts: int, capacity: Tensor | int) -> Tensor:
    """Tell which assignments an expert has room for.

    First choices of all tokens come before second choices, and among equals the earlier position
    comes first (arXiv:2006.16668, algorithm 1).

    Args:
        indices_TK: chosen experts, best first; -1 for none.
        num_experts: number of experts E.
        capacity: assignments one expert takes.

    Returns:
        ``(T, K)`` bool; false at -1.
    """
    experts = indices_TK.t().reshape(-1)
    order = experts.argsort(stable=True)
    arranged = experts[order]
    position = torch.arange(experts.numel(), device=experts.device)
    # searchsorted finds where each expert's run starts, so the difference is a place in the queue.
    start = torch.searchsorted(arranged, torch.arange(num_experts, device=experts.device))
    place = position - start[arranged.clamp(min=0)]
    served = torch.zeros_like(experts, dtype=torch.bool)
    served[order] = (place < capacity) & (arranged >= 0)
    return served.reshape(indices_TK.shape[1], indices_TK.shape[0]).t()
