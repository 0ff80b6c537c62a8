"""Which entries of a matrix a mask keeps, by their scores.

All rules are deterministic: of equal scores the lower index wins. Shapes: O rows, I columns.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def places(groups_MG: Tensor) -> Tensor:
    """Return the place of each of M numbers in its group, 0 for the largest, ``(M, G)`` int16.

    Every pair is compared, which for so few is faster than to sort.
    """
    place_MG = torch.zeros_like(groups_MG, dtype=torch.int16)
    for j in range(len(groups_MG)):
        for k in range(j + 1, len(groups_MG)):
            first_G = groups_MG[j] >= groups_MG[k]
            place_MG[k] += first_G
            place_MG[j] += ~first_G
    return place_MG


def best_of_group(scores_OI: Tensor, n: int, m: int) -> Tensor:
    """Keep the n best of every m consecutive entries of a row, ``(O, I)`` bool."""
    groups_MG = scores_OI.reshape(-1, m).t().contiguous()
    return (places(groups_MG) < n).t().reshape(scores_OI.shape)


def next_of_group(scores_OI: Tensor, n: int, m: int) -> Tensor:
    """Return the best entry of every group but for the n best, ``(O, I)``, the same in a group."""
    groups_MG = scores_OI.reshape(-1, m).t().contiguous()
    best_G = groups_MG.masked_fill(places(groups_MG) != n, 0.0).sum(dim=0)
    return best_G.unsqueeze(-1).expand(-1, m).reshape(scores_OI.shape)


def best_of_row(scores_RC: Tensor, count: int) -> Tensor:
    """Keep the ``count`` best of every row, ``(R, C)`` bool."""
    order_RC = scores_RC.argsort(dim=-1, descending=True, stable=True)
    kept_RC = torch.zeros_like(scores_RC, dtype=torch.bool)
    return kept_RC.scatter_(-1, order_RC[:, :count], True)


@functools.cache
def transposable_patterns() -> Tensor:
    """Return the 90 masks ``(90, 4, 4)`` with two ones in every row and every column."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    found = [
        four
        for four in itertools.product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*four, strict=True))
    ]
    return torch.tensor(found, dtype=torch.bool, device="cpu")


def transposable(scores_OI: Tensor) -> Tensor:
    """Keep two of four in every row and every column of every 4 × 4 block, the best in sum."""
    height, width = scores_OI.shape
    blocks = scores_OI.reshape(height // 4, 4, width // 4, 4).transpose(1, 2)
    patterns = transposable_patterns().to(scores_OI.device)
    totals = blocks.reshape(-1, 16) @ patterns.reshape(-1, 16).to(scores_OI.dtype).t()
    chosen = patterns[totals.argmax(dim=-1)].reshape(height // 4, width // 4, 4, 4)
    return chosen.transpose(1, 2).reshape(height, width)


def block_norms(values_OI: Tensor, block: int) -> Tensor:
    """Return the Frobenius norms of blocks, ``(O / block, I / block)``; magnitudes for single ones.

    At least in fp32: norms of blocks in half precision would tie.
    """
    wide = values_OI.to(torch.promote_types(values_OI.dtype, torch.float32))
    if block == 1:
        return wide.abs()
    height, width = wide.shape
    blocks = wide.reshape(height // block, block, width // block, block)
    return blocks.square().sum(dim=(1, 3)).sqrt()


def in_blocks(kept_RC: Tensor, block: int) -> Tensor:
    """Return a mask of entries for one of blocks."""
    if block == 1:
        return kept_RC
    return kept_RC.repeat_interleave(block, 0).repeat_interleave(block, 1)
