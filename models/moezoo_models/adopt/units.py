"""From the two products of a hidden neuron to its value, as classes of transformers compute it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moezoo_kernels.activations import PLAIN_GLU, GLUOptions

ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "QuickGELUActivation": "quick_gelu",
    "Tanh": "tanh",
    "LeakyReLU": "leaky_relu",
}
"""Ours by the class, or the name of the function, that theirs is."""

QUICK_GELU = 1.702
"""The factor within our quick_gelu, ``x sigmoid(1.702 x)``."""


class CannotSay(ValueError):
    """What a module computes has no name among our options; the message says what."""


@dataclass(frozen=True)
class Unit:
    """How hidden neurons are computed.

    Attributes:
        formula: from gate g and up u to the value.
        trap: what one would guess wrong.
        read: from a module with experts, or a shared expert, and its block to an activation and
            bounds.
    """

    formula: str
    trap: str
    read: Callable[[Any, Any], tuple[str, GLUOptions]]


def _activation(module: Any, block: Any) -> str:
    names = ("act_fn", "activation", "activation_fn", "act")
    found = [getattr(owner, name, None) for owner in (module, block) for name in names]
    function = next((each for each in found if each is not None), None)
    name = getattr(function, "__name__", type(function).__name__)
    if name not in ACTIVATIONS:
        raise CannotSay(f"activates by {function}")
    return ACTIVATIONS[name]


def _limit(module: Any) -> float | None:
    """Return a module's limit; None for none."""
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    return None if limit is None or math.isinf(limit) else float(limit)


def _plain(module: Any, block: Any) -> tuple[str, GLUOptions]:
    return _activation(module, block), PLAIN_GLU


def _limited(module: Any, block: Any) -> tuple[str, GLUOptions]:
    return _activation(module, block), GLUOptions(limit=_limit(module))


def _limited_silu(module: Any, block: Any) -> tuple[str, GLUOptions]:
    return "silu", GLUOptions(limit=_limit(module))


def _limited_after(module: Any, block: Any) -> tuple[str, GLUOptions]:
    limit = _limit(module)
    return _activation(module, block), GLUOptions(limit=limit, limit_after=limit is not None)


def _shifted(module: Any, block: Any) -> tuple[str, GLUOptions]:
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    if alpha != QUICK_GELU:
        raise CannotSay(f"activates by x sigmoid({alpha} x), and quick_gelu has {QUICK_GELU}")
    return "quick_gelu", GLUOptions(limit=_limit(module), up_shift=1.0)


def _capped(module: Any, block: Any) -> tuple[str, GLUOptions]:
    unit = module.act_fn
    gate, up = float(unit.gate_softcap.softcap), float(unit.up_softcap.softcap)
    return "silu", GLUOptions(gate_softcap=gate, up_softcap=up)


UNITS = {
    "plain": Unit(
        "act(g) u, or act(u) without a gate",
        "AFMoE and many others compute the shared expert likewise, Qwen2-MoE behind a sigmoid gate",
        _plain,
    ),
    "limited": Unit(
        "act(min(g, L)) clamp(u, -L, L)",
        "the gate is bounded from above only, and before the activation",
        _limited,
    ),
    "limited_silu": Unit(
        "silu(min(g, L)) clamp(u, -L, L)",
        "SiLU whatever hidden_act says; Hunyuan 4 bounds its routed experts and not the shared one",
        _limited_silu,
    ),
    "limited_after": Unit(
        "min(act(g), L) clamp(u, -L, L)",
        "the activation's value is bounded, with limits of their own for some layers, and for the "
        "shared expert; 0 in the configuration means none",
        _limited_after,
    ),
    "shifted": Unit(
        "min(g, L) sigmoid(1.702 min(g, L)) (clamp(u, -L, L) + 1)",
        "1 is added to the bounded linear half",
        _shifted,
    ),
    "capped": Unit(
        "a tanh(g / a) sigmoid(g) b tanh(u / b)",
        "the sigmoid sees the gate without its cap",
        _capped,
    ),
}
"""Each by its name in the table of blocks."""
