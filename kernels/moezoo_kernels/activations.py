"""The activation functions that layers and fused ops share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    """Squared ReLU, arXiv:2109.08668."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu2": _relu2,
}


def activate(x: Tensor, activation: str, gated: bool) -> Tensor:
    """Apply the activation to a pre-activation ``x``.

    Args:
        x: ``(..., 2 f)`` if gated (the gate's half first, then the linear half), else ``(..., f)``.
        activation: a key of :data:`ACTIVATIONS`.
        gated: whether ``x`` holds a gated linear unit's two halves.

    Returns:
        ``(..., f)``: ``act(gate) * up``, or ``act(x)``.
    """
    function = ACTIVATIONS[activation]
    if not gated:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up
