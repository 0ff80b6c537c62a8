"""The baseline: keep some neurons for all tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moezoo.convert.carve.block import Block

PruneMethod = Literal["static", "static_mean", "static_ls"]


def prune(block: Block, x_TD: Tensor, keep: int, method: PruneMethod = "static") -> Block:
    """Keep the neurons with the largest ``mean|h_i| ||down[:, i]||``."""
    size_F = sum(h.abs().sum(dim=0) for h in block.chunks(x_TD)) * block.down.norm(dim=0)
    return block.take(size_F.argsort(descending=True, stable=True)[:keep].sort().values)
