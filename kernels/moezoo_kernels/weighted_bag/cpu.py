"""``weighted_bag`` in C++ (csrc/weighted_bag.cpp), for fp32 and bf16 tables, summed in fp32.

The backward goes once through the rows that were read, in their order: a row's gradient is the sum
over its assignments, and while the gradients of their tokens are in cache, each one's dot product
with the row is its weight's gradient. So the table is read in order, and each row once.

Shapes: T tokens, J rows read per token, N rows of the table, R rows of its gradient, V width.
"""

from __future__ import annotations

from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.row_sums import Assignments


def forward(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the bags, ``(T, V)``."""
    (tokens, choices), width = indices.shape, table.shape[1]
    output = table.new_empty(tokens, width)
    native.call(
        "moezoo_weighted_bag",
        table.contiguous(),
        native.dtype_code(table.dtype),
        indices.contiguous(),
        weights.contiguous(),
        tokens,
        choices,
        width,
        output,
    )
    return output


def backward(
    grad: Tensor,  # (T, V)
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    assignments: Assignments | None,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the table's rows (R, V), if sorted for it, and of weights (T, J)."""
    grad, table = grad.contiguous(), table.contiguous()
    (tokens, choices), width = indices.shape, table.shape[1]
    dtype = native.dtype_code(table.dtype)
    # Zeros, as the sorted pass does not come by the assignments of no row.
    of_weights = weights.new_zeros(tokens, choices) if needs_weights else None
    if assignments is None:
        native.call(
            "moezoo_weighted_bag_weights_backward",
            grad,
            table,
            dtype,
            indices.contiguous(),
            tokens,
            choices,
            width,
            of_weights,
        )
        return None, of_weights
    order, starts, rows = assignments
    num_rows = starts.numel() - 1
    of_table = table.new_empty(num_rows, width)
    native.call(
        "moezoo_weighted_bag_backward",
        grad,
        table,
        dtype,
        weights.contiguous(),
        choices,
        order,
        starts,
        rows,
        num_rows,
        width,
        of_table,
        of_weights,
    )
    return of_table, of_weights
