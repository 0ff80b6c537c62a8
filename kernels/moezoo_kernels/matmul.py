"""Matrix products in fp32 on CPUs, in C++ (csrc/matmul.h).

Tiles of sums stay in registers, and what they read is laid out for them in blocks that stay in
cache. Operands have any strides, a call costs little, and nothing is generated for a new shape.
Whether these products are the faster ones is what
:func:`moezoo_kernels.product_libraries.own_is_faster` finds out. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native


def unusable(*tensors: Tensor) -> str | None:
    """Return why :func:`matmul` cannot multiply these; None if it can."""
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return "has fp32 only"
        if reason := native.unusable(tensor.device, tensor.dtype):
            return reason
    return None


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Return ``a @ b``, plus a bias, or added to what ``out`` holds.

    Each number is summed in an order that the depth alone decides: neither threads nor the other
    rows change its bits.

    Args:
        a: ``(M, K)`` or ``(B, M, K)``, fp32, any strides.
        b: ``(K, N)`` or ``(B, K, N)``.
        out: ``(M, N)`` or ``(B, M, N)``, the numbers of a row side by side, rows with any stride;
            it must share no memory with the operands. Default: a new tensor.
        bias: ``(N,)``, added to each row; not with ``accumulate``.
        accumulate: add to ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes do not fit together, a tensor is not fp32, or ``out`` is not to be
            written as it lies.
    """
    batched = a.ndim == 3
    if a.ndim not in (2, 3) or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"matmul: give (M, K), (K, N), not {tuple(a.shape)}, {tuple(b.shape)}")
    *outer, rows, depth = a.shape
    columns = b.shape[-1]
    if b.shape[-2] != depth:
        raise ValueError(f"matmul: a has {depth} columns, b {b.shape[-2]} rows")
    shape = (*outer, rows, columns)
    if out is None:
        if accumulate:
            raise ValueError("accumulate: there is nothing to add to; give out")
        out = native.floats(*shape)
    elif out.shape != shape or (columns > 1 and out.stride(-1) != 1):
        found = f"{tuple(out.shape)} with strides {out.stride()}"
        raise ValueError(f"out: is {found}; give {shape}, numbers of a row side by side")
    if bias is not None and (bias.shape != (columns,) or accumulate):
        raise ValueError(f"bias: give ({columns},), and not with accumulate")
    for name, tensor in (("a", a), ("b", b), ("out", out), ("bias", bias)):
        if tensor is not None and (reason := unusable(tensor)):
            raise ValueError(f"matmul: {name} {reason}")
    native.call(
        "moezoo_matmul",
        a.data_ptr(),
        *(a.stride() if batched else (0, *a.stride())),
        b.data_ptr(),
        *(b.stride() if batched else (0, *b.stride())),
        None if bias is None else bias.contiguous(),
        a.shape[0] if batched else 1,
        rows,
        depth,
        columns,
        accumulate,
        out.data_ptr(),
        *(out.stride()[:2] if batched else (0, out.stride(0))),
    )
    return out
