"""``weighted_bag`` on plain torch: any device and floating dtype, no compiler.

Shapes: T tokens, J rows read per token, N rows of the table, R rows of its gradient, V width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.row_sums import Assignments, sum_rows

# What one chunk of gathered rows may take: about a core's cache, or enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 1 << 21}
_DEFAULT_CHUNK_BYTES = 1 << 26


def forward(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the bags, ``(T, V)``."""
    if indices.numel() == 0 or table.shape[0] == 0:  # then all indices are -1
        return table.new_zeros(indices.shape[0], table.shape[1])
    kept = weights.masked_fill(indices < 0, 0.0).to(table.dtype)
    return F.embedding_bag(indices.clamp(min=0), table, mode="sum", per_sample_weights=kept)


def backward(
    grad: Tensor,  # (T, V)
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    assignments: Assignments | None,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the table's rows (R, V), if sorted for it, and of weights (T, J)."""
    of_table = of_weights = None
    if assignments is not None:
        of_table = sum_rows(grad, weights, assignments.order, assignments.starts, table.dtype)
    if needs_weights:
        of_weights = _dots(grad, table, indices, weights.dtype)
    return of_table, of_weights


def _dots(grad: Tensor, table: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each token's gradient with the rows it read; zero for index -1: (T, J)."""
    tokens, choices = indices.shape
    dots = torch.zeros(tokens, choices, dtype=dtype, device=grad.device)
    if table.shape[0] == 0:
        return dots
    budget = _CHUNK_BYTES.get(grad.device.type, _DEFAULT_CHUNK_BYTES)
    chunk = max(1, budget // max(1, choices * table.shape[1] * table.element_size()))
    for start in range(0, tokens, chunk):
        index = indices[start : start + chunk]
        rows = table[index.clamp(min=0)].to(dtype)
        column = grad[start : start + chunk].to(dtype).unsqueeze(-1)
        dots[start : start + chunk] = (rows @ column).squeeze(-1)
    return dots.masked_fill_(indices < 0, 0.0)
