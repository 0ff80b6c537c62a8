"""``grouped_mlp`` in fp32 on CPUs in one call of C++ for all experts (csrc/grouped_mlp_whole.cpp).

Rows of some experts go through gather, both products, activation and combine before the next ones',
in blocks that stay in cache, and the products are our own. Beside them nothing is left that costs
something per expert. Additions into a token run in expert order, and no bit depends on threads.

Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F,
N assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Experts, Gradients, Needs
from moezoo_kernels.grouped_products import address, by_row, gradient, stack
from moezoo_kernels.layouts import is_transposed


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    weights: Tensor,  # (T, K)
    assignments: Assignments,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and, if ``keep``, the pre-activations (N, I), else (0, I)."""
    w_in, w_out, bias_in, bias_out, unit = experts
    x = by_row(x)
    output = torch.zeros(x.shape, dtype=torch.float32)
    inner = native.floats(assignments.order.numel() if keep else 0, w_in.shape[1])
    native.call(
        "moezoo_grouped_mlp_forward",
        x.data_ptr(),
        x.stride(0),
        *stack(w_in),
        *stack(w_out),
        assignments.tokens,
        assignments.ends,
        *w_out.shape,
        *unit.encode(),
        _row_weights(weights, assignments),
        *(None if bias is None else bias.contiguous() for bias in (bias_in, bias_out)),
        inner if keep else None,
        output,
    )
    return output, inner


def backward(
    grad: Tensor,  # (T, D)
    inner: Tensor,  # (N, I)
    x: Tensor,
    experts: Experts,
    weights: Tensor,
    assignments: Assignments,
    needs: Needs,
) -> Gradients:
    """Return the gradients, recomputing the activation from the pre-activations ``inner``."""
    w_in, w_out, bias_in, bias_out, unit = experts
    grad, x = by_row(grad), by_row(x)
    order, ends = assignments.order, assignments.ends
    grad_x = torch.zeros(x.shape, dtype=torch.float32) if needs.x else None
    of_w_in, of_w_out, of_bias_in, of_bias_out = (
        gradient(parameter, needed, ends)
        for parameter, needed in (
            (w_in, needs.w_in),
            (w_out, needs.w_out),
            (bias_in, needs.bias_in),
            (bias_out, needs.bias_out),
        )
    )
    of_rows = native.floats(order.numel())
    native.call(
        "moezoo_grouped_mlp_backward",
        grad.data_ptr(),
        grad.stride(0),
        inner.contiguous(),
        x.data_ptr(),
        x.stride(0),
        *stack(w_in),
        *stack(w_out),
        assignments.tokens,
        ends,
        *w_out.shape,
        *unit.encode(),
        _row_weights(weights, assignments),
        bias_out.contiguous() if bias_out is not None and needs.weights else None,
        grad_x,
        address(of_w_in),
        is_transposed(w_in),
        address(of_w_out),
        is_transposed(w_out),
        of_rows,
        of_bias_in,
        of_bias_out,
    )
    grad_weights = None
    if needs.weights:
        used = int(ends[-1]) if ends.numel() else 0
        grad_weights = weights.new_zeros(weights.numel())
        grad_weights[order[:used]] = of_rows[:used].to(weights.dtype)
        grad_weights = grad_weights.view(weights.shape)
    return Gradients(grad_x, of_w_in, of_w_out, grad_weights, of_bias_in, of_bias_out)


def _row_weights(weights: Tensor, assignments: Assignments) -> Tensor:
    return weights.reshape(-1)[assignments.order].to(torch.float32)
