"""The experts of transformers' mixtures by the kernels here, in every layout that it has.

Shapes: T tokens, K choices, E experts, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo.experts.around import Choices, Weights, run_around, run_slot_by_slot
from moezoo.stock_experts.gates import Gate, known_gate
from moezoo_kernels import grouped_mlp
from moezoo_kernels.grouped_linear.by_slot import is_few
from moezoo_kernels.grouped_mlp.direct import grouped_mlp_directly, is_direct

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    Raises:
        InputError: weights are quantized.
    """
    weights = _weights(self)
    if weights.w_in.dtype not in _DTYPES or weights.w_out.dtype not in _DTYPES:
        _refuse_quantized(self, weights)
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
    between = self._apply_gate if self.has_gate else self.act_fn
    after = self.post_expert_norm if self.has_post_expert_norm else None
    if (gate is None or self.is_transposed) and is_few(indices, self.num_experts):
        choices = Choices(indices, top_k_weights, self.num_experts)
        return run_slot_by_slot(x, weights, choices, between, after).to(hidden_states.dtype)
    indices, rows = _present(indices, self.num_experts)
    if gate is not None:
        y = _fused(x, weights, indices, top_k_weights, gate, rows)
    else:
        choices = Choices(indices, top_k_weights, self.num_experts)
        y = run_around(x, weights, choices, rows, between, after)
    return y.to(hidden_states.dtype)


def _refuse_quantized(experts: Any, weights: Weights) -> None:
    kind = weights.w_out.dtype if weights.w_in.dtype in _DTYPES else weights.w_in.dtype
    raise InputError(
        f"experts_implementation: weights of {type(experts).__name__} are {kind}, as if quantized; "
        "dequantize the model, or choose another implementation"
    )


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
