"""Tensors that processes keep in parts, put together and taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def in_parts(model: nn.Module) -> bool:
    """Tell whether processes keep parts of a model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensors(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Put tensors together, on the CPU; all processes must call this together.

    Args:
        state: values that are not tensors stay as they are.
        keep: whether this process wants them; else it only gives its parts.
    """
    together = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            together[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return together


def whole_optimizer_state(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Put an optimizer's ``state_dict()`` together; see :func:`whole_tensors`."""
    together = {number: whole_tensors(values, keep) for number, values in state["state"].items()}
    return {**state, "state": together if keep else {}}


def split_like(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Take tensors apart.

    Args:
        state: whole tensors, or such as are in parts already.
        like: by the same names, tensors that are in parts; a tensor of another shape stays whole,
            as do those that have nothing to be like.
    """
    return {name: _part(value, like.get(name)) for name, value in state.items()}


def _part(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor) or value.shape != like.shape:
        return value
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    for dimension, (start, length) in enumerate(zip(offset, shape, strict=True)):
        value = value.narrow(dimension, start, length)
    return DTensor.from_local(
        value.to(like.device, copy=True).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
