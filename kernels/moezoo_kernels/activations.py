"""The activation functions that layers and fused ops share, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

_QUICK_GELU = 1.702
_LEAK = 0.01


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    """Squared ReLU, arXiv:2109.08668."""
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(_QUICK_GELU * x)


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _LEAK)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu2": _relu2,
    "quick_gelu": _quick_gelu,
    "tanh": torch.tanh,
    "leaky_relu": _leaky_relu,
}

# By which number csrc/activations.h knows each.
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x, approximate="none"),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "relu2": lambda grad, x: grad * F.relu(x).mul_(2),
    "quick_gelu": lambda grad, x: _aten.silu_backward(grad, _QUICK_GELU * x),
    "tanh": lambda grad, x: _aten.tanh_backward(grad, torch.tanh(x)),
    "leaky_relu": lambda grad, x: _aten.leaky_relu_backward(grad, x, _LEAK, False),
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


def activate_backward(
    grad: Tensor, x: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """Recompute the activation and give its gradient, without autograd.

    Fused ops that save only the pre-activation call it inside their backward.

    Args:
        grad: ``(..., f)``, gradient of what :func:`activate` returned.
        x: the pre-activation :func:`activate` was given.
        activation: a key of :data:`ACTIVATIONS`.
        gated: as for :func:`activate`.

    Returns:
        ``activate(x)``, ``(..., f)``, and the gradient of ``<activate(x), grad>`` in ``x``, of
        ``x``'s shape; both contiguous.
    """
    function, backward = ACTIVATIONS[activation], _BACKWARDS[activation]
    if not gated:
        return function(x), backward(grad, x)
    gate, up = x.chunk(2, dim=-1)
    activated = function(gate)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gate, grad_up = grad_x.chunk(2, dim=-1)
    torch.mul(grad, activated, out=grad_up)
    grad_gate.copy_(backward(grad * up, gate))
    return activated.mul_(up), grad_x
