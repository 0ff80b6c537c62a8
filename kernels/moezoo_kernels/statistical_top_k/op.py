"""``statistical_top_k`` in C++ as one opaque op with a backward op: what autograd and compile see.

Written out, the threshold and its gradient make some ten tensors of the hidden layer's size. Here
there are the result and the gradients; saved are the inputs, which the products around them hold.

Shapes: T tokens, F width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import fresh, native
from moezoo_kernels.activations import ACTIVATION_CODES

_ROWS = torch.contiguous_format


@torch.library.custom_op("moezoo::statistical_top_k", mutates_args=())
def forward(pre: Tensor, up: Tensor | None, quantile: float, activation: str) -> Tensor:
    """Return the hidden activations, of the shape and dtype of ``pre``."""
    operands = _contiguous(pre, up)
    hidden = fresh.about_to_write(torch.empty_like(pre, memory_format=_ROWS))
    native.call("moezoo_statistical_top_k", *operands, *_options(pre, quantile, activation), hidden)
    return hidden


@forward.register_fake
def _(pre: Tensor, up: Tensor | None, quantile: float, activation: str) -> Tensor:
    return pre.new_empty(pre.shape)


@torch.library.custom_op("moezoo::statistical_top_k_backward", mutates_args=())
def backward(
    grad: Tensor, pre: Tensor, up: Tensor | None, quantile: float, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``pre`` and ``up``; without ``up``, the second is empty."""
    operands = _contiguous(grad, pre, up)
    of_pre = fresh.about_to_write(torch.empty_like(pre, memory_format=_ROWS))
    of_up = None if up is None else fresh.about_to_write(torch.empty_like(of_pre))
    options = _options(pre, quantile, activation)
    native.call("moezoo_statistical_top_k_backward", *operands, *options, of_pre, of_up)
    return of_pre, pre.new_empty(0) if of_up is None else of_up


@backward.register_fake
def _(
    grad: Tensor, pre: Tensor, up: Tensor | None, quantile: float, activation: str
) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty(0 if up is None else up.shape)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _options(pre: Tensor, quantile: float, activation: str) -> tuple[int | float, ...]:
    width = max(1, pre.shape[-1])
    dtype, code = native.dtype_code(pre.dtype), ACTIVATION_CODES[activation]
    return dtype, pre.numel() // width, width, float(quantile), code


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pre, up, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pre, up)


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    pre, up = ctx.saved_tensors
    if grad is None:
        return (None,) * 4
    of_pre, of_up = backward(grad, pre, up, *ctx.options)
    return of_pre, None if up is None else of_up, None, None


forward.register_autograd(_differentiate, setup_context=_save)
