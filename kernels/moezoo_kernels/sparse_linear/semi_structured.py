"""Products with 2:4 matrices on NVIDIA's sparse tensor cores, by torch. Nothing here was timed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 64  # of both sides, which all of torch's kernels take


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why sparse tensor cores cannot be used on this device in this dtype; None if so."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in _DTYPES:
        return f"has bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def pack(dense: Tensor) -> Tensor | None:
    """Return a 2:4 matrix as sparse tensor cores read it; None where they cannot."""
    fits = not any(size % _MULTIPLE for size in dense.shape)
    if not fits or unusable(dense.device, dense.dtype):
        return None
    return torch.sparse.to_sparse_semi_structured(dense)


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x (T, K)`` times such a matrix, ``(T, N)``."""
    return F.linear(x, matrix, bias)
