"""The chosen experts, and what their scores are divided by: :class:`moezoo.WeightOptions`.

Shapes: T tokens, K choices per token, S shared experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.routing.options import RouterOptions


class Chosen(NamedTuple):
    """The experts of each token, with scores and, once these are normalised, weights.

    Attributes:
        indices: ``(T, K)``, -1 for none.
        scores: ``(T, K)``.
        shared_scores: ``(T, S)`` of the shared experts, where the router weighs these too.
        weights: ``(T, K)``.
        shared_weights: ``(T, S)``.
    """

    indices: Tensor
    scores: Tensor
    shared_scores: Tensor | None
    weights: Tensor
    shared_weights: Tensor | None

    def masked(self, mask_T: Tensor | None) -> Chosen:
        """Return the same with the index -1 at padding."""
        if mask_T is None:
            return self
        return self._replace(indices=self.indices.masked_fill(~mask_T.unsqueeze(-1), -1))


def total_of(scores_TK: Tensor, shared_TS: Tensor | None, options: RouterOptions) -> Tensor:
    """Return the sum or norm of a token's scores, ``(T, 1)``, never below its minimum.

    Args:
        scores_TK: of the chosen experts.
        shared_TS: of the shared experts, if they are weighed too.
        options: of the router.
    """
    how = options.weights
    if shared_TS is not None:
        scores_TK = torch.cat([scores_TK, shared_TS], dim=-1)
    if how.p == 1.0:
        total_T1 = scores_TK.sum(dim=-1, keepdim=True)
    else:
        total_T1 = torch.linalg.vector_norm(scores_TK, how.p, dim=-1, keepdim=True)
    if how.minimum:
        total_T1 = total_T1.clamp(min=how.minimum)
    # Scores that do not compete may all underflow; the constant is DeepSeek-V3's.
    default = 0.0 if options.score == "softmax" else 1e-20
    eps = default if how.eps is None else how.eps
    if eps:
        return total_T1 + eps
    return total_T1
