"""Token rounding: the tokens of each expert become a multiple of what a kernel computes at once.

A grouped matrix product works on tiles, of 128 rows say: an expert with 145 tokens pays for 256.
SonicMoE (arXiv:2512.14080) gives it 128 instead, and one with 230 tokens 256.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.routing.stats import count_tokens
from moezoo.routing.weights import Chosen


class Rounded(NamedTuple):
    """What rounding made of the tokens' choice.

    Attributes:
        chosen: indices ``(T, E)``, an expert's own number where it has the token and -1 elsewhere;
            weights ``(T, E)``, zero there; scores ``(T, E)`` of all.
        max_assignments: an upper bound on the indices that are not -1.
        dropped: how many assignments experts lost, a scalar int64.
        stats: ``rounded_up`` and ``rounded_down``, assignments that were added and dropped as
            shares, in fp32, of those that tokens chose.
    """

    chosen: Chosen
    max_assignments: int
    dropped: Tensor
    stats: dict[str, Tensor]


def round_tokens(
    chosen: Chosen, scores_TE: Tensor, added_TE: Tensor, mask_T: Tensor | None, multiple: int
) -> Rounded:
    """Round how many tokens each expert has to the nearest multiple, a half to the even one.

    No expert has more than the real tokens there are, a multiple or not. One that has too many
    loses those of least weight; one that has too few gains those of the best score that did not
    choose it.

    Args:
        chosen: experts of each token, -1 for none, with weights, which are kept.
        scores_TE: of all experts, finite at real tokens; chooses who is added.
        added_TE: the weights of those added.
        mask_T: true at real tokens; no other is added.
        multiple: of the counts.
    """
    tokens, experts = scores_TE.shape
    is_there_TK = chosen.indices >= 0
    slots_TK = chosen.indices + 1  # column 0 is for none
    has_TE = scores_TE.new_zeros(tokens, experts + 1, dtype=torch.bool)
    has_TE = has_TE.scatter(1, slots_TK, is_there_TK)[:, 1:]
    kept_TE = added_TE.new_zeros(tokens, experts + 1)
    kept_TE = kept_TE.scatter(1, slots_TK, chosen.weights.masked_fill(~is_there_TK, 0.0))[:, 1:]
    counts_E = has_TE.sum(dim=0)
    real = count_tokens(chosen.indices, mask_T)
    wanted_E = nearest_multiple(counts_E, multiple).minimum(real)

    could_TE = ~has_TE if mask_T is None else ~has_TE & mask_T.unsqueeze(-1)
    most = min(multiple // 2, tokens)
    goes_TE = among_best(-kept_TE.detach().abs(), has_TE, counts_E - wanted_E, most)
    stays_TE = has_TE & ~goes_TE
    comes_TE = among_best(scores_TE.detach(), could_TE, wanted_E - counts_E, most)
    weights_TE = torch.where(stays_TE, kept_TE, added_TE.masked_fill(~comes_TE, 0.0))
    number_E = torch.arange(experts, device=scores_TE.device)
    indices_TE = torch.where(stays_TE | comes_TE, number_E, -1)
    bound = min(tokens * experts, chosen.indices.numel() + experts * (multiple // 2))

    asked = counts_E.sum()
    added, dropped = comes_TE.sum(), goes_TE.sum()
    of = asked.clamp(min=1).float()
    stats = {"rounded_up": added / of, "rounded_down": dropped / of}
    rounded = Chosen(indices_TE, scores_TE, None, weights_TE, None)
    return Rounded(rounded, bound, dropped, stats)


def nearest_multiple(counts_E: Tensor, multiple: int) -> Tensor:
    """Round whole numbers to multiples, a half to the even one, as ``torch.round`` does."""
    full_E = counts_E // multiple
    twice_E = 2 * (counts_E - full_E * multiple)
    up_E = (twice_E > multiple) | ((twice_E == multiple) & (full_E % 2 == 1))
    return (full_E + up_E) * multiple


def among_best(values_TE: Tensor, among_TE: Tensor, how_many_E: Tensor, most: int) -> Tensor:
    """Return which values are an expert's largest, ``(T, E)`` bool.

    Args:
        values_TE: finite where they count.
        among_TE: whose values count.
        how_many_E: how many of these to take, none below zero; there are as many.
        most: no number of ``how_many_E`` is larger; from 0 to T.
    """
    values_ET = values_TE.masked_fill(~among_TE, -torch.inf).t().contiguous()
    best_EM = values_ET.topk(most, dim=1).indices
    taken_EM = torch.arange(most, device=best_EM.device) < how_many_E.unsqueeze(-1)
    return torch.zeros_like(values_ET, dtype=torch.bool).scatter(1, best_EM, taken_EM).t()
