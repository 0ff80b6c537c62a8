"""``grouped_mlp`` for CPUs: expert by expert, through blocks that stay in cache.

A fresh buffer costs a CPU more than the arithmetic on it (page faults). So an expert's rows go
through gather, both products, activation and combine before the next expert's, and only what the
backward needs is written in full. Additions into a token run in expert order: deterministic.

Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F,
N assignments, n assignments of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels import fresh, native
from moezoo_kernels.grouped_matmul import groups
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Experts, Gradients, Needs
from moezoo_kernels.grouped_mlp.rowwise import RowPasses

# At most so many slots, in all and per expert, are multiplied one by one as the weights are read.
# A product of matrices catches up as slots share an expert; in bf16 sooner, where processors have
# instructions for it.
_FEW_SLOTS = 1024
_FEW_PER_EXPERT = {torch.float32: 16, torch.bfloat16: 8}


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    weights: Tensor,  # (T, K)
    assignments: Assignments,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and, if ``keep``, the pre-activations (N, I), else (0, I)."""
    w_in, w_out, bias_in, bias_out, unit = experts
    passes = RowPasses(x.dtype, *unit)
    output = torch.zeros(x.shape, dtype=passes.accumulation)
    inner = x.new_empty(assignments.order.numel() if keep else 0, w_in.shape[1])
    tokens = assignments.tokens
    row_weights = weights.reshape(-1)[assignments.order].to(passes.accumulation)
    for e, start, end in groups(assignments.ends):
        tokens_n = tokens[start:end]
        x_nD = x.index_select(0, tokens_n)
        bias_I = None if bias_in is None else bias_in[e]
        bias_D = None if bias_out is None else bias_out[e]
        if keep:
            inner_nI = fresh.about_to_write(inner[start:end])
            inner_nI = _linear(x_nD, w_in[e], bias_I, out=inner_nI)
        else:
            inner_nI = F.linear(x_nD, w_in[e], bias_I)
        answer_nD = F.linear(passes.activate(inner_nI), w_out[e], bias_D)
        passes.combine(output, tokens_n, answer_nD, row_weights[start:end])
    return output.to(x.dtype), inner


def is_few(slots: int, num_experts: int, dtype: torch.dtype) -> bool:
    """Return whether so many slots are run by :func:`few`: no batch, and few per expert."""
    return slots <= min(_FEW_SLOTS, _FEW_PER_EXPERT.get(dtype, 0) * num_experts)


def few(x: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) of a few tokens, and their pre-activations (T K, I) in fp32.

    No sort, no copy, no product of matrices. The caller has checked the indices; the
    pre-activations of a slot of -1 are uninitialised.
    """
    w_in, w_out, bias_in, bias_out, unit = experts
    _, width, hidden_width = w_out.shape
    inner = native.floats(indices.numel(), w_in.shape[1])
    hidden = native.floats(indices.numel(), hidden_width)
    output = native.floats(*x.shape)
    operands = (x, w_in, w_out, bias_in, bias_out)
    native.call(
        "moezoo_grouped_mlp_few",
        *(None if t is None else t.contiguous() for t in operands),
        native.dtype_code(x.dtype),
        indices.contiguous(),
        weights.float().contiguous(),
        *indices.shape,
        width,
        hidden_width,
        *unit.encode(),
        inner,
        hidden,
        output,
    )
    return output.to(x.dtype), inner


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
    passes = RowPasses(x.dtype, *unit)
    accumulation = passes.accumulation
    grad_x = torch.zeros(x.shape, dtype=accumulation) if needs.x else None
    ends = assignments.ends
    grad_w_in = _gradient(w_in, needs.w_in, ends)
    grad_w_out = _gradient(w_out, needs.w_out, ends)
    grad_bias_in = _gradient(bias_in, needs.bias_in, ends)
    grad_bias_out = _gradient(bias_out, needs.bias_out, ends)
    tokens = assignments.tokens
    row_weights = weights.reshape(-1)[assignments.order].to(accumulation)
    grad_N = row_weights.new_empty(row_weights.shape)
    for e, start, end in groups(assignments.ends):
        tokens_n, weights_n = tokens[start:end], row_weights[start:end]
        grad_nD = grad.index_select(0, tokens_n)
        hidden_nF, grad_inner_nI, grad_n = passes.backward(
            grad_nD @ w_out[e], inner[start:end], weights_n
        )
        if bias_out is not None and needs.weights:
            grad_n += (grad_nD.to(accumulation) * bias_out[e]).sum(-1)
        grad_N[start:end] = grad_n
        if grad_w_out is not None:
            torch.mm(grad_nD.t(), hidden_nF, out=fresh.about_to_write(grad_w_out[e]))
        if grad_bias_out is not None:
            grad_bias_out[e] = (grad_nD * weights_n[:, None]).sum(0, dtype=accumulation)
        if grad_w_in is not None:
            x_nD = x.index_select(0, tokens_n)
            torch.mm(grad_inner_nI.t(), x_nD, out=fresh.about_to_write(grad_w_in[e]))
        if grad_bias_in is not None:
            grad_bias_in[e] = grad_inner_nI.sum(0, dtype=accumulation)
        if grad_x is not None:
            passes.combine(grad_x, tokens_n, grad_inner_nI @ w_in[e], None)
    grad_weights = None
    if needs.weights:
        used = int(assignments.ends[-1]) if assignments.ends.numel() else 0
        grad_weights = weights.new_zeros(weights.numel())
        grad_weights[assignments.order[:used]] = grad_N[:used].to(weights.dtype)
    return Gradients(
        None if grad_x is None else grad_x.to(x.dtype),
        grad_w_in,
        grad_w_out,
        None if grad_weights is None else grad_weights.view(weights.shape),
        grad_bias_in,
        grad_bias_out,
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _gradient(parameter: Tensor | None, needed: bool, ends: Tensor) -> Tensor | None:
    """Return a buffer for a stacked gradient, written only where an expert is unused: zeros."""
    if parameter is None or not needed:
        return None
    return fresh.stacked(parameter.shape, parameter.dtype, ends)
