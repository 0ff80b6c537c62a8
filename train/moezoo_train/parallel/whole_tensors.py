"""Tensors that processes keep in parts, put together and taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Model = TypeVar("Model", bound=nn.Module)


def in_parts(model: nn.Module) -> bool:
    """Return whether processes keep parts of a model's parameters."""
    return any(isinstance(p, DTensor) or _in_zero(p) for p in model.parameters())


def _in_zero(tensor: Any) -> bool:
    """Return whether DeepSpeed (ZeRO stage 3) keeps a parameter in parts."""
    return hasattr(tensor, "ds_id")


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process keeps of a tensor, which may be all of it."""
    known: Any = tensor
    if _in_zero(tensor):
        part = cast(Tensor, known.ds_tensor)
        return part[: max(0, known.ds_numel - dist.get_rank() * part.numel())]  # the rest pads
    return known.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(tensor: Tensor, change: bool = False) -> Iterator[None]:
    """Have a parameter whole that DeepSpeed keeps in parts; all processes must call this together.

    Args:
        tensor: nothing is done about any other.
        change: whether what the first process changes is to be kept.
    """
    if not _in_zero(tensor):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if change else None):
        yield


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Any]:
    """Return a module's ``state_dict()`` put together; see :func:`whole_tensors`."""
    state = module.state_dict(keep_vars=True)
    together: dict[str, Any] = {}
    in_zero: dict[Any, Any] = {}
    for name, tensor in state.items():
        if _in_zero(tensor) and tensor not in in_zero:
            with gathered(tensor):
                # What was gathered goes when the block ends.
                in_zero[tensor] = tensor.detach().cpu().clone() if keep else None
        if _in_zero(tensor) and keep:
            together[name] = in_zero[tensor]
    together |= whole_tensors({n: t for n, t in state.items() if not _in_zero(t)}, keep)
    return {name: together[name] for name in state if name in together}


def undivided(model: Model) -> Model:
    """Return a model whose parameters have their sizes: itself, or else one without numbers.

    DeepSpeed leaves tensors of no size where it keeps parameters in parts.
    """
    if not any(_in_zero(parameter) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        return type(model)(model.config)


def undivided_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's ``state_dict()``, with whole shapes though perhaps without numbers."""
    return {
        name: torch.empty(tensor.ds_shape, dtype=tensor.dtype, device="meta")
        if _in_zero(tensor)
        else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def whole_tensors(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Put tensors together, on the CPU; all processes must call this together.

    Those that are one, as tied weights are, stay one.

    Args:
        state: values that are not tensors stay as they are.
        keep: whether this process wants them; else it only gives its parts.
    """
    together: dict[str, Any] = {}
    known: dict[tuple[int, int], Tensor | None] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            place = place_of(value)
            if place not in known:
                gathered_value = value.full_tensor()
                known[place] = gathered_value.detach().cpu() if keep else None
            value = known[place]
        if keep:
            together[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return together


def place_of(tensor: DTensor) -> tuple[int, int]:
    """Return where this process's part lies in memory, which tied weights share."""
    own = tensor.to_local()
    return own.untyped_storage()._cdata, int(own.storage_offset())


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
