"""The formula of ``weighted_bag`` in plain differentiable torch: gathers ``(T, J, V)``.

Shapes: T tokens, J rows read per token, N rows of the table, V their width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_bag(
    table: Tensor,  # (N, V)
    indices: Tensor,  # (T, J)
    weights: Tensor,  # (T, J)
    *,
    sparse: bool = False,
) -> Tensor:
    """Gather, weight and sum; see the package's ``weighted_bag``.

    ``sparse`` changes nothing: autograd's gradient of the gather is dense.
    """
    accumulation = torch.promote_types(table.dtype, torch.float32)
    if table.shape[0] == 0:  # a row for all indices, which are -1
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    rows = table[indices.clamp(min=0)].to(accumulation)
    kept = weights.to(accumulation).masked_fill(indices < 0, 0.0)
    return (kept.unsqueeze(-1) * rows).sum(dim=1).to(table.dtype)
