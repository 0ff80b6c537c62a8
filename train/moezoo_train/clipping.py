"""Gradient clipping by clip group, for dense and sparse gradients.

Each clip group of the optimizer (see :class:`moezoo.ParameterGroup`) is clipped by its own norm to
the same limit, as in the trainers of Lample et al. 2019 (arXiv:1907.05242) and Berges et al. 2024
(arXiv:2412.09764). There the values of a memory form one group and the rest of the model the other,
so that a large gradient of one does not shrink the steps of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

MAIN = "main"


def gradient_norms(optimizer: Optimizer) -> dict[str, Tensor]:
    """Give the norm of the gradient of each clip group that has one, the main group first.

    A sparse gradient may list a row several times, once for each use; these are summed here.
    """
    norms = {}
    for name, parameters in _clip_groups(optimizer).items():
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        norms[name] = _norm([_values(p) for p in parameters])
    return norms


def _norm(gradients: list[Tensor]) -> Tensor:
    """Take the norm of tensors, of which some may lie in parts on several processes."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [get_total_norm(members) for members in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return get_total_norm(whole) if len(whole) != 1 else whole[0]


def total_norm(norms: dict[str, Tensor]) -> Tensor:
    """Give the norm of the whole gradient."""
    return get_total_norm(list(norms.values())) if len(norms) != 1 else next(iter(norms.values()))


@torch.no_grad()
def clip_norms(optimizer: Optimizer, norms: dict[str, Tensor], limit: float) -> None:
    """Scale the gradient of each clip group down to a norm of at most ``limit``.

    Args:
        optimizer: whose gradients.
        norms: what :func:`gradient_norms` gave.
        limit: largest norm of each group.
    """
    for name, parameters in _clip_groups(optimizer).items():
        factor = (limit / (norms[name] + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for values in _own(parameters):
            values.mul_(factor.to(values.device))


@torch.no_grad()
def clip_values(optimizer: Optimizer, limit: float) -> None:
    """Clamp every number of the gradient to ``[-limit, limit]``."""
    for parameters in _clip_groups(optimizer).values():
        for values in _own(parameters):
            values.clamp_(-limit, limit)


def _clip_groups(optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters that have a gradient."""
    groups: dict[str, list[nn.Parameter]] = {MAIN: []}
    for group in optimizer.param_groups:
        members = groups.setdefault(group.get("clip_group", MAIN), [])
        members.extend(p for p in group["params"] if p.grad is not None)
    return {name: members for name, members in groups.items() if members}


def _own(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Give this process's part of each gradient, to be changed in place."""
    gradients = [_values(p) for p in parameters]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _values(parameter: nn.Parameter) -> Tensor:
    """Give the gradient, or of a (coalesced) sparse one the rows."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.values() if gradient.is_sparse else gradient
