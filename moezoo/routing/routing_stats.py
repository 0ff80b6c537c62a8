"""The statistics of one call of a learned router.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.routing import ragged
from moezoo.routing.stats import mean_entropy, slot_stats


def routing_stats(
    probabilities_TE: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    mask_T: Tensor | None,
    dropped: Tensor | None,
    num_experts: int,
    may_be_without: bool = False,
) -> dict[str, Tensor]:
    """Return the load of the experts, the entropy of the router and how much was dropped.

    Args:
        probabilities_TE: each expert's share of its token's scores.
        indices_TK: chosen experts before any limit on capacity, -1 for none.
        weights_TK: theirs.
        mask_T: true at real tokens.
        dropped: assignments that experts had no room for; None for none.
        num_experts: number of experts E.
        may_be_without: whether a token may choose no expert at all, which is counted then.
    """
    stats = slot_stats(indices_TK, weights_TK.abs(), num_experts, mask_T, most_counts=num_experts)
    stats["router_entropy"] = mean_entropy(probabilities_TE, mask_T)
    stats["dropped"] = torch.zeros_like(stats["tokens"]) if dropped is None else dropped
    if may_be_without:
        stats["without_expert"] = ragged.without_expert(indices_TK, mask_T)
    return stats
