"""Attention whose values are mixed hidden states, answered by a block's own experts: UMoE.

A router chooses K experts of a token. Each has a query of its own, and one key serves all of them;
what a query attends to is not projected, but mixed as it is and given to the expert (Yang et al.
2025, arXiv:2505.07260)::

    q_i = W_q x_t + B_i A_i x_t          z_i = Σ_s softmax_s(q_i · W_k x_s / sqrt(C)) x_s
    y_t = Σ_i p_i E_i(z_i)

The experts E are those of the block's feed-forward mixture, which has a router of its own. Queries
and keys turn by their positions. A cache holds keys and hidden states: C and D numbers of a token.

Shapes: B sequences, S tokens of each, T = B S, D hidden_size, C head_dim, E experts, K choices,
R rank, N = T K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moezoo.errors import InputError, check_int
from moezoo.experts import ExpertNormOptions
from moezoo.experts.mlp import MLPExperts
from moezoo.init import init_linear
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions, Router, RouterOptions
from moezoo_kernels.grouped_linear import assign, grouped_linear, sum_by_token
from moezoo_kernels.linear import Linear
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention import SelfAttention
from moezoo_models.model.attention_experts import AttentionExperts, options_of
from moezoo_models.model.rotary import rotate

if TYPE_CHECKING:
    from moezoo_models.model.config import MoezooConfig

BACKENDS = ("sdpa", "eager")


class MixtureAttention(SelfAttention):
    """Attention by a mixture's experts, for a block whose feed-forward layer has them.

    Args:
        config: the model's configuration, with ``attention_experts``.
        layer_idx: number of the layer, which is its place in the cache.
        layer: the block's mixture, whose experts each call is given.

    Raises:
        InputError: the mixture has more than experts of full width, or attention other options
            than this has.
    """

    def __init__(self, config: MoezooConfig, layer_idx: int, layer: SparseMoE) -> None:
        options = options_of(config.attention_experts)
        _check(config, layer, options)
        width, experts, top_k = config.hidden_size, layer.num_experts, options.top_k
        head_dim = config.head_dim or width // config.num_attention_heads
        scaling = config.attention_multiplier or head_dim**-0.5
        super().__init__(config, layer_idx, scaling, groups=top_k)  # queries share the key
        self.options, self.head_dim = options, head_dim
        self.q_proj = Linear(width, self.head_dim, bias=config.attention_bias)
        self.k_proj = Linear(width, self.head_dim, bias=config.attention_bias)
        self.query_down = nn.Parameter(torch.empty(experts, self.options.rank, width))
        self.query_up = nn.Parameter(torch.empty(experts, self.head_dim, self.options.rank))
        self.gate = Router(
            width,
            experts,
            top_k,
            options=RouterOptions(normalize=self.options.normalize),
            balance=BalanceOptions(load_balancing=0.0, sequence=self.options.balance),
        )
        self._per_expert = layer.experts.parameters_per_expert()
        self._expert_flops = layer.experts.flops_per_assignment()

    def reset_parameters(self) -> None:
        """Draw projections from N(0, 1/fan_in), what is an expert's own in a query half as large.

        The experts' outputs are scaled already.
        """
        width, rank = self.query_down.shape[2], self.options.rank
        for projection in (self.q_proj, self.k_proj):
            init_linear(projection, width**-0.5)
        nn.init.normal_(self.query_down, std=width**-0.5)
        nn.init.normal_(self.query_up, std=0.5 * rank**-0.5)
        self.gate.reset_parameters()

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Any,
        past_key_values: Cache | None = None,
        *,
        experts: MLPExperts,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Attend from each position to those before it, and let experts answer.

        Args:
            hidden: ``(B, S, D)``.
            rotary: cos and sin at the positions; None where positions are learned.
            attention_mask: as the backend's mask function made it.
            past_key_values: cache that these keys and hidden states are added to.
            experts: those of the block's mixture.
            token_mask: ``(B, S)`` bool, true at real tokens; others get zeros.
            kwargs: passed on to the backend.

        Returns:
            ``(B, S, D)``; the attention weights of the eager backend; and the losses of attention's
            router, weighted.
        """
        batch, length, width = hidden.shape
        flat_TD, mask_T = hidden.reshape(-1, width), None
        if token_mask is not None:
            mask_T = token_mask[:, -length:].reshape(-1)
        routing = self.gate(flat_TD, mask_T, (batch, length))
        indices_N1 = routing.indices.reshape(-1, 1)
        query = self._queries(flat_TD, indices_N1).unflatten(0, (batch, length, -1)).transpose(1, 2)
        key, value = self.k_proj(hidden).unsqueeze(1), hidden.unsqueeze(1)
        dtype = key.dtype
        value = value.to(dtype)  # under autocast backends want one
        if rotary is not None and self.rotated:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        query, key = query.to(dtype), key.to(dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = self.attend(query, key, value, attention_mask, **kwargs)
        answers_ND = experts(
            mixed.reshape(-1, width),
            indices_N1,
            routing.weights.reshape(-1, 1),
            routing.max_assignments,
        )
        return answers_ND.view(batch, length, -1, width).sum(2), weights, routing.losses

    def _queries(self, flat_TD: Tensor, indices_N1: Tensor) -> Tensor:
        """Return a query of each token and choice, ``(N, C)``."""
        rows_ND = flat_TD.repeat_interleave(self.options.top_k, dim=0)
        assignments = assign(indices_N1, len(self.query_down))
        low = grouped_linear(rows_ND, self.query_down, assignments)
        own = grouped_linear(low, self.query_up, assignments, gather=False)
        own_NC = sum_by_token(own, (indices_N1 >= 0).to(own.dtype), assignments)
        return self.q_proj(flat_TD).repeat_interleave(self.options.top_k, dim=0) + own_NC

    def flops_per_token(self, context: int) -> int:
        """Return the forward FLOPs of one token that sees so many, but for ``nn.Linear``'s."""
        rank, width = self.query_down.shape[1:]
        attending = 2 * context * (self.head_dim + width)
        own = 2 * rank * (width + self.head_dim)
        each = attending + own + self._expert_flops
        return self.options.top_k * each + self.gate.flops_per_token()

    def idle_parameters(self) -> int:
        """Count parameters that a token does not touch, less the experts that it does.

        These are stored, and counted as idle, by the block's mixture.
        """
        experts, top_k = len(self.query_down), self.options.top_k
        own = (self.query_down.numel() + self.query_up.numel()) // experts
        return (experts - top_k) * own - top_k * self._per_expert


def _check(config: MoezooConfig, layer: SparseMoE, options: AttentionExperts) -> None:
    check_int("attention_experts.top_k", options.top_k, maximum=layer.num_experts)
    more = layer.d_latent is not None or layer.num_idle_experts or layer.gate.capacity
    if more or layer.expert_norms != ExpertNormOptions():
        raise InputError(
            "attention_experts: attention shares experts of full width, without norms, capacity, "
            "identity or skip experts; leave these out"
        )
    if config.qk_norm:
        raise InputError("attention_experts: its queries have no norms; set qk_norm to false")
    if (backend := attention_backend(config)) not in (None, *BACKENDS):
        raise InputError(
            f"attention: '{backend}' cannot mix values wider than its keys (attention_experts); "
            f"{' and '.join(BACKENDS)} can"
        )
