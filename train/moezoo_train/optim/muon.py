"""Muon's update for matrices that may be sharded over processes.

The update is the momentum's nearest orthogonal matrix (Jordan 2024; Liu et al. 2025,
arXiv:2502.16982), which only the whole matrix has. Processes that share matrices by rows (FSDP2)
therefore exchange them: each gets some matrices whole, orthogonalises these, and sends the rows
back, so that no work is done twice. Stacks of experts are shared by experts where the processes
divide them, and need no exchange then.

In fp32 on a CPU, the iterations are a C++ kernel (:mod:`moezoo_kernels.newton_schulz`) that
multiplies small symmetric matrices in place of whole ones, where that is faster; the updates agree
to 1e-5. Everything else runs them as published.

Products of sharded matrices would be right too, but for rounding: partial sums rounded to bf16 turn
the result by a percent, sums of whole matrices round as they do in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moezoo_kernels import newton_schulz
from moezoo_train.adapters.torch_core import adjusted_muon_lr

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic iteration, as published by Muon's author and default in torch."""
NEWTON_SCHULZ_STEPS = 5
_EPS = 1e-7


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    adjust_lr_fn: str,
    dtype: torch.dtype,
) -> None:
    """Update matrices ``(rows, columns)`` and stacks of matrices in place.

    Args:
        parameters: the same on all processes, in the same order.
        gradients: of the parameters.
        momenta: running means of the gradients, which are updated.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: Nesterov's.
        adjust_lr_fn: see :class:`torch.optim.Muon`.
        dtype: of the products that orthogonalise.
    """
    updates = []
    for gradient, mean in zip(map(_local, gradients), map(_local, momenta), strict=True):
        mean.lerp_(gradient, 1 - momentum)
        updates.append(gradient.lerp(mean, momentum))
    orthogonal = _orthogonalize(updates, parameters, dtype)
    for parameter, update in zip(parameters, orthogonal, strict=True):
        target = _local(parameter)
        target.mul_(1 - lr * weight_decay)
        target.add_(update, alpha=-adjusted_muon_lr(lr, adjust_lr_fn, parameter.shape[-2:]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonalize(
    updates: list[Tensor], parameters: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Orthogonalise this process's shards of the updates."""
    result: list[Tensor] = list(updates)
    whole: list[int] = []
    sharded: dict[Any, list[int]] = {}
    for number, parameter in enumerate(parameters):
        group = _row_group(parameter)
        (whole if group is None else sharded.setdefault(group, [])).append(number)
    for number, matrix in zip(
        whole, orthogonalize([updates[n] for n in whole], dtype), strict=True
    ):
        result[number] = matrix
    for group, numbers in sharded.items():
        parts = {n: _matrices(updates[n]) for n in numbers}
        shapes = [parameters[n].shape[-2:] for n in numbers for _ in parts[n]]
        flat = [part for n in numbers for part in parts[n]]
        orthogonal = iter(_exchange(flat, shapes, group, dtype))
        for number in numbers:
            found = list(islice(orthogonal, len(parts[number])))
            result[number] = torch.stack(found) if updates[number].ndim == 3 else found[0]
    return result


def _matrices(update: Tensor) -> list[Tensor]:
    return list(update.unbind()) if update.ndim == 3 else [update]


def orthogonalize(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Bring singular values near 1 by Newton-Schulz iterations, as torch's Muon does.

    Args:
        matrices: ``(rows, columns)``, or stacks of them, ``(E, rows, columns)``; they may be
            overwritten.
        dtype: of the arithmetic and of what is returned.
    """
    result = [matrix.to(dtype) for matrix in matrices]
    native = [number for number, x in enumerate(result) if newton_schulz.unusable(x) is None]
    for number in native:
        result[number] = result[number].contiguous()
    newton_schulz.newton_schulz_(
        [result[number] for number in native], NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, _EPS
    )
    for number in sorted({*range(len(result))} - {*native}):
        stack = result[number]
        if stack.ndim == 2:
            result[number] = iterate(stack)
        elif len(stack):
            result[number] = torch.stack([iterate(matrix) for matrix in stack])
    return result


def iterate(matrix: Tensor) -> Tensor:
    """Run the iterations on one matrix as published, in any dtype and on any device."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if (tall := matrix.shape[0] > matrix.shape[1]) else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _row_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that share a matrix by rows; None if its matrices are whole here."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    cut = [
        dimension
        for dimension, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1
    ]
    if parameter.ndim == 3:
        cut = [d for d in cut if not parameter.placements[d].is_shard(0)]
    if not cut:
        return None
    rows = Shard(parameter.ndim - 2)
    if len(cut) > 1 or parameter.placements[cut[0]] != rows:
        raise NotImplementedError(f"Muon for {parameter.placements} of {tuple(parameter.shape)}")
    return mesh.get_group(cut[0])


def _exchange(
    parts: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup, dtype: torch.dtype
) -> list[Tensor]:
    """Orthogonalise matrices of which every process has some rows; the j-th is rank j mod R's."""
    ranks, me = group.size(), group.rank()
    owned = [range(rank, len(parts), ranks) for rank in range(ranks)]
    rows = [[len(c) for c in _chunks(shape[0], ranks)] for shape in shapes]
    columns = [shape[1] for shape in shapes]
    mine = [j for rank in range(ranks) for j in owned[rank]]  # by the rank that they go to
    leaving = [sum(rows[j][me] * columns[j] for j in js) for js in owned]
    arriving = [sum(rows[j][rank] * columns[j] for j in owned[me]) for rank in range(ranks)]

    sent = torch.cat([parts[j].flatten() for j in mine])
    received = _all_to_all(sent, leaving, arriving, group)
    by_rank = [
        piece.split([rows[j][rank] * columns[j] for j in owned[me]])
        for rank, piece in enumerate(received.split(arriving))
    ]
    matrices = [
        torch.cat([pieces[i] for pieces in by_rank]).reshape(shapes[j])
        for i, j in enumerate(owned[me])
    ]
    whole = orthogonalize(matrices, dtype)
    cut = [matrix.split(rows[j]) for matrix, j in zip(whole, owned[me], strict=True)]
    back = [pieces[rank].flatten() for rank in range(ranks) for pieces in cut]
    answer = torch.cat(back) if back else sent.new_zeros(0, dtype=dtype)
    returned = _all_to_all(answer, arriving, leaving, group)
    orthogonal = list(parts)
    for j, piece in zip(mine, returned.split([parts[j].numel() for j in mine]), strict=True):
        orthogonal[j] = piece.reshape(parts[j].shape)
    return orthogonal


def _chunks(size: int, ranks: int) -> list[range]:
    """Cut rows as ``torch.chunk`` does, the last ranks perhaps getting none."""
    length = -(-size // ranks)
    return [range(min(r * length, size), min((r + 1) * length, size)) for r in range(ranks)]


def _all_to_all(
    x: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = x.new_empty(sum(arriving))
    dist.all_to_all_single(received, x, arriving, leaving, group=group)
    return received
