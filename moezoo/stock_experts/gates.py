"""Which of transformers' experts have an activation that the fused kernel has, too.

An activation is recognised by the class or function that computes it, never by a name in a
configuration: names are kept by copies that compute something else. What is not listed is run as it
is, between two products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn
from transformers import activations as theirs
from transformers.integrations.moe import _default_apply_gate


class Gate(NamedTuple):
    """What stands between the products, in the words of :func:`moezoo_kernels.grouped_mlp`."""

    activation: str
    gated: bool


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
    if find is None or "forward" in vars(function):
        return None
    if function._forward_hooks or function._forward_pre_hooks or function._backward_hooks:
        return None
    return find(function)


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


_REVIEWED: dict[str, Callable[[Any], Gate | None]] = {}
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
