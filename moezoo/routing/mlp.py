"""An MLP between what a router reads and its linear map, as in ZAYA.

Shapes: T tokens, D d_model, R width of the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.init import init_linear
from moezoo.routing.wide_linear import wide_linear


class RouterMLP(nn.Module):
    """``gelu(W2 gelu(W1 norm(W0 x + b0) + b1) + b2)``, in fp32 or wider.

    ZAYA1 (Zyphra 2025) routes by a linear map of this, as its public code has it. What it adds to
    ``W0 x`` from the router of the layer before is left out: no layer here reads another's state.

    Args:
        d_model: width of what the router reads.
        width: of the MLP.
        eps: added to the mean square in the norm.
    """

    def __init__(self, d_model: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.down = nn.Linear(d_model, width)
        self.norm_scale = nn.Parameter(torch.empty(width))
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/fan_in); zero biases, unit scales."""
        nn.init.ones_(self.norm_scale)
        for linear in (self.down, self.fc1, self.fc2):
            init_linear(linear, linear.in_features**-0.5)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return ``(T, R)``."""
        x_TR = wide_linear(hidden_TD, self.down.weight, self.down.bias)
        x_TR = F.rms_norm(x_TR, self.norm_scale.shape, self.norm_scale.to(x_TR.dtype), self.eps)
        for linear in (self.fc1, self.fc2):
            x_TR = F.gelu(wide_linear(x_TR, linear.weight, linear.bias))
        return x_TR

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: 2 d R + 4 R²."""
        return 2 * sum(part.weight.numel() for part in (self.down, self.fc1, self.fc2))
