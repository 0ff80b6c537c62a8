"""A linear map in fp32 of what is kept in bf16 or fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo_kernels.dtypes import at_least_fp32, without_autocast
from moezoo_kernels.linear import linear


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x Wᵀ + b`` in fp32, or fp64 for fp64 inputs, whatever autocast says.

    Bits and gradients are those of ``F.linear`` on wider copies, but the backward is left with the
    operands themselves: a router's copy of all tokens would be a fifth of what its layer saves.

    Args:
        x: ``(T, A)``.
        weight: ``(B, A)``.
        bias: ``(B,)``.

    Returns:
        ``(T, B)``, in fp32 or fp64.
    """
    with without_autocast(x.device.type):
        # The compiler decides by itself what it keeps and what it casts again.
        if torch.compiler.is_compiling() or x.dtype in (torch.float32, torch.float64):
            x = at_least_fp32(x)
            return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return _WideLinear.apply(x, weight, bias)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = (grad @ weight.float()).to(x.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (grad.t() @ x.float()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias
