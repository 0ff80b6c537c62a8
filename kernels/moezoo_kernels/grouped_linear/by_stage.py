"""The products in whole-batch stages: on an accelerator nothing waits for the device.

Shapes: T tokens, K choices, E experts, A and B widths, N rows in expert order, of which those from
``ends[-1]`` on are padding and become zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.grouped_matmul import grouped_matmul, grouped_outer
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import accumulation_dtype
from moezoo_kernels.grouped_mlp.stages import TORCH, is_padding
from moezoo_kernels.layouts import is_transposed


def linear(x: Tensor, w: Tensor, bias: Tensor | None, assignments: Assignments) -> Tensor:
    """Return each row's product ``(N, B)``; without choices, ``x`` has the rows themselves."""
    product = _product(_rows(x, assignments), w, bias, assignments)
    return _zero_padding(product, assignments)


def linear_backward(
    grad: Tensor,  # (N, B)
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    assignments: Assignments,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w and bias."""
    ends, grad = assignments.ends, grad.contiguous()
    grad_x = grad_w = grad_bias = None
    if needs[0]:
        grad_rows_NA = grouped_matmul(grad, w, ends)
        if assignments.choices:
            grad_x = TORCH.sum_by_token(grad_rows_NA, None, assignments, x.shape[0])
        else:
            grad_x = _zero_padding(grad_rows_NA, assignments)
    if needs[1]:
        grad_w = _outer(grad, _rows(x, assignments), w, ends)
    if bias is not None and needs[2]:
        grad_bias = _sum_by_expert(grad, ends).to(bias.dtype)
    return grad_x, grad_w, grad_bias


def linear_sum(
    rows: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, assignments: Assignments
) -> Tensor:
    """Return the weighted sum of each token's products, ``(T, B)``."""
    answer = _product(rows.contiguous(), w, bias, assignments)
    if answer.device.type == "cpu" and weights.numel() == _used(assignments.ends):
        by_slot = torch.empty_like(answer).index_copy_(0, assignments.order, answer)
        weights_TK1 = weights.to(accumulation_dtype(rows.dtype)).unsqueeze(-1)
        return (by_slot.view(*weights.shape, answer.shape[1]) * weights_TK1).sum(1).to(rows.dtype)
    return TORCH.sum_by_token(answer, weights, assignments, weights.shape[0])


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
    order, ends = assignments.order, assignments.ends
    accumulation = accumulation_dtype(rows.dtype)
    weights_N1 = weights.reshape(-1)[order].to(accumulation)[:, None]
    grad_NB = grad[assignments.tokens]
    grad_rows = grad_w = grad_bias = grad_weights = None
    if needs[0] or needs[3]:
        of_rows_NA = _zero_padding(grouped_matmul(grad_NB, w, ends), assignments)
        if needs[0]:
            grad_rows = (of_rows_NA * weights_N1).to(rows.dtype)
        if needs[3]:
            of_weights_N = (of_rows_NA * rows).sum(-1, dtype=accumulation)
            if bias is not None:
                of_weights_N += (grad_NB * bias[_experts(assignments)]).sum(-1, dtype=accumulation)
            slots = torch.where(is_padding(assignments), weights.numel(), order)
            by_slot = of_weights_N.new_zeros(weights.numel() + 1)
            by_slot = by_slot.index_copy_(0, slots, of_weights_N)[:-1]
            grad_weights = by_slot.to(weights.dtype).view(weights.shape)
    if needs[1] or needs[2]:
        weighted_NB = (grad_NB * weights_N1).to(rows.dtype)
        if needs[1]:
            grad_w = _outer(weighted_NB, rows.contiguous(), w, ends)
        if bias is not None and needs[2]:
            grad_bias = _sum_by_expert(weighted_NB, ends).to(bias.dtype)
    return grad_rows, grad_w, grad_bias, grad_weights


def _zero_padding(rows: Tensor, assignments: Assignments) -> Tensor:
    if rows.device.type == "cpu":
        rows[_used(assignments.ends) :] = 0
        return rows
    return rows.masked_fill_(is_padding(assignments)[:, None], 0)


def _used(ends: Tensor) -> int:
    return int(ends[-1]) if ends.numel() else 0


def _rows(x: Tensor, assignments: Assignments) -> Tensor:
    return x[assignments.tokens] if assignments.choices else x.contiguous()


def _product(rows: Tensor, w: Tensor, bias: Tensor | None, assignments: Assignments) -> Tensor:
    product = grouped_matmul(rows, w.transpose(1, 2), assignments.ends)
    if bias is not None:
        product += bias[_experts(assignments)]
    return product


def _outer(grad_NB: Tensor, rows_NA: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient of matrices ``(E, B, A)``, in their layout."""
    if is_transposed(w):
        return grouped_outer(rows_NA, grad_NB, ends).transpose(1, 2)
    return grouped_outer(grad_NB, rows_NA, ends)


def _experts(assignments: Assignments) -> Tensor:
    """Return the expert of each row, ``(N,)``; padding gets the last one."""
    rows = torch.arange(assignments.order.numel(), device=assignments.order.device)
    experts = torch.searchsorted(assignments.ends, rows, right=True)
    return experts.clamp_(max=assignments.ends.numel() - 1)


def _sum_by_expert(rows_NB: Tensor, ends: Tensor) -> Tensor:
    """Sum each expert's rows, ``(E, B)``."""
    rows = torch.arange(rows_NB.shape[0], device=rows_NB.device)
    return F.embedding_bag(
        rows, rows_NB.to(accumulation_dtype(rows_NB.dtype)), F.pad(ends, (1, 0)), mode="sum"
    )[:-1]
