"""Products of rows in expert order in one C++ call for all experts, with our own fp32 products.

``csrc/grouped_products.cpp`` on CPUs: nothing in Python costs something per expert. No bit depends
on the number of threads. Not differentiable.

Shapes: T tokens, E experts, A and B widths, N rows in expert order, of which those from
``ends[-1]`` on are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import fresh, native
from moezoo_kernels.layouts import is_transposed
from moezoo_kernels.product_libraries import own_keeps_up


def is_whole(dtype: torch.dtype) -> bool:
    """Return whether a CPU runs all experts of this dtype in one call."""
    if dtype != torch.float32 or native.unusable(torch.device("cpu"), dtype) is not None:
        return False
    return own_keeps_up()


# As `_choose` of backends.py: a compiler takes what is found for a constant.
is_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def linear(
    rows: Tensor, tokens: Tensor | None, w: Tensor, bias: Tensor | None, ends: Tensor, count: int
) -> Tensor:
    """Return each row times its expert's matrix, plus its bias; padding is uninitialised.

    Args:
        rows: ``(N, A)``, or ``(T, A)`` if there are tokens.
        tokens: ``(N,)`` int64 or None.
        w: ``(E, B, A)``, any strides.
        bias: ``(E, B)`` or None.
        ends: ``(E,)`` int64, non-decreasing, at most N.
        count: N.

    Returns:
        ``(N, B)``.
    """
    rows = by_row(rows)
    product = native.floats(count, w.shape[1])
    native.call(
        "moezoo_grouped_linear",
        rows.data_ptr(),
        rows.stride(0),
        tokens,
        *stack(w),
        None if bias is None else bias.contiguous(),
        ends,
        *w.shape,
        product,
    )
    return product


def linear_sum(
    rows: Tensor,
    tokens: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    count: int,
) -> Tensor:
    """Return the sum of each token's rows times their matrices, plus biases, perhaps weighted.

    Args:
        rows: ``(N, A)``.
        tokens: ``(N,)`` int64.
        w: ``(E, B, A)``, any strides.
        bias: ``(E, B)`` or None.
        weights: ``(N,)`` fp32; None for ones.
        ends: as for :func:`linear`.
        count: T.

    Returns:
        ``(T, B)``.
    """
    rows = by_row(rows)
    output = torch.zeros(count, w.shape[1], dtype=torch.float32)
    native.call(
        "moezoo_grouped_linear_sum",
        rows.data_ptr(),
        rows.stride(0),
        *stack(w),
        None if bias is None else bias.contiguous(),
        tokens,
        weights,
        ends,
        *w.shape,
        output,
    )
    return output


def outer(
    grad: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    ends: Tensor,
    of_w: Tensor | None,
    of_bias: Tensor | None,
) -> None:
    """Write sums over each expert's rows: of their outer products ``gradᵀ rows``, and of ``grad``.

    Args:
        grad: ``(N, B)``.
        rows: ``(N, A)``, or ``(T, A)`` if there are tokens.
        tokens: ``(N,)`` int64 or None.
        ends: as for :func:`linear`.
        of_w: ``(E, B, A)``, written where there are rows: of :func:`gradient`, or None.
        of_bias: ``(E, B)``, likewise.
    """
    grad, rows = by_row(grad), by_row(rows)
    native.call(
        "moezoo_grouped_outer",
        grad.data_ptr(),
        grad.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        tokens,
        ends,
        ends.numel(),
        grad.shape[1],
        rows.shape[1],
        address(of_w),
        of_w is not None and is_transposed(of_w),
        of_bias,
    )


def by_row(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows' numbers lie side by side."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def stack(w: Tensor) -> tuple[int, ...]:
    """Return what C++ takes for matrices: their address and strides."""
    return (w.data_ptr(), *w.stride())


def gradient(parameter: Tensor | None, needed: bool, ends: Tensor) -> Tensor | None:
    """Return a gradient in its parameter's layout, to be written where experts are used: zeros."""
    if parameter is None or not needed:
        return None
    if is_transposed(parameter):
        shape = parameter.transpose(1, 2).shape
        return fresh.stacked(shape, parameter.dtype, ends).transpose(1, 2)
    return fresh.stacked(parameter.shape, parameter.dtype, ends)


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies, whatever its strides; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
