"""``sparse_linear`` as an opaque op: what compile, autograd and FLOP counters see.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.sparse_linear import cpu
from moezoo_kernels.sparse_linear.matrices import BlockSparse, GroupSparse


@torch.library.custom_op("moezoo::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    rows: int,
    n: int,
    m: int,
    backend: str,
) -> Tensor:
    """Return the output (T, N) in ``x``'s dtype; the arguments are those of the C++ function."""
    run = cpu.sparse_linear
    if backend == "triton":  # looked for when asked for, as it imports triton
        name = "moezoo_kernels.sparse_linear.triton_blocks"
        run = importlib.import_module(name).sparse_linear
    return run(x, values, index, starts, bias, rows, n, m)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    rows: int,
    *_: Any,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, starts, bias, rows, n, m, _ = inputs
    ctx.save_for_backward(values, index, *([] if starts is None else [starts]))
    ctx.sizes = ((rows, x.shape[1]), n, m)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tokens and the bias; the matrix is fixed."""
    values, index, *starts = ctx.saved_tensors
    shape, n, m = ctx.sizes
    grad_x = None
    if ctx.needs_input_grad[0]:
        if starts:
            dense = BlockSparse(values, index, starts[0], shape).dense()
        else:
            dense = GroupSparse(values, index, n, m, shape).dense()
        grad_x = grad @ dense
    grad_bias = grad.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, None


sparse_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.moezoo.sparse_linear, get_raw=True)
def _flops(x: Tensor, values: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Count the products with what is stored."""
    return 2 * x.shape[0] * values.numel()
