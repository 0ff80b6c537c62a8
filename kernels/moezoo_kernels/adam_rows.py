"""One step of Adam on the rows of a table that have a gradient; the others are not looked at.

Of a table of a gigabyte a batch reads some thousand rows. Each is read and written once, with its
two moments, where torch's operators make a sparse tensor for every one of the three and sort it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native


def adam_rows(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    rows: Tensor,
    gradients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    step_size: float,
) -> None:
    """Update rows of a table and of its moments in place, as ``torch.optim.SparseAdam`` does.

    ``m += (1 - β₁) (g - m)``, ``v += (1 - β₂) (g² - v)``, ``w -= step_size m / (√v + eps)`` (Kingma
    and Ba 2014, arXiv:1412.6980; the step size holds the correction of the moments' beginning).

    Args:
        table: ``(N, …)``, any floating dtype.
        first: running mean of the gradients, of the table's shape.
        second: running mean of their squares.
        rows: ``(R,)`` int64, none of them twice.
        gradients: ``(R, …)``.
        betas: β₁ and β₂.
        eps: added to the root.
        step_size: of this step.
    """
    tensors = (table, first, second, gradients)
    if not rows.numel():
        return
    if all(_is_plain(tensor) for tensor in tensors):
        width, options = table[0].numel(), (*map(float, betas), float(eps), float(step_size))
        operands = table, first, second, rows.contiguous(), gradients
        native.call("moezoo_adam_rows", *operands, len(rows), width, *options)
        for changed in (table, first, second):  # as operators of torch tell what they write
            torch.autograd.graph.increment_version(changed)
        return
    mean, square = first[rows], second[rows]
    mean += (gradients - mean) * (1 - betas[0])
    square += (gradients * gradients - square) * (1 - betas[1])
    first.index_copy_(0, rows, mean)
    second.index_copy_(0, rows, square)
    table.index_copy_(0, rows, table[rows] - step_size * (mean / (square.sqrt() + eps)))


def _is_plain(tensor: Tensor) -> bool:
    """Return whether C++ can read and write it where it lies."""
    usable = native.unusable(tensor.device, tensor.dtype) is None
    return usable and tensor.dtype == torch.float32 and tensor.is_contiguous()
