"""``selective_mlp`` by torch's operators: all products whole, any device and dtype, gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS, GLUOptions, gate_value, up_value
from moezoo_kernels.selective_mlp.thresholds import Thresholds, count_kept, keeps


def selective_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds,
    *,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    glu: GLUOptions,
    dense: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output and counts; the gradient flows through what is kept."""

    def select(values: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = keeps(values, threshold, dense)
        selected = values if kept is None else values.where(kept, 0.0)
        return selected, count_kept(kept, values)

    used, of_input = select(x, thresholds.input)
    of_up = torch.zeros_like(of_input)
    if w_gate is None:
        inner = ACTIVATIONS[activation](F.linear(used, w_up, bias_up))
        hidden, of_gate = select(inner, thresholds.gate)
    else:
        inner = gate_value(F.linear(used, w_gate, bias_gate), activation, glu)
        passed, of_gate = select(inner, thresholds.gate)
        used, of_up = select(x, thresholds.up_input)
        hidden = passed * up_value(F.linear(used, w_up, bias_up), glu)
    hidden, of_hidden = select(hidden, thresholds.hidden)
    counts = torch.stack((of_input, of_up, of_gate, of_hidden), dim=1)
    return F.linear(hidden, w_down, bias_down), counts
