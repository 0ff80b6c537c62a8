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

from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Experts, Gradients, Needs, accumulation_dtype
from moezoo_kernels.grouped_mlp.stages import TORCH, Rows, Stages, is_padding
from moezoo_kernels.layouts import is_transposed


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    weights: Tensor,  # (T, K)
    assignments: Assignments,
    keep: bool,
    stages: Stages = TORCH,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and, if ``keep``, the pre-activations (N, I), else (0, I)."""
    w_in, w_out, bias_in, bias_out, unit = experts
    ends = assignments.ends
    x_N = stages.gather(x, assignments.tokens)
    inner_NI = stages.matmul(x_N, w_in.transpose(1, 2), ends)
    if bias_in is not None:
        inner_NI += bias_in[_experts(assignments)]
    hidden_NF = stages.activate(inner_NI, unit)
    answer_ND = stages.matmul(Rows(hidden_NF), w_out.transpose(1, 2), ends)
    if bias_out is not None:
        answer_ND += bias_out[_experts(assignments)]
    output = stages.sum_by_token(answer_ND, weights, assignments, x.shape[0])
    return output, inner_NI if keep else inner_NI.new_empty(0, inner_NI.shape[1])


def backward(
    grad: Tensor,  # (T, D)
    inner: Tensor,  # (N, I)
    x: Tensor,
    experts: Experts,
    weights: Tensor,
    assignments: Assignments,
    needs: Needs,
    stages: Stages = TORCH,
) -> Gradients:
    """Return the gradients, recomputing the activation from the pre-activations ``inner``."""
    w_in, w_out, bias_in, bias_out, unit = experts
    accumulation = accumulation_dtype(x.dtype)
    order, ends, tokens = assignments.order, assignments.ends, assignments.tokens
    weights_N = weights.reshape(-1)[order].to(accumulation)
    grad_N = stages.gather(grad, tokens)
    hidden = stages.activate_backward(stages.matmul(grad_N, w_out, ends), inner, weights_N, unit)
    grad_x = grad_w_in = grad_w_out = grad_weights = grad_bias_in = grad_bias_out = None
    if needs.weights:
        of_weights_N = hidden.weights
        if bias_out is not None:
            of_weights_N += (grad[tokens].to(accumulation) * bias_out[_experts(assignments)]).sum(
                -1
            )
        grad_weights = _to_slots(of_weights_N, assignments, weights.numel())
        grad_weights = grad_weights.to(weights.dtype).view(weights.shape)
    if needs.w_out:
        grad_w_out = _outer(stages, grad_N, Rows(hidden.weighted), w_out, ends)
    if bias_out is not None and needs.bias_out:
        grad_bias_out = _sum_by_expert(grad[tokens] * weights_N[:, None], ends).to(bias_out.dtype)
    if needs.w_in:
        grad_w_in = _outer(stages, Rows(hidden.inner), stages.gather(x, tokens), w_in, ends)
    if bias_in is not None and needs.bias_in:
        grad_bias_in = _sum_by_expert(hidden.inner.to(accumulation), ends).to(bias_in.dtype)
    if needs.x:
        grad_rows_ND = stages.matmul(Rows(hidden.inner), w_in, ends)
        grad_x = stages.sum_by_token(grad_rows_ND, None, assignments, x.shape[0])
    return Gradients(grad_x, grad_w_in, grad_w_out, grad_weights, grad_bias_in, grad_bias_out)


def _outer(stages: Stages, grad_NB: Rows, rows_NA: Rows, w: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient of matrices ``(E, B, A)``, in their layout."""
    if is_transposed(w):
        return stages.outer(rows_NA, grad_NB, ends).transpose(1, 2)
    return stages.outer(grad_NB, rows_NA, ends)


def _experts(assignments: Assignments) -> Tensor:
    """Return the expert of each row, ``(N,)``; padding gets the last one."""
    rows = torch.arange(assignments.order.numel(), device=assignments.order.device)
    experts = torch.searchsorted(assignments.ends, rows, right=True)
    return experts.clamp_(max=assignments.ends.numel() - 1)


def _sum_by_expert(rows_NA: Tensor, ends: Tensor) -> Tensor:
    """Sum each expert's rows: ``(E, A)``."""
    starts = F.pad(ends, (1, 0))
    rows = torch.arange(rows_NA.shape[0], device=rows_NA.device)
    return F.embedding_bag(rows, rows_NA, starts, mode="sum")[:-1]


def _to_slots(values_N: Tensor, assignments: Assignments, num_slots: int) -> Tensor:
    """Scatter one value per row to its slot, ``(T K,)``; slots without an expert get zero."""
    slots = torch.where(is_padding(assignments), num_slots, assignments.order)
    return values_N.new_zeros(num_slots + 1).index_copy_(0, slots, values_N)[:num_slots]
