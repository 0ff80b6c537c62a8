"""The chosen experts, and how their scores become weights: :class:`moezoo.WeightOptions`.

Shapes: T tokens, E experts, K choices per token, S shared experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class Scales(NamedTuple):
    """The learned factors on weights.

    Attributes:
        learned: ``(1,)``, on all; None for none.
        expert: ``(E,)``, on those of each expert; None for none.
    """

    learned: Tensor | None
    expert: Tensor | None


def weighed(chosen: Chosen, options: RouterOptions, scales: Scales, may_be_none: bool) -> Chosen:
    """Take the scores for weights, normalised and scaled.

    Args:
        chosen: the experts, with scores.
        options: of the router.
        scales: its learned factors.
        may_be_none: whether all scores of a token may be zero; its weights are zero then.
    """
    weights_TK, shared_TS = chosen.scores, chosen.shared_scores
    if options.normalize:
        total_T1 = total_of(weights_TK, shared_TS, options)
        if may_be_none:
            total_T1 = total_T1.masked_fill(total_T1 == 0, 1.0)
        weights_TK = weights_TK / total_T1
        shared_TS = None if shared_TS is None else shared_TS / total_T1
    weights_TK = _scaled(weights_TK, options, scales)
    if scales.expert is not None:
        # An embedding's gradient is summed in a fixed order, that of indexing is not.
        experts_TK = chosen.indices.clamp(min=0)
        scale_TK = F.embedding(experts_TK, scales.expert.unsqueeze(-1)).squeeze(-1)
        weights_TK = weights_TK * scale_TK.to(weights_TK.dtype)
    shared_TS = None if shared_TS is None else _scaled(shared_TS, options, scales)
    return chosen._replace(weights=weights_TK, shared_weights=shared_TS)


def weights_of_all(scores_TE: Tensor, options: RouterOptions, scales: Scales) -> Tensor:
    """Return the weights ``(T, E)`` of all experts by their scores as they are, scaled."""
    weights_TE = _scaled(scores_TE, options, scales)
    return weights_TE if scales.expert is None else weights_TE * scales.expert.to(weights_TE.dtype)


def _scaled(weights: Tensor, options: RouterOptions, scales: Scales) -> Tensor:
    weights = weights * options.scale
    return weights if scales.learned is None else weights * scales.learned.to(weights.dtype)
