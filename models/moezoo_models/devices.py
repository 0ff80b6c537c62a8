"""Choosing a device by name."""

from __future__ import annotations

import torch

from moezoo.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """Turn a device's name into a device; ``auto`` takes an accelerator if there is one.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device: '{name}' cannot be used ({reason}); auto or cpu can") from error
    return device
