"""Counting what the FLOP formulas of the ops multiply with."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers can be read: it is neither fake nor on the meta device."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def count_active(indices: Tensor, otherwise: int | None = None) -> int:
    """Count the indices that are not -1; without data ``otherwise``, by default all of them."""
    if has_data(indices):
        return int(indices.ge(0).sum())
    return indices.numel() if otherwise is None else otherwise
