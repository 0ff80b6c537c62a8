"""Hidden activations above a threshold that about k of them pass (arXiv:2506.06644, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import backends, native
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.statistical_top_k import op, plain, reference


def statistical_top_k(
    pre: Tensor, up: Tensor | None = None, *, quantile: float, activation: str
) -> Tensor:
    """Return ``act(max(pre - θ, 0)) * up``, with ``θ = mean(pre) + std(pre) * quantile``.

    Mean and deviation are those of each row (the deviation divides by F), taken in fp32 at least,
    and the gradient goes through both. Saved for the backward are the inputs. Same inputs give
    bit-identical results, with any number of threads.

    Args:
        pre: ``(..., F)`` pre-activations, any floating dtype.
        up: the linear branch of a gated unit, of the shape and dtype of ``pre``; None for ones.
        quantile: deviations above the mean; ``Φ⁻¹(1 - k / F)`` lets k of F Gaussians pass.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.

    Returns:
        ``(..., F)``, in the dtype of ``pre``.

    Raises:
        ValueError: shapes or dtypes do not fit together, unknown activation, or a forced backend
            that cannot run.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: '{activation}' is not known; choose from: {known}")
    if up is not None and (up.shape != pre.shape or up.dtype != pre.dtype):
        expected = f"{tuple(pre.shape)} in {pre.dtype}"
        raise ValueError(f"up: {tuple(up.shape)} in {up.dtype}; pre is {expected}")
    run = backends.choose("statistical_top_k", pre.device, pre.dtype)
    return run(pre, up, quantile=quantile, activation=activation)


def _cpu(pre: Tensor, up: Tensor | None, *, quantile: float, activation: str) -> Tensor:
    return op.forward(pre, up, quantile, activation)


def _torch(pre: Tensor, up: Tensor | None, *, quantile: float, activation: str) -> Tensor:
    has_kernel = pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.bfloat16)
    if has_kernel and not torch.compiler.is_compiling():
        native.warn_once()
    return plain.statistical_top_k(pre, up, quantile=quantile, activation=activation)


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "statistical_top_k",
    backends.Backend("cpu", _cpu, native.unusable),
    backends.Backend("torch", _torch, _anywhere),
    backends.Backend("reference", reference.statistical_top_k, _anywhere),
)

__all__ = ["statistical_top_k"]
