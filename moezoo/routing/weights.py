"""What the scores of the chosen experts are divided by: :class:`moezoo.WeightOptions`.

Shapes: T tokens, K choices per token, S shared experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.routing.options import RouterOptions


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
    return total_T1 + eps if eps else total_T1
