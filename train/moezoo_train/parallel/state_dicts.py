"""Gather and shard state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moezoo.experts.row_shares import share_of
from moezoo_train.adapters.deepspeed import full_shape, is_sharded_by_zero
from moezoo_train.adapters.deepspeed import local_shard as local_zero_shard
from moezoo_train.adapters.torch_core import storage_id
from moezoo_train.adapters.torch_distributed import shard_bounds

Model = TypeVar("Model", bound=nn.Module)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are sharded over processes."""
    return any(isinstance(p, DTensor) or is_sharded_by_zero(p) for p in model.parameters())


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor; a tensor that is not sharded is its own shard."""
    if is_sharded_by_zero(tensor):
        return local_zero_shard(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(tensor: Tensor, change: bool = False) -> Iterator[None]:
    """All-gather a parameter that DeepSpeed has sharded; all processes must call this together.

    Args:
        tensor: any other is left as it is.
        change: whether rank 0's changes are kept, and sent to the other ranks.
    """
    if not is_sharded_by_zero(tensor):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if change else None):
        yield


def full_state_dict(module: nn.Module, keep: bool = True) -> dict[str, Any]:
    """Return a module's full state dict, on the CPU; see :func:`gather_tensors`."""
    state = module.state_dict(keep_vars=True)
    full: dict[str, Any] = {}
    in_zero: dict[Any, Any] = {}
    for name, tensor in state.items():
        if is_sharded_by_zero(tensor) and tensor not in in_zero:
            with gathered(tensor):
                # What was gathered goes when the block ends.
                in_zero[tensor] = tensor.detach().cpu().clone() if keep else None
        if is_sharded_by_zero(tensor) and keep:
            full[name] = in_zero[tensor]
    full |= gather_tensors({n: t for n, t in state.items() if not is_sharded_by_zero(t)}, keep)
    return {name: full[name] for name in state if name in full}


def unsharded_model(model: Model) -> Model:
    """Return a model whose parameters have their full shapes: itself, or one on the meta device.

    DeepSpeed leaves empty tensors in the place of sharded parameters.
    """
    if not any(is_sharded_by_zero(parameter) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        return type(model)(model.config)


def full_shape_state_dict(module: nn.Module) -> dict[str, Any]:
    """Return a module's ``state_dict()`` with full shapes, sharded by ZeRO on the meta device."""
    return {
        name: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        if is_sharded_by_zero(tensor)
        else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def gather_tensors(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """All-gather tensors to the CPU; all processes must call this together.

    Tensors that share storage, as tied weights do, share it in the result.

    Args:
        state: values that are not tensors stay as they are.
        keep: whether this process gets the result; else it only sends its shards, and the result
            is empty.
    """
    full: dict[str, Any] = {}
    known: dict[tuple[int, int], Tensor | None] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            place = place_of(value)
            if place not in known:
                gathered_value = value.full_tensor()
                known[place] = gathered_value.detach().cpu() if keep else None
            value = known[place]
        if keep:
            full[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return full


def place_of(tensor: DTensor) -> tuple[int, int]:
    """Return the place of this process's shard in memory, which tied weights share."""
    own = tensor.to_local()
    return storage_id(own), int(own.storage_offset())


def optimizer_shards(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's ``state_dict()``, with the state of shares as that of sharded tensors.

    See :class:`moezoo.experts.row_shares.RowShare`.
    """
    found, parameters = optimizer.state_dict(), parameters_of(optimizer)
    states = {
        number: {
            name: share.dtensor(value) if isinstance(value, Tensor) and value.ndim else value
            for name, value in values.items()
        }
        if (share := share_of(parameters[number])) is not None
        else values
        for number, values in found["state"].items()
    }
    return {**found, "state": states}


def load_optimizer_shards(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's full state, or its shards, of each parameter what this process holds."""
    parameters = parameters_of(optimizer)
    states = {}
    for number, values in state["state"].items():
        parameter = parameters[number]
        shards = shard_like(values, dict.fromkeys(values, like_shards(parameter)))
        if share_of(parameter) is not None:
            shards = {
                name: local_shard(value) if isinstance(value, Tensor) else value
                for name, value in shards.items()
            }
        states[number] = shards
    optimizer.load_state_dict({**state, "state": states})


def like_shards(parameter: Tensor) -> Tensor:
    """Return a parameter, or of a share the sharded tensor that it is of."""
    share = share_of(parameter)
    return parameter if share is None else share.dtensor(parameter)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return an optimizer's parameters, in the order of their numbers."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def full_optimizer_state_dict(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """All-gather an optimizer's ``state_dict()``; see :func:`gather_tensors`."""
    full = {number: gather_tensors(values, keep) for number, values in state["state"].items()}
    return {**state, "state": full if keep else {}}


def shard_like(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Shard tensors as others are sharded.

    Args:
        state: full tensors; those that are sharded already stay as they are.
        like: by the same names, sharded tensors; a tensor that is missing here, or has another
            shape, stays full.
    """
    return {name: _shard(value, like.get(name)) for name, value in state.items()}


def _shard(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor) or value.shape != like.shape:
        return value
    for dimension, (start, length) in enumerate(shard_bounds(like)):
        value = value.narrow(dimension, start, length)
    return DTensor.from_local(
        value.to(like.device, copy=True).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
