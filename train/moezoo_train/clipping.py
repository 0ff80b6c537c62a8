"""Gradient clipping by clip group, for dense and sparse gradients.

Each clip group of the optimizer (see :class:`moezoo.ParameterGroup`) is clipped by its own norm to
the same limit, as in the trainers of Lample et al. 2019 (arXiv:1907.05242) and Berges et al. 2024
(arXiv:2412.09764). There the values of a memory form one group and the rest of the model the other,
so that a large gradient of one does not shrink the steps of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
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
        norms[name] = get_total_norm([_dense(p) for p in parameters])
    return norms


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
        dense, sparse = _split(parameters)
        clip_grads_with_norm_(dense, limit, norms[name])
        for values in sparse:  # the factor that torch multiplies the dense ones with
            values.mul_((limit / (norms[name] + 1e-6)).clamp(max=1.0).to(values.device))


@torch.no_grad()
def clip_values(optimizer: Optimizer, limit: float) -> None:
    """Clamp every number of the gradient to ``[-limit, limit]``."""
    for parameters in _clip_groups(optimizer).values():
        dense, sparse = _split(parameters)
        if dense:  # torch's kernel for many tensors refuses none
            clip_grad_value_(dense, limit)
        for values in sparse:
            values.clamp_(-limit, limit)


def _clip_groups(optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters that have a gradient."""
    groups: dict[str, list[nn.Parameter]] = {MAIN: []}
    for group in optimizer.param_groups:
        members = groups.setdefault(group.get("clip_group", MAIN), [])
        members.extend(p for p in group["params"] if p.grad is not None)
    return {name: members for name, members in groups.items() if members}


def _split(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Separate parameters of dense gradients from the rows of (coalesced) sparse ones."""
    dense = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
    return dense, [_dense(p) for p in parameters if p.grad is not None and p.grad.is_sparse]


def _dense(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.values() if gradient.is_sparse else gradient
