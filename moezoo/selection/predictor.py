"""A low-rank guess of which neurons a token needs, before any of them is computed.

``score = B norm(A x) + b`` (Deja Vu, Liu et al. 2023, arXiv:2310.17157, section 4.1, without a
norm; Polar Sparsity, Shrestha et al. 2025, arXiv:2505.14884, with a layer norm), or the gate at low
rank, ``score = |act(B A x + b)| · length``. A token has the neurons of the k highest scores. The
numbers are found beside the weights, by ``moezoo sparsify``; no gradient trains them.

Shapes: T tokens, D d_model, F hidden width, R rank, K neurons per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.feed_forward import TokenContext
from moezoo.selection.options import Predictor
from moezoo.selection.selector import Selector, Shares
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, gate_value
from moezoo_kernels.linear import linear

NORM_EPS = 1e-5


class PredictorSelector(Selector):
    """Chooses the k neurons of the highest scores.

    Args:
        d_model: inputs D.
        d_ff: neurons F.
        options: rank, k, and what a score is.
        activation: of the gate, or of an MLP.
        glu: bounds of the gate.

    Attributes:
        reduce: A, ``(R, D)``.
        expand: B, ``(F, R)``.
        bias: b, ``(F,)``.
        length: ``(F,)``, of ``score: gate`` alone.
    """

    reduce: Tensor
    expand: Tensor
    bias: Tensor
    length: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        options: Predictor,
        activation: str,
        glu: GLUOptions = PLAIN_GLU,
    ) -> None:
        super().__init__()
        self._options, self._activation, self._glu = options, activation, glu
        self.rank, self.top_k = options.sizes(d_model, d_ff)
        self.register_buffer("reduce", torch.empty(self.rank, d_model))
        self.register_buffer("expand", torch.empty(d_ff, self.rank))
        self.register_buffer("bias", torch.empty(d_ff))
        if options.score == "gate":
            self.register_buffer("length", torch.empty(d_ff))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors from N(0, 1/fan_in): until they are found, neurons are as drawn."""
        nn.init.normal_(self.reduce, std=self.reduce.shape[1] ** -0.5)
        nn.init.normal_(self.expand, std=self.rank**-0.5)
        nn.init.zeros_(self.bias)
        if self._options.score == "gate":
            nn.init.ones_(self.length)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return each neuron's score, ``(T, F)``, without a gradient."""
        inner_TR = linear(x_TD.detach(), self.reduce)
        if self._options.norm:
            inner_TR = F.layer_norm(inner_TR, (self.rank,), eps=NORM_EPS)
        scores_TF = linear(inner_TR, self.expand, self.bias)
        if self._options.score == "logit":
            return scores_TF
        return gate_value(scores_TF, self._activation, self._glu).abs() * self.length

    def keep_neurons(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """Choose the k highest scores, ``(T, F)`` bool."""
        scores_TF = self.scores(x_TD)
        best_TK = scores_TF.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(scores_TF, dtype=torch.bool).scatter(-1, best_TK, True)

    def calibrated(self) -> Shares:
        """Return the share of neurons that a token has: of each matrix as many rows or columns."""
        share = self.top_k / len(self.expand)
        return Shares(input=share, gate=share, hidden=share)

    def numbers(self) -> int:
        """Count the numbers that a choice multiplies with."""
        return self.reduce.numel() + self.expand.numel()
