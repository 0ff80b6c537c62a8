"""The layouts of stacked matrices: a transposed view has a gradient that is one."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transposed(w: Tensor) -> bool:
    """Return whether matrices ``(E, B, A)`` lie in memory as ``(E, A, B)``."""
    return w.ndim == 3 and not w.is_contiguous() and w.transpose(1, 2).is_contiguous()


def like(tensor: Tensor) -> Tensor:
    """Return an uninitialised gradient of a tensor, in its layout if that is a transposed one."""
    if is_transposed(tensor):
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
