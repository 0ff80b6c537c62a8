"""Stacked results in fresh memory on a CPU, whose first touch costs more than what is written.

The zeros of groups without rows take no page before they are read, and the pages of a group are
asked for in one call, instead of a fault for each. Without the C++ library these are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moezoo_kernels import native

_LARGE = 1 << 18  # bytes; below, there is nothing to gain
_STRETCH = 1 << 19  # bytes of small parts that are asked for in one call


def stacked(shape: Sequence[int], dtype: torch.dtype, ends: Tensor) -> Tensor:
    """Return ``(E, …)``, zeros where a group has no rows and uninitialised elsewhere.

    Args:
        shape: of the result, E first.
        dtype: of the result.
        ends: ``(E,)`` int64, non-decreasing: where each group's rows end.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _LARGE and _has_library():
        part, groups = tensor.nbytes // ends.numel(), ends.numel()
        native.call("moezoo_zero_empty_groups", tensor, part, ends.contiguous(), groups)
        return tensor
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return tensor.index_fill_(0, (counts == 0).nonzero().squeeze(-1), 0)


class Parts:
    """The groups' parts of :func:`stacked`, to be written in their order, each all at once.

    Args:
        tensor: ``(E, …)``, contiguous.
        ends: ``(E,)`` int64, as there.
    """

    def __init__(self, tensor: Tensor, ends: Tensor) -> None:
        self._tensor = tensor
        self._ends = [0, *ends.tolist()]
        self._parts: Sequence[Tensor] | Tensor = tensor
        groups = len(self._ends) - 1
        if 2 * sum(a < b for a, b in pairwise(self._ends)) > groups:  # cheaper than one by one
            self._parts = tensor.unbind(0)
        part = tensor.nbytes // max(1, groups)
        self._ahead = max(1, _STRETCH // max(1, part))
        self._asked = 0 if tensor.nbytes >= _LARGE and _has_library() else groups

    def __getitem__(self, group: int) -> Tensor:
        """Return a part that has rows, and ask for its pages and those of small ones behind it."""
        if group >= self._asked:
            last = group + 1
            while last < min(group + self._ahead, len(self._ends) - 1) and (
                self._ends[last] < self._ends[last + 1]
            ):
                last += 1
            about_to_write(self._tensor[group:last])
            self._asked = last
        return self._parts[group]


def about_to_write(part: Tensor) -> Tensor:
    """Return ``part``, contiguous, after asking for the pages behind it; its contents stay."""
    if part.nbytes >= _LARGE and _has_library():
        native.call("moezoo_about_to_write", part, part.nbytes)
    return part


def _has_library() -> bool:
    return native.unusable(torch.device("cpu"), torch.float32) is None
