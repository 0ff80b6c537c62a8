"""The formula of ``linear_cross_entropy`` in plain differentiable torch: holds all logits, (T, V).

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels.dtypes import autocast


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, z-loss and count; see the package's ``linear_cross_entropy``."""
    logits_TV = autocast(hidden) @ autocast(weight).t()
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    scored_T = labels != ignore_index
    count = scored_T.sum()
    partition_T = logits_TV.logsumexp(dim=-1)
    named_T = logits_TV.gather(-1, labels.masked_fill(~scored_T, 0).unsqueeze(-1)).squeeze(-1)
    share = scored_T.to(logits_TV.dtype) / count.clamp(min=1)
    z = z_loss * (partition_T.square() * share).sum()
    return ((partition_T - named_T) * share).sum() + z, z.detach(), count
