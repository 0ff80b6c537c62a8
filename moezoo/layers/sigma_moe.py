"""σ-MoE: experts chosen by sigmoids that do not compete, initialised like one wide dense block.

``y = Σ_{e in topK(s)} s_e W2_e ReLU(W1_e x)`` with ``s = sigmoid(W3 x)`` (Csordás et al. 2023,
arXiv:2310.10837, section 5). The scores are not normalised: what one expert outputs does not
depend on the scores of the others. An entropy loss and dropout of whole experts keep them in use.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moezoo.errors import check_choice, check_int, check_number
from moezoo.experts import MLPExperts
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.layers.dense import Activation, default_width
from moezoo.routing import BalanceOptions, Router, RouterOptions
from moezoo.routing.options import check_top_k
from moezoo.routing.stats import SlotLoad, slot_load
from moezoo_kernels.activations import ACTIVATIONS


class SigmaMoE(FeedForward):
    """σ-MoE: sigmoid selection without normalisation.

    A call's ``losses``: ``entropy``, γ Σ p log p with p the mean softmax over all ranks' tokens;
    ``stats``: those of :class:`moezoo.SparseMoE`.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts E.
        top_k: experts per token K.
        d_expert: hidden width G of one expert; default: 4 d_model / E rounded up to a multiple of
            16, so that all experts together are as wide as the dense block and a token costs K / E
            of it (G = 128 for d_model 512 and E 16, as in the paper).
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        entropy: coefficient γ of the entropy loss; the paper has 1e-3 for its large models, 1e-4
            for the small ones.
        expert_dropout: probability δ of zeroing a token's score of an expert while training; 0.05
            for the paper's small models, 0.1 for the large ones.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 16,
        top_k: int = 4,
        d_expert: int | None = None,
        activation: Activation = "relu",
        entropy: float = 1e-4,
        expert_dropout: float = 0.05,
    ) -> None:
        super().__init__(d_model)
        self.num_experts = check_int("num_experts", num_experts)
        self.top_k = check_top_k(top_k, num_experts)
        if d_expert is None:
            d_expert = -(-default_width(d_model, gated=False) // (16 * num_experts)) * 16
        self.d_expert = check_int("d_expert", d_expert)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.entropy = check_number("entropy", entropy)
        self.expert_dropout = check_number("expert_dropout", expert_dropout, maximum=1.0)

        router = RouterOptions(score="sigmoid", normalize=False, expert_dropout=self.expert_dropout)
        balance = BalanceOptions(load_balancing=0.0, entropy=self.entropy)
        self.gate = Router(d_model, num_experts, top_k, options=router, balance=balance)
        self.experts = MLPExperts(
            d_model, self.d_expert, num_experts, activation=activation, gated=False, bias=False
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw W1 from N(0, 2 / (d L)), W2 from N(0, 2 / (E G L)), W3's rows at equal length.

        W2's variance has the width of all experts in it, not of one (section 5). W3's rows are
        drawn at random, brought to one length, and scaled to W1's root mean square.
        """
        std = (2 / (self.d_model * num_layers)) ** 0.5
        nn.init.normal_(self.experts.gate_up_proj, std=std)
        d_ff = self.num_experts * self.d_expert
        nn.init.normal_(self.experts.down_proj, std=(2 / (d_ff * num_layers)) ** 0.5)
        selection = nn.init.normal_(self.gate.weight)
        selection *= std * self.d_model**0.5 / selection.norm(dim=-1, keepdim=True)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Sum up the K best experts times their scores; by brute force, run all of them."""
        tokens, router_TD, flat_mask = self._flatten(hidden, context)
        routing = self.gate(router_TD, flat_mask)
        if brute_force:
            output = self.experts.reference(tokens, routing.indices, routing.weights)
        else:
            output = self.experts(tokens, routing.indices, routing.weights, routing.max_assignments)
        return FeedForwardOutput(output.reshape(hidden.shape), routing.losses, routing.stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Route each token to its K best experts and sum their weighted outputs, and no more."""
        tokens = hidden.reshape(-1, self.d_model)
        flat_mask = None if mask is None else mask.flatten()
        router_TD = tokens if router_input is None else router_input.reshape(-1, self.d_model)
        routing = self.gate.select(router_TD, flat_mask)
        output = self.experts.infer(
            tokens, routing.indices, routing.weights, routing.max_assignments
        )
        return output.reshape(hidden.shape)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the experts' choices and scores."""
        _, router_TD, flat_mask = self._flatten(hidden, context)
        routing = self.gate(router_TD, flat_mask)
        return slot_load(routing.indices, routing.weights, self.num_experts)

    def cost(self) -> Cost:
        """Selection and K experts: 2 d E + 4 K d G FLOPs; d E + 2 E d G parameters."""
        selection = self.d_model * self.num_experts
        per_expert = self.experts.parameters_per_expert()
        active = selection + self.top_k * per_expert
        return Cost(
            total_parameters=selection + self.num_experts * per_expert,
            active_parameters=active,
            flops_per_token=2 * selection + self.top_k * self.experts.flops_per_assignment(),
            bytes_per_token=active * self.experts.down_proj.element_size(),
        )


register(
    Method(
        "sigma_moe",
        SigmaMoE,
        Paper(
            "Csordás et al.",
            2023,
            "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
            "2310.10837",
        ),
    )
)
