"""``sparse_linear`` for CPUs, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    rows: int,
    n: int,
    m: int,
) -> Tensor:
    """Return ``(T, N)``, in ``x``'s dtype.

    Args:
        x: ``(T, K)``.
        values: of :class:`~moezoo_kernels.sparse_linear.BlockSparse` or ``GroupSparse``.
        index: the columns of blocks, or the places in groups.
        starts: of blocks; None for groups.
        bias: ``(N,)`` or None.
        rows: N.
        n: numbers of a group that are stored; 0 for blocks.
        m: numbers of a group; 0 for blocks.
    """
    tokens, width = x.shape
    output = torch.empty(tokens, rows, dtype=x.dtype)
    native.call(
        "moezoo_sparse_linear",
        x.contiguous(),
        output,
        values.contiguous(),
        index.contiguous(),
        None if starts is None else starts.contiguous(),
        None if bias is None else bias.contiguous(),
        native.dtype_code(x.dtype),
        *(tokens, rows, width),
        0 if starts is None else values.shape[1],
        *(n, m),
    )
    return output
