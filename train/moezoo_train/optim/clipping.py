"""Gradient clipping by clip group, for dense and sparse gradients.

Each clip group of the optimizer (see :class:`moezoo.ParameterGroup`) is clipped by its own norm to
the same limit, as in the trainers of Lample et al. 2019 (arXiv:1907.05242) and Berges et al. 2024
(arXiv:2412.09764). There the values of a memory form one group and the rest of the model the other,
so that a large gradient of one does not shrink the steps of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from moezoo.experts.row_shares import share_of

MAIN = "main"


def grouped_gradients(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """Sort the gradients by clip group, the main group first; sparse ones are their rows.

    A sparse gradient may list a row several times, once for each use; these are summed here.
    """
    groups: dict[str, list[Tensor]] = {MAIN: []}
    for group in optimizer.param_groups:
        members = groups.setdefault(group.get("clip_group", MAIN), [])
        members.extend(_values(p) for p in group["params"] if p.grad is not None)
    return {name: members for name, members in groups.items() if members}


def _values(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.coalesce()
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return gradient
    share, values = share_of(parameter), gradient.values()
    return values if share is None else share.part(values)


def gradient_norms(
    gradients: Mapping[str, list[Tensor]], over_ranks: bool = False
) -> dict[str, Tensor]:
    """Return the norm of the gradient of each clip group that has one.

    Args:
        gradients: by clip group.
        over_ranks: whether the gradients are those of all processes, one after the other.
    """
    norms = {name: _norm(members) for name, members in gradients.items()}
    if over_ranks:
        squares = torch.stack(list(norms.values())).square()
        dist.all_reduce(squares)
        norms = dict(zip(norms, squares.sqrt(), strict=True))
    return norms


def _norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of tensors, some of which may be sharded over processes."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [get_total_norm(members) for members in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return get_total_norm(whole) if len(whole) != 1 else whole[0]


def total_norm(norms: dict[str, Tensor]) -> Tensor:
    """Return the norm of the whole gradient."""
    return get_total_norm(list(norms.values())) if len(norms) != 1 else next(iter(norms.values()))


@torch.no_grad()
def scale(gradients: Mapping[str, list[Tensor]], factor: float) -> None:
    """Multiply the gradient by a number, in place."""
    for members in gradients.values():
        for values in map(_local, members):
            values.mul_(factor)


@torch.no_grad()
def clip_norms(
    gradients: Mapping[str, list[Tensor]], norms: Mapping[str, Tensor], limit: float
) -> None:
    """Scale the gradient of each clip group down to a norm of at most ``limit``, in place.

    Args:
        gradients: by clip group.
        norms: as :func:`gradient_norms` returns them.
        limit: largest norm of each group.
    """
    for name, members in gradients.items():
        factor = (limit / (norms[name] + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for values in map(_local, members):
            values.mul_(factor.to(values.device))


@torch.no_grad()
def clip_values(gradients: Mapping[str, list[Tensor]], limit: float) -> None:
    """Clamp every number of the gradient to ``[-limit, limit]``, in place."""
    for members in gradients.values():
        for values in map(_local, members):
            values.clamp_(-limit, limit)


def _local(gradient: Tensor) -> Tensor:
    """Return this process's part."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
