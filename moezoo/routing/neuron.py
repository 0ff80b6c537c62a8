"""A router whose scores are activations of neurons, one per expert (CMoE, arXiv:2502.04416).

``s = |act(G x) * (U x)|``, row e of G and U those of expert e's representative neuron (eq. 8, with
the absolute value of the authors' code); ``s' = softmax(s)``, and the top_k of ``s' + b`` are
chosen, with b moved against the load after every step (section 4.4).

Shapes: T tokens, D d_model, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moezoo.routing.balance_options import BalanceOptions
from moezoo.routing.options import RouterOptions
from moezoo.routing.router import Router
from moezoo.routing.wide_linear import wide_linear
from moezoo_kernels.activations import ACTIVATIONS


class NeuronRouter(Router):
    """Score by one neuron per expert, or by a linear map with an intercept.

    Args:
        d_model: width of what the router reads.
        num_experts: number of experts E.
        top_k: experts per token.
        score: ``neuron`` or ``linear``.
        activation: of the neurons, a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: whether the neurons are those of gated linear units.
        bias: whether there is a bias before the activation; a linear router always has one.
        signed: leave the sign of the neurons' activations.
        bias_update_rate: how far the selection bias moves per optimizer step (γ).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["neuron", "linear"],
        activation: str,
        gated: bool,
        bias: bool,
        signed: bool,
        bias_update_rate: float,
    ) -> None:
        options = RouterOptions(
            normalize=False, selection_bias=True, bias_update_rate=bias_update_rate
        )
        balance = BalanceOptions(load_balancing=0.0)
        super().__init__(d_model, num_experts, top_k, options=options, balance=balance)
        self.score, self.activation, self.signed = score, activation, signed
        self.up_weight: nn.Parameter | None = None
        if gated and score == "neuron":
            self.up_weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = None
        if bias or score == "linear":
            self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows as those of neurons, N(0, 1/d); zero biases."""
        super().reset_parameters()
        # The base class calls this too, before it knows of the other parameters.
        for name in ("weight", "up_weight"):
            if (rows := self._parameters.get(name)) is not None:
                nn.init.normal_(rows, std=self.d_model**-0.5)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        logits_TE = wide_linear(hidden_TD, self.weight, self.bias)
        if self.score == "linear":
            return logits_TE
        logits_TE = ACTIVATIONS[self.activation](logits_TE)
        if self.up_weight is not None:
            logits_TE = logits_TE * wide_linear(hidden_TD, self.up_weight)
        return logits_TE if self.signed else logits_TE.abs()

    def _choose(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """Choose by ``s' + b``; among equals by the logits, then the lower expert.

        Logits are not scaled, so a softmax may underflow where they still differ; and the neurons
        of ReLU blocks are often zero together.
        """
        order_TE = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        selection_TE = scores_TE.detach() + self.selection_bias
        selection_TE = selection_TE.gather(1, order_TE)
        best_TE = selection_TE.sort(dim=-1, descending=True, stable=True).indices
        return order_TE.gather(1, best_TE[:, : self.top_k])

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: 2 d E, 4 d E for gated neurons."""
        products = 1 if self.up_weight is None else 2
        return 2 * products * self.d_model * self.num_experts
