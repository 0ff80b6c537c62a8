"""Linear maps in fp32 on a CPU, by the library that is faster there; elsewhere ``F.linear``.

Which library gets a product depends on its sizes alone, never on what ran before, so that a run
that is resumed, or a block that is recomputed, has the same bits.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo_kernels import product_libraries
from moezoo_kernels.transforms import is_ordinary

# oneDNN's calls take 11 µs where torch's take 2, and a shape's first one 0.3 to 0.9 ms, for which
# code is generated. Measured on an EPYC with AVX-512, one thread: from 8 MFLOP on, 1.3 to 2.3 times
# as fast in all three products of a training step, but 1.05 for gradients of matrices under 128.
_LEAST_FLOPS = 8e6
_LEAST_ROWS = 16
_LEAST_WIDTH = 32
# From here on a product by oneDNN takes no longer than torch's though its code is generated for it.
_ANY_SHAPE_FLOPS = 2e8
_FINEST_STEP = 8
# Rows of zeros cost a copy, which narrower products do not earn.
_LEAST_WIDTH_TO_FILL = 192


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x Wᵀ + b`` as ``F.linear``, with the same gradients and as much saved for them.

    Products in fp32 on a CPU go to oneDNN where it is clearly the faster library and they are large
    enough; everything else, compiled, exported and transformed functions, tensor subclasses and
    second derivatives among it, is left to torch's operators.

    Args:
        x: ``(..., I)``.
        weight: ``(O, I)``.
        bias: ``(O,)``.

    Returns:
        ``(..., O)``.

    Raises:
        ValueError: ``MOEZOO_PRODUCTS`` is neither ``fastest`` nor ``torch``.
    """
    if torch.compiler.is_compiling() or not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _forward(x, weight, bias)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x Wᵀ`` by the faster library; by torch's where a gradient is wanted.

    Args:
        x: ``(R, I)``.
        weight: ``(O, I)``.
    """
    return _product(x, weight) if suits(x, weight) else torch.mm(x, weight.t())


def suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`multiply` leaves a product to oneDNN, which returns new memory."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not learns and not torch.compiler.is_compiling() and _suits(x, weight, None)


class Linear(nn.Linear):
    """``nn.Linear`` whose products run by the library that is faster; the same in all else."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(..., out_features)`` of ``(..., in_features)``."""
        return linear(input, self.weight, self.bias)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Return whether a module is ``nn.Linear`` or :class:`Linear`, and no other subclass."""
    return type(module) in (nn.Linear, Linear)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN gets a product; asks for what is most often missing first."""
    if type(x) not in _TYPES or type(weight) not in _TYPES or weight.ndim != 2:
        return False
    if torch._C._is_tracing():  # whose sizes are tensors
        return False
    outputs, inputs = weight.shape
    numbers = x.numel()
    return (
        2.0 * numbers * outputs >= _LEAST_FLOPS
        and x.ndim >= 1
        and x.shape[-1] == inputs
        and _pays(numbers // inputs, inputs, outputs)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.layout == weight.layout == torch.strided
        and _has_lines(weight)
        and (bias is None or _fits(bias, outputs))
        and is_ordinary()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("none", "ieee")
        and product_libraries.onednn_is_faster()
    )


_TYPES = (Tensor, nn.Parameter)


def _pays(rows: int, inputs: int, outputs: int) -> bool:
    narrow = min(inputs, outputs)
    if rows < _LEAST_ROWS or narrow < _LEAST_WIDTH:
        return False
    return narrow >= _LEAST_WIDTH_TO_FILL or _filled(rows, 2.0 * rows * inputs * outputs) == rows


def _fits(bias: Tensor, outputs: int) -> bool:
    return (
        type(bias) in _TYPES
        and bias.shape == (outputs,)
        and bias.dtype == torch.float32
        and bias.is_cpu
        and bias.is_contiguous()
    )


def _has_lines(matrix: Tensor) -> bool:
    """Return whether a matrix's rows, or its columns, lie one behind the other in memory."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return (right == 1 and down >= columns) or (down == 1 and right >= rows)


def _in_lines(matrix: Tensor) -> Tensor:
    return matrix if _has_lines(matrix) else matrix.contiguous()


def _filled(rows: int, flops: float) -> int:
    """Return how many rows a product gets, zeros added: few numbers of rows need little code.

    Up to 128, multiples of 8; above, 8 numbers from each power of two to the next.
    """
    if flops >= _ANY_SHAPE_FLOPS:
        return rows
    step = max(_FINEST_STEP, (1 << (rows - 1).bit_length()) // 16)
    return -(-rows // step) * step


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """Return a matrix with rows of zeros behind its own."""
    if matrix.shape[0] == rows:
        return _in_lines(matrix)
    filled = matrix.new_empty(rows, matrix.shape[1])
    filled[: len(matrix)].copy_(matrix)
    filled[len(matrix) :].zero_()
    return filled


def _product(x_RI: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(R, O)``, which is no view."""
    rows, inputs = x_RI.shape
    outputs = weight_OI.shape[0]
    filled = _filled(rows, 2.0 * rows * inputs * outputs)
    made = product_libraries.onednn_linear(_with_rows(x_RI, filled), _in_lines(weight_OI), bias)
    return made if filled == rows else made.resize_(rows, outputs)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made_RO = _product(x.reshape(-1, x.shape[-1]), weight, bias)
    # A view would be refused by operators that write into what a function returns.
    return made_RO if x.ndim == 2 else made_RO.resize_(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.width = x.shape[-1]
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_RO = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        again = torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_ordinary()
        if ctx.needs_input_grad[2]:
            of_bias = grad_RO.sum(0)
        if again or type(grad) is not Tensor or not grad.is_cpu:
            if weight is not None:
                of_x = grad @ weight
            if x is not None:
                of_weight = grad_RO.t() @ x.reshape(-1, x.shape[-1])
            return of_x, of_weight, of_bias
        flops = 2.0 * grad.numel() * ctx.width
        rows, filled = len(grad_RO), _filled(len(grad_RO), flops)
        grad_RO = _with_rows(grad_RO, filled)
        if weight is not None:
            made_RI = product_libraries.onednn_linear(grad_RO, weight.t())
            of_x = made_RI[:rows].view(*grad.shape[:-1], ctx.width)
        if x is not None:
            x_RI = _with_rows(x.reshape(-1, ctx.width), filled)
            of_weight = product_libraries.onednn_linear(grad_RO.t(), x_RI.t())
        return of_x, of_weight, of_bias
