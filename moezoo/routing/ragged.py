"""Routing in which tokens have as many experts as follows, not k each.

Experts choose tokens (arXiv:2202.09368), take those whose score is above a threshold
(arXiv:2603.11535), or those of a positive score (ReMoE, arXiv:2412.14711).
Indices are ``(T, E)``: an expert's own number where it takes the token, else -1.

Shapes: T tokens, E experts, H bins of a histogram.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.routing import losses as L
from moezoo.routing.balance import mean_probability
from moezoo.routing.balance_options import BalanceOptions
from moezoo.routing.choose import best_tokens
from moezoo.routing.margins import margin_histogram, upper_quantile
from moezoo.routing.model_sparsity import SparsityScope
from moezoo.routing.options import RouterOptions
from moezoo.routing.scores import scores_of
from moezoo.routing.selection_bias import StepLoad
from moezoo.routing.stats import count_tokens, expert_counts

COLD = -1.0
"""The threshold of an expert that has seen no step; scores are never below zero."""


class Taken(NamedTuple):
    """Which expert takes which token.

    Attributes:
        scores: ``(T, E)``.
        indices: ``(T, E)``, -1 where an expert does not take a token.
        weights: ``(T, E)``, zero there.
        max_assignments: an upper bound on the indices that are not -1.
    """

    scores: Tensor
    indices: Tensor
    weights: Tensor
    max_assignments: int


def take(
    logits_TE: Tensor,
    mask_T: Tensor | None,
    options: RouterOptions,
    top_k: int,
    threshold_E: Tensor | None,
) -> Taken:
    """Choose by the options' ``choice``, or by the sign of relu scores, and weigh by the scores.

    Args:
        logits_TE: of the router.
        mask_T: true at real tokens; no other is taken.
        options: of the router.
        top_k: experts per token, on average.
        threshold_E: of threshold choice.
    """
    scores_TE = scores_of(logits_TE, options.score)
    if options.score == "relu":
        indices_TE = _numbered(scores_TE.detach() > 0, mask_T)
        bound = _bound(indices_TE)
    elif threshold_E is None:
        indices_TE, room = best_tokens(scores_TE.detach(), mask_T, top_k)
        bound = room * scores_TE.shape[1]
    else:
        indices_TE = _numbered(above(scores_TE.detach(), threshold_E, top_k), mask_T)
        bound = _bound(indices_TE)
    weights_TE = scores_TE.masked_fill(indices_TE < 0, 0.0) * options.scale
    return Taken(scores_TE, indices_TE, weights_TE, bound)


def above(scores_TE: Tensor, threshold_E: Tensor, top_k: int) -> Tensor:
    """Return which scores are above their expert's threshold, ``(T, E)`` bool.

    An expert without a threshold yet takes the tokens among whose ``top_k`` best it is.
    """
    best_TK = scores_TE.topk(top_k, dim=-1).indices
    among_best_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, best_TK, True)
    return torch.where(threshold_E < 0, among_best_TE, scores_TE > threshold_E)


def threshold_margins(scores_TE: Tensor, threshold_E: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return the histogram ``(E, H)`` of scores less thresholds, for :func:`move_threshold`."""
    return margin_histogram(scores_TE.detach() - threshold_E.clamp(min=0), mask_T)


def move_threshold(threshold_E: Tensor, load: StepLoad, top_k: int, decay: float) -> None:
    """Average thresholds, in place, with those that would have given all experts k T / E tokens.

    ``θ <- decay θ + (1 - decay) Q`` with Q the quantile 1 - k / E of an expert's scores over all
    tokens of the step, on all ranks (arXiv:2603.11535); the first step sets ``θ <- Q``.

    Args:
        threshold_E: fp32, :data:`COLD` before the first step.
        load: of the step; without any token the thresholds stay.
        top_k: experts per token k, on average.
        decay: of the moving average.
    """
    if load.margins is None:
        return
    histogram_EH = L.sum_over_ranks(load.margins)
    base_E = threshold_E.clamp(min=0)
    if top_k < len(threshold_E):
        found_E = (base_E + upper_quantile(histogram_EH, top_k / len(threshold_E))).clamp(min=0)
    else:
        found_E = torch.zeros_like(base_E)
    averaged_E = torch.where(threshold_E < 0, found_E, decay * base_E + (1 - decay) * found_E)
    threshold_E.copy_(torch.where(histogram_EH.sum(dim=-1) > 0, averaged_E, threshold_E))


def sparsity_loss(
    taken: Taken, mask_T: Tensor | None, load: StepLoad, balance: BalanceOptions, top_k: int
) -> Tensor:
    """Compute ``mean_t Σ_e f_e g_te``, ``f_e = E c_e / (k T)`` (arXiv:2412.14711).

    With the ``global`` scope c and T are those of all ranks and of the step's micro-batches so far.

    Args:
        taken: what the experts take.
        mask_T: true at real tokens.
        load: of the earlier micro-batches of the optimizer step.
        balance: options of the router's balance.
        top_k: experts per token k, on average.
    """
    experts = taken.scores.shape[1]
    counts_E, tokens = expert_counts(taken.indices, experts), count_tokens(taken.indices, mask_T)
    if balance.scope == "global":
        if load.counts is not None and load.tokens is not None:
            counts_E, tokens = counts_E + load.counts, tokens + load.tokens
        counts_E, tokens = L.sum_over_ranks(counts_E), L.sum_over_ranks(tokens)
    f_E = counts_E.to(taken.scores.dtype) * (experts / top_k) / tokens.clamp(min=1)
    return torch.dot(f_E, mean_probability(balance, taken.scores, mask_T))


def move_sparsity(
    weight_1: Tensor,
    load: StepLoad,
    balance: BalanceOptions,
    top_k: int,
    scope: SparsityScope | None = None,
) -> None:
    """Raise the loss's coefficient λ, in place, if tokens had more than k experts, or lower it.

    ``λ <- λ growth^sign(Σ_e c_e - k T)`` over all ranks and micro-batches of the step: the paper's
    rule (arXiv:2412.14711) for the sparsity of this layer, where the paper has one λ and the
    mean sparsity of all layers. With a ``scope`` it is that: the mean over its layers of
    ``Σ_e c_e / (T E) - k / E``. Without any load of the layer λ stays.
    """
    if load.counts is None or load.tokens is None:
        return
    if scope is not None:
        if (direction := scope.direction()) is not None:
            weight_1 *= balance.sparsity_growth ** direction.to(weight_1.dtype)
        return
    excess = L.sum_over_ranks(load.counts).sum() - top_k * L.sum_over_ranks(load.tokens)
    weight_1 *= balance.sparsity_growth ** excess.sign().to(weight_1.dtype)


def without_expert(indices_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return the share of real tokens that no expert takes, fp32."""
    none_T = (indices_TE < 0).all(dim=-1)
    return L.masked_mean(none_T.float(), mask_T)


def _numbered(taken_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is not None:
        taken_TE = taken_TE & mask_T.unsqueeze(-1)
    return torch.where(taken_TE, torch.arange(taken_TE.shape[1], device=taken_TE.device), -1)


def _bound(indices_TE: Tensor) -> int:
    """Count the assignments, for which accelerators are waited for; without values, all."""
    if torch.compiler.is_compiling() or indices_TE.is_meta or type(indices_TE) is not Tensor:
        return indices_TE.numel()
    return int((indices_TE >= 0).sum())
