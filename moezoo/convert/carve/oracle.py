"""The oracle's choice: the experts that contribute most; and how often a router agrees.

Shapes: T tokens, D d_model, F neurons, N routed experts, K of them active.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contributions(hidden_TF: Tensor, experts_NM: Tensor, down_DF: Tensor) -> Tensor:
    """Measure every routed expert's output for every token, ``||down_e h_e||``, ``(T, N)``."""
    lengths = [_lengths(hidden_TF, e, down_DF) for e in experts_NM.to(hidden_TF.device)]
    return torch.stack(lengths, dim=1)


def _lengths(hidden_TF: Tensor, neurons_M: Tensor, down_DF: Tensor) -> Tensor:
    """Return ``||down_e h_e||`` of one expert, ``(T,)``; if small as ``h^T (down^T down) h``."""
    down_DM = down_DF[:, neurons_M]
    few = len(neurons_M) < len(down_DM)
    gram_MM = down_DM.t() @ down_DM if few else None
    lengths = []
    for part in hidden_TF.split(2048):
        hidden_TM = part[:, neurons_M]
        if gram_MM is None:
            lengths.append((hidden_TM @ down_DM.t()).norm(dim=1))
        else:
            square_T = (hidden_TM @ gram_MM).mul_(hidden_TM).sum(dim=1)
            lengths.append(square_T.clamp(min=0).sqrt())
    return torch.cat(lengths)


def agreement(logits_TN: Tensor, contribution_TN: Tensor, active: int) -> dict[str, float]:
    """Compare a router's choices with those of the contribution oracle.

    Returns:
        ``overlap``, the share of the oracle's experts that the router chooses too; ``exact``, the
        share of tokens where it chooses the same ones; what a random router would get of both
        (``chance_…``); and ``busiest``, the largest load of an expert over the mean (1 + MaxVio).
    """
    experts = logits_TN.shape[1]
    chosen = top_mask(logits_TN, active)
    wanted = top_mask(contribution_TN, active)
    common_T = (chosen & wanted).sum(dim=1)
    load_N = chosen.sum(dim=0).double()
    return {
        "overlap": float(common_T.double().mean() / active),
        "exact": float((common_T == active).double().mean()),
        "chance_overlap": active / experts,
        "chance_exact": 1 / math.comb(experts, active),
        "busiest": float(load_N.max() / load_N.mean()),
    }


def top_mask(scores_TN: Tensor, count: int) -> Tensor:
    """Mark the best of each row, the lower index among equals, ``(T, N)`` bool."""
    best = scores_TN.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, best, True)
