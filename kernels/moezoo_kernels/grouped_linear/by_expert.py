"""The products on a CPU: expert by expert, through blocks that stay in cache.

Shapes: T tokens, K choices, E experts, A and B widths, N rows in expert order, n rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels import fresh
from moezoo_kernels.grouped_matmul import groups
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import accumulation_dtype
from moezoo_kernels.grouped_mlp.rowwise import add_rows
from moezoo_kernels.layouts import StackedGradient


def linear(x: Tensor, w: Tensor, bias: Tensor | None, assignments: Assignments) -> Tensor:
    """Return each row's product ``(N, B)``; without choices, ``x`` has the rows themselves."""
    ends = assignments.ends
    tokens = assignments.tokens if assignments.choices else None
    product = x.new_empty(assignments.order.numel(), w.shape[1])
    for e, start, end in groups(ends):
        rows_nA = x[start:end] if tokens is None else x.index_select(0, tokens[start:end])
        product_nB = fresh.about_to_write(product[start:end])
        if bias is None:
            torch.mm(rows_nA, w[e].t(), out=product_nB)
        else:
            torch.addmm(bias[e], rows_nA, w[e].t(), out=product_nB)
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
    ends = assignments.ends
    tokens = assignments.tokens if assignments.choices else None
    accumulation = accumulation_dtype(x.dtype)
    grad_x = None
    if needs[0]:
        grad_x = torch.zeros(x.shape, dtype=x.dtype if tokens is None else accumulation)
    grad_w = StackedGradient(w, ends) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    for e, start, end in groups(ends):
        grad_nB = grad[start:end]
        if grad_w is not None:
            rows_nA = x[start:end] if tokens is None else x.index_select(0, tokens[start:end])
            grad_w.write(e, grad_nB, rows_nA)
        if grad_bias is not None:
            grad_bias[e] = grad_nB.sum(0, dtype=accumulation)
        if grad_x is not None:
            if tokens is None:
                torch.mm(grad_nB, w[e], out=grad_x[start:end])
            else:
                add_rows(grad_x, tokens[start:end], grad_nB @ w[e], None)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_w is None else grad_w.whole,
        grad_bias,
    )


def linear_sum(
    rows: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, assignments: Assignments
) -> Tensor:
    """Return the weighted sum of each token's products, ``(T, B)``."""
    accumulation = accumulation_dtype(rows.dtype)
    output = torch.zeros(weights.shape[0], w.shape[1], dtype=accumulation)
    tokens = assignments.tokens
    weights_N = weights.reshape(-1)[assignments.order].to(accumulation)
    for e, start, end in groups(assignments.ends):
        answer_nB = F.linear(rows[start:end], w[e], None if bias is None else bias[e])
        add_rows(output, tokens[start:end], answer_nB, weights_N[start:end])
    return output.to(rows.dtype)


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
    order, ends, tokens = assignments.order, assignments.ends, assignments.tokens
    accumulation = accumulation_dtype(rows.dtype)
    weights_N = weights.reshape(-1)[order].to(accumulation)
    grad_rows = torch.zeros(rows.shape, dtype=rows.dtype) if needs[0] else None
    grad_w = StackedGradient(w, ends) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    grad_weights = weights.new_zeros(weights.numel()) if needs[3] else None
    for e, start, end in groups(ends):
        grad_nB = grad.index_select(0, tokens[start:end])
        rows_nA, weights_n1 = rows[start:end], weights_N[start:end, None]
        if grad_rows is not None or grad_weights is not None:
            of_rows_nA = grad_nB @ w[e]
            if grad_weights is not None:
                of_weights_n = (of_rows_nA * rows_nA).sum(-1, dtype=accumulation)
                if bias is not None:
                    of_weights_n += (grad_nB * bias[e]).sum(-1, dtype=accumulation)
                grad_weights[order[start:end]] = of_weights_n.to(weights.dtype)
            if grad_rows is not None:
                torch.mul(of_rows_nA, weights_n1, out=grad_rows[start:end])
        if grad_w is not None or grad_bias is not None:
            weighted_nB = (grad_nB * weights_n1).to(rows.dtype)
            if grad_w is not None:
                grad_w.write(e, weighted_nB, rows_nA)
            if grad_bias is not None:
                grad_bias[e] = weighted_nB.sum(0, dtype=accumulation)
    return (
        grad_rows,
        None if grad_w is None else grad_w.whole,
        grad_bias,
        None if grad_weights is None else grad_weights.view(weights.shape),
    )


def _used(ends: Tensor) -> int:
    return int(ends[-1]) if ends.numel() else 0
