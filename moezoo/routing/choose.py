"""Which experts may be chosen, given the numbers that choose.

Shapes: T tokens, E experts in G groups of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.routing.options import RouterOptions


def within_groups(selection_TE: Tensor, options: RouterOptions) -> Tensor:
    """Close all but a token's best groups of experts (arXiv:2405.04434, section 2.2).

    Args:
        selection_TE: the numbers that choose, selection bias included.
        options: of the router.

    Returns:
        The same numbers, -inf in closed groups, or 0 where the options say so.
    """
    if options.num_groups == 1:
        return selection_TE
    groups_TGN = selection_TE.unflatten(1, (options.num_groups, -1))
    default = "sum_of_two" if options.selection_bias else "max"
    of = 2 if (options.group_score or default) == "sum_of_two" else 1
    best_TG = groups_TGN.topk(min(of, groups_TGN.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = best_TG.topk(options.top_groups, dim=-1).indices
    closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, chosen, False)
    closed_value = 0.0 if options.closed_groups == "zero" else -torch.inf
    return groups_TGN.masked_fill(closed_TG.unsqueeze(-1), closed_value).flatten(1)
