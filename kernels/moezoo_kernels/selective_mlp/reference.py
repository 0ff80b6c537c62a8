"""``selective_mlp`` from its rule: every product whole, of factors that are zero where left out."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS, GLUOptions
from moezoo_kernels.selective_mlp.thresholds import Thresholds


def selective_mlp(
    x: Tensor,  # (T, D)
    w_gate: Tensor | None,  # (M, D)
    w_up: Tensor,  # (M, D)
    w_down: Tensor,  # (D, M)
    thresholds: Thresholds,
    *,
    bias_gate: Tensor | None,  # (M,)
    bias_up: Tensor | None,  # (M,)
    bias_down: Tensor | None,  # (D,)
    activation: str,
    glu: GLUOptions,
    dense: Tensor | None,  # (T,)
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and the counts (T, 4); see the package's ``counted``."""

    def mask(values: Tensor, threshold: Tensor | None) -> Tensor:
        with torch.no_grad():
            if threshold is None:
                return torch.ones_like(values)
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            kept = ((wide > threshold) | (wide < -threshold) | wide.isnan()).to(values.dtype)
            return kept if dense is None else kept.clamp(min=dense[:, None].to(values.dtype))

    def product(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = torch.einsum("tk,nk->tn", values, weight)
        return found if bias is None else found + bias

    of_input = mask(x, thresholds.input)
    of_up = torch.zeros_like(x)
    if w_gate is None:
        inner = ACTIVATIONS[activation](product(x * of_input, w_up, bias_up))
        of_gate = mask(inner, thresholds.gate)
        hidden = inner * of_gate
    else:
        gate = product(x * of_input, w_gate, bias_gate)
        inner = _gate(gate, activation, glu)
        of_gate, of_up = mask(inner, thresholds.gate), mask(x, thresholds.up_input)
        hidden = (inner * of_gate) * _linear(product(x * of_up, w_up, bias_up), glu)
    of_hidden = mask(hidden, thresholds.hidden)
    output = product(hidden * of_hidden, w_down, bias_down)
    counts = [each.sum(1, dtype=torch.int64) for each in (of_input, of_up, of_gate, of_hidden)]
    return output, torch.stack(counts, dim=1)


def _gate(gate: Tensor, activation: str, glu: GLUOptions) -> Tensor:
    if glu.gate_softcap is not None:
        return torch.tanh(gate / glu.gate_softcap) * glu.gate_softcap * torch.sigmoid(gate)
    if glu.limit is None:
        return ACTIVATIONS[activation](gate)
    if glu.limit_after:
        return ACTIVATIONS[activation](gate).clamp(max=glu.limit)
    return ACTIVATIONS[activation](gate.clamp(max=glu.limit))


def _linear(up: Tensor, glu: GLUOptions) -> Tensor:
    if glu.up_softcap is not None:
        up = torch.tanh(up / glu.up_softcap) * glu.up_softcap
    if glu.limit is not None:
        up = up.clamp(-glu.limit, glu.limit)
    return up + glu.up_shift
