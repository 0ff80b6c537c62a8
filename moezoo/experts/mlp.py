"""E feed-forward experts with their weights stacked, run by one grouped kernel.

Shapes: T tokens, D d_model, E experts, F hidden width of an expert, K choices per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.init import output_std
from moezoo_kernels import grouped_mlp
from moezoo_kernels.activations import activate


class MLPExperts(nn.Module):
    """Stacked MLPs or gated linear units, in the layout of transformers' MoE blocks.

    Args:
        d_model: input and output width D.
        d_expert: hidden width F of one expert.
        num_experts: number of experts E.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: gated linear units; the gate's rows come first in ``gate_up_proj``.
        bias: whether both projections have biases.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        activation: str,
        gated: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.d_model, self.d_expert, self.num_experts = d_model, d_expert, num_experts
        self.activation, self.gated = activation, gated
        inner = 2 * d_expert if gated else d_expert
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, inner, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if bias:
            self.gate_up_bias = nn.Parameter(torch.empty(num_experts, inner))
            self.down_bias = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw weights from N(0, 1/fan_in); the output's further / sqrt(2 num_layers)."""
        nn.init.normal_(self.gate_up_proj, std=self.d_model**-0.5)
        nn.init.normal_(self.down_proj, std=output_std(self.d_expert, num_layers))
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        max_assignments: int,
        output_bias: bool = True,
    ) -> Tensor:
        """Sum the weighted answers of each token's experts; index -1 answers nothing.

        Without ``output_bias`` the answers go without theirs.
        """
        return grouped_mlp(
            x_TD,
            self.gate_up_proj,
            self.down_proj,
            indices_TK,
            weights_TK,
            activation=self.activation,
            gated=self.gated,
            bias_in=self.gate_up_bias,
            bias_out=self.down_bias if output_bias else None,
            max_assignments=max_assignments,
        )

    def reference(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        output_bias: bool = True,
        scale_TEF: Tensor | None = None,
    ) -> Tensor:
        """Run every expert on every token and weight the answers by a dense (T, E) matrix.

        ``scale_TEF`` multiplies hidden units, as dropout does.
        """
        down_bias = self.down_bias if output_bias else None
        one_hot_TKE = F.one_hot(indices_TK + 1, self.num_experts + 1)[..., 1:].to(weights_TK.dtype)
        dense_TE = (weights_TK.unsqueeze(-1) * one_hot_TKE).sum(dim=1).to(x_TD.dtype)
        output = torch.zeros_like(x_TD)
        for e in range(self.num_experts):
            up = F.linear(x_TD, self.gate_up_proj[e], _row(self.gate_up_bias, e))
            inner = activate(up, self.activation, self.gated)
            if scale_TEF is not None:
                inner = inner * scale_TEF[:, e]
            answer = F.linear(inner, self.down_proj[e], _row(down_bias, e))
            output = output + dense_TE[:, e : e + 1] * answer
        return output

    def parameters_per_expert(self) -> int:
        """Count the parameters of one expert."""
        return sum(p[0].numel() for p in self.parameters())

    def flops_per_assignment(self) -> int:
        """Give the forward FLOPs of one token in one expert."""
        return 2 * (self.gate_up_proj[0].numel() + self.down_proj[0].numel())


def _row(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else bias[index]
