"""``grouped_mlp`` for a few tokens in inference, straight to the C++ kernel.

A custom op is what autograd, compilers and FLOP counters need, and costs more than the experts of
one token of a small model. Where none of them looks on, as in a decoding loop, this leaves out
the op, the choice of a backend, and the checks of operands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from moezoo_kernels import backends, native
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions
from moezoo_kernels.grouped_mlp import cpu
from moezoo_kernels.grouped_mlp.operands import Experts, Unit
from moezoo_kernels.transforms import is_ordinary


def is_direct(x: Tensor, indices: Tensor, w_in: Tensor) -> bool:
    """Return whether :func:`grouped_mlp_directly` can and should run.

    Args:
        x: ``(T, D)`` tokens.
        indices: ``(T, K)`` expert numbers.
        w_in: ``(E, I, D)``, as other weights of the experts are.
    """
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and (w_in.dtype, w_in.device) == (x.dtype, x.device)
        and cpu.is_few(indices.numel(), len(w_in), x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and backends.forced() in (None, "cpu")
        and native.unusable(x.device, x.dtype) is None
    )


def may_run_directly(
    x: Tensor, indices: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor
) -> bool:
    """Return whether :func:`is_direct` holds, nothing watches operators, and all operands fit.

    Counters of FLOPs, fake tensors and ``make_fx`` watch, as do ``vmap`` and subclasses of tensors.

    Args:
        x: tokens.
        indices: of experts, which are read and checked here.
        weights: of the choices.
        w_in: ``(E, I, D)``, as other weights of the experts are.
        w_out: ``(E, D, F)``.
    """
    return (
        is_direct(x, indices, w_in)
        and is_ordinary()
        and all(type(each) in (Tensor, Parameter) for each in (x, indices, weights, w_in, w_out))
        and _fit(x, indices, weights, w_in)
    )


def _fit(x: Tensor, indices: Tensor, weights: Tensor, w_in: Tensor) -> bool:
    if not (
        x.ndim == indices.ndim == 2
        and x.shape == (len(indices), w_in.shape[2])
        and weights.shape == indices.shape
        and weights.device == x.device
        and indices.dtype == torch.int64
    ):
        return False
    numbers = indices.reshape(-1).tolist()
    return not numbers or (min(numbers) >= -1 and max(numbers) < len(w_in))


def grouped_mlp_directly(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gated: bool,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Return what :func:`moezoo_kernels.grouped_mlp` returns, where :func:`is_direct` holds.

    Arguments as there. Indices must be of -1 … E - 1: nothing checks them, and memory beyond the
    weights would be read.

    Raises:
        ValueError: an operand is not of ``x``'s dtype.
    """
    for name, tensor in (("w_out", w_out), ("bias_in", bias_in), ("bias_out", bias_out)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, x has {x.dtype}; cast one of them")
    experts = Experts(w_in, w_out, bias_in, bias_out, Unit(activation, gated, glu, interleaved))
    return cpu.few(x, experts, indices, weights)[0]
