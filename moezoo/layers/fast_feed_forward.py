"""Fast feedforward: a tree of decisions picks one of many small feed-forward leaves per token.

Training mixes all leaves softly, ``y = Σ_l π_l(x) Leaf_l(x)`` with π the product of the decisions
on the way to a leaf; inference takes the likelier side at each node, ``y = Leaf_{l(x)}(x)``, in
logarithmic time (Belcak and Wattenhofer 2023, arXiv:2308.14711, algorithm 1). With load balancing
and a master leaf it is the enhanced FFF (Charalampopoulos et al. 2024, arXiv:2405.16836).

Shapes: T tokens, D d_model, N = 2^depth - 1 nodes, E = 2^depth leaves, F width of a leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int, check_number
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
from moezoo.layers.dense import Activation, DenseFFN, default_width
from moezoo.routing import losses as L
from moezoo.routing import tree
from moezoo.routing.deferred import statistics
from moezoo.routing.stats import SlotLoad, expert_counts, kl_to_uniform, slot_load, usage
from moezoo_kernels import leaf_mlp
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.linear import linear

Reduction = Literal["per_token", "sum", "mean"]


class FastFeedForward(FeedForward):
    """A tree of depth D over 2^D MLP leaves: soft mixture in training, one leaf in inference.

    A call's ``losses``, in training only: ``hardening`` and ``load_balancing`` where their
    coefficient is not zero. Its ``stats``: ``expert_counts`` (E,) of the leaves that hard decisions
    reach, ``tokens``, ``usage`` (share of leaves reached), ``unevenness`` (KL of the counts from
    even, nats), and ``node_entropy`` (mean over nodes and tokens, nats) where all nodes were
    computed, which hard inference does not do.

    Args:
        d_model: width of the residual stream.
        depth: levels of the tree; 0 is one leaf and no node.
        d_leaf: hidden width of a leaf; default: such that all leaves together have the width of
            the dense block.
        activation: relu (the paper's), gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu,
            tanh or leaky_relu (0.01 below zero).
        gated: gated linear units as leaves instead of MLPs.
        hard: take one leaf instead of mixing all; default: exactly when not training.
        hardening: coefficient of the entropy of the decisions, which drives them to 0 or 1; the
            default is that of the authors' notebook.
        hardening_reduction: ``mean``: averaged over nodes and tokens. ``sum``: summed over both,
            as the paper's formula stands, whose coefficient is 3. ``per_token``: summed over nodes
            and averaged over tokens.
        region_leak: probability with which a node swaps its two children for a token; training
            only.
        load_balancing: coefficient of ``E Σ_l f_l P_l`` (arXiv:2405.16836).
        d_master: hidden width of the master leaf, which runs on every token; 0 for none.
        leaf_dropout: probability of dropping a leaf's hidden unit for a token; training only, and
            not in the master leaf.
        compat: ``upstream_eval`` leaves the leaf's output bias out of hard inference, as the
            authors' package (fastfeedforward 0.2.1) does.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        depth: int = 4,
        d_leaf: int | None = None,
        activation: Activation = "relu",
        gated: bool = False,
        hard: bool | None = None,
        hardening: float = 0.1,
        hardening_reduction: Reduction = "mean",
        region_leak: float = 0.0,
        load_balancing: float = 0.0,
        d_master: int = 0,
        leaf_dropout: float = 0.0,
        compat: Literal["upstream_eval"] | None = None,
    ) -> None:
        super().__init__(d_model)
        self.depth = check_int("depth", depth, minimum=0, maximum=24)
        if d_leaf is None:
            d_leaf = -(-default_width(d_model, gated) // 2**depth)
        self.d_leaf = check_int("d_leaf", d_leaf)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        if hard not in (None, True, False):
            raise InputError(f"hard: {hard!r} is not known; give true, false or null")
        self.hard = hard
        self.hardening = check_number("hardening", hardening)
        self.hardening_reduction = check_choice(
            "hardening_reduction", hardening_reduction, ("per_token", "sum", "mean")
        )
        self.region_leak = check_number("region_leak", region_leak, maximum=1.0)
        self.load_balancing = check_number("load_balancing", load_balancing)
        self.d_master = check_int("d_master", d_master, minimum=0)
        self.leaf_dropout = check_number("leaf_dropout", leaf_dropout, maximum=1.0)
        if compat is not None:
            check_choice("compat", compat, ("upstream_eval",))
        self.compat = compat

        self.tree = tree.DecisionTree(d_model, depth)
        self.leaves = MLPExperts(
            d_model, self.d_leaf, 2**depth, activation=activation, gated=gated, bias=True
        )
        self.leaves.can_shard = False  # training computes them all as one wide block
        if d_master:
            self.master = DenseFFN(d_model, d_master, activation=activation, gated=gated, bias=True)
            self.master_mix = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """The number of leaves."""
        return self.leaves.num_experts

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw all from U(±1/sqrt(fan_in)), as the authors' code; outputs / sqrt(num_layers)."""
        self.tree.reset_parameters()
        leaves = self.leaves
        _uniform(self.d_model**-0.5, leaves.gate_up_proj, leaves.gate_up_bias)
        _uniform((num_layers * self.d_leaf) ** -0.5, leaves.down_proj, leaves.down_bias)
        if self.d_master:
            self.master.reset_parameters(num_layers)
            nn.init.constant_(self.master_mix, 0.5)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Mix all leaves or run each token's own; by brute force, weight all by their paths."""
        x_TD, router_TD, mask_T = self._flatten(hidden, context)
        hard = not self.training if self.hard is None else self.hard
        decisions = self._decide(router_TD, hard, brute_force)
        leaf_T, p_TE, entropy_TN = decisions
        stats = statistics(self, self._stats, leaf_T, entropy_TN, mask_T)
        losses = self._losses(p_TE, entropy_TN, mask_T, stats)
        scale_TEF = self._dropout_scale(x_TD)
        # The package fails at depth 0, so there is nothing to reproduce.
        bias = self.training or not hard or self.compat != "upstream_eval" or self.depth == 0
        if brute_force:
            weights_TE = self._weights(decisions, hard, x_TD.dtype)
            every_TE = torch.arange(self.num_experts, device=x_TD.device).expand(len(x_TD), -1)
            output_TD = self.leaves.reference(x_TD, every_TE, weights_TE, bias, scale_TEF)
        elif hard and scale_TEF is None:
            output_TD = self._one_leaf(x_TD, decisions.leaf_T, mask_T, bias)
        else:
            weights_TE = self._weights(decisions, hard, x_TD.dtype)
            output_TD = self._mixture(x_TD, weights_TE, scale_TEF)
        if self.d_master:
            master = (self.master.reference if brute_force else self.master)(x_TD).hidden
            mix = self.master_mix.sigmoid()
            output_TD = (mix * output_TD + (1 - mix) * master).to(output_TD.dtype)
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        return FeedForwardOutput(output_TD.reshape(hidden.shape), losses, stats)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count the leaves that hard decisions reach; if soft, weigh by probabilities."""
        _, router_TD, mask_T = self._flatten(hidden, context)
        hard = not self.training if self.hard is None else self.hard
        decisions = self._decide(router_TD, hard, brute_force=False)
        leaf_T1 = decisions.leaf_T.unsqueeze(-1)
        load = slot_load(leaf_T1, None, self.num_experts, mask_T, kind="leaves")
        if hard or decisions.p_TE is None:
            return load
        p_TE = decisions.p_TE if mask_T is None else decisions.p_TE * mask_T.unsqueeze(-1)
        return load._replace(mass=p_TE.sum(dim=0))

    def _decide(self, router_TD: Tensor, hard: bool, brute_force: bool) -> _Decisions:
        if hard and not self.training and not brute_force:
            return _Decisions(self.tree.descend(router_TD), None, None)
        logits_TN = self.tree.logits(router_TD)
        swap_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
        if self.training and self.region_leak:
            swap_TN = torch.rand_like(logits_TN) < self.region_leak
        decide = _decide_by_paths if brute_force else _decide_by_levels
        decisions = decide(logits_TN, swap_TN, self.depth)
        return decisions._replace(entropy_TN=None) if hard and not self.training else decisions

    def _stats(
        self, leaf_T: Tensor, entropy_TN: Tensor | None, mask_T: Tensor | None
    ) -> dict[str, Tensor]:
        if mask_T is not None:
            leaf_T = leaf_T.masked_fill(~mask_T, -1)
        counts_E = expert_counts(leaf_T, self.num_experts)
        stats = {
            "expert_counts": counts_E,
            "tokens": counts_E.sum(),
            "usage": usage(counts_E),
            "unevenness": kl_to_uniform(counts_E),
        }
        if entropy_TN is not None:
            stats["node_entropy"] = _reduce(entropy_TN, mask_T, "mean")
        return stats

    def _losses(
        self,
        p_TE: Tensor | None,
        entropy_TN: Tensor | None,
        mask_T: Tensor | None,
        stats: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if not self.training:
            return losses
        if entropy_TN is not None and self.hardening:
            loss = _reduce(entropy_TN, mask_T, self.hardening_reduction)
            losses["hardening"] = self.hardening * loss
        if p_TE is not None and self.load_balancing:
            counts_E = L.sum_over_ranks(stats["expert_counts"])
            loss = L.load_balancing_loss(counts_E, L.masked_mean(p_TE, mask_T))
            losses["load_balancing"] = self.load_balancing * loss
        return losses

    def _dropout_scale(self, x_TD: Tensor) -> Tensor | None:
        """Draw the factors on all hidden units, ``(T, E, F)``: 0, or 1 / (1 - p)."""
        if not (self.training and self.leaf_dropout):
            return None
        ones = x_TD.new_ones(len(x_TD), self.num_experts, self.d_leaf)
        return F.dropout(ones, self.leaf_dropout)

    def _weights(self, decisions: _Decisions, hard: bool, dtype: torch.dtype) -> Tensor:
        """Return every leaf's weight, ``(T, E)``."""
        if hard or decisions.p_TE is None:
            return F.one_hot(decisions.leaf_T, self.num_experts).to(dtype)
        return decisions.p_TE

    def _one_leaf(self, x_TD: Tensor, leaf_T: Tensor, mask_T: Tensor | None, bias: bool) -> Tensor:
        """Compute each token's own leaf."""
        if mask_T is not None:
            leaf_T = leaf_T.masked_fill(~mask_T, -1)
        return leaf_mlp(
            x_TD,
            leaf_T,
            self.leaves.gate_up_proj,
            self.leaves.down_proj,
            activation=self.activation,
            gated=self.gated,
            bias_in=self.leaves.gate_up_bias,
            bias_out=self.leaves.down_bias if bias else None,
        )

    def _mixture(self, x_TD: Tensor, p_TE: Tensor, scale_TEF: Tensor | None) -> Tensor:
        """Compute all leaves as one wide block whose hidden units are scaled by π: two GEMMs."""
        leaves = self.leaves
        assert leaves.gate_up_bias is not None
        assert leaves.down_bias is not None
        up = linear(x_TD, leaves.gate_up_proj.flatten(0, 1), leaves.gate_up_bias.flatten())
        inner_TEF = activate(up.unflatten(-1, (self.num_experts, -1)), self.activation, self.gated)
        factor = p_TE.unsqueeze(-1) if scale_TEF is None else p_TE.unsqueeze(-1) * scale_TEF
        scaled_TEF = (inner_TEF * factor).to(inner_TEF.dtype)
        down_DEF = leaves.down_proj.transpose(0, 1)
        output_TD = linear(scaled_TEF.flatten(1), down_DEF.flatten(1))
        return output_TD + p_TE.to(inner_TEF.dtype) @ leaves.down_bias

    def cost(self) -> Cost:
        """Count hard inference: depth nodes, one leaf, the master leaf.

        ``2 depth d + 4 d F`` FLOPs, 6 d F if gated; the nodes' products are counted as the batched
        products with gathered rows that they are.
        """
        node, leaf = self.d_model + 1, self.leaves.parameters_per_expert()
        total = self.tree.num_nodes * node + self.num_experts * leaf
        active = self.depth * node + leaf
        flops = 2 * self.depth * self.d_model + self.leaves.flops_per_assignment()
        if self.d_master:
            master = self.master.cost()
            total += master.total_parameters + 1
            active += master.total_parameters + 1
            flops += master.flops_per_token
        bytes_per_token = active * self.leaves.down_proj.element_size()
        return Cost(total, active, flops, bytes_per_token)


class _Decisions(NamedTuple):
    """Decisions of tokens: the hard leaf, the leaves' probabilities, the nodes' entropies."""

    leaf_T: Tensor
    p_TE: Tensor | None
    entropy_TN: Tensor | None


def _decide_by_levels(logits_TN: Tensor, swap_TN: Tensor, depth: int) -> _Decisions:
    right_TN, left_TN = logits_TN.sigmoid(), (-logits_TN).sigmoid()
    p_TE = tree.leaf_probabilities(
        torch.where(swap_TN, right_TN, left_TN), torch.where(swap_TN, left_TN, right_TN)
    )
    leaf_T = tree.follow((logits_TN >= 0) ^ swap_TN, depth)
    # A coin and its swap have the same entropy.
    return _Decisions(leaf_T, p_TE, tree.bernoulli_entropy(logits_TN))


def _decide_by_paths(logits_TN: Tensor, swap_TN: Tensor, depth: int) -> _Decisions:
    """Multiply along the path of every leaf, as the formulas are written."""
    c_TN = (swap_TN.to(logits_TN.dtype) - logits_TN.sigmoid()).abs()
    entropy_TN = torch.special.entr(c_TN) + torch.special.entr(1 - c_TN)
    right_TN = (logits_TN >= 0) ^ swap_TN
    p, reached = [], []
    for leaf in range(2**depth):
        p_T, reached_T = torch.ones_like(logits_TN.sum(-1)), torch.ones_like(right_TN.any(-1))
        for node, goes_right in tree.path(leaf, depth):
            p_T = p_T * (c_TN[:, node] if goes_right else 1 - c_TN[:, node])
            reached_T = reached_T & (right_TN[:, node] == goes_right)
        p.append(p_T)
        reached.append(reached_T)
    leaf_T = torch.stack(reached, dim=-1).int().argmax(dim=-1)
    return _Decisions(leaf_T, torch.stack(p, dim=-1), entropy_TN)


def _reduce(entropy_TN: Tensor, mask_T: Tensor | None, reduction: str) -> Tensor:
    entropy_T = entropy_TN.sum(dim=-1)
    if reduction == "sum":
        return (entropy_T if mask_T is None else entropy_T * mask_T).sum()
    mean = L.masked_mean(entropy_T, mask_T)
    return mean if reduction == "per_token" else mean / max(entropy_TN.shape[-1], 1)


def _uniform(bound: float, *parameters: nn.Parameter | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


register(
    Method(
        "fast_feed_forward",
        FastFeedForward,
        Paper("Belcak & Wattenhofer", 2023, "Fast Feedforward Networks", "2308.14711"),
    ),
    Method(
        "efff",
        FastFeedForward,
        Paper(
            "Charalampopoulos et al.",
            2024,
            "Enhancing Fast Feed Forward Networks with Load Balancing and a Master Leaf Node",
            "2405.16836",
        ),
        {"load_balancing": 0.01, "d_master": 8},
    ),
)
