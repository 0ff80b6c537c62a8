"""Which of transformers' experts have a gate that the fused kernel has, too.

An activation is recognised by the class or function that computes it, never by a name in a
configuration: names are kept by copies that compute something else. A gate is recognised by the
method that computes it, and its numbers are read from the instance. What is not listed is run as it
is, between two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn
from transformers import activations as theirs
from transformers.integrations.moe import _default_apply_gate

from moezoo_kernels.activations import PLAIN_GLU, QUICK_GELU_FACTOR, GLUOptions


class Gate(NamedTuple):
    """What stands between the products, in the words of :func:`moezoo_kernels.grouped_mlp`."""

    activation: str
    gated: bool
    glu: GLUOptions = PLAIN_GLU
    interleaved: bool = False


def known_gate(experts: Any) -> Gate | None:
    """Return what stands between the products of transformers' experts; None if it is not known.

    Args:
        experts: a module that ``use_experts_implementation`` marks.
    """
    if not experts.has_gate:
        activation = known_activation(experts.act_fn)
        return None if activation is None else Gate(activation, False)
    if "_apply_gate" in vars(experts):
        return None
    function = type(experts)._apply_gate
    if function is _default_apply_gate:
        return _in_halves(experts)
    find = _REVIEWED.get(function.__module__)
    return None if find is None else find(experts)


def known_activation(function: Any) -> str | None:
    """Return the key of ``moezoo_kernels.activations.ACTIVATIONS`` that computes the same, or None.

    Args:
        function: of one tensor, or a module of one. A module with hooks, or whose ``forward`` was
            replaced, is not what its class says.
    """
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function) if callable(function) else None
    find = _MODULES.get(type(function))
    return None if find is None or not _is_untouched(function) else find(function)


def _is_untouched(module: nn.Module) -> bool:
    before = (module._forward_pre_hooks, module._backward_pre_hooks)
    after = (module._forward_hooks, module._backward_hooks)
    return "forward" not in vars(module) and not any((*before, *after))


def _in_halves(experts: Any) -> Gate | None:
    """The library's default: the gate is the first half of the columns, whatever a flag says."""
    activation = known_activation(experts.act_fn)
    return None if activation is None else Gate(activation, True)


def _gelu(module: Any) -> str | None:
    return "gelu" if module.act is F.gelu else None


def _gelu_tanh(module: Any) -> str | None:
    act = module.act
    same = isinstance(act, partial) and act.func is F.gelu and not act.args
    return "gelu_tanh" if same and act.keywords == {"approximate": "tanh"} else None


def _torch_gelu(module: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)


def _limited(activation: str | None, limit: Any, shift: float = 0.0) -> Gate | None:
    """``act(min(gate, L)) * (clamp(up, -L, L) + shift)``, its halves one after the other."""
    if activation is None or not _is_positive(limit):
        return None
    return Gate(activation, True, GLUOptions(limit=limit, up_shift=shift))


def _limited_act_fn(experts: Any) -> Gate | None:
    return _limited(known_activation(experts.act_fn), experts.limit)


def _limited_silu(experts: Any) -> Gate | None:
    return _limited("silu", experts.swiglu_limit)


def _of_gpt_oss(experts: Any) -> Gate | None:
    return _limited_sigmoid(experts.alpha, experts.limit)


def _interleaved(experts: Any) -> Gate | None:
    gate = _of_gpt_oss(experts)
    return None if gate is None else gate._replace(interleaved=True)


def _of_minimax(experts: Any) -> Gate | None:
    return _limited_sigmoid(experts.swiglu_alpha, experts.swiglu_limit)


def _limited_sigmoid(alpha: Any, limit: Any) -> Gate | None:
    """``g sigmoid(alpha g) (u + 1)`` of bounded g and u, if the kernel has that factor."""
    activation = {QUICK_GELU_FACTOR: "quick_gelu", 1.0: "silu"}.get(alpha)
    return _limited(activation, limit, 1.0)


def _softcapped(experts: Any) -> Gate | None:
    """Inkling 2's unit, known by the names of its classes: no other family imports its module."""
    parts = (experts.act_fn, *experts.act_fn.children())
    if any(type(part).__module__ != _INKLING2 or not _is_untouched(part) for part in parts):
        return None
    unit, *caps = (type(part).__name__ for part in parts)
    if unit != "Inkling2SoftcappedSwiGLU" or caps != ["Inkling2Softcap"] * 2:
        return None
    of_gate, of_up = experts.act_fn.gate_softcap.softcap, experts.act_fn.up_softcap.softcap
    if not (_is_positive(of_gate) and _is_positive(of_up)):
        return None
    return Gate("silu", True, GLUOptions(gate_softcap=of_gate, up_softcap=of_up))


def _is_positive(value: Any) -> bool:
    """Return whether a number bounds something, as :meth:`GLUOptions.check` wants it."""
    return type(value) in (int, float) and 0 < value < math.inf


_MODELS = "transformers.models"
_INKLING2 = f"{_MODELS}.inkling2.modeling_inkling2"

_REVIEWED: dict[str, Callable[[Any], Gate | None]] = {
    f"{_MODELS}.{family}.modeling_{family}": find
    for family, find in (
        ("beam", _in_halves),  # in fp32
        ("deepseek_v4", _limited_act_fn),
        ("glm5_next", _limited_silu),
        ("gpt_oss", _interleaved),
        ("hy_v4", _limited_silu),
        ("inkling2", _softcapped),
        ("minimax_m3_vl", _of_minimax),
        ("openai_privacy_filter", _of_gpt_oss),
    )
}
"""Methods ``_apply_gate`` that were read and compared, by the module that defines one."""

_MODULES: dict[type, Callable[[Any], str | None]] = {
    theirs.SiLUActivation: lambda module: "silu",
    theirs.GELUActivation: _gelu,
    theirs.GELUTanh: _gelu_tanh,
    theirs.ReLUSquaredActivation: lambda module: "relu2",
    nn.SiLU: lambda module: "silu",
    nn.GELU: _torch_gelu,
    nn.ReLU: lambda module: "relu",
}

_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
