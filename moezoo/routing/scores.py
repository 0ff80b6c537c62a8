"""From logits to scores, and from scores to a distribution over experts.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _sqrt_softplus(logits_TE: Tensor) -> Tensor:
    # Where softplus underflows, the root's gradient would be infinite times zero.
    return F.softplus(logits_TE).clamp(min=torch.finfo(logits_TE.dtype).tiny).sqrt()


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
    "sqrt_softplus": _sqrt_softplus,
    "sparse_mixer": lambda logits_TE: logits_TE.softmax(dim=-1),
    "relu": F.relu,
}
COMPETING = ("softmax", "sparse_mixer")
"""Scores that sum to one."""


def scores_of(logits_TE: Tensor, score: str) -> Tensor:
    """Return the scores, by :attr:`moezoo.RouterOptions.score`."""
    return _SCORES[score](logits_TE)


def shares_of(scores_TE: Tensor, score: str) -> Tensor:
    """Return each expert's share of its token's scores; those of a softmax are shares already."""
    if score in COMPETING:
        return scores_TE
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
