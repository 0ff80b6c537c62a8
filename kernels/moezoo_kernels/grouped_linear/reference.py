"""The formulas of :mod:`moezoo_kernels.grouped_linear` in plain differentiable torch.

Shapes: T tokens, K choices, E experts, A and B widths, N assignments in expert order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def places(indices: Tensor, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """Return each expert's tokens and choices, in order of tokens."""
    found = ((indices == e).nonzero(as_tuple=True) for e in range(num_experts))
    return [(tokens, choices) for tokens, choices in found]


def grouped_linear(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None = None, gather: bool = True
) -> Tensor:
    """Return the products ``(N, B)`` in expert order, of no row too many."""
    parts, start = [], 0
    for e, (tokens, _) in enumerate(places(indices, w.shape[0])):
        rows = x[tokens] if gather else x[start : start + len(tokens)]
        parts.append(F.linear(rows, w[e], None if bias is None else bias[e]))
        start += len(tokens)
    return torch.cat(parts)


def sum_by_token(rows: Tensor, weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Return the weighted sum of each token's rows, ``(T, B)``."""
    accumulation = torch.promote_types(rows.dtype, torch.float32)
    output = torch.zeros(weights.shape[0], rows.shape[1], dtype=accumulation, device=rows.device)
    start = 0
    for tokens, choices in places(indices, num_experts):
        end = start + len(tokens)
        weighted = rows[start:end] * weights[tokens, choices].unsqueeze(-1)
        output = output.index_add(0, tokens, weighted.to(accumulation))
        start = end
    return output.to(rows.dtype)


def grouped_linear_sum(
    rows: Tensor, w: Tensor, weights: Tensor, indices: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of each token's products, ``(T, B)``."""
    product = grouped_linear(rows, w, indices, bias, gather=False)
    return sum_by_token(product, weights, indices, w.shape[0])
