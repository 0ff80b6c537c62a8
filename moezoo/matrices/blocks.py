"""Products with the blocks of a diagonal, written where they belong.

``torch.bmm`` of parts of the tokens' vectors makes a tensor block by block, which is then copied
token by token, in the backward pass too. On a CPU each is written in place: in fp32 by our own
products, whose results may lie in any rows; by torch's, a call for each block.

Shapes: T tokens, B blocks, I inputs and O outputs of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import matmul
from moezoo_kernels.product_libraries import own_keeps_up
from moezoo_kernels.transforms import is_ordinary


def by_blocks(x: Tensor, blocks_BOI: Tensor) -> Tensor:
    """Apply each block to its part of the last dimension, ``(..., B O)``.

    Args:
        x: ``(..., B I)``.
        blocks_BOI: the blocks.
    """
    kind = x.device.type
    if kind != "cpu" or torch.compiler.is_compiling():
        return in_batches(x, blocks_BOI)
    x_TD = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, blocks_BOI = x_TD.to(dtype), blocks_BOI.to(dtype)
    made_TD: Tensor = _InPlace.apply(x_TD, blocks_BOI)
    return made_TD.reshape(*x.shape[:-1], made_TD.shape[-1])


def in_batches(x: Tensor, blocks_BOI: Tensor) -> Tensor:
    """Do what :func:`by_blocks` does by a product of batches, on any device."""
    made_TD = batched(x.reshape(-1, x.shape[-1]), blocks_BOI)
    return made_TD.reshape(*x.shape[:-1], made_TD.shape[-1])


def batched(x_TD: Tensor, blocks_BOI: Tensor) -> Tensor:
    """Do the same by one product of batches, ``(T, B O)``."""
    count, outputs, inputs = blocks_BOI.shape
    parts_BTI = x_TD.reshape(-1, count, inputs).transpose(0, 1)
    made_BTO = torch.bmm(parts_BTI, blocks_BOI.transpose(1, 2))
    return made_BTO.transpose(0, 1).reshape(-1, count * outputs)


class _InPlace(torch.autograd.Function):
    """A product of each block that is written into the columns of its outputs."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, blocks_BOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, blocks_BOI)
        count, outputs, _ = blocks_BOI.shape
        made_TD = x_TD.new_empty(len(x_TD), count * outputs)
        ctx.own = _takes_own(x_TD, blocks_BOI)
        if ctx.own:
            matmul.matmul(_stacked(x_TD, count), blocks_BOI.mT, out=_stacked(made_TD, count))
            return made_TD
        for block_OI, read_TI, made_TO in _parts(blocks_BOI, x_TD, made_TD):
            torch.mm(read_TI, block_OI.t(), out=made_TO)
        return made_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, blocks_BOI = ctx.saved_tensors
        (gradient_TD,) = gradients
        wants = ctx.needs_input_grad
        if torch.is_grad_enabled():  # it is to be differentiated again
            return _differentiable(x_TD, blocks_BOI, gradient_TD, *wants)
        gradient_TD = gradient_TD.contiguous()
        d_x = x_TD.new_empty(x_TD.shape) if wants[0] else None
        d_blocks = blocks_BOI.new_empty(blocks_BOI.shape) if wants[1] else None
        if ctx.own:
            count = len(blocks_BOI)
            slopes_BTO = _stacked(gradient_TD, count)
            if d_x is not None:
                matmul.matmul(slopes_BTO, blocks_BOI, out=_stacked(d_x, count))
            if d_blocks is not None:
                matmul.matmul(slopes_BTO.mT, _stacked(x_TD, count), out=d_blocks)
            return d_x, d_blocks
        for k, (block_OI, read_TI, slope_TO) in enumerate(_parts(blocks_BOI, x_TD, gradient_TD)):
            width = read_TI.shape[1]
            if d_x is not None:
                torch.mm(slope_TO, block_OI, out=d_x[:, k * width : (k + 1) * width])
            if d_blocks is not None:
                torch.mm(slope_TO.t(), read_TI, out=d_blocks[k])
        return d_x, d_blocks


def _takes_own(x_TD: Tensor, blocks_BOI: Tensor) -> bool:
    return matmul.unusable(x_TD, blocks_BOI) is None and is_ordinary() and own_keeps_up()


def _stacked(x_TD: Tensor, count: int) -> Tensor:
    """Return a view of each block's part of the columns, ``(B, T, D / B)``."""
    return x_TD.unflatten(1, (count, -1)).transpose(0, 1)


def _parts(
    blocks_BOI: Tensor, x_TD: Tensor, made_TD: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return each block, the columns that it reads, and those of its outputs."""
    _, outputs, inputs = blocks_BOI.shape
    return zip(
        blocks_BOI.unbind(),
        x_TD.split(inputs, dim=1),
        made_TD.split(outputs, dim=1),
        strict=True,
    )


def _differentiable(
    x_TD: Tensor, blocks_BOI: Tensor, gradient_TD: Tensor, *wants: bool
) -> tuple[Tensor | None, Tensor | None]:
    count = len(blocks_BOI)
    parts_BTI, slopes_BTO = _stacked(x_TD, count), _stacked(gradient_TD, count)
    d_x = (slopes_BTO @ blocks_BOI).transpose(0, 1).flatten(1) if wants[0] else None
    return d_x, slopes_BTO.transpose(1, 2) @ parts_BTI if wants[1] else None
