"""Inputs whose discrete choices do not hang on the last bits.

Two right programs round differently, and where two experts score alike to the last bit they may
choose differently: the outputs then differ visibly though neither is wrong. The gate would have to
be so loose as to be worthless. So tokens with such a choice are drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moezoo.routing.product_key import ProductKeys

_MARGIN = 2e-5  # of the scores' standard deviation; products of a thousand terms are off by 1e-6
_ATTEMPTS = 10


def decided(
    draw: Callable[[int], Tensor], margin: Callable[[Tensor], Tensor], tokens: int
) -> Tensor:
    """Draw tokens that choose clearly.

    Args:
        draw: gives that many tokens, ``(T, …)``.
        margin: gives how clearly each token chooses, ``(T,)``, relative to the scores' spread.
        tokens: how many are wanted.

    Raises:
        ValueError: hardly any token chooses clearly; the layer's scores are all alike.
    """
    kept: list[Tensor] = []
    count = 0
    for _ in range(_ATTEMPTS):
        drawn = draw(tokens + tokens // 8 + 8)
        with torch.no_grad():
            clear = drawn[margin(drawn) > _MARGIN]
        kept.append(clear)
        count += len(clear)
        if count >= tokens:
            return torch.cat(kept)[:tokens].contiguous()
    raise ValueError(f"only {count} of {tokens} tokens choose clearly; spread the scores")


def product_key_margin(keys: ProductKeys, queries_THC: Tensor) -> Tensor:
    """Return how far each token's last chosen slot is above the first one left out: ``(T,)``."""
    halves = queries_THC.float().unflatten(-1, (2, -1))
    codebooks = keys.keys.float().expand(keys.num_heads, -1, -1, -1)
    return halves_margin(torch.einsum("thpc,hpnc->tphn", halves, codebooks), keys.top_k)


def halves_margin(scores_T2Hn: Tensor, top_k: int) -> Tensor:
    """Return the same from the scores of both halves."""
    best = scores_T2Hn.topk(min(top_k + 1, scores_T2Hn.shape[-1]), dim=-1).values
    sums = (best[:, 0, :, :, None] + best[:, 1, :, None, :]).flatten(2)
    top = sums.topk(top_k + 1, dim=-1).values
    return (top[..., -2] - top[..., -1]).amin(dim=1) / scores_T2Hn.std()


def top_k_margin(scores_TE: Tensor, top_k: int) -> Tensor:
    """Return how far each token's last chosen expert is above the first one left out: ``(T,)``."""
    top = scores_TE.float().topk(top_k + 1, dim=-1).values
    return (top[:, -2] - top[:, -1]) / scores_TE.float().std()


def sign_margin(logits_TN: Tensor) -> Tensor:
    """Return how far from zero each token's logits are: ``(T,)``."""
    # All nodes of a tree are asked, far more than a token meets: be less strict per node.
    return logits_TN.abs().amin(dim=1) / logits_TN.std() * 10
