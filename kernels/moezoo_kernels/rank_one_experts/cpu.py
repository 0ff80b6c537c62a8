"""``rank_one_experts`` by the C++ kernels, token after token or expert after expert.

By token, a row is read for each of its assignments; by expert, once for all of them, in the order
in which rows lie in memory, at the price of sorting. Tables' gradients are always made by expert,
each row by one thread: written once, zeros included, with no atomics.

A large batch goes by expert in blocks of tokens: what is known of a block's assignments stays in
cache, where it is looked up in another order than it lies in. Sums go on from block to block, in
the order in which one pass takes them.

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

# Tokens of a block, and assignments per expert that are worth reading the tables for (measured).
_BLOCK_TOKENS = 1024
_BLOCK_ASSIGNMENTS_PER_EXPERT = 16


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
    x_TD, tables, sizes = _fp32(x), _tables(experts), (tokens, choices, width)
    weights = _fp32(weights)
    if _by_expert(indices, num_experts):
        for block in _blocks(indices, num_experts):
            order, starts, _ = sort_by_row(indices[block], num_experts, False)
            native.call(
                "moezoo_rank_one_experts_by_expert",
                *(x_TD[block], *tables, weights[block], order, starts, num_experts),
                *(len(indices[block]), choices, width, output[block], inner[block]),
            )
    else:
        native.call(
            "moezoo_rank_one_experts_by_token",
            *(x_TD, *tables, indices.contiguous(), weights, *sizes, output, inner),
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
    grad, x_TD, weights, tables = _fp32(grad), _fp32(x), _fp32(weights), _tables(experts)
    if needs.tables or _by_expert(indices, num_experts):
        begun = False
        for block in _backward_blocks(indices, experts, needs, sparse):
            order, starts, rows = sort_by_row(indices[block], num_experts, sparse and needs.tables)
            num_rows = starts.numel() - 1
            if not begun:
                grad_u, grad_v, grad_gate = (
                    table.new_empty(num_rows, width) if table is not None and needed else None
                    for table, needed in (
                        (experts.u, needs.u),
                        (experts.v, needs.v),
                        (experts.gate, needs.gate),
                    )
                )
            native.call(
                "moezoo_rank_one_experts_backward_by_expert",
                *(grad[block], inner[block], x_TD[block], *tables, weights[block]),
                *(order, starts, rows, num_rows, len(indices[block]), choices, width, begun),
                *(None if grad_x is None else grad_x[block], grad_u, grad_v, grad_gate),
                None if grad_weights is None else grad_weights[block],
            )
            begun = True
    else:
        native.call(
            "moezoo_rank_one_experts_backward_by_token",
            *(grad, inner, *tables, indices.contiguous(), weights, tokens, choices, width),
            *(grad_x, grad_weights),
        )
    of_x = None if grad_x is None else grad_x.to(x.dtype)
    return Gradients(of_x, grad_u, grad_v, grad_gate, grad_weights, rows)


def _by_expert(indices: Tensor, num_experts: int) -> bool:
    return indices.numel() >= _ASSIGNMENTS_PER_EXPERT * num_experts


def _blocks(indices: Tensor, num_experts: int) -> list[slice]:
    """Cut the tokens into blocks, in which an expert still has assignments that share its rows."""
    tokens, choices = indices.shape
    shared = _BLOCK_ASSIGNMENTS_PER_EXPERT * num_experts // max(1, choices)
    count = max(1, tokens // max(_BLOCK_TOKENS, shared))
    return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def _backward_blocks(indices: Tensor, experts: Experts, needs: Needs, sparse: bool) -> list[slice]:
    """Cut the tokens into blocks, if the tables' gradients can be added up block by block.

    Those in bf16 would be rounded after each block, and sparse ones have the rows of all tokens.
    """
    if needs.tables and (sparse or experts.u.dtype != torch.float32):
        return [slice(0, len(indices))]
    return _blocks(indices, experts.u.shape[0])


def _tables(experts: Experts) -> tuple[Tensor | int | None, ...]:
    tables = (experts.u, experts.v, experts.gate)
    contiguous = (None if table is None else table.contiguous() for table in tables)
    dtype, activation = native.dtype_code(experts.u.dtype), ACTIVATION_CODES[experts.activation]
    return *contiguous, dtype, activation


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
