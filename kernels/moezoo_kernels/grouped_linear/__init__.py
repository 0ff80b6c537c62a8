"""The two products of experts apart, for experts whose activation only its owner knows.

:func:`moezoo_kernels.grouped_mlp` knows the activation between its products and recomputes it. Any
other function stands between these two instead, under autograd::

    assignments = assign(indices, num_experts)
    inner = grouped_linear(x, w_in, assignments, bias_in)
    y = grouped_linear_sum(function(inner), w_out, weights, assignments, bias_out)

Shapes: T tokens, K choices, E experts, A and B widths, N assignments in expert order. Rows past the
last assignment are zeros, and so are their gradients: functions of single rows may have parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import transforms
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.grouped_linear import op
from moezoo_kernels.grouped_mlp.assignments import Assignments


def assign(indices: Tensor, num_experts: int, rows: int | None = None) -> Assignments:
    """Return the assignments in expert order.

    Args:
        indices: ``(T, K)`` int64 expert numbers; -1 for no expert.
        num_experts: E.
        rows: N, at least as many as indices are not -1; default: T K.

    Raises:
        ValueError: an index is out of range, or more than ``rows`` are not -1.
    """
    room = indices.numel() if rows is None else min(rows, indices.numel())
    order, ends = _run(op.sort, (), indices, num_experts, room)
    return Assignments(order, ends, indices.shape[1])


def grouped_linear(
    x: Tensor, w: Tensor, assignments: Assignments, bias: Tensor | None = None, gather: bool = True
) -> Tensor:
    """Apply to each row its expert's matrix: ``w[e] @ x[token] + bias[e]``.

    Saved for the backward: the operands, and the assignments.

    Args:
        x: ``(T, A)`` tokens, fp64, fp32, bf16 or fp16.
        w: ``(E, B, A)``, ``x``'s dtype; may be a transposed view, whose gradient is one too.
        assignments: of :func:`assign`.
        bias: ``(E, B)`` or None.
        gather: false if ``x`` holds the rows themselves, ``(N, A)`` in expert order.

    Returns:
        ``(N, B)`` in expert order, in the dtype of ``x`` (or of autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    x, w, bias = autocast(x), autocast(w), None if bias is None else autocast(bias)
    _check(x, w, bias)
    if not gather:
        _check_rows(x, assignments)
    choices = assignments.choices if gather else 0
    operands = (x, w, bias)
    found: Tensor = _run(
        op.linear, operands, *operands, assignments.order, assignments.ends, choices
    )
    return found


def grouped_linear_sum(
    rows: Tensor,
    w: Tensor,
    weights: Tensor,
    assignments: Assignments,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply to each row its expert's matrix, and sum each token's rows by their weights.

    For each token, ``sum over its slots of weights[t, j] * (w[e] @ row + bias[e])``, added up in
    fp32 at least. Saved for the backward: the operands and the assignments, not the products.

    Args:
        rows: ``(N, A)`` in expert order, fp64, fp32, bf16 or fp16.
        w: ``(E, B, A)``, ``rows``' dtype; may be a transposed view, whose gradient is one too.
        weights: ``(T, K)`` router weights, any floating dtype.
        assignments: of :func:`assign`.
        bias: ``(E, B)`` or None.

    Returns:
        ``(T, B)`` in the dtype of ``rows`` (or of autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    rows, w, bias = autocast(rows), autocast(w), None if bias is None else autocast(bias)
    _check(rows, w, bias)
    _check_rows(rows, assignments)
    operands = (rows, w, bias, weights)
    found: Tensor = _run(op.linear_sum, operands, *operands, assignments.order, assignments.ends)
    return found


def sum_by_token(rows: Tensor, weights: Tensor, assignments: Assignments) -> Tensor:
    """Sum each token's rows by their weights, in fp32 at least; plain torch, no atomics.

    For rows that something is done to after the second product. Saved for the backward: the rows by
    slot, in the dtype of the sums, and the weights.

    Args:
        rows: ``(N, B)`` in expert order.
        weights: ``(T, K)`` router weights.
        assignments: of :func:`assign`.

    Returns:
        ``(T, B)`` in the dtype of ``rows``.
    """
    accumulation = torch.promote_types(rows.dtype, torch.float32)
    slots = op.slots(assignments.order, assignments.ends, weights.numel())
    by_slot = rows.new_zeros(weights.numel() + 1, rows.shape[1]).index_copy(0, slots, rows)[:-1]
    by_slot = by_slot.view(*weights.shape, rows.shape[1]).to(accumulation)
    return (by_slot * weights.to(accumulation).unsqueeze(-1)).sum(1).to(rows.dtype)


def _run(operation: Any, operands: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    """Call an op; where no autograd, compiler, transform or mode looks on, what it calls."""
    if (
        torch.compiler.is_compiling()
        or not transforms.is_ordinary()
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands))
    ):
        return operation.opaque(*arguments)
    return operation.plain(*arguments)


def _check(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        shapes = f"rows {tuple(x.shape)}, w {tuple(w.shape)}"
        raise ValueError(f"grouped_linear: give rows (…, A) and w (E, B, A), not {shapes}")
    if bias is not None and bias.shape != w.shape[:2]:
        raise ValueError(f"bias: shape is {tuple(bias.shape)}, w asks for {tuple(w.shape[:2])}")
    for name, tensor in (("w", w), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, rows have {x.dtype}; cast one")


def _check_rows(rows: Tensor, assignments: Assignments) -> None:
    if rows.shape[0] != assignments.order.shape[0]:
        count = assignments.order.shape[0]
        raise ValueError(f"rows: there are {rows.shape[0]}, the assignments ask for {count}")


__all__ = ["assign", "grouped_linear", "grouped_linear_sum", "sum_by_token"]
