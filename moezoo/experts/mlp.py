"""E feed-forward experts with their weights stacked, run by one grouped kernel.

Shapes: T tokens, D d_model, E experts, F hidden width of an expert, K choices per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.experts.around import Choices, OfRows, Weights, run_around, run_slot_by_slot
from moezoo.init import output_std
from moezoo_kernels import grouped_mlp
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, activate, split_gate
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.grouped_linear.by_slot import is_few
from moezoo_kernels.grouped_mlp.direct import (
    grouped_mlp_directly,
    is_direct,
    may_run_directly,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moezoo.parallel import DispatchedTokens


class MLPExperts(nn.Module):
    """Stacked MLPs or gated linear units, in the layout of transformers' MoE blocks.

    Args:
        d_model: input and output width D.
        d_expert: hidden width F of one expert.
        num_experts: number of experts E.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: gated linear units; the gate's rows come first in ``gate_up_proj``.
        bias: whether both projections have biases.
        glu: bounds of the gated linear units' factors.
        interleaved: the gate's rows and the linear ones lie in turn in ``gate_up_proj`` and its
            bias, as in GPT-OSS. They are read where they are.

    Attributes:
        mesh: the ranks that share the experts, after :meth:`shard`.
        can_shard: false where the owner computes with the parameters itself.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        *,
        activation: str,
        gated: bool,
        bias: bool,
        glu: GLUOptions = PLAIN_GLU,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.d_expert, self.num_experts = d_model, d_expert, num_experts
        self.activation, self.gated = activation, gated
        self.glu, self.interleaved = glu, interleaved
        self.mesh: DeviceMesh | None = None
        self.can_shard = True
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

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this rank's share of the experts only; see :func:`moezoo.parallel.shard_experts`.

        Raises:
            InputError: the ranks do not divide the experts.
        """
        from moezoo.parallel import split_parameters

        split_parameters(self, mesh, 0, "num_experts")
        self.mesh = mesh

    def dispatch(
        self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor
    ) -> DispatchedTokens | None:
        """Send tokens to the ranks of their experts, to pass on to the call; None if all are here.

        What is computed between this and the call overlaps with the all-to-all.
        """
        if self.mesh is None:
            return None
        from moezoo.parallel import dispatch_tokens

        return dispatch_tokens(autocast(x_TD), indices_TK, weights_TK, self.num_experts, self.mesh)

    def forward(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        max_assignments: int,
        output_bias: bool = True,
        dispatched: DispatchedTokens | None = None,
        after: OfRows | None = None,
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, ``(T, D)``; index -1 adds nothing.

        Without ``output_bias`` the experts' ``down_bias`` is left out. ``dispatched`` is what
        :meth:`dispatch` returned for these tokens, if it was called. ``after`` is applied to the
        outputs ``(N, D)`` before they are weighed, where their experts are; see
        :func:`moezoo.experts.around.run_around`.
        """
        sent = dispatched or self.dispatch(x_TD, indices_TK, weights_TK)
        if sent is None:
            weights = (self.gate_up_proj, self.down_proj)
            if after is None and may_run_directly(x_TD, indices_TK, weights_TK, *weights):
                return self._directly(x_TD, indices_TK, weights_TK, output_bias)
            return self._run(x_TD, indices_TK, weights_TK, max_assignments, output_bias, after)
        how = (sent.assignments, output_bias, after)
        return sent.combine(self._run(sent.x, sent.indices, sent.weights, *how))

    def infer(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        max_assignments: int,
        output_bias: bool = True,
        after: OfRows | None = None,
    ) -> Tensor:
        """Return what a call returns; the indices are a router's and not checked."""
        if after is not None and self.mesh is None and is_few(indices_TK, self.num_experts):
            choices = Choices(indices_TK, weights_TK, self.num_experts)
            return run_slot_by_slot(x_TD, self._weights(output_bias), choices, self.activate, after)
        usual = self.mesh is None and after is None
        if not (usual and is_direct(x_TD, indices_TK, self.gate_up_proj)):
            return self(x_TD, indices_TK, weights_TK, max_assignments, output_bias, None, after)
        return self._directly(x_TD, indices_TK, weights_TK, output_bias)

    def _directly(
        self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, output_bias: bool
    ) -> Tensor:
        """Run the experts on a few tokens in inference, without an operator."""
        return grouped_mlp_directly(
            x_TD,
            self.gate_up_proj,
            self.down_proj,
            indices_TK,
            weights_TK,
            activation=self.activation,
            gated=self.gated,
            bias_in=self.gate_up_bias,
            bias_out=self.down_bias if output_bias else None,
            glu=self.glu,
            interleaved=self.interleaved,
        )

    def _run(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        max_assignments: int,
        output_bias: bool,
        after: OfRows | None = None,
    ) -> Tensor:
        """Run the experts of this rank."""
        weights = self._weights(output_bias)
        if after is not None:
            choices = Choices(indices_TK, weights_TK, len(weights.w_in))
            return run_around(x_TD, weights, choices, max_assignments, self.activate, after)
        return grouped_mlp(
            x_TD,
            weights.w_in,
            weights.w_out,
            indices_TK,
            weights_TK,
            activation=self.activation,
            gated=self.gated,
            bias_in=weights.bias_in,
            bias_out=weights.bias_out,
            max_assignments=max_assignments,
            glu=self.glu,
            interleaved=self.interleaved,
        )

    def _weights(self, output_bias: bool) -> Weights:
        """Return the weights of this rank's experts."""
        down_bias = self.down_bias if output_bias else None
        return Weights(
            self._own(self.gate_up_proj),
            self._own(self.down_proj),
            None if self.gate_up_bias is None else self._own(self.gate_up_bias),
            None if down_bias is None else self._own(down_bias),
        )

    def _own(self, parameter: Tensor) -> Tensor:
        if self.mesh is None:
            return parameter
        from moezoo.parallel import own

        return own(parameter)

    def _whole(self, parameter: Tensor | None) -> Tensor | None:
        if self.mesh is None or parameter is None:
            return parameter
        from moezoo.parallel import whole

        return whole(parameter)

    def reference(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        output_bias: bool = True,
        scale_TEF: Tensor | None = None,
        after: OfRows | None = None,
    ) -> Tensor:
        """Run every expert on every token and weight the outputs by a dense (T, E) matrix.

        ``scale_TEF`` multiplies hidden units, as dropout does. ``after`` as for a call.
        """
        up_proj, down_proj = self._whole(self.gate_up_proj), self._whole(self.down_proj)
        assert up_proj is not None
        assert down_proj is not None
        up_bias = self._whole(self.gate_up_bias)
        down_bias = self._whole(self.down_bias if output_bias else None)
        one_hot_TKE = F.one_hot(indices_TK + 1, self.num_experts + 1)[..., 1:].to(weights_TK.dtype)
        dense_TE = (weights_TK.unsqueeze(-1) * one_hot_TKE).sum(dim=1).to(x_TD.dtype)
        output = torch.zeros_like(x_TD)
        for e in range(self.num_experts):
            up = F.linear(x_TD, up_proj[e], _row(up_bias, e))
            inner = self.activate(up)
            if scale_TEF is not None:
                inner = inner * scale_TEF[:, e]
            answer = F.linear(inner, down_proj[e], _row(down_bias, e))
            if after is not None:
                answer = after(answer)
            output = output + dense_TE[:, e : e + 1] * answer
        return output

    def activate(self, inner: Tensor) -> Tensor:
        """Return the values ``(..., F)`` of hidden neurons whose first products these are."""
        return activate(inner, self.activation, self.gated, self.glu, self.interleaved)

    def before_activation(self, inner: Tensor) -> Tensor:
        """Return what the activation reads of the first products: ``(..., F)``."""
        return split_gate(inner, self.interleaved)[0] if self.gated else inner

    def parameters_per_expert(self) -> int:
        """Count the parameters of one expert."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    def flops_per_assignment(self) -> int:
        """Return the forward FLOPs of one token in one expert."""
        return 2 * (self.gate_up_proj.numel() + self.down_proj.numel()) // self.num_experts


def _row(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else bias[index]
