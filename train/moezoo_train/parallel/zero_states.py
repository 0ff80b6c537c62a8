"""Gather and shard the optimizer states of DeepSpeed's ZeRO, which are runs of flat parameters.

Each process updates a few flat tensors, each of which holds the process's shards of all parameters
of a group, one after the other. The full optimizer state, as torch's AdamW has it on one process,
is gathered from these and sharded into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.errors import InputError

STEP = "step"


@dataclass(frozen=True)
class Piece:
    """This process's shard of a parameter, perhaps an empty one, inside a flat tensor.

    Attributes:
        flat: the flat tensor, under which the optimizer has its state.
        inside: the shard's place in the flat tensor.
        run: its place in the flattened parameter.
    """

    flat: Tensor
    inside: slice
    run: slice


def piece_of(zero: Any, parameter: nn.Parameter, group: int) -> Piece:
    """Return this process's shard of a parameter.

    Args:
        zero: DeepSpeed's optimizer.
        parameter: one that is trained.
        group: the number of its group.
    """
    known: Any = parameter  # DeepSpeed's notes on it
    if hasattr(known, "ds_id"):  # stage 3: each parameter is divided by itself, and padded
        number, offset, length = zero.grad_position[known.ds_id]
        start = dist.get_rank() * length
        count = max(0, min(length, known.ds_numel - start))
        flat = zero.fp32_partitioned_groups_flat[number]
        return Piece(flat, slice(offset, offset + count), slice(start, start + count))
    flat, place = zero.single_partition_of_fp32_groups[group], known._hp_mapping
    if place is None:
        return Piece(flat, slice(0, 0), slice(0, 0))
    inside, run = place.hp_fragment_address, place.lp_fragment_address
    return Piece(
        flat,
        slice(inside.start, inside.start + inside.numel),
        slice(run.start, run.start + run.numel),
    )


def gather_states(
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    pieces: Mapping[nn.Parameter, Piece],
    keep: bool,
) -> dict[str, Any]:
    """Return the full optimizer state; all processes must call this together.

    Args:
        optimizer: the one that updates the flat tensors.
        groups: the parameters of each of its groups.
        pieces: their shards.
        keep: whether this process gets the result; else it only sends its shards.

    Returns:
        What ``optimizer.state_dict()`` is in one process.
    """
    numbers = {p: n for n, p in enumerate(p for group in groups for p in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for parameter, number in numbers.items():
        piece = pieces[parameter]
        values = {
            key: _whole(value, piece, parameter) if key != STEP else value.detach().clone()
            for key, value in optimizer.state.get(piece.flat, {}).items()
        }
        if keep and values:
            state[number] = {key: value.cpu() for key, value in values.items()}
    return {
        "state": state,
        "param_groups": [
            {**_fields(fields), "params": [numbers[p] for p in group]}
            for fields, group in zip(optimizer.param_groups, groups, strict=True)
        ],
    }


def _whole(value: Tensor, piece: Piece, parameter: nn.Parameter) -> Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = value.new_zeros(shape.numel())
    whole[piece.run] = value[piece.inside]
    dist.all_reduce(whole)
    return whole.reshape(shape)


def load_states(
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    pieces: Mapping[nn.Parameter, Piece],
    saved: Mapping[str, Any],
) -> None:
    """Load this process's shards of a full optimizer state.

    Args:
        optimizer: as in :func:`gather_states`.
        groups: as in :func:`gather_states`.
        pieces: as in :func:`gather_states`.
        saved: its result.

    Raises:
        InputError: parameters of one group have been updated unequally often.
    """
    optimizer.state.clear()
    states = iter(range(sum(len(group) for group in groups)))
    for fields, new, group in zip(
        optimizer.param_groups, saved["param_groups"], groups, strict=True
    ):
        fields.update(_fields(new))
        for parameter, number in zip(group, states, strict=False):
            piece = pieces[parameter]
            for key, value in saved["state"].get(number, {}).items():
                _keep(optimizer.state[piece.flat], key, value, piece, fields)


def _keep(
    own: dict[str, Tensor], key: str, value: Tensor, piece: Piece, fields: Mapping[str, Any]
) -> None:
    if key != STEP:
        if key not in own:
            own[key] = torch.zeros_like(piece.flat, requires_grad=False)
        own[key][piece.inside] = value.flatten()[piece.run].to(piece.flat.device)
        return
    if key in own and float(own[key]) != float(value):
        raise InputError(
            f"ckpt_path: parameters of the group '{fields['name']}' have been updated unequally "
            "often, which ZeRO cannot go on with; use trainer.strategy ddp or fsdp2"
        )
    # As torch's own: the fused kernel reads the count where the parameters are.
    own[key] = value.to(piece.flat.device if fields.get("fused") else "cpu", copy=True)


def _fields(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
