"""SparseMixer: experts are sampled in training, with a gradient for having been sampled.

Top-k does not say what another expert would have done. SparseMixer-v2 (Liu et al. 2024,
arXiv:2409.12136; first in arXiv:2310.00811) samples one expert after another from a
softmax over the logits near the best, and estimates the gradient of that choice by Heun's
third-order method. As PhiMoE's public code has it.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_THIRD = 0.3333
"""The public code's value of 1/3: what a sampled expert's weight is multiplied by."""


def sparse_mixer(
    logits_TE: Tensor, top_k: int, eps: float, training: bool
) -> tuple[Tensor, Tensor]:
    """Choose experts one after another, each among those that are left.

    Args:
        logits_TE: of the router.
        top_k: experts per token K.
        eps: logits are near the best if they are below it by no more than ``2 eps`` of their size.
        training: sample, instead of taking the best.

    Returns:
        Indices and weights, ``(T, K)``. A weight is the expert's share of the softmax over the
        near logits. In training, that of an expert that is not the best is a third of its share in
        three cases of four; gradients are those of the share.
    """
    left_TE, logits = logits_TE, logits_TE.detach()
    chosen_K, weights_K = [], []
    for _ in range(top_k):
        best_T1 = left_TE.detach().amax(dim=-1, keepdim=True)
        far_TE = (best_T1 - logits) / logits.abs().maximum(best_T1) > 2 * eps
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        share_TE = near_TE.softmax(dim=-1)
        chosen_T1 = best = share_TE.detach().argmax(dim=-1, keepdim=True)
        if training:
            # The difference of a logit and the log of an exponential has Gumbel noise in it.
            noise_TE = torch.empty_like(logits).exponential_().log()
            chosen_T1 = (near_TE.detach() - noise_TE).argmax(dim=-1, keepdim=True)
        weight_T1 = share_TE.gather(-1, chosen_T1)
        if training:
            whole_T1 = (chosen_T1 == best) | (torch.rand_like(weight_T1) > 0.75)
            taken_T1 = weight_T1.detach().masked_fill(whole_T1, 0.0) * (1.0 - _THIRD)
            weight_T1 = weight_T1 - taken_T1
        chosen_K.append(chosen_T1)
        weights_K.append(weight_T1)
        left_TE = left_TE.scatter(-1, chosen_T1, -torch.inf)
    return torch.cat(chosen_K, dim=-1), torch.cat(weights_K, dim=-1)
