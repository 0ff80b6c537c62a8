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

from moezoo_kernels.activations import activate, activate_backward
from moezoo_kernels.grouped_matmul import groups
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Experts, Gradients, Needs, accumulation_dtype


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    weights: Tensor,  # (T, K)
    assignments: Assignments,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Give the output (T, D) and, if ``keep``, the pre-activations (N, I), else (0, I)."""
    w_in, w_out, bias_in, bias_out, activation, gated = experts
    accumulation = accumulation_dtype(x.dtype)
    output = torch.zeros(x.shape, dtype=accumulation)
    inner = x.new_empty(assignments.order.numel() if keep else 0, w_in.shape[1])
    tokens, row_weights = assignments.tokens, weights.reshape(-1)[assignments.order]
    for e, start, end in groups(assignments.ends):
        tokens_n = tokens[start:end]
        x_nD = x.index_select(0, tokens_n)
        bias_I = None if bias_in is None else bias_in[e]
        bias_D = None if bias_out is None else bias_out[e]
        if keep:
            inner_nI = _linear(x_nD, w_in[e], bias_I, out=inner[start:end])
        else:
            inner_nI = F.linear(x_nD, w_in[e], bias_I)
        answer_nD = F.linear(activate(inner_nI, activation, gated), w_out[e], bias_D)
        weighted_nD = answer_nD * row_weights[start:end, None]
        output.index_add_(0, tokens_n, weighted_nD.to(accumulation))
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
    """Give the gradients, recomputing the activation from the pre-activations ``inner``."""
    w_in, w_out, bias_in, bias_out, activation, gated = experts
    accumulation = accumulation_dtype(x.dtype)
    grad_x = torch.zeros(x.shape, dtype=accumulation) if needs.x else None
    counts = torch.diff(assignments.ends, prepend=torch.tensor([0]))
    unused = (counts == 0).nonzero().squeeze(-1)
    grad_w_in = _gradient(w_in, needs.w_in, unused)
    grad_w_out = _gradient(w_out, needs.w_out, unused)
    grad_bias_in = _gradient(bias_in, needs.bias_in, unused)
    grad_bias_out = _gradient(bias_out, needs.bias_out, unused)
    grad_weights = torch.zeros_like(weights.reshape(-1)) if needs.weights else None

    tokens, row_weights = assignments.tokens, weights.reshape(-1)[assignments.order]
    for e, start, end in groups(assignments.ends):
        tokens_n, weights_n1 = tokens[start:end], row_weights[start:end, None]
        grad_nD = grad.index_select(0, tokens_n)
        unweighted_nF = grad_nD @ w_out[e]
        grad_hidden_nF = (unweighted_nF * weights_n1).to(x.dtype)
        hidden_nF, grad_inner_nI = activate_backward(
            grad_hidden_nF, inner[start:end], activation, gated
        )
        if grad_weights is not None:
            grad_n = (unweighted_nF.to(accumulation) * hidden_nF).sum(-1)
            if bias_out is not None:
                grad_n += (grad_nD.to(accumulation) * bias_out[e]).sum(-1)
            grad_weights[assignments.order[start:end]] = grad_n.to(weights.dtype)
        if grad_w_out is not None:
            torch.mm(grad_nD.t(), hidden_nF.mul_(weights_n1), out=grad_w_out[e])
        if grad_bias_out is not None:
            grad_bias_out[e] = (grad_nD * weights_n1).sum(0, dtype=accumulation)
        if grad_w_in is not None:
            torch.mm(grad_inner_nI.t(), x.index_select(0, tokens_n), out=grad_w_in[e])
        if grad_bias_in is not None:
            grad_bias_in[e] = grad_inner_nI.sum(0, dtype=accumulation)
        if grad_x is not None:
            grad_x.index_add_(0, tokens_n, (grad_inner_nI @ w_in[e]).to(accumulation))
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


def _gradient(parameter: Tensor | None, needed: bool, unused: Tensor) -> Tensor | None:
    """Give a buffer for a stacked gradient, written only where the expert is unused: zeros."""
    if parameter is None or not needed:
        return None
    gradient = torch.empty(parameter.shape, dtype=parameter.dtype)
    return gradient.index_fill_(0, unused, 0)
