"""The dtype that arithmetic is done in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(hidden: Tensor) -> Tensor:
    """Promote bf16 and fp16 to fp32, for what decides something."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def autocast(tensor: Tensor) -> Tensor:
    """Cast as ``F.linear``'s operands are cast under autocast, which leaves custom ops alone."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Return a context without autocast; nothing is done where there is none.

    Entering one takes longer than the product of a token with a small matrix.
    """
    if torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return nullcontext()
