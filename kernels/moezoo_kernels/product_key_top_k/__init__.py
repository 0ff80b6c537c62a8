"""The exact best of n² sums of two rows of n scores: retrieval by product keys."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.product_key_top_k import op, reference, staircase


def product_key_top_k(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the K best of the n² sums ``halves[0, t, h, i] + halves[1, t, h, j]``.

    Exact in floating point, and the same on every backend, bit for bit: of equal sums the one with
    the better first half comes first, then the one with the better second half; of equal halves
    the one with the lower index is the better. A NaN counts as greater than all numbers, as in
    ``torch.sort``. Where +inf in one half meets -inf in the other their sum is a NaN that neither
    half announces; such a pair is found only if both are among the K best of their halves.

    Backends differ in speed only. Gradients flow to the half scores whose sums were chosen, are
    deterministic, and need the slots only; those of ``cpu`` and ``triton`` cannot be
    differentiated again.

    Args:
        halves: ``(2, T, H, n)`` scores of both half-queries, any floating dtype; the C++ and
            Triton kernels take fp32. Read in place if they lie in memory as ``(2, T, H, n)`` or
            ``(H, 2, T, n)``.
        top_k: K, at most n.

    Returns:
        Scores ``(T, H, K)``, best first, in the dtype of ``halves``, and slots ``i n + j``,
        ``(T, H, K)`` int64.

    Raises:
        ValueError: ``halves`` has another shape or is not floating, ``top_k`` is out of range, or
            a forced backend cannot run.
    """
    if halves.ndim != 4 or halves.shape[0] != 2:
        raise ValueError(f"halves: shape is {tuple(halves.shape)}; give (2, T, H, n)")
    if not halves.is_floating_point():
        raise ValueError(f"halves: dtype is {halves.dtype}; give a floating dtype")
    if not 1 <= top_k <= halves.shape[-1]:
        raise ValueError(f"top_k: {top_k} is out of range; give 1 to n = {halves.shape[-1]}")
    return backends.choose("product_key_top_k", halves.device, halves.dtype)(halves, top_k)


def _fused(halves: Tensor, top_k: int, *, backend: str) -> tuple[Tensor, Tensor]:
    return op.forward(halves, top_k, backend)


def _torch(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling() and _has_kernel(halves):
        native.warn_once()
    return staircase.product_key_top_k(halves, top_k)


def _has_kernel(halves: Tensor) -> bool:
    return halves.device.type == "cpu" and halves.dtype == torch.float32


def _cpu_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu" and dtype != torch.float32:
        return f"has fp32, not {str(dtype).removeprefix('torch.')}"
    return native.unusable(device, dtype)


def _triton_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = triton_support.unusable(device, dtype)
    if reason is None and dtype != torch.float32:
        return f"has fp32, not {str(dtype).removeprefix('torch.')}"
    return reason


def _everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "product_key_top_k",
    backends.Backend("cpu", partial(_fused, backend="cpu"), _cpu_usable),
    backends.Backend("triton", partial(_fused, backend="triton"), _triton_usable),
    backends.Backend("torch", _torch, _everywhere),
    backends.Backend("reference", reference.product_key_top_k, _everywhere),
)

__all__ = ["product_key_top_k"]
