"""``rank_one_experts`` by the C++ kernels, token after token or expert after expert.

By token, a row is read for each of its assignments; by expert, once for all of them, in the order
in which rows lie in memory, at the price of sorting. Tables' gradients are always made by expert,
each row by one thread: written once, zeros included, with no atomics.

Tokens and their gradients are fp32 inside; the tables are fp32 or bf16.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.activations import ACTIVATION_CODES
from moezoo_kernels.rank_one_experts.operands import Experts, Gradients, Needs
from moezoo_kernels.row_sums import sort_by_row

# From this many assignments per expert on, experts are taken one after another (measured).
_ASSIGNMENTS_PER_EXPERT = 0.75


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    indices: Tensor,  # (T, J)
    weights: Tensor,  # (T, J)
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and the pre-activations (T, I), the gate's half first."""
    num_experts = experts.u.shape[0]
    tokens, choices, width = *indices.shape, x.shape[1]
    output = torch.empty(tokens, width, dtype=torch.float32)
    inner = torch.empty(tokens, choices * (2 if experts.gated else 1), dtype=torch.float32)
    operands, sizes = (_fp32(x), *_tables(experts)), (tokens, choices, width)
    weights = _fp32(weights)
    if _by_expert(indices, num_experts):
        order, starts, _ = sort_by_row(indices, num_experts, False)
        native.call(
            "moezoo_rank_one_experts_by_expert",
            *(*operands, weights, order, starts, num_experts, *sizes, output, inner),
        )
    else:
        native.call(
            "moezoo_rank_one_experts_by_token",
            *(*operands, indices.contiguous(), weights, *sizes, output, inner),
        )
    return output.to(x.dtype), inner


def backward(
    grad: Tensor,  # (T, D)
    inner: Tensor,  # (T, I)
    x: Tensor,
    experts: Experts,
    indices: Tensor,
    weights: Tensor,
    needs: Needs,
    sparse: bool,
) -> Gradients:
    """Return the gradients, recomputing the activation from the pre-activations."""
    tokens, choices, width = *indices.shape, x.shape[1]
    num_experts = experts.u.shape[0]
    grad_x = torch.empty(tokens, width, dtype=torch.float32) if needs.x else None
    grad_weights = native.floats(tokens, choices) if needs.weights else None
    grad_u = grad_v = grad_gate = rows = None
    given, sizes = (_fp32(grad), inner), (tokens, choices, width)
    weights = _fp32(weights)
    if needs.tables or _by_expert(indices, num_experts):
        order, starts, rows = sort_by_row(indices, num_experts, sparse and needs.tables)
        num_rows = starts.numel() - 1
        grad_u, grad_v, grad_gate = (
            table.new_empty(num_rows, width) if table is not None and needed else None
            for table, needed in (
                (experts.u, needs.u),
                (experts.v, needs.v),
                (experts.gate, needs.gate),
            )
        )
        sorted_by_row = (order, starts, rows, num_rows)
        gradients = (grad_x, grad_u, grad_v, grad_gate, grad_weights)
        native.call(
            "moezoo_rank_one_experts_backward_by_expert",
            *(*given, _fp32(x), *_tables(experts), weights, *sorted_by_row, *sizes, *gradients),
        )
    else:
        operands = (*_tables(experts), indices.contiguous(), weights, *sizes)
        native.call(
            "moezoo_rank_one_experts_backward_by_token", *given, *operands, grad_x, grad_weights
        )
    of_x = None if grad_x is None else grad_x.to(x.dtype)
    return Gradients(of_x, grad_u, grad_v, grad_gate, grad_weights, rows)


def _by_expert(indices: Tensor, num_experts: int) -> bool:
    return indices.numel() >= _ASSIGNMENTS_PER_EXPERT * num_experts


def _tables(experts: Experts) -> tuple[Tensor | int | None, ...]:
    tables = (experts.u, experts.v, experts.gate)
    contiguous = (None if table is None else table.contiguous() for table in tables)
    dtype, activation = native.dtype_code(experts.u.dtype), ACTIVATION_CODES[experts.activation]
    return *contiguous, dtype, activation


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
