"""``statistical_top_k`` from its formula: sums and comparisons, no deviation of torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS


def statistical_top_k(
    pre: Tensor, up: Tensor | None, *, quantile: float, activation: str
) -> Tensor:
    """Return ``act(max(pre - θ, 0)) * up``; arguments as for the public function."""
    wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
    width = max(1, pre.shape[-1])
    mean = wide.sum(dim=-1, keepdim=True) / width
    variance = (wide - mean).square().sum(dim=-1, keepdim=True) / width
    # A constant row has no deviation, whose gradient there is taken as zero.
    deviation = variance.where(variance > 0, 1.0).sqrt() * (variance > 0)
    excess = wide - (mean + deviation * quantile)
    hidden = ACTIVATIONS[activation]((excess * (excess > 0)).to(pre.dtype))
    return hidden if up is None else hidden * up
