"""``grouped_mlp`` in whole-batch stages around ``grouped_mm``: nothing waits for the device.

gather → grouped product → activation → grouped product → weighted combine. The combine gathers
and sums each token's rows (no atomics), so results are the same in every run.

Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F,
N assignments in expert order. Rows from ``ends[-1]`` on are padding: they may hold anything, even
NaN, and reach no result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import activate, activate_backward
from moezoo_kernels.grouped_matmul import grouped_matmul, grouped_outer
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
    order, ends = assignments.order, assignments.ends
    inner_NI = grouped_matmul(x[assignments.tokens], w_in.transpose(1, 2), ends)
    if bias_in is not None:
        inner_NI += bias_in[_experts(assignments)]
    hidden_NF = activate(inner_NI, activation, gated)
    answer_ND = grouped_matmul(hidden_NF, w_out.transpose(1, 2), ends)
    if bias_out is not None:
        answer_ND += bias_out[_experts(assignments)]
    weighted_ND = answer_ND * weights.reshape(-1)[order].to(accumulation_dtype(x.dtype))[:, None]
    output = _sum_by_token(weighted_ND, assignments, x.shape[0]).to(x.dtype)
    return output, inner_NI if keep else inner_NI.new_empty(0, inner_NI.shape[1])


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
    order, ends, tokens = assignments.order, assignments.ends, assignments.tokens
    weights_N1 = weights.reshape(-1)[order].to(accumulation)[:, None]
    grad_ND = grad[tokens]
    unweighted_NF = grouped_matmul(grad_ND, w_out, ends)
    grad_hidden_NF = (unweighted_NF * weights_N1).to(x.dtype)
    hidden_NF, grad_inner_NI = activate_backward(grad_hidden_NF, inner, activation, gated)

    grad_x = grad_w_in = grad_w_out = grad_weights = grad_bias_in = grad_bias_out = None
    if needs.weights:
        grad_N = (unweighted_NF.to(accumulation) * hidden_NF).sum(-1)
        if bias_out is not None:
            grad_N += (grad_ND.to(accumulation) * bias_out[_experts(assignments)]).sum(-1)
        grad_weights = _to_slots(grad_N, assignments, weights.numel())
        grad_weights = grad_weights.to(weights.dtype).view(weights.shape)
    if needs.w_out:
        weighted_NF = (hidden_NF * weights_N1).to(x.dtype)
        grad_w_out = grouped_outer(grad_ND, weighted_NF, ends)
    if bias_out is not None and needs.bias_out:
        grad_bias_out = _sum_by_expert(grad_ND * weights_N1, ends).to(bias_out.dtype)
    if needs.w_in:
        grad_w_in = grouped_outer(grad_inner_NI, x[tokens], ends)
    if bias_in is not None and needs.bias_in:
        grad_bias_in = _sum_by_expert(grad_inner_NI.to(accumulation), ends).to(bias_in.dtype)
    if needs.x:
        grad_rows_ND = grouped_matmul(grad_inner_NI, w_in, ends).to(accumulation)
        grad_x = _sum_by_token(grad_rows_ND, assignments, x.shape[0]).to(x.dtype)
    return Gradients(grad_x, grad_w_in, grad_w_out, grad_weights, grad_bias_in, grad_bias_out)


def _experts(assignments: Assignments) -> Tensor:
    """Give the expert of each row, ``(N,)``; padding gets the last one."""
    rows = torch.arange(assignments.order.numel(), device=assignments.order.device)
    experts = torch.searchsorted(assignments.ends, rows, right=True)
    return experts.clamp_(max=assignments.ends.numel() - 1)


def _sum_by_token(rows_ND: Tensor, assignments: Assignments, num_tokens: int) -> Tensor:
    """Sum each token's rows, in the order of its choices: ``(T, D)``."""
    num_slots = num_tokens * assignments.choices
    slots, by_slot = torch.sort(torch.where(_is_padding(assignments), num_slots, assignments.order))
    tokens = torch.arange(num_tokens + 1, device=slots.device)
    starts = torch.searchsorted(slots, tokens * assignments.choices)
    # The last bag holds the padding; dropping it afterwards keeps every shape known beforehand.
    return F.embedding_bag(by_slot, rows_ND, starts, mode="sum")[:-1]


def _sum_by_expert(rows_NA: Tensor, ends: Tensor) -> Tensor:
    """Sum each expert's rows: ``(E, A)``."""
    starts = F.pad(ends, (1, 0))
    rows = torch.arange(rows_NA.shape[0], device=rows_NA.device)
    return F.embedding_bag(rows, rows_NA, starts, mode="sum")[:-1]


def _to_slots(values_N: Tensor, assignments: Assignments, num_slots: int) -> Tensor:
    """Put one value per row at its slot, ``(T K,)``; slots without an expert get zero."""
    slots = torch.where(_is_padding(assignments), num_slots, assignments.order)
    return values_N.new_zeros(num_slots + 1).index_copy_(0, slots, values_N)[:num_slots]


def _is_padding(assignments: Assignments) -> Tensor:
    rows = torch.arange(assignments.order.numel(), device=assignments.order.device)
    return rows >= assignments.ends[-1]
