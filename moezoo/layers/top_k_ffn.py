"""A feed-forward block that keeps only a token's strongest neurons.

Exact: ``y = W_down topk(a)``, ``a = act(W_up x)``: the k largest activations stay, the others are
zero (Li et al. 2022, "The Lazy Neuron Phenomenon", arXiv:2210.06313, section 4; Csordás et al.
2023, arXiv:2310.10837, section 3.1).

Statistical: pre-activations u are taken for Gaussian, so that about k of F pass a threshold that
their mean and standard deviation give, and no sorting is needed (You et al. 2025, "Spark
Transformer", arXiv:2506.06644): ``act(max(u - θ, 0))``, ``θ = mean(u) + std(u) Φ⁻¹(1 - k / F)``.

Shapes: T tokens, D d_model, F hidden width, K neurons kept, R width that the gate reads.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moezoo.errors import InputError, check_choice, check_int
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense import Activation, default_width
from moezoo.routing.deferred import statistics
from moezoo.routing.neuron_stats import neuron_stats
from moezoo.routing.stats import SlotLoad, neuron_load
from moezoo_kernels import statistical_top_k
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.linear import Linear
from moezoo_kernels.statistical_top_k.plain import excess


class TopKFFN(FeedForward):
    """An MLP or gated linear unit with top-k activation, under Llama's tensor names.

    A call's ``stats``: ``tokens``; ``density``, the mean share of neurons that are not zero;
    ``usage``, the share of neurons that were not zero for some token; ``unevenness``, the
    divergence of the neurons' summed magnitudes from uniform, in nats; and up to 4096 neurons,
    ``expert_counts`` (F,), how often each was not zero. It has no losses.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width F; default 4 d_model, or 8/3 d_model rounded up to 16 when gated
            (4 d_model too if the input is split, which has the parameters of an MLP).
        top_k: neurons per token; default F / 4 (arXiv:2310.10837 keeps 512 of 2053), or 8 % of F
            if selection is statistical (arXiv:2506.06644).
        selection: ``exact`` keeps the k strongest activations; ``statistical`` subtracts a
            threshold that about k pre-activations (the gate's, if gated) pass.
        rank: in exact selection, an activation's strength is its ``magnitude``, or its
            ``contribution``, the magnitude times the length of its column of W_down.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: a gated linear unit instead of an MLP.
        split_input: the gate reads the first half of the input, the linear branch the rest
            (Spark FFN, arXiv:2506.06644); needs gated.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        top_k: int | None = None,
        selection: Literal["exact", "statistical"] = "exact",
        rank: Literal["magnitude", "contribution"] = "magnitude",
        activation: Activation = "relu",
        gated: bool = False,
        split_input: bool = False,
    ) -> None:
        super().__init__(d_model)
        if split_input and not gated:
            raise InputError("split_input: an MLP has nothing to split; set gated: true")
        if split_input and d_model < 2:
            raise InputError("split_input: a d_model of 1 has no halves; set it to false")
        if d_ff is None:
            d_ff = default_width(d_model, gated and not split_input)
        self.d_ff = check_int("d_ff", d_ff)
        self.selection = check_choice("selection", selection, ("exact", "statistical"))
        if top_k is None:
            top_k = max(1, round(self.d_ff * (0.25 if selection == "exact" else 0.08)))
        self.top_k = check_int("top_k", top_k, maximum=self.d_ff)
        if selection == "statistical" and self.top_k == self.d_ff:
            raise InputError(
                f"top_k: {top_k} is all of d_ff, which no threshold keeps; "
                "lower it, or set selection: exact"
            )
        if selection == "statistical":
            self.quantile = NormalDist().inv_cdf(1 - self.top_k / self.d_ff)
        self.rank = check_choice("rank", rank, ("magnitude", "contribution"))
        if selection == "statistical" and rank != "magnitude":
            raise InputError("rank: a threshold ranks nothing; set it to magnitude")
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.split_input = split_input

        self.gate_width = d_model // 2 if split_input else d_model
        up_width = d_model - self.gate_width if split_input else d_model
        if gated:
            self.gate_proj = Linear(self.gate_width, self.d_ff, bias=False)
        self.up_proj = Linear(up_width, self.d_ff, bias=False)
        self.down_proj = Linear(self.d_ff, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw weights from N(0, 1/fan_in), the output's by the k neurons that are kept."""
        if self.gated:
            init_linear(self.gate_proj, self.gate_proj.in_features**-0.5)
        init_linear(self.up_proj, self.up_proj.in_features**-0.5)
        init_linear(self.down_proj, output_std(self.top_k, num_layers))

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Keep each token's strongest neurons; a mask only keeps padding out of the statistics."""
        x_TD, router_TD, mask_T = self._flatten(hidden, context)
        if brute_force:
            output_TD, inner_TF = self._neuron_by_neuron(x_TD, router_TD)
            output = output_TD.reshape(hidden.shape)
            return FeedForwardOutput(output, {}, self._stats(inner_TF.detach(), mask_T))
        if _in_blocks(x_TD):
            return self._block_by_block(hidden, x_TD, context.router_input, mask_T)
        inner = self._kept(hidden, context.router_input)
        stats = statistics(self, self._stats, inner.reshape(-1, self.d_ff), mask_T)
        return FeedForwardOutput(self.down_proj(inner), {}, stats)

    def _block_by_block(
        self, hidden: Tensor, x_TD: Tensor, router_input: Tensor | None, mask_T: Tensor | None
    ) -> FeedForwardOutput:
        """Compute without gradients what a call computes, some tokens at a time."""
        output_TD = torch.empty_like(x_TD)
        router_TD = None if router_input is None else router_input.reshape(x_TD.shape)
        loads, active = [], []
        for begin in range(0, len(x_TD), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            inner_TF = self._kept(x_TD[part], None if router_TD is None else router_TD[part])
            output_TD[part] = self.down_proj(inner_TF)
            load, active_T = neuron_load(inner_TF, None if mask_T is None else mask_T[part])
            loads.append(load)
            active.append(active_T)
        counts_F, mass_F = (
            torch.stack(parts).sum(dim=0)
            for parts in ([load.counts for load in loads], [load.mass for load in loads])
        )
        load = loads[0]._replace(counts=counts_F, mass=mass_F)
        stats = neuron_stats(load, torch.cat(active), mask_T)
        return FeedForwardOutput(output_TD.reshape(hidden.shape), {}, stats)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count how often each neuron is not zero, and sum up its magnitude."""
        _, _, mask_T = self._flatten(hidden, context)
        inner_TF = self._kept(hidden, context.router_input).reshape(-1, self.d_ff)
        return neuron_load(inner_TF, mask_T)[0]

    def _kept(self, hidden: Tensor, router_input: Tensor | None) -> Tensor:
        """Compute the hidden layer ``(..., F)``, zero where it is not kept."""
        gate, up = self._branches(hidden)
        if self.selection == "statistical" and router_input is None:
            pre, linear = (up, None) if gate is None else (gate, up)
            return statistical_top_k(
                pre, linear, quantile=self.quantile, activation=self.activation
            )
        inner = asked = self._inner(gate, up)
        if router_input is not None:
            with torch.no_grad():
                asked = self._inner(*self._branches(router_input))
        if self.selection == "exact":
            return self._strongest(inner, asked)
        inner = ACTIVATIONS[self.activation](inner.where(asked > 0, 0.0).to(up.dtype))
        return inner if gate is None else inner * up

    def _branches(self, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.gated:
            return None, self.up_proj(hidden)
        if not self.split_input:
            return self.gate_proj(hidden), self.up_proj(hidden)
        first, rest = hidden.tensor_split([self.gate_width], dim=-1)
        return self.gate_proj(first), self.up_proj(rest)

    def _inner(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return every activation, or every pre-activation less the threshold."""
        if self.selection == "statistical":
            return excess(up if gate is None else gate, self.quantile)
        act = ACTIVATIONS[self.activation]
        return act(up) if gate is None else act(gate) * up

    def _strongest(self, inner: Tensor, asked: Tensor) -> Tensor:
        """Zero all but those that are strongest in ``asked``; of equals, as many as have room."""
        strength = asked.detach().abs()
        if self.rank == "contribution":
            lengths = self.down_proj.weight.detach().norm(dim=0)
            strength = strength.to(torch.promote_types(strength.dtype, lengths.dtype)) * lengths
        kept = strength.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(inner).scatter(-1, kept, inner.gather(-1, kept))

    def _stats(self, inner_TF: Tensor, mask_T: Tensor | None) -> dict[str, Tensor]:
        return neuron_stats(*neuron_load(inner_TF, mask_T), mask_T)

    def _neuron_by_neuron(self, x_TD: Tensor, router_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output ``(T, D)`` and the hidden layer ``(T, F)``, zero where not kept.

        A neuron is kept by counting those that are stronger, or by the threshold.
        """
        act = ACTIVATIONS[self.activation]
        inner_TF, up_TF = self._reference_inner(x_TD)
        asked_TF = inner_TF if router_TD is x_TD else self._reference_inner(router_TD)[0]
        if self.selection == "statistical":
            value_TF = act(inner_TF.where(asked_TF > 0, 0.0)) * (up_TF if self.gated else 1.0)
        else:
            value_TF = inner_TF
            strength_TF = asked_TF.detach().abs()
            if self.rank == "contribution":
                strength_TF = strength_TF * self.down_proj.weight.detach().square().sum(0).sqrt()
            # Of the strengths, the k-th largest; neurons below it are not kept.
            weakest_T1 = strength_TF.sort(dim=-1, descending=True).values[:, self.top_k - 1, None]
            value_TF = value_TF.where(strength_TF >= weakest_T1, 0.0)
        output_TD = torch.zeros_like(x_TD)
        for j in range(self.d_ff):
            output_TD = output_TD + value_TF[:, j, None] * self.down_proj.weight[:, j]
        return output_TD, value_TF

    def _reference_inner(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return every activation, or every pre-activation less the threshold; and W_up x."""
        up_TF = x_TD[:, -self.up_proj.in_features :] @ self.up_proj.weight.t()
        first_TF = up_TF
        if self.gated:
            first_TF = x_TD[:, : self.gate_width] @ self.gate_proj.weight.t()
        if self.selection == "exact":
            value_TF = ACTIVATIONS[self.activation](first_TF)
            return value_TF * (up_TF if self.gated else 1.0), up_TF
        mean_T = first_TF.sum(dim=-1) / self.d_ff
        variance_T = (first_TF - mean_T[:, None]).square().sum(dim=-1) / self.d_ff
        # A constant row has no deviation, whose gradient there is taken as zero.
        deviation_T = variance_T.where(variance_T > 0, 1.0).sqrt() * (variance_T > 0)
        z = math.sqrt(2) * torch.special.erfinv(
            torch.tensor(1 - 2 * self.top_k / self.d_ff, dtype=torch.float64)
        )
        theta_T = mean_T + deviation_T * z.to(x_TD.dtype)
        return first_TF - theta_T[:, None], up_TF

    def cost(self) -> Cost:
        """Products as computed, which are dense: 4 d F FLOPs, 6 d F if gated and not split.

        A token's active parameters are the input matrices and k columns of W_down.
        """
        inputs = sum(p.numel() for p in self.parameters()) - self.down_proj.weight.numel()
        active = inputs + self.top_k * self.d_model
        return Cost(
            total_parameters=inputs + self.d_ff * self.d_model,
            active_parameters=active,
            flops_per_token=2 * (inputs + self.d_ff * self.d_model),
            bytes_per_token=active * self.down_proj.weight.element_size(),
        )


_BLOCK = 1024
"""Tokens whose hidden layers are still in a CPU's caches when they are read again."""


def _in_blocks(x_TD: Tensor) -> bool:
    """Return whether tokens are run block by block: many, on a CPU, without gradients."""
    return (
        len(x_TD) > _BLOCK
        and x_TD.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


register(
    Method(
        "top_k_ffn",
        TopKFFN,
        Paper(
            "Li et al.",
            2022,
            "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
            "2210.06313",
        ),
    ),
    Method(
        "spark_ffn",
        TopKFFN,
        Paper(
            "You et al.",
            2025,
            "Spark Transformer: Reactivating Sparsity in FFN and Attention",
            "2506.06644",
        ),
        {
            "selection": "statistical",
            "activation": "gelu_tanh",
            "gated": True,
            "split_input": True,
        },
    ),
)
