"""Initialisation that the zoo's layers share."""

from __future__ import annotations

from torch import nn


def init_linear(linear: nn.Linear, std: float) -> None:
    """Draw a projection's weight from N(0, std^2) and zero its bias, in place."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def output_std(fan_in: int, num_layers: int) -> float:
    """Return ``1 / sqrt(2 L fan_in)``: 2 L branches add into the residual stream (GPT-2)."""
    return (2 * num_layers * fan_in) ** -0.5
