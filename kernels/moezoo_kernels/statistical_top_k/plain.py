"""``statistical_top_k`` by torch's operators: any device and dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS


def statistical_top_k(
    pre: Tensor, up: Tensor | None, *, quantile: float, activation: str
) -> Tensor:
    """Return ``act(max(pre - θ, 0)) * up``; arguments as for the public function."""
    above = excess(pre, quantile)
    hidden = ACTIVATIONS[activation](above.where(above > 0, 0.0).to(pre.dtype))
    return hidden if up is None else hidden * up


def excess(pre: Tensor, quantile: float) -> Tensor:
    """Compute ``pre - θ`` in fp32 at least; the gradient goes through mean and deviation too."""
    wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
    if not pre.numel():
        return wide
    deviation = wide.std(dim=-1, keepdim=True, unbiased=False)
    return wide - (wide.mean(dim=-1, keepdim=True) + deviation * quantile)
