"""The experts of transformers' mixtures by the kernels here, in every layout that it has.

Shapes: T tokens, K choices, E experts, D width, F hidden width, I = 2 F if gated else F, N
assignments in expert order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moezoo.stock_experts.gates import Gate, known_gate
from moezoo_kernels import grouped_mlp
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.grouped_linear import (
    assign,
    grouped_linear,
    grouped_linear_sum,
    sum_by_token,
)
from moezoo_kernels.grouped_linear.by_slot import is_few, linear_by_slot, sum_by_slot
from moezoo_kernels.grouped_mlp.direct import grouped_mlp_directly, is_direct


class Weights(NamedTuple):
    """The stacked weights of experts, as the kernels want them."""

    w_in: Tensor  # (E, I, D)
    w_out: Tensor  # (E, D, F)
    bias_in: Tensor | None  # (E, I)
    bias_out: Tensor | None  # (E, D)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the weighted sum of each token's experts, as transformers' own functions do.

    Args:
        self: experts that ``use_experts_implementation`` marks, of one device.
        hidden_states: ``(T, D)``.
        top_k_index: ``(T, K)`` expert numbers; one of E or more stands for an expert that is not
            here, and adds nothing.
        top_k_weights: ``(T, K)``.

    Returns:
        ``(T, D)`` in the dtype of ``hidden_states``.
    """
    weights = _weights(self)
    gate = None if self.has_post_expert_norm else known_gate(self)
    x = hidden_states
    if x.dtype != weights.w_in.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weights.w_in.dtype)
    indices = top_k_index if top_k_index.dtype == torch.int64 else top_k_index.long()
    if gate is not None and is_direct(x, indices, weights.w_in):
        if max(indices.reshape(-1).tolist(), default=0) >= self.num_experts:
            indices = torch.where(indices < self.num_experts, indices, -1)
        y = grouped_mlp_directly(
            x,
            weights.w_in,
            weights.w_out,
            indices,
            top_k_weights,
            activation=gate.activation,
            gated=gate.gated,
            bias_in=weights.bias_in,
            bias_out=weights.bias_out,
            glu=gate.glu,
            interleaved=gate.interleaved,
        )
        return y if y.dtype == hidden_states.dtype else y.to(hidden_states.dtype)
    if (gate is None or self.is_transposed) and is_few(indices, self.num_experts):
        return _slot_by_slot(self, x, weights, indices, top_k_weights).to(hidden_states.dtype)
    indices, rows = _present(indices, self.num_experts)
    if gate is not None:
        y = _fused(x, weights, indices, top_k_weights, gate, rows)
    else:
        y = _around(self, x, weights, indices, top_k_weights, rows)
    return y.to(hidden_states.dtype)


def _weights(experts: Any) -> Weights:
    prefix = "gate_up_proj" if experts.has_gate else "up_proj"
    w_in, w_out = getattr(experts, prefix), experts.down_proj
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    if not experts.has_bias:
        return Weights(w_in, w_out, None, None)
    return Weights(w_in, w_out, getattr(experts, f"{prefix}_bias"), experts.down_proj_bias)


def _present(indices: Tensor, num_experts: int) -> tuple[Tensor, int]:
    """Return the indices with -1 for experts that are not here, and a bound on the others.

    On a CPU the bound is their number; elsewhere that would mean waiting.
    """
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(indices < num_experts, indices, -1), indices.numel()
    if indices.numel() == 0 or int(indices.max()) < num_experts:
        return indices, indices.numel()
    indices = torch.where(indices < num_experts, indices, -1)
    return indices, int(indices.ge(0).sum())


def _fused(
    x: Tensor, weights: Weights, indices: Tensor, top_k_weights: Tensor, gate: Gate, rows: int
) -> Tensor:
    return grouped_mlp(
        x,
        weights.w_in,
        weights.w_out,
        indices,
        top_k_weights,
        activation=gate.activation,
        gated=gate.gated,
        bias_in=weights.bias_in,
        bias_out=weights.bias_out,
        max_assignments=rows,
        glu=gate.glu,
        interleaved=gate.interleaved,
    )


def _around(
    experts: Any,
    x: Tensor,
    weights: Weights,
    indices: Tensor,
    top_k_weights: Tensor,
    rows: int,
) -> Tensor:
    """Run the experts' own gate, and their norm, between and after two products."""
    assignments = assign(indices, experts.num_experts, rows)
    inner_NI = grouped_linear(x, weights.w_in, assignments, weights.bias_in)
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    hidden_NF = _recomputed(gate, inner_NI)
    if hidden_NF.dtype != inner_NI.dtype:
        hidden_NF = hidden_NF.to(inner_NI.dtype)
    if not experts.has_post_expert_norm:
        return grouped_linear_sum(
            hidden_NF, weights.w_out, top_k_weights, assignments, weights.bias_out
        )
    answer_ND = grouped_linear(
        hidden_NF, weights.w_out, assignments, weights.bias_out, gather=False
    )

    def finish(answer_ND: Tensor, weights_TK: Tensor) -> Tensor:
        return sum_by_token(experts.post_expert_norm(answer_ND), weights_TK, assignments)

    return _recomputed(finish, answer_ND, top_k_weights)


def _slot_by_slot(
    experts: Any, x: Tensor, weights: Weights, indices: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Do what :func:`_around` does, for a handful of tokens in inference."""
    w_in, w_out, bias_in, bias_out = (None if t is None else autocast(t) for t in weights)
    assert w_in is not None
    assert w_out is not None
    numbers = indices.reshape(-1).tolist()
    inner_SI = linear_by_slot(autocast(x), w_in, numbers, bias_in, indices.shape[1])
    hidden_SF = experts._apply_gate(inner_SI) if experts.has_gate else experts.act_fn(inner_SI)
    answer_SD = linear_by_slot(hidden_SF.to(inner_SI.dtype), w_out, numbers, bias_out)
    if experts.has_post_expert_norm:
        answer_SD = experts.post_expert_norm(answer_SD)
    return sum_by_slot(answer_SD, top_k_weights, numbers, experts.num_experts)


def _recomputed(function: Callable[..., Tensor], rows: Tensor, *others: Tensor) -> Tensor:
    """Apply a function of rows, of which the backward keeps only what it was given.

    A compiler decides itself what it keeps.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and rows.requires_grad):
        return function(rows, *others)
    found: Tensor = checkpoint(function, rows, *others, use_reentrant=False)
    return found
