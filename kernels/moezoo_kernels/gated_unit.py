"""Gated linear units in one pass on a CPU, in C++ (csrc/gated_unit.cpp).

torch's operators take two passes forward and three back, and keep the activation's value; here the
backward pass computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import activations, native
from moezoo_kernels.activations import ACTIVATION_CODES, GLUOptions
from moezoo_kernels.transforms import is_ordinary


def gated_unit(gate: Tensor, up: Tensor, activation: str, glu: GLUOptions) -> Tensor:
    """Return ``act(gate) up``, as :func:`moezoo_kernels.activations.gated_unit` does.

    In fp32 on a CPU it is one pass; everything else, compiled and transformed functions and second
    derivatives among it, is left to that.

    Args:
        gate: of any shape.
        up: of the same.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        glu: bounds of the factors.
    """
    if torch.compiler.is_compiling() or not (_suits(gate, up) and is_ordinary()):
        return activations.gated_unit(gate, up, activation, glu)
    made: Tensor = _Unit.apply(gate, up, activation, glu)
    return made


def _suits(gate: Tensor, up: Tensor) -> bool:
    return (
        type(gate) is type(up) is Tensor
        and gate.shape == up.shape
        and gate.dtype == up.dtype == torch.float32
        and native.unusable(gate.device, torch.float32) is None
        and up.device == gate.device
    )


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, glu: GLUOptions) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        made = native.floats(*gate.shape)
        codes = (ACTIVATION_CODES[activation], *glu.encode())
        native.call("moezoo_gated_unit", gate, up, gate.numel(), *codes, made)
        ctx.save_for_backward(gate, up)
        ctx.options, ctx.codes = (activation, glu), codes
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated again
            made = activations.gated_unit(gate, up, *ctx.options)
            wanted = [
                t for t, asked in zip((gate, up), ctx.needs_input_grad, strict=False) if asked
            ]
            found = iter(torch.autograd.grad(made, wanted, slopes[0], create_graph=True))
            return (
                *(next(found) if asked else None for asked in ctx.needs_input_grad[:2]),
                None,
                None,
            )
        d_gate, d_up = native.floats(*gate.shape), native.floats(*up.shape)
        operands = (slopes[0].contiguous(), gate, up, gate.numel(), *ctx.codes, d_gate, d_up)
        native.call("moezoo_gated_unit_backward", *operands)
        return d_gate, d_up, None, None
