"""Do slots specialise in tokens? Mutual information of token and choice, and what carries it.

One choice is drawn at random from all choices that a layer made on a text. X is the token that made
it, Y the slot that was chosen, both counted in a table. In nats::

    I(X; Y) = Σ p(x, y) log(p(x, y) / (p(x) p(y)))

A table of finite counts has some by chance alone: what is left when the same choices are dealt out
to the same tokens at random (as in the adjusted mutual information of Vinh et al. 2010). And no
input, however rich, could tell more than ``H(Y) - H(Y | occurrence)``: a token makes k choices.
Between these, ``explained`` is 0 where the token says nothing and 1 where it decides, as it does in
a hash layer. Muennighoff et al. 2024 (arXiv:2409.02060, section 5) call ``p(y | x)`` the vocabulary
specialisation of expert y.

Shapes: V tokens that are told apart, N slots, T tokens of the text, K choices of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# numpy's sampler holds its totals in 30 bits.
_MOST_DEALT = 10**9 - 1


@dataclass(frozen=True)
class Specialization:
    """The part of a layer's choices that the token explains; entropies and information in nats.

    Attributes:
        choices: how many were counted.
        entropy: H(Y), of the slots over all choices; log N when even.
        attainable: H(Y) less the mean entropy of the choices of one occurrence of a token: the
            most that any input could tell.
        information: I(X; Y) of the counts.
        chance: the same when the choices are dealt out at random.
        explained: ``(information - chance) / (attainable - chance)``, at most 1; None where there
            is nothing to explain, as when every slot is always chosen.
    """

    choices: int
    entropy: float
    attainable: float
    information: float
    chance: float
    explained: float | None


def count_pairs(counts_VN: Tensor, tokens_T: Tensor, indices_TK: Tensor) -> None:
    """Add one for each token and each slot that it chose, in place.

    Args:
        counts_VN: ``(V, N)`` of any number type, contiguous.
        tokens_T: ``(T,)`` int64 token ids.
        indices_TK: ``(T, K)`` int64 slots; -1 is no slot.
    """
    tokens_TK = tokens_T.unsqueeze(-1).expand_as(indices_TK)
    chosen_TK = indices_TK >= 0
    cells = (tokens_TK * counts_VN.shape[1] + indices_TK)[chosen_TK]
    counts_VN.view(-1).scatter_add_(0, cells, torch.ones_like(cells).to(counts_VN.dtype))


def occurrence_entropy(indices_TK: Tensor) -> Tensor:
    """Sum ``K' H(Y | occurrence)`` over tokens, in nats, K' the choices that a token made.

    A token whose K' choices all differ has ``H = log K'``; the same choice twice makes it less.

    Args:
        indices_TK: ``(T, K)`` int64 slots; -1 is no slot.

    Returns:
        A fp64 scalar.
    """
    sorted_TK = indices_TK.sort(dim=-1).values
    last_TK = torch.searchsorted(sorted_TK, sorted_TK, right=True)
    times_TK = last_TK - torch.searchsorted(sorted_TK, sorted_TK)
    chosen_TK = sorted_TK >= 0
    made_T = chosen_TK.sum(dim=-1).double()
    repeated_T = (times_TK.double().log() * chosen_TK).sum(dim=-1)
    return (torch.special.xlogy(made_T, made_T) - repeated_T).sum()


def mutual_information(counts_VN: Tensor) -> float:
    """Return I(X; Y) of a table of counts ``(V, N)``, in nats."""
    return max(float(information_terms(counts_VN).sum()), 0.0)


def information_terms(counts_VN: Tensor) -> Tensor:
    """Return the terms ``p(x, y) log(p(x, y) / (p(x) p(y)))`` whose sum is I(X; Y), in nats.

    Args:
        counts_VN: ``(V, N)``, how often each token chose each slot.

    Returns:
        ``(V, N)`` fp64; negative where a token avoids a slot.
    """
    p_VN = counts_VN.double() / max(int(counts_VN.sum()), 1)
    independent_VN = p_VN.sum(dim=1, keepdim=True) * p_VN.sum(dim=0)
    ratio_VN = p_VN / independent_VN.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.xlogy(p_VN, ratio_VN)


def entropy(counts: Tensor) -> float:
    """Return the entropy of the shares of counts of any shape, in nats; 0 without any count."""
    total = max(int(counts.sum()), 1)
    return float(torch.special.entr(counts.double() / total).sum())


def chance_information(counts_VN: Tensor, seed: int = 0) -> float:
    """Return I(X; Y) of a random table with the same row and column sums, in nats.

    From a billion counts on, the chi-squared approximation ``(V - 1)(N - 1) / (2 C)`` of its mean.
    """
    total = int(counts_VN.sum())
    rows_V = counts_VN.sum(dim=1).long()
    columns_N = counts_VN.sum(dim=0).long()
    if total > _MOST_DEALT:
        cells = (int((rows_V > 0).sum()) - 1) * (int((columns_N > 0).sum()) - 1)
        return cells / (2 * total)
    generator = np.random.default_rng(seed)
    left_N = columns_N.numpy().copy()
    information = 0.0
    for row in rows_V.tolist():
        dealt_N = generator.multivariate_hypergeometric(left_N, row, method="marginals")
        left_N -= dealt_N
        information += _row_information(dealt_N, columns_N.numpy(), total)
    return max(information, 0.0)


def _row_information(dealt_N: np.ndarray, columns_N: np.ndarray, total: int) -> float:
    used = dealt_N > 0
    share = dealt_N[used] / total
    independent = dealt_N.sum() / total * (columns_N[used] / total)
    return float((share * np.log(share / independent)).sum())


def specialization(counts_VN: Tensor, occurrence: float) -> Specialization:
    """Summarise a table of counts.

    Args:
        counts_VN: how often each token chose each slot.
        occurrence: the sum of :func:`occurrence_entropy` over the same tokens; 0.0 where each made
            one choice.
    """
    choices = int(counts_VN.sum())
    of_slots = entropy(counts_VN.sum(dim=0))
    attainable = max(of_slots - occurrence / max(choices, 1), 0.0)
    information, chance = mutual_information(counts_VN), chance_information(counts_VN)
    explained = None
    if attainable - chance > 1e-6:
        explained = min((information - chance) / (attainable - chance), 1.0)
    return Specialization(choices, of_slots, attainable, information, chance, explained)
