"""Matrix products over groups of consecutive rows: ``torch.nn.functional.grouped_mm``, tamed.

``grouped_mm`` takes int32 offsets only; wants every row, of operands and results, to start at a
multiple of 16 bytes; refuses fp64, biases and expanded tensors; leaves rows beyond the last offset
unwritten; and has a fake kernel for bf16 alone. The functions here take int64 offsets and any
shape and floating dtype, falling back to a loop of ``mm`` (which on an accelerator waits for the
offsets). In fp32 on a CPU, all groups are one call with our own products where these keep up. Call
them inside an opaque op: they are neither differentiable nor traceable.

Shapes: N rows, E groups, A and B widths; group e is rows ``ends[e-1] … ends[e]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels import fresh, grouped_products
from moezoo_kernels.grouped_products import is_whole

_ALIGNMENT = 16  # bytes
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        rows: ``(N, A)``.
        matrices: ``(E, A, B)``; may be a transposed view.
        ends: ``(E,)`` int64, non-decreasing, at most N.

    Returns:
        ``(N, B)``, contiguous. Rows from ``ends[-1]`` on are uninitialised: never read them.
    """
    width = matrices.shape[-1]
    if _is_whole(rows, matrices):
        turned = matrices.transpose(1, 2)
        return grouped_products.linear(rows, None, turned, None, ends.contiguous(), len(rows))
    if _fusable(rows, matrices) and width * rows.element_size() % _ALIGNMENT == 0:
        return F.grouped_mm(rows, matrices, offs=ends.to(torch.int32)).contiguous()
    product = rows.new_empty(rows.shape[0], width)
    for e, start, end in groups(ends):
        torch.mm(rows[start:end], matrices[e], out=product[start:end])
    return product


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum the outer products of paired rows over each group: ``left_eᵀ right_e``.

    Args:
        left: ``(N, A)``.
        right: ``(N, B)``.
        ends: ``(E,)`` int64, non-decreasing, at most N. Rows from ``ends[-1]`` on are not read.

    Returns:
        ``(E, A, B)``, contiguous; zeros for an empty group.
    """
    width = right.shape[-1]
    if left.device.type == "cpu":  # grouped_mm is this loop there, and zeroes empty groups by hand
        product = fresh.stacked((ends.numel(), left.shape[1], width), right.dtype, ends)
        if _is_whole(left, right):
            grouped_products.outer(left, right, None, ends.contiguous(), product, None)
            return product
        parts = fresh.Parts(product, ends)
        for e, start, end in groups(ends):
            torch.mm(left[start:end].t(), right[start:end], out=parts[e])
        return product
    if _fusable(left.t(), right) and width * right.element_size() % _ALIGNMENT == 0:
        product = F.grouped_mm(left.t(), right, offs=ends.to(torch.int32)).contiguous()
        # An empty group: torch promises nothing.
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return product.masked_fill_(empty[:, None, None], 0)
    product = right.new_zeros(ends.numel(), left.shape[1], width)
    for e, start, end in groups(ends):
        torch.mm(left[start:end].t(), right[start:end], out=product[e])
    return product


def groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """List ``(group, start, end)`` of the groups that are not empty. Waits for the device."""
    listed, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            listed.append((group, start, end))
        start = end
    return listed


def _is_whole(left: Tensor, right: Tensor) -> bool:
    """Return whether our own products take all groups in one call."""
    return left.device.type == "cpu" and left.dtype == right.dtype and is_whole(left.dtype)


def _fusable(left: Tensor, right: Tensor) -> bool:
    shared = left.dtype == right.dtype and left.dtype in _FUSED_DTYPES
    rows = max(left.shape[-1], left.shape[0])
    return shared and rows < 2**31 and all(_aligned(t) for t in (left, right))


def _aligned(tensor: Tensor) -> bool:
    """Return whether the last two dimensions are a plain matrix of aligned rows or columns."""
    *outer, rows, columns = tensor.stride()
    height, width = tensor.shape[-2:]
    if columns == 1 and rows >= max(1, width):
        leading = rows
    elif rows == 1 and columns >= max(1, height):
        leading = columns
    else:
        return False
    steps = [leading, *outer, tensor.storage_offset()]
    return all(step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)
