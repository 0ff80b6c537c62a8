"""Where Triton kernels run, and over which few configurations they are tuned.

Importing this does not import triton; a module that holds kernels does, so ops import it late.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on any device: for tests, and slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels do not run on this device in this dtype; None if they do."""
    if device.type != "cuda" and not interpreted():
        return "needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if dtype not in _DTYPES:
        return f"has fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    return None


def on_its_device(
    launch: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Run a function on the device of its first argument: Triton launches on the current one."""

    @wraps(launch)
    def run(first: Tensor, *rest: Rest.args, **options: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *rest, **options)

    return run


def configurations(*choices: tuple[dict[str, int], int]) -> list[Any]:
    """List ``(constants, warps)`` to tune over; the interpreter, where no time counts, takes one.

    None of the constants may change the order of a sum: results must not depend on what was faster.
    """
    import triton

    listed = [triton.Config(constants, num_warps=warps) for constants, warps in choices]
    return listed[:1] if interpreted() else listed


def precision(dtype: torch.dtype) -> str:
    """Return ``tl.dot``'s input precision: TF32 for fp32 only where torch's own products may."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"
