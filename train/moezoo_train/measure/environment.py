"""The machine and the versions that numbers were measured with."""

from __future__ import annotations

import platform
from typing import Any

import torch

import moezoo


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return machine and versions in words and numbers that JSON can hold.

    Args:
        device: where it was measured; default: the GPU if there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "moezoo": moezoo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
