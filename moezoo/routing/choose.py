"""Who may be chosen, given the numbers that choose: experts by tokens, or tokens by experts.

Shapes: T tokens, E experts in G groups of N, C tokens per expert.
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


def best_tokens(scores_TE: Tensor, mask_T: Tensor | None, top_k: int) -> tuple[Tensor, int]:
    """Return who is taken where each expert takes its ``T k / E`` best tokens.

    This is expert choice (arXiv:2202.09368, section 3.2).

    Args:
        scores_TE: not negative.
        mask_T: true at real tokens; no other is taken.
        top_k: experts per token, on average.

    Returns:
        ``(T, E)`` int64, an expert's own number where it takes the token and -1 elsewhere, and an
        upper bound C on the tokens that one expert takes.
    """
    tokens, experts = scores_TE.shape
    real = tokens if mask_T is None else mask_T.sum()
    room = min(tokens, -(-tokens * top_k // experts))
    if mask_T is not None:
        scores_TE = scores_TE.masked_fill(~mask_T.unsqueeze(-1), -1.0)
    best_CE = scores_TE.topk(room, dim=0).indices
    place_C1 = torch.arange(room, device=best_CE.device).unsqueeze(-1)
    taken_CE = (place_C1 < -(-real * top_k // experts)) & (place_C1 < real)
    taken_CE = taken_CE.expand_as(best_CE)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, best_CE, taken_CE)
    return torch.where(chosen_TE, torch.arange(experts, device=scores_TE.device), -1), room
