"""The loss of a language model's head, without all logits at once."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels import backends, native
from moezoo_kernels.linear_cross_entropy import op, reference


class LinearCrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy` returns.

    Attributes:
        loss: scalar in fp32 (fp64 for fp64): the mean cross-entropy in nats plus the z-loss; 0
            where every label is ignored. Differentiable.
        z_loss: scalar, the part of it that is the z-loss, detached.
        num_labels: int64 scalar, the labels that are not ignored.
    """

    loss: Tensor
    z_loss: Tensor
    num_labels: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> LinearCrossEntropy:
    """Compute the mean cross-entropy of ``hidden @ weight.T`` against labels.

    With ``log Z[t] = logsumexp(hidden[t] @ weight.T)``, over the n labels that are not ignored::

        loss = 1/n Σ (log Z[t] - hidden[t] @ weight[labels[t]]) + z_loss/n Σ log² Z[t]

    The second term keeps Z near 1 (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Logits
    exist for a chunk of tokens at a time, and their gradients are used up in the forward: between
    forward and backward only the gradients of ``hidden`` and ``weight`` are kept, of which the
    backward is a multiple. It is taken of ``loss`` alone. Where gradients are off, none are
    computed. Same inputs give bit-identical results and gradients.

    Products run in the operands' dtype, or in autocast's (as in ``F.linear``); the softmax, and the
    sum of the weight's gradient over chunks, stay in fp32. A weight that is sharded (``DTensor``)
    must have been gathered: under FSDP2 it is inside the forward of the module that owns it.

    Args:
        hidden: ``(..., D)``, fp64, fp32, bf16 or fp16.
        weight: ``(V, D)``, the head's, tied or not; hidden's dtype, but under autocast.
        labels: ``(...)`` int64 tokens.
        ignore_index: label of the positions that are left out.
        z_loss: weight of the z-loss.

    Raises:
        ValueError: shapes or dtypes do not fit, a label is out of range, a sharded weight, or a
            forced backend that cannot run.
        RuntimeError: a second derivative is asked of a backend other than ``reference``.
    """
    _check(hidden, weight, labels, z_loss)
    dtype = _product_dtype(hidden, weight)
    run = backends.choose("linear_cross_entropy", hidden.device, dtype)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return LinearCrossEntropy(
        *run(flat, weight, flat_labels, ignore_index=ignore_index, z_loss=z_loss)
    )


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch" and not torch.compiler.is_compiling() and _has_kernel(hidden):
        native.warn_once()
    on = torch.is_grad_enabled()
    needs = (on and hidden.requires_grad, on and weight.requires_grad)
    dtype = _product_dtype(hidden, weight)
    options = (ignore_index, z_loss, *needs, dtype, backend)
    return op.forward(hidden, weight, labels, *options)[:3]


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that ``F.linear`` would compute in."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> None:
    if hasattr(weight, "device_mesh"):
        raise ValueError("weight: is sharded; call this where its module's forward has gathered it")
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(
            f"linear_cross_entropy: give hidden (..., D) and weight (V, D), not {shapes}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: dtype is {labels.dtype}; give torch.int64")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: shape is {tuple(labels.shape)}, hidden asks for {tuple(hidden.shape[:-1])}"
        )
    device = hidden.device.type
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device):
        raise ValueError(
            f"weight: dtype is {weight.dtype}, hidden has {hidden.dtype}; cast one of them"
        )
    if z_loss < 0:
        raise ValueError(f"z_loss: {z_loss} is out of range; give a number ≥ 0")


def _has_kernel(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.bfloat16)


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "linear_cross_entropy",
    backends.Backend("cpu", partial(_chunked, backend="cpu"), native.unusable),
    backends.Backend("torch", partial(_chunked, backend="torch"), _anywhere),
    backends.Backend("reference", reference.linear_cross_entropy, _anywhere),
)

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]
