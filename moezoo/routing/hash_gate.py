"""Learned weights of experts that a hash has chosen.

Shapes: T tokens, D d_model, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.routing.scores import scores_of
from moezoo.routing.wide_linear import wide_linear

Score = Literal["sqrt_softplus", "sigmoid", "softmax"]
SCORES = ("sqrt_softplus", "sigmoid", "softmax")


class HashGate(nn.Module):
    """Scores of the chosen experts over their sum, ``w_k = c s_k / Σ_j s_j``, ``s = score(W x)``.

    DeepSeek-AI 2026, arXiv:2606.19348, section 2.1. In fp32 at least.

    Args:
        d_model: D.
        num_experts: E.
        score: of a logit; softmax is over all E.
        scale: c.
    """

    def __init__(self, d_model: int, num_experts: int, score: str, scale: float) -> None:
        super().__init__()
        self.score, self.scale = score, scale
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1 / D)."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        """Return the weights ``(T, K)``."""
        scores_TE = scores_of(wide_linear(x_TD, self.weight), self.score)
        scores_TK = scores_TE.gather(-1, experts_TK)
        return self.scale * scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)


def check_learned(
    weights: str, top_k: int, num_hashes: int, key: str, score: str, scale: float
) -> None:
    """Refuse options of a hash layer's weights that do not fit each other.

    Raises:
        InputError: names the option and the fix.
    """
    if weights == "one":
        for name, value, default in (("score", score, SCORES[0]), ("scale", scale, 1.0)):
            if value != default:
                raise InputError(f"{name}: is that of learned weights; set weights to learned")
        if top_k > 1:
            raise InputError(
                f"top_k: {top_k} experts want weights; set weights to learned, or top_k to 1"
            )
    elif top_k == 1:
        raise InputError(
            "top_k: the weight of one expert is its score over itself; give 2 or more, or set "
            "weights to one"
        )
    if top_k > 1 and num_hashes > 1:
        raise InputError("num_hashes: several experts of a token are whole ones; set it to 1")
    if top_k > 1 and key in ("position", "bigram"):
        raise InputError(f"top_k: a hash of key '{key}' names one expert; set key to token")
