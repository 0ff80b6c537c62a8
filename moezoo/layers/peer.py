"""PEER: parameter-efficient expert retrieval from a million experts (He 2024, arXiv:2407.04153).

Each of h heads asks for its k best of N = n² experts, through product keys, and the outputs of all
heads are added up (algorithm 1)::

    I^h = top-k of q_h(x) · key_i        g^h = softmax over I^h of q_h(x) · key_i
    f(x) = Σ_h Σ_{i in I^h} g^h_i e_i(x)        e_i(x) = act(u_i · x) v_i

An expert is one hidden neuron, so a token's h k experts are the hidden layer of an MLP put
together for it (section 2.3). Experts and keys are shared by all heads.

Shapes: T tokens, D d_model, H heads, K experts per head, J = H K, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.experts.rank_one import RankOneExperts
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    ParameterGroup,
    TokenContext,
    register,
    set_apart,
)
from moezoo.layers.dense import Activation
from moezoo.routing.deferred import statistics
from moezoo.routing.product_key import ProductKeys
from moezoo.routing.query_network import QUERY_NORMS, QueryNetwork, QueryNorm
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo_kernels.activations import ACTIVATIONS

ScoreFunction = Literal["softmax", "sigmoid", "relu"]

SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


class PEER(FeedForward):
    """Single-neuron experts, retrieved by product keys.

    With ``query_norm="batch"`` a token's output depends, in training only, on the other tokens of
    the batch through their mean and variance.

    A call's ``stats``: ``tokens``; ``usage``, the share of experts with any weight in this batch;
    ``unevenness``, the divergence of the experts' weights from the uniform distribution in nats;
    and up to 4096 experts ``expert_counts`` (N,). It has no losses.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts N, a square n²; default: n a quarter of d_model, at least
            top_k and at most the paper's 1024.
        num_heads: heads H, each with a query of its own.
        top_k: experts per head, at most n.
        d_key: width of a query and of a key, even; default half of d_model.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: experts that are gated linear units, ``act(a_i · x) (u_i · x) v_i``.
        score_fn: how the k scores of a head become weights: softmax, sigmoid or relu.
        query_norm: batch, layer, qk (queries and keys) or none.
        share_keys: one set of keys for all heads, as in the paper, or one per head.
        sparse: give the experts' gradients as sparse tensors of the rows that were read
            (for torch.optim.SparseAdam or SGD); not under torch.compile.
        expert_lr_multiplier: learning rate of the experts, as a multiple of the run's.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int | None = None,
        num_heads: int = 8,
        top_k: int = 16,
        d_key: int | None = None,
        activation: Activation = "gelu",
        gated: bool = False,
        score_fn: ScoreFunction = "softmax",
        query_norm: QueryNorm = "batch",
        share_keys: bool = True,
        sparse: bool = False,
        expert_lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(d_model)
        self.num_heads = check_int("num_heads", num_heads)
        self.top_k = check_int("top_k", top_k)
        if num_experts is None:
            num_experts = max(min(d_model // 4, 1024), top_k) ** 2
        self.num_experts = check_int("num_experts", num_experts)
        num_keys = _side_of_square(num_experts)
        if top_k > num_keys:
            raise InputError(
                f"top_k: {top_k} is more than {num_keys}, the side of num_experts={num_experts}; "
                "lower top_k or raise num_experts"
            )
        self.d_key = check_int("d_key", max(2, d_model // 4 * 2) if d_key is None else d_key)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.score_fn = check_choice("score_fn", score_fn, SCORE_FUNCTIONS)
        self.query_norm = check_choice("query_norm", query_norm, QUERY_NORMS)
        self.share_keys = share_keys
        self.sparse = sparse
        self.expert_lr_multiplier = check_number("expert_lr_multiplier", expert_lr_multiplier)

        self.query = QueryNetwork(d_model, num_heads, self.d_key, norm=query_norm)
        self.keys = ProductKeys(
            self.d_key,
            num_keys,
            num_heads=num_heads,
            top_k=top_k,
            share_keys=share_keys,
            normalize=query_norm == "qk",
        )
        self.experts = RankOneExperts(
            d_model,
            num_experts,
            num_heads * top_k,
            activation=activation,
            gated=gated,
            sparse=sparse,
        )

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise queries, keys and experts; outputs scale with 1/sqrt(num_layers)."""
        self.query.reset_parameters()
        self.keys.reset_parameters()
        self.experts.reset_parameters(num_layers)

    def route(
        self, hidden: Tensor, router_input: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each token's experts and their weights, without running them: ``(T, H, K)`` both.

        Padding gets experts -1 and weights zero.
        """
        _, router_TD, mask_T = self._flatten(hidden, TokenContext(None, router_input, mask))
        return self._retrieve(router_TD, mask_T, brute_force=False)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Sum up the retrieved experts; by brute force, score all n² keys and run all experts."""
        tokens_TD, router_TD, mask_T = self._flatten(hidden, context)
        batch: dict[str, Tensor] = {}
        experts_THK, weights_THK = self._retrieve(router_TD, mask_T, brute_force, batch)
        answer = self.experts.reference if brute_force else self.experts
        output_TD = answer(tokens_TD, experts_THK.flatten(1), weights_THK.flatten(1))
        chosen = (experts_THK, weights_THK, self.num_experts, mask_T)
        stats = statistics(self, slot_stats, *chosen)
        if batch:
            stats = {**stats, **batch}
        return FeedForwardOutput(output_TD.reshape(hidden.shape), {}, stats)

    def _retrieve(
        self,
        router_TD: Tensor,
        mask_T: Tensor | None,
        brute_force: bool,
        batch: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if brute_force:
            scores_THK, experts_THK = self.keys.reference(self.query.reference(router_TD, mask_T))
        else:
            scores_THK, experts_THK = self.keys(self.query(router_TD, mask_T, batch))
        weights_THK = SCORE_FUNCTIONS[self.score_fn](scores_THK)
        if mask_T is None:
            return experts_THK, weights_THK
        padding = ~mask_T[:, None, None]
        return experts_THK.masked_fill(padding, -1), weights_THK.masked_fill(padding, 0.0)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the experts' choices and weights; ``shape`` is the keys' n × n grid."""
        experts_THK, weights_THK = self.route(hidden, context.router_input, context.mask)
        grid = (self.keys.num_keys, self.keys.num_keys)
        return slot_load(experts_THK, weights_THK, self.num_experts, shape=grid, ranked=True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Keep the experts out of weight decay and schedule, as the values of memory layers.

        Decay would shrink the many experts that a batch does not ask.
        """
        experts = ParameterGroup(
            "experts",
            [p for p in self.experts.parameters() if p.requires_grad],
            lr_multiplier=self.expert_lr_multiplier,
            weight_decay=False,
            schedule=False,
            sparse=self.experts.sparse,
        )
        return set_apart(super().parameter_groups(), [experts])

    def cost(self) -> Cost:
        """Queries 2 d h d_k, keys 2 h n d_k, experts h k (4 | 6) d FLOPs.

        A gathered dot product and a weighted sum of rows count as the matrix products they are;
        the h k² sums of half-scores are additions, which torch does not count.
        """
        always = sum(p.numel() for part in (self.query, self.keys) for p in part.parameters())
        tables = 3 if self.gated else 2
        answering = self.num_heads * self.top_k
        active = always + min(answering, self.num_experts) * tables * self.d_model
        flops = self.query.flops_per_token() + self.keys.flops_per_token()
        return Cost(
            total_parameters=always + self.num_experts * tables * self.d_model,
            active_parameters=active,
            flops_per_token=flops + answering * self.experts.flops_per_assignment(),
            bytes_per_token=active * self.experts.u.element_size(),
        )


def _side_of_square(num_experts: int) -> int:
    side = math.isqrt(num_experts)
    if side**2 != num_experts:
        raise InputError(
            f"num_experts: {num_experts} is not a square; the nearest are "
            f"{side**2} ({side}²) and {(side + 1) ** 2} ({side + 1}²)"
        )
    return side


register(Method("peer", PEER, Paper("He", 2024, "Mixture of A Million Experts", "2407.04153")))
