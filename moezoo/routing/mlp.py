"""An MLP between what a router reads and its linear map, as in ZAYA.

Shapes: T tokens, D d_model, R width of the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.init import init_linear
from moezoo.routing.wide_linear import wide_linear
from moezoo_kernels.linear import Linear


class RouterMLP(nn.Module):
    """``gelu(W2 gelu(W1 norm(r) + b1) + b2)`` of a state ``r = W0 x + b0``, in fp32 or wider.

    ZAYA1 (Zyphra 2025, arXiv:2511.17127) routes by a linear map of this, as its public code has it.
    From its second layer on the state carries over layers: ``r_l = W0 x + b0 + s * r_{l-1}``, with
    a learned vector s.

    Args:
        d_model: width of what the router reads.
        width: of the MLP.
        eps: added to the mean square in the norm.
        carry: whether the state of the layer before is added.
    """

    state_scale: nn.Parameter | None

    def __init__(self, d_model: int, width: int, eps: float, carry: bool = False) -> None:
        super().__init__()
        self.eps, self.width = eps, width
        self.down = Linear(d_model, width)
        self.register_parameter("state_scale", nn.Parameter(torch.empty(width)) if carry else None)
        self.norm_scale = nn.Parameter(torch.empty(width))
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/fan_in); zero biases, unit scales."""
        nn.init.ones_(self.norm_scale)
        if self.state_scale is not None:
            nn.init.ones_(self.state_scale)
        for linear in (self.down, self.fc1, self.fc2):
            init_linear(linear, linear.in_features**-0.5)

    def state(self, hidden_TD: Tensor, before_TR: Tensor | None) -> Tensor:
        """Return the state r, ``(T, R)``.

        Args:
            hidden_TD: what the router reads.
            before_TR: the state of the layer before; None for zeros.

        Raises:
            InputError: that state is of another width.
        """
        state_TR = wide_linear(hidden_TD, self.down.weight, self.down.bias)
        if self.state_scale is None:
            return state_TR
        if before_TR is None:  # zeros all the same, so that the scale has a gradient in any layer
            before_TR = state_TR.new_zeros(1, self.width)
        if before_TR.shape[-1] != self.width:
            raise InputError(
                f"router_state: is {before_TR.shape[-1]} wide and the router's MLP {self.width}; "
                "give layers that carry it the same router.logits.mlp"
            )
        return state_TR + before_TR.to(state_TR.dtype) * self.state_scale.to(state_TR.dtype)

    def forward(self, state_TR: Tensor) -> Tensor:
        """Return ``(T, R)``, what the linear map reads."""
        scale_R = self.norm_scale.to(state_TR.dtype)
        x_TR = F.rms_norm(state_TR, scale_R.shape, scale_R, self.eps)
        for linear in (self.fc1, self.fc2):
            x_TR = F.gelu(wide_linear(x_TR, linear.weight, linear.bias))
        return x_TR

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: 2 d R + 4 R²."""
        return 2 * sum(part.weight.numel() for part in (self.down, self.fc1, self.fc2))
