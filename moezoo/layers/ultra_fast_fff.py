"""UltraFastBERT's feedforward: trees of neurons in which each neuron on the way adds to the output.

A tree's node is one neuron. Its pre-activation decides where to go and adds to the output:
``y = Σ_trees Σ_{n on the way} GELU(a_n) v_n`` with ``a_n = w_n · x + b_n``; right iff ``a_n > 0``
(Belcak and Wattenhofer 2023, arXiv:2311.10770, section 2). Of 2^(depth + 1) - 1 neurons per tree
depth + 1 are used. The decisions get no gradient; the neurons learn through what they add.

Shapes: T tokens, D d_model, P trees, N = 2^(depth + 1) - 1 neurons of a tree.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moezoo.errors import check_choice, check_int
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
from moezoo.routing.deferred import statistics
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo_kernels import path_neurons
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.linear import linear


class UltraFastFFF(FeedForward):
    """P parallel trees of neurons; each token uses one path from root to bottom of each.

    Training computes all neurons and masks those off the path, inference gathers the path's.

    A call's ``stats``: ``expert_counts`` (P 2^depth,) of the bottom neurons, one per token and tree
    (left out beyond 4096), ``tokens``, ``usage`` (share of bottom neurons reached) and
    ``unevenness`` (KL of their counts from even, nats). It has no losses.

    Args:
        d_model: width of the residual stream.
        num_trees: parallel trees P (UltraFastBERT-1x11 has one, of depth 11).
        depth: decisions on a path, which has depth + 1 neurons; default: the least at which the
            trees together are as wide as the dense block.
        activation: gelu (the paper's), relu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu,
            tanh or leaky_relu (0.01 below zero).
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_trees: int = 1,
        depth: int | None = None,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(d_model)
        self.num_trees = check_int("num_trees", num_trees)
        if depth is None:
            width_per_tree = -(-default_width(d_model, gated=False) // num_trees)
            depth = width_per_tree.bit_length() - 1
        self.depth = check_int("depth", depth, minimum=0, maximum=24)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.num_nodes = 2 ** (self.depth + 1) - 1
        self.in_weight = nn.Parameter(torch.empty(num_trees, self.num_nodes, d_model))
        self.in_bias = nn.Parameter(torch.empty(num_trees, self.num_nodes))
        self.out_weight = nn.Parameter(torch.empty(num_trees, self.num_nodes, d_model))
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw from U(±1/sqrt(d)) and U(±1/sqrt(P (depth + 1))); outputs / sqrt(num_layers)."""
        bound = self.d_model**-0.5
        nn.init.uniform_(self.in_weight, -bound, bound)
        nn.init.uniform_(self.in_bias, -bound, bound)
        bound = (num_layers * self.num_trees * (self.depth + 1)) ** -0.5
        nn.init.uniform_(self.out_weight, -bound, bound)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Sum up the neurons on each token's paths."""
        x_TD, router_TD, mask_T = self._flatten(hidden, context)
        if brute_force:
            compute = self._neuron_by_neuron
        else:
            compute = self._dense if self.training else self._descend
        output_TD, bottom_TP = compute(x_TD, router_TD)
        return self._output(hidden, output_TD, bottom_TP, mask_T)

    def _neuron_by_neuron(self, x_TD: Tensor, router_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Run all neurons one by one, each times whether the decisions above lead to it."""
        first_bottom = 2**self.depth - 1
        act = ACTIVATIONS[self.activation]
        output_TD, bottom = torch.zeros_like(x_TD), []
        for w_ND, b_N, v_ND in zip(self.in_weight, self.in_bias, self.out_weight, strict=True):
            logits = [x_TD @ w_D + b for w_D, b in zip(w_ND, b_N, strict=True)]
            on_path = [torch.ones_like(logits[0], dtype=torch.bool)]
            for node in range(first_bottom):
                right_T = router_TD @ w_ND[node] + b_N[node] > 0
                on_path += [on_path[node] & ~right_T, on_path[node] & right_T]
            for logit_T, reached_T, v_D in zip(logits, on_path, v_ND, strict=True):
                output_TD = output_TD + (act(logit_T) * reached_T).unsqueeze(-1) * v_D
            bottom.append(torch.stack(on_path[first_bottom:], dim=-1).int().argmax(dim=-1))
        return output_TD, torch.stack(bottom, dim=-1)

    def _logits(self, x_TD: Tensor) -> Tensor:
        """Compute the pre-activations of all neurons: ``(T, P, N)``."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_fp32(x_TD)
            weight, bias = self.in_weight.flatten(0, 1), self.in_bias.flatten()
            logits = linear(x_TD, weight.to(x_TD.dtype), bias.to(x_TD.dtype))
        return logits.unflatten(-1, (self.num_trees, self.num_nodes))

    def _dense(self, x_TD: Tensor, router_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute all neurons, and mask: two GEMMs."""
        logits_TPN = self._logits(x_TD)
        with torch.no_grad():
            right_TPN = (logits_TPN if router_TD is x_TD else self._logits(router_TD)) > 0
            node_TP1 = torch.zeros_like(logits_TPN[..., :1], dtype=torch.int64)
            on_path_TPN = torch.zeros_like(right_TPN).scatter_(-1, node_TP1, True)
            for _ in range(self.depth):
                node_TP1 = 2 * node_TP1 + 1 + right_TPN.gather(-1, node_TP1)
                on_path_TPN.scatter_(-1, node_TP1, True)
        inner_TPN = ACTIVATIONS[self.activation](logits_TPN).masked_fill(~on_path_TPN, 0.0)
        weight = self.out_weight.flatten(0, 1)
        output_TD = inner_TPN.flatten(1).to(weight.dtype) @ weight
        return output_TD, node_TP1.squeeze(-1) - (2**self.depth - 1)

    def _descend(self, x_TD: Tensor, router_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the neurons on the path, reading their rows only."""
        return path_neurons(
            x_TD,
            self.in_weight,
            self.in_bias,
            self.out_weight,
            activation=self.activation,
            asking=None if router_TD is x_TD else router_TD,
        )

    def _output(
        self, hidden: Tensor, output_TD: Tensor, bottom_TP: Tensor, mask_T: Tensor | None
    ) -> FeedForwardOutput:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        output_TD = output_TD.to(dtype)
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        stats = statistics(self, self._stats, bottom_TP, mask_T)
        return FeedForwardOutput(output_TD.reshape(hidden.shape), {}, stats)

    def _stats(self, bottom_TP: Tensor, mask_T: Tensor | None) -> dict[str, Tensor]:
        slots_TP, num_slots = self._slots(bottom_TP)
        return slot_stats(slots_TP, None, num_slots, mask_T)

    def _slots(self, bottom_TP: Tensor) -> tuple[Tensor, int]:
        """Number the bottom neurons of all trees, and give how many there are."""
        bottoms = 2**self.depth
        first_P = bottoms * torch.arange(self.num_trees, device=bottom_TP.device)
        return bottom_TP + first_P, self.num_trees * bottoms

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up which bottom neurons are reached; ``shape`` is trees × neurons of one."""
        _, router_TD, mask_T = self._flatten(hidden, context)
        slots_TP, num_slots = self._slots(self._descend(router_TD, router_TD)[1])
        grid = (self.num_trees, 2**self.depth) if self.num_trees > 1 else None
        return slot_load(slots_TP, None, num_slots, mask_T, kind="leaves", shape=grid)

    def cost(self) -> Cost:
        """Count inference: ``4 P (depth + 1) d`` FLOPs in products with gathered rows."""
        neurons = self.num_trees * (self.depth + 1)
        active = neurons * (2 * self.d_model + 1)
        return Cost(
            total_parameters=self.num_trees * self.num_nodes * (2 * self.d_model + 1),
            active_parameters=active,
            flops_per_token=4 * neurons * self.d_model,
            bytes_per_token=active * self.in_weight.element_size(),
        )


register(
    Method(
        "ultra_fast_fff",
        UltraFastFFF,
        Paper(
            "Belcak & Wattenhofer", 2023, "Exponentially Faster Language Modelling", "2311.10770"
        ),
    )
)
