"""Attributes of DeepSpeed's parameters and optimizers that have no public access, as of 0.19."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Fragment(NamedTuple):
    """This process's shard of a parameter, perhaps an empty one, inside a flat tensor.

    Attributes:
        flat: the flat tensor, under which the optimizer has its state.
        inside: the shard's place in the flat tensor.
        run: its place in the flattened parameter.
    """

    flat: Tensor
    inside: slice
    run: slice


def is_sharded_by_zero(tensor: Any) -> bool:
    """Return whether ZeRO's stage 3 has sharded a parameter, by its attribute ``ds_id``."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Any) -> torch.Size:
    """Return a parameter's shape before ZeRO's stage 3, by ``ds_shape``, or else its own."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def local_shard(tensor: Any) -> Tensor:
    """Return this process's shard of a parameter of ZeRO's stage 3, without padding.

    Uses ``ds_tensor`` and ``ds_numel``: DeepSpeed's public functions gather all of it.
    """
    shard: Tensor = tensor.ds_tensor
    return shard[: max(0, tensor.ds_numel - dist.get_rank() * shard.numel())]


def fragment_of(optimizer: Any, parameter: Any, group: int) -> Fragment:
    """Return this process's shard of a parameter in the optimizer's flat tensors.

    Uses ``grad_position`` and ``fp32_partitioned_groups_flat`` of stage 3, and
    ``single_partition_of_fp32_groups`` and ``_hp_mapping`` of stages 1 and 2: DeepSpeed's public
    functions give one full state at a time. If renamed: AttributeError when a checkpoint is written
    or read.

    Args:
        optimizer: DeepSpeed's.
        parameter: one that is trained.
        group: the number of its group.
    """
    if is_sharded_by_zero(parameter):  # each parameter is sharded by itself, and padded
        number, offset, length = optimizer.grad_position[parameter.ds_id]
        start = dist.get_rank() * length
        count = max(0, min(length, parameter.ds_numel - start))
        flat = optimizer.fp32_partitioned_groups_flat[number]
        return Fragment(flat, slice(offset, offset + count), slice(start, start + count))
    flat, place = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
    if place is None:
        return Fragment(flat, slice(0, 0), slice(0, 0))
    inside, run = place.hp_fragment_address, place.lp_fragment_address
    return Fragment(
        flat,
        slice(inside.start, inside.start + inside.numel),
        slice(run.start, run.start + run.numel),
    )


def local_gradients(optimizer: Any, stage: int) -> dict[int, list[Tensor]]:
    """Return this process's shards of the gradients by number of their parameter group.

    Uses ``averaged_gradients``, and ``sub_group_to_group_id`` of stage 3: clipping by groups needs
    gradients between the backward pass and the step. If renamed: AttributeError at the first step.
    """
    found: dict[int, list[Tensor]] = {}
    for number, parts in optimizer.averaged_gradients.items():
        group = optimizer.sub_group_to_group_id[number] if stage == 3 else number
        found.setdefault(group, []).extend(parts)
    return found


def never_compile_shm() -> None:
    """Keep DeepSpeed from compiling its all-reduce for inference on CPUs.

    Uses ``deepspeed.ops.__compatible_ops__``: training never calls it, and DeepSpeed would compile
    it on starting, for more than a minute, and fail where there is no compiler. If renamed:
    AttributeError on starting.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
