"""The formula of ``product_key_top_k`` in plain differentiable torch: all n² sums, sorted.

Shapes: T tokens, H heads, n half scores per codebook, K choices.
"""

from __future__ import annotations

from torch import Tensor


def product_key_top_k(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Sort all n² sums, ``(T, H, n²)``; see the package's ``product_key_top_k``.

    The halves are sorted first, so that a stable sort leaves equal sums in the order of the rule:
    better first half, then better second half, and of equal halves the lower index.
    """
    n = halves.shape[-1]
    best, rows = halves.sort(dim=-1, descending=True, stable=True)
    sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)
    slots = (rows[0].unsqueeze(-1) * n + rows[1].unsqueeze(-2)).flatten(-2)
    order = sums.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return sums.gather(-1, order), slots.gather(-1, order)
