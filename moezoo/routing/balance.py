"""The auxiliary losses of token choice, as :class:`moezoo.BalanceOptions` weights them.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.routing import losses as L
from moezoo.routing.balance_options import BalanceOptions
from moezoo.routing.stats import expert_counts


class Logits(NamedTuple):
    """A router's logits ``(T, E)``: without noise, with it, and its size if there is any."""

    clean: Tensor
    noisy: Tensor
    std: Tensor | None


class Choice(NamedTuple):
    """What was chosen, before any limit on capacity.

    Attributes:
        probabilities: ``(T, E)``, a token's sum to one.
        indices: ``(T, K)``, -1 at padding.
        weights: ``(T, K)``, also at padding.
    """

    probabilities: Tensor
    indices: Tensor
    weights: Tensor


def balance_losses(
    balance: BalanceOptions,
    logits: Logits,
    choice: Choice,
    mask_T: Tensor | None,
    sequences: tuple[int, int],
    earlier_E: Tensor | None,
) -> dict[str, Tensor]:
    """Return the weighted losses whose coefficient is not zero.

    Args:
        balance: the coefficients.
        logits: of the router.
        choice: what it chose.
        mask_T: true at real tokens.
        sequences: how many sequences of what length the tokens are.
        earlier_E: counts of the earlier micro-batches of this optimizer step.
    """
    indices_TK = choice.indices
    aux = {}
    if balance.load_balancing:
        counts_E = _assigned(balance, choice, earlier_E)
        p_E = mean_probability(balance, choice.probabilities, mask_T)
        aux["load_balancing"] = balance.load_balancing * L.load_balancing_loss(counts_E, p_E)
    if balance.z_loss:
        aux["router_z"] = balance.z_loss * L.z_loss(logits.clean, mask_T)
    if balance.sequence:
        aux["sequence_balance"] = balance.sequence * L.sequence_balance_loss(
            indices_TK.unflatten(0, sequences),
            choice.probabilities.unflatten(0, sequences),
            None if mask_T is None else mask_T.reshape(sequences),
        )
    if balance.entropy:
        aux["entropy"] = balance.entropy * L.negative_entropy(
            logits.clean, mask_T, over_ranks=balance.scope == "global"
        )
    if balance.importance:
        kept = choice.weights.masked_fill(indices_TK < 0, 0.0)
        gates_TE = torch.zeros_like(choice.probabilities)
        gates_TE = gates_TE.scatter(1, indices_TK.clamp(min=0), kept)
        aux["importance"] = balance.importance * L.cv_squared(gates_TE.sum(dim=0))
    if balance.load:
        aux["load"] = balance.load * L.cv_squared(_load(logits, indices_TK, mask_T))
    return aux


def _assigned(balance: BalanceOptions, choice: Choice, earlier_E: Tensor | None) -> Tensor:
    first_only = balance.count == "first_choice"
    indices = choice.indices[:, :1] if first_only else choice.indices
    counts_E = expert_counts(indices, choice.probabilities.shape[-1])
    if balance.scope == "global":
        # The counts of earlier micro-batches of this optimizer step count every choice; with
        # first choices only, each micro-batch stands for itself.
        if earlier_E is not None and not first_only:
            counts_E = counts_E + earlier_E
        counts_E = L.sum_over_ranks(counts_E)
    return counts_E


def mean_probability(
    balance: BalanceOptions, probabilities_TE: Tensor, mask_T: Tensor | None
) -> Tensor:
    """Average each expert's probability over the real tokens of the scope, ``(E,)``."""
    if balance.scope == "local" or mask_T is None:
        return L.masked_mean(probabilities_TE, mask_T)
    # Ranks may hold different numbers of real tokens; data parallelism averages gradients over
    # ranks, so each divides by the mean number to arrive at the mean over the global batch.
    tokens = L.sum_over_ranks(mask_T.sum()) / L.world_size()
    return (probabilities_TE * mask_T.unsqueeze(-1)).sum(dim=0) / tokens.clamp(min=1)


def _load(logits: Logits, indices_TK: Tensor, mask_T: Tensor | None) -> Tensor:
    (_, experts), (_, top_k) = logits.clean.shape, indices_TK.shape
    if logits.std is None or top_k == experts:
        return expert_counts(indices_TK, experts).to(logits.clean.dtype)
    return L.expected_load(logits.clean, logits.noisy, logits.std, top_k, mask_T)
