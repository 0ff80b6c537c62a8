"""The products in fp32 on a CPU, all experts in one call of C++ (csrc/grouped_products.cpp).

Shapes: T tokens, K choices, E experts, A and B widths, N rows in expert order, of which those from
``ends[-1]`` on are padding and become zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo_kernels import grouped_products, native
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_products import address, by_row, gradient, stack
from moezoo_kernels.layouts import is_transposed


def linear(x: Tensor, w: Tensor, bias: Tensor | None, assignments: Assignments) -> Tensor:
    """Return each row's product ``(N, B)``; without choices, ``x`` has the rows themselves."""
    ends, count = assignments.ends, assignments.order.numel()
    product = grouped_products.linear(x, _tokens(assignments), w, bias, ends, count)
    product[_used(ends) :] = 0
    return product


def linear_backward(
    grad: Tensor,  # (N, B)
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    assignments: Assignments,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w and bias."""
    ends, tokens = assignments.ends, _tokens(assignments)
    turned, grad_x = w.transpose(1, 2), None
    if needs[0] and tokens is not None:
        grad_x = grouped_products.linear_sum(grad, tokens, turned, None, None, ends, len(x))
    elif needs[0]:
        grad_x = grouped_products.linear(grad, None, turned, None, ends, len(grad))
        grad_x[_used(ends) :] = 0
    grad_w, grad_bias = gradient(w, needs[1], ends), gradient(bias, needs[2], ends)
    if grad_w is not None or grad_bias is not None:
        grouped_products.outer(grad, x, tokens, ends, grad_w, grad_bias)
    return grad_x, grad_w, grad_bias


def linear_sum(
    rows: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, assignments: Assignments
) -> Tensor:
    """Return the weighted sum of each token's products, ``(T, B)``."""
    tokens, weights_N = assignments.tokens, _row_weights(weights, assignments)
    ends, count = assignments.ends, weights.shape[0]
    return grouped_products.linear_sum(rows, tokens, w, bias, weights_N, ends, count)


def linear_sum_backward(
    grad: Tensor,  # (T, B)
    rows: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    assignments: Assignments,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of rows, w, bias and weights."""
    order, ends, used = assignments.order, assignments.ends, _used(assignments.ends)
    grad, rows = by_row(grad), by_row(rows)
    grad_rows = native.floats(*rows.shape) if needs[0] else None
    grad_w, grad_bias = gradient(w, needs[1], ends), gradient(bias, needs[2], ends)
    of_weights = native.floats(order.numel()) if needs[3] else None
    native.call(
        "moezoo_grouped_linear_sum_backward",
        grad.data_ptr(),
        grad.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        *stack(w),
        None if bias is None else bias.contiguous(),
        assignments.tokens,
        _row_weights(weights, assignments),
        ends,
        *w.shape,
        grad_rows,
        address(grad_w),
        is_transposed(w),
        grad_bias,
        of_weights,
    )
    if grad_rows is not None:
        grad_rows[used:] = 0
    grad_weights = None
    if of_weights is not None:
        grad_weights = weights.new_zeros(weights.numel())
        grad_weights[order[:used]] = of_weights[:used].to(weights.dtype)
        grad_weights = grad_weights.view(weights.shape)
    return grad_rows, grad_w, grad_bias, grad_weights


def _tokens(assignments: Assignments) -> Tensor | None:
    return assignments.tokens if assignments.choices else None


def _row_weights(weights: Tensor, assignments: Assignments) -> Tensor:
    return weights.reshape(-1)[assignments.order].to(torch.float32)


def _used(ends: Tensor) -> int:
    return int(ends[-1]) if ends.numel() else 0
