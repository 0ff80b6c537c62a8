"""Choosing a device by name, and the memory that is free."""

from __future__ import annotations

from pathlib import Path

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


def free_memory() -> int:
    """Return the bytes that can be had without swapping; without Linux' word for it, 4 GB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30
