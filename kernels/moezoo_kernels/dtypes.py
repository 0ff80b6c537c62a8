"""The dtype of arithmetic that decides something."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(hidden: Tensor) -> Tensor:
    """Promote bf16 and fp16 to fp32."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
