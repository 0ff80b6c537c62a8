"""Numbers that are not finite are not written: no later reader could mend them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moezoo.errors import InputError


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity; None if there is none.

    Each tensor is read once, and nothing of its size is made. Integers, and tensors without
    numbers, pass.
    """
    names, bounds = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            wide = tensor if tensor.element_size() > 1 else tensor.float()  # fp8 has no order
            names.append(name)
            bounds.append(torch.aminmax(wide.detach()))  # NaN if any is
    # Only now, so that a device computes all before it is waited for.
    found = (bool((low.isfinite() & high.isfinite()).logical_not()) for low, high in bounds)
    return next((name for name, bad in zip(names, found, strict=True) if bad), None)


def check_finite(tensors: Iterable[tuple[str, Tensor]], target: Path) -> None:
    """Refuse to write what is not finite.

    Args:
        tensors: by name.
        target: what they would be written to, for the message.

    Raises:
        InputError: names the first one that is not.
    """
    if (name := first_not_finite(tensors)) is not None:
        raise InputError(
            f"checkpoint: tensor '{name}' holds NaN or an infinity, so {target} is not written; "
            "take an earlier checkpoint, or another source"
        )
