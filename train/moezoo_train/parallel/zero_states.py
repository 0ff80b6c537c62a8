"""Gather and shard the optimizer states of DeepSpeed's ZeRO, which are runs of flat parameters.

Each process updates a few flat tensors, each of which holds the process's shards of all parameters
of a group, one after the other. The full optimizer state, as torch's AdamW has it on one process,
is gathered from these and sharded into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.errors import InputError
from moezoo_train.adapters.deepspeed import Fragment, full_shape

STEP = "step"


def gather_states(
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    fragments: Mapping[nn.Parameter, Fragment],
    keep: bool,
) -> dict[str, Any]:
    """Return the full optimizer state; all processes must call this together.

    Args:
        optimizer: the one that updates the flat tensors.
        groups: the parameters of each of its groups.
        fragments: their shards.
        keep: whether this process gets the result; else it only sends its shards.

    Returns:
        What ``optimizer.state_dict()`` is in one process.
    """
    numbers = {p: n for n, p in enumerate(p for group in groups for p in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for parameter, number in numbers.items():
        fragment = fragments[parameter]
        values = {
            key: _whole(value, fragment, parameter) if key != STEP else value.detach().clone()
            for key, value in optimizer.state.get(fragment.flat, {}).items()
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


def _whole(value: Tensor, fragment: Fragment, parameter: nn.Parameter) -> Tensor:
    shape = full_shape(parameter)
    whole = value.new_zeros(shape.numel())
    whole[fragment.run] = value[fragment.inside]
    dist.all_reduce(whole)
    return whole.reshape(shape)


def load_states(
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    fragments: Mapping[nn.Parameter, Fragment],
    saved: Mapping[str, Any],
) -> None:
    """Load this process's shards of a full optimizer state.

    Args:
        optimizer: as in :func:`gather_states`.
        groups: as in :func:`gather_states`.
        fragments: as in :func:`gather_states`.
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
            fragment = fragments[parameter]
            for key, value in saved["state"].get(number, {}).items():
                _keep(optimizer.state[fragment.flat], key, value, fragment, fields)


def _keep(
    own: dict[str, Tensor], key: str, value: Tensor, fragment: Fragment, fields: Mapping[str, Any]
) -> None:
    if key != STEP:
        if key not in own:
            own[key] = torch.zeros_like(fragment.flat, requires_grad=False)
        own[key][fragment.inside] = value.flatten()[fragment.run].to(fragment.flat.device)
        return
    if key in own and float(own[key]) != float(value):
        raise InputError(
            f"ckpt_path: parameters of the group '{fields['name']}' have been updated unequally "
            "often, which ZeRO cannot go on with; use trainer.strategy ddp or fsdp2"
        )
    # As torch's own: the fused kernel reads the count where the parameters are.
    own[key] = value.to(fragment.flat.device if fields.get("fused") else "cpu", copy=True)


def _fields(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
