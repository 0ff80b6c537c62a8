"""``rank_one_experts`` in whole-batch torch operations, for any device and dtype.

Only the dot products ever gather rows, for one chunk of tokens at a time; every weighted sum of
rows is an embedding bag, which reads them where they are.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import activate, activate_backward
from moezoo_kernels.rank_one_experts.operands import Experts, Gradients, Needs, halves
from moezoo_kernels.row_sums import sort_by_row, sum_rows

# What one chunk of gathered rows may take: about a core's cache, or enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 1 << 21}
_DEFAULT_CHUNK_BYTES = 1 << 26


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    indices: Tensor,  # (T, J)
    weights: Tensor,  # (T, J)
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and the pre-activations (T, I), the gate's half first."""
    inner = _dots(x, experts.u, indices, weights.dtype)
    if experts.gate is not None:
        inner = torch.cat([_dots(x, experts.gate, indices, weights.dtype), inner], dim=-1)
    coefficients = weights * activate(inner, experts.activation, experts.gated)
    return _bags(experts.v, indices, coefficients).to(x.dtype), inner


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
    """Return the gradients, recomputing the activation from the pre-activations.

    That of ``v`` is a sum of rows of ``grad``, those of ``u`` and ``gate`` are sums of rows of
    ``x``.
    """
    u, v, gate, activation = experts
    answers = _dots(grad, v, indices, weights.dtype)
    activated, grad_inner = activate_backward(answers * weights, inner, activation, experts.gated)
    of_gate, of_u = halves(grad_inner, experts.gated)
    grad_x = grad_weights = grad_u = grad_v = grad_gate = rows = None
    if needs.weights:
        grad_weights = (answers * activated).masked_fill_(indices < 0, 0.0)
    if needs.x:
        grad_x = _bags(u, indices, of_u)
        if gate is not None:
            grad_x = grad_x + _bags(gate, indices, of_gate)
        grad_x = grad_x.to(x.dtype)
    if needs.tables:
        order, starts, rows = sort_by_row(indices, v.shape[0], sparse)
        if needs.u:
            grad_u = sum_rows(x, of_u.contiguous(), order, starts, u.dtype)
        if needs.v:
            grad_v = sum_rows(grad, activated.mul_(weights), order, starts, v.dtype)
        if gate is not None and needs.gate:
            grad_gate = sum_rows(x, of_gate.contiguous(), order, starts, gate.dtype)
    return Gradients(grad_x, grad_u, grad_v, grad_gate, grad_weights, rows)


def _dots(x: Tensor, table: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each token with the table's rows that its indices name: (T, J), of ``dtype``."""
    (tokens, choices), width = indices.shape, table.shape[1]
    dots = torch.empty(tokens, choices, dtype=dtype, device=x.device)
    budget = _CHUNK_BYTES.get(x.device.type, _DEFAULT_CHUNK_BYTES)
    chunk = min(tokens, max(1, budget // max(1, choices * width * table.element_size())))
    rows = table.new_empty(chunk * choices, width)
    for start in range(0, tokens, max(chunk, 1)):
        index = indices[start : start + chunk].clamp(min=0).reshape(-1)
        gathered = rows[: index.numel()]
        torch.index_select(table, 0, index, out=gathered)
        column = x[start : start + chunk].to(table.dtype).unsqueeze(-1)
        dots[start : start + chunk] = (gathered.view(-1, choices, width) @ column).squeeze(-1)
    return dots


def _bags(table: Tensor, indices: Tensor, coefficients: Tensor) -> Tensor:
    """Sum each token's rows of the table, weighted; index -1 adds nothing: (T, D)."""
    if indices.numel() == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    kept = coefficients.masked_fill(indices < 0, 0.0).to(table.dtype)
    return F.embedding_bag(indices.clamp(min=0), table, mode="sum", per_sample_weights=kept)
