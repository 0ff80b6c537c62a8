"""Finedeep: a dense block cut into experts that all answer, in several sub-layers.

With ``h_0`` the input, M sub-layers follow each other, of K experts each::

    h_m = h_{m-1} + Σ_k r_k E_k(RMSNorm(h_{m-1})),    r_k = σ(<w_k, E_k(RMSNorm(h_{m-1}))>)

and the layer returns ``h_M - h_0``, as the block around it adds its input again (Pan et al.
2025, arXiv:2502.12928). Nothing is chosen, so parameters and FLOPs are the dense block's. That an
expert's weight is a sigmoid of its own answer is the paper's; that one vector per expert reads it
is our reading, as no text that we could read has the formula.

An expert's answer is linear in its hidden activations z, ``E_k = W_k z + b_k``. So its weight is
``σ(<W_kᵀ w_k, z> + <w_k, b_k>)``, and no answer is needed to weigh it: the weights multiply z, and
all experts' answers are added up by the one product that a dense block has, too.

Shapes: T tokens, D d_model, M sub-layers, K experts of each, F hidden width of an expert.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int, check_number
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
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.linear import Linear


class SubLayer(nn.Module):
    """K experts beside each other, the norm before them, and the vectors that weigh them.

    Args:
        width: D.
        num_experts: K.
        d_expert: F.
        activation: of the experts.
        gated: whether they are gated linear units.
        bias: whether their projections have biases.
        norm_eps: added to mean squares in the norm.

    Attributes:
        gate_proj: ``(K F, D)``, if gated; the rows of an expert follow each other.
        up_proj: ``(K F, D)``.
        down_proj: ``(D, K F)``, without a bias.
        down_bias: ``(K, D)``, or None.
        router: ``(K, D)``.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        d_expert: int,
        activation: str,
        gated: bool,
        bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.activation, self.norm_eps = activation, norm_eps
        self.norm = nn.Parameter(torch.empty(width))
        inner = num_experts * d_expert
        self.gate_proj = Linear(width, inner, bias=bias) if gated else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=False)
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.router = nn.Parameter(torch.empty(num_experts, width))

    def reset_parameters(self, branches: int) -> None:
        """Draw everything anew.

        Args:
            branches: how many sub-layers add into the model's residual stream.
        """
        nn.init.ones_(self.norm)
        for part in (self.gate_proj, self.up_proj):
            if part is not None:
                init_linear(part, part.in_features**-0.5)
        # Sigmoids begin near one half.
        init_linear(self.down_proj, 2 * output_std(self.down_proj.in_features, branches))
        nn.init.normal_(self.router, std=self.router.shape[1] ** -0.5)
        if self.down_bias is not None:
            nn.init.zeros_(self.down_bias)

    def forward(self, states_TD: Tensor) -> Tensor:
        """Return what the sub-layer adds, ``(T, D)``."""
        z_TKF = self._hidden(self._normed(states_TD)).unflatten(-1, (len(self.router), -1))
        weights_TK = self.weigh(z_TKF)
        weighed_TKF = z_TKF * weights_TK.to(z_TKF.dtype).unsqueeze(-1)
        output_TD: Tensor = self.down_proj(weighed_TKF.flatten(1))
        if self.down_bias is not None:
            # Not a product of matrices, which would be one more of this size.
            biases_TKD = weights_TK.unsqueeze(-1) * self.down_bias
            output_TD = output_TD + biases_TKD.sum(1).to(output_TD.dtype)
        return output_TD

    def weigh(self, z_TKF: Tensor) -> Tensor:
        """Return the experts' weights ``(T, K)``, of hidden activations ``(T, K, F)``."""
        logits_TK = (at_least_fp32(z_TKF) * self._readers()).sum(-1)
        if self.down_bias is not None:
            logits_TK = logits_TK + (self.router * self.down_bias).sum(-1)
        return logits_TK.sigmoid()

    def reference(self, states_TD: Tensor) -> Tensor:
        """Return the same, expert by expert, each of whose answers is weighed by itself."""
        x_TD = states_TD / (states_TD.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()
        x_TD = x_TD * self.norm
        output_TD = torch.zeros_like(x_TD)
        width = self.up_proj.out_features // len(self.router)
        for k, reader_D in enumerate(self.router):
            own = slice(k * width, (k + 1) * width)
            z_TF = _rows(self.up_proj, own, x_TD)
            act = ACTIVATIONS[self.activation]
            gate = self.gate_proj
            z_TF = act(z_TF) if gate is None else act(_rows(gate, own, x_TD)) * z_TF
            answer_TD = z_TF @ self.down_proj.weight[:, own].t()
            if self.down_bias is not None:
                answer_TD = answer_TD + self.down_bias[k]
            output_TD = output_TD + torch.sigmoid(answer_TD @ reader_D)[:, None] * answer_TD
        return output_TD

    def _normed(self, states_TD: Tensor) -> Tensor:
        wide_TD = at_least_fp32(states_TD)
        scale_D = self.norm.to(wide_TD.dtype)
        return F.rms_norm(wide_TD, scale_D.shape, scale_D, self.norm_eps).to(states_TD.dtype)

    def _hidden(self, x_TD: Tensor) -> Tensor:
        up_TI: Tensor = self.up_proj(x_TD)
        act = ACTIVATIONS[self.activation]
        return act(up_TI) if self.gate_proj is None else act(self.gate_proj(x_TD)) * up_TI

    def _readers(self) -> Tensor:
        """Return ``W_kᵀ w_k``, ``(K, F)``: what reads an expert's hidden activations."""
        down_DKF = self.down_proj.weight.unflatten(1, (len(self.router), -1))
        return (down_DKF * self.router.t().unsqueeze(-1)).sum(0)


def _rows(linear: nn.Linear, rows: slice, x_TD: Tensor) -> Tensor:
    product = x_TD @ linear.weight[rows].t()
    return product if linear.bias is None else product + linear.bias[rows]


class Finedeep(FeedForward):
    """A dense block cut into experts that all answer, in sub-layers that follow each other.

    It has no losses and no statistics: every expert answers every token.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width of all experts of all sub-layers together, a multiple of their number;
            default that of a dense block, rounded up to one.
        num_sublayers: how many follow each other, M.
        num_experts: of each sub-layer, K.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: experts are gated linear units instead of MLPs.
        bias: whether projections have biases.
        norm_eps: added to mean squares in the norms before sub-layers.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        num_sublayers: int = 2,
        num_experts: int = 8,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        self.num_sublayers = check_int("num_sublayers", num_sublayers)
        self.num_experts = check_int("num_experts", num_experts)
        parts = self.num_sublayers * self.num_experts
        if d_ff is None:
            d_ff = -(-default_width(d_model, gated) // parts) * parts
        self.d_ff = check_int("d_ff", d_ff)
        if self.d_ff % parts:
            raise InputError(
                f"d_ff: {d_ff} is not divisible by num_sublayers * num_experts = {parts}; make it "
                "a multiple"
            )
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated, self.bias = gated, bias
        self.norm_eps = check_number("norm_eps", norm_eps)
        d_expert = self.d_ff // parts
        self.sublayers = nn.ModuleList(
            SubLayer(d_model, num_experts, d_expert, activation, gated, bias, self.norm_eps)
            for _ in range(num_sublayers)
        )
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw projections as those of a dense block, of whose depth a sub-layer is a part."""
        for sublayer in self._parts():
            sublayer.reset_parameters(num_layers * self.num_sublayers)

    def _parts(self) -> list[SubLayer]:
        return [cast(SubLayer, sublayer) for sublayer in self.sublayers]

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Add up what the sub-layers add; a mask changes nothing, as no token sees another."""
        x_TD, _, _ = self._flatten(hidden, context)
        states_TD = x_TD
        added_TD: Tensor | None = None
        for sublayer in self._parts():
            step_TD = sublayer.reference(states_TD) if brute_force else sublayer(states_TD)
            added_TD = step_TD if added_TD is None else added_TD + step_TD
            states_TD = x_TD + added_TD.to(x_TD.dtype)
        assert added_TD is not None
        return FeedForwardOutput(added_TD.reshape(hidden.shape), {}, {})

    def cost(self) -> Cost:
        """Every parameter is active; the products are a dense block's, 4 or 6 D times ``d_ff``."""
        parameters = sum(p.numel() for p in self.parameters())
        matrices = 3 if self.gated else 2
        return Cost(
            total_parameters=parameters,
            active_parameters=parameters,
            flops_per_token=2 * matrices * self.d_model * self.d_ff,
            bytes_per_token=parameters * self._parts()[0].router.element_size(),
        )


register(
    Method(
        "finedeep",
        Finedeep,
        Paper(
            "Pan et al.",
            2025,
            "Finedeep: Mitigating Sparse Activation in Dense LLMs via Multi-Layer Fine-Grained "
            "Experts",
            "2502.12928",
        ),
    )
)
