"""The activation functions that layers and fused ops share, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

QUICK_GELU_FACTOR = 1.702
_LEAK = 0.01


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    """Squared ReLU, arXiv:2109.08668."""
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(QUICK_GELU_FACTOR * x)


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
    "quick_gelu": lambda grad, x: _aten.silu_backward(grad, QUICK_GELU_FACTOR * x),
    "tanh": lambda grad, x: _aten.tanh_backward(grad, torch.tanh(x)),
    "leaky_relu": lambda grad, x: _aten.leaky_relu_backward(grad, x, _LEAK, False),
}


@dataclass(frozen=True)
class GLUOptions:
    """How the factors of a gated linear unit are bounded; ``act(gate) * up`` by default.

    The gradient of a limit is ``torch.clamp``'s: whole up to the limit itself, zero beyond it.

    Attributes:
        limit: L of ``act(min(gate, L)) * clamp(up, -L, L)``: 7 in GPT-OSS and MiniMax-M3, 10 in
            DeepSeek-V4. None: no limit.
        limit_after: limit the activation's value instead, ``min(act(gate), L)`` (Step-3.7).
        up_shift: added to ``up`` once it is bounded; 1 in GPT-OSS and MiniMax-M3, whose
            activation is ``quick_gelu``.
        gate_softcap: c of ``c tanh(gate / c) sigmoid(gate)``: SiLU whose linear factor is capped,
            4 in Inkling 2. None: no cap.
        up_softcap: c of ``c tanh(up / c)``, 25 in Inkling 2; set with ``gate_softcap`` alone.
    """

    limit: float | None = None
    limit_after: bool = False
    up_shift: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None

    def check(self, activation: str, gated: bool, name: str = "glu") -> None:
        """Check the options against each other and the unit they belong to.

        Args:
            activation: a key of :data:`ACTIVATIONS`.
            gated: whether there is a gated linear unit.
            name: what an error message calls these options.

        Raises:
            ValueError: an option is out of range, or contradicts another or the unit; one line.
        """
        if self == PLAIN_GLU:
            return
        if not gated:
            raise ValueError(f"{name}: bounds a gated linear unit; set gated to true")
        for field in ("limit", "gate_softcap", "up_softcap"):
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name}.{field}: {value!r} is not a number > 0; or leave it out")
        if not _is_number(self.up_shift):
            raise ValueError(f"{name}.up_shift: {self.up_shift!r} is not a number")
        if not isinstance(self.limit_after, bool):
            raise ValueError(f"{name}.limit_after: {self.limit_after!r} is neither true nor false")
        if self.limit_after and self.limit is None:
            raise ValueError(f"{name}.limit_after: there is no limit; set {name}.limit")
        if (self.gate_softcap is None) != (self.up_softcap is None):
            raise ValueError(f"{name}.gate_softcap: goes with up_softcap; set both or neither")
        if self.gate_softcap is not None:
            if self.limit is not None:
                raise ValueError(f"{name}.gate_softcap: replaces the limit; leave out one of them")
            if activation != "silu":
                raise ValueError(
                    f"{name}.gate_softcap: is defined for the activation silu, not {activation}"
                )

    def encode(self) -> tuple[int, float, float, float]:
        """Return what kernels take: the kind of bound, those of gate and up, and the shift.

        The kind is 0 for none, 1 for a limit before the activation, 2 for one after it, and 3 for
        softcaps; csrc/grouped_mlp.h and triton_stages.py know the same. (4 is :data:`RELU_UP`.)
        """
        shift = float(self.up_shift)
        if self.gate_softcap is not None and self.up_softcap is not None:
            return 3, float(self.gate_softcap), float(self.up_softcap), shift
        if self.limit is None:
            return 0, 0.0, 0.0, shift
        return 2 if self.limit_after else 1, float(self.limit), float(self.limit), shift

    @classmethod
    def decode(cls, numbers: Sequence[float]) -> GLUOptions:
        """Return the options of which :meth:`encode` made these numbers."""
        kind, gate, up, shift = numbers
        if kind == 3:
            return cls(up_shift=shift, gate_softcap=gate, up_softcap=up)
        return cls(gate if kind else None, kind == 2, shift)


PLAIN_GLU = GLUOptions()

RELU_UP = (4, 0.0, 0.0, 0.0)
"""What :meth:`GLUOptions.encode` would return for ``act(gate) relu(up)``; for C++ kernels alone."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def gated_unit(gate: Tensor, up: Tensor, activation: str, glu: GLUOptions = PLAIN_GLU) -> Tensor:
    """Return ``act(gate) * up``, with the bounds of ``glu``.

    Args:
        gate: ``(..., f)``.
        up: ``(..., f)``.
        activation: a key of :data:`ACTIVATIONS`.
        glu: bounds of the factors.
    """
    return gate_value(gate, activation, glu) * up_value(up, glu)


def gate_value(gate: Tensor, activation: str, glu: GLUOptions = PLAIN_GLU) -> Tensor:
    """Return the first factor of :func:`gated_unit`, ``act(gate)`` with its bounds."""
    if glu.gate_softcap is not None:
        return _capped(gate, glu.gate_softcap) * torch.sigmoid(gate)
    if glu.limit is not None and not glu.limit_after:
        gate = gate.clamp(max=glu.limit)
    value = ACTIVATIONS[activation](gate)
    return value.clamp(max=glu.limit) if glu.limit_after else value


def up_value(up: Tensor, glu: GLUOptions = PLAIN_GLU) -> Tensor:
    """Return the second factor of :func:`gated_unit`, ``up`` with its bounds."""
    if glu.up_softcap is not None:
        up = _capped(up, glu.up_softcap)
    if glu.limit is not None:
        up = up.clamp(-glu.limit, glu.limit)
    return up + glu.up_shift if glu.up_shift else up


def _capped(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


def split_gate(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of gate and up, each ``(..., f)``, in ``x`` ``(..., 2 f)``.

    Args:
        x: the gate's half first, or, if interleaved, gate and up in turn.
        interleaved: which of the two.
    """
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    gate, up = x.chunk(2, dim=-1)
    return gate, up


def activate(
    x: Tensor,
    activation: str,
    gated: bool,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Apply the activation to a pre-activation ``x``.

    Args:
        x: ``(..., 2 f)`` if gated (the gate's half first, then the linear half), else ``(..., f)``.
        activation: a key of :data:`ACTIVATIONS`.
        gated: whether ``x`` holds a gated linear unit's two halves.
        glu: bounds of the gated linear unit's factors.
        interleaved: gate and linear numbers of ``x`` lie in turn, instead of in halves.

    Returns:
        ``(..., f)``: ``act(gate) * up``, or ``act(x)``.
    """
    if not gated:
        return ACTIVATIONS[activation](x)
    return gated_unit(*split_gate(x, interleaved), activation, glu)


def activate_backward(
    grad: Tensor,
    x: Tensor,
    activation: str,
    gated: bool,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Recompute the activation and give its gradient, without autograd.

    Fused ops that save only the pre-activation call it inside their backward.

    Args:
        grad: ``(..., f)``, gradient of what :func:`activate` returned.
        x: the pre-activation :func:`activate` was given.
        activation: a key of :data:`ACTIVATIONS`.
        gated: as for :func:`activate`.
        glu: as for :func:`activate`.
        interleaved: as for :func:`activate`.

    Returns:
        ``activate(x)``, ``(..., f)``, and the gradient of ``<activate(x), grad>`` in ``x``, of
        ``x``'s shape; both contiguous.
    """
    if not gated:
        return ACTIVATIONS[activation](x), _BACKWARDS[activation](grad, x)
    gate, up = split_gate(x, interleaved)
    activated, factor = gate_value(gate, activation, glu), up_value(up, glu)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gate, grad_up = split_gate(grad_x, interleaved)
    torch.mul(grad, activated, out=grad_up)
    if glu != PLAIN_GLU:
        grad_up.copy_(_up_backward(grad_up, up, glu))
    grad_gate.copy_(_gate_backward(grad * factor, gate, activation, glu))
    return activated.mul_(factor), grad_x


def _gate_backward(grad: Tensor, gate: Tensor, activation: str, glu: GLUOptions) -> Tensor:
    if glu.gate_softcap is not None:
        share = torch.sigmoid(gate)
        capped = torch.tanh(gate / glu.gate_softcap)
        slope = (1 - capped.square()) + capped * (1 - share) * glu.gate_softcap
        return grad * share * slope
    function, backward = ACTIVATIONS[activation], _BACKWARDS[activation]
    if glu.limit is None:
        return backward(grad, gate)
    if glu.limit_after:
        return backward(grad.where(function(gate) <= glu.limit, 0.0), gate)
    return backward(grad, gate.clamp(max=glu.limit)).where(gate <= glu.limit, 0.0)


def _up_backward(grad: Tensor, up: Tensor, glu: GLUOptions) -> Tensor:
    if glu.up_softcap is not None:
        return grad * (1 - torch.tanh(up / glu.up_softcap).square())
    return grad if glu.limit is None else grad.where(up.abs() <= glu.limit, 0.0)
