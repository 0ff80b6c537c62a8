"""Block shuffles on a CPU, of which nothing is copied: what they make lies outputs first.

``y = P blockdiag(second) P blockdiag(first) x``, where P moves number l of block k to place k of
group l. Token by token P is a copy of every vector, as BLAS writes no columns that are apart. Where
an output's numbers of all tokens lie side by side, in one row, P is every B-th row: a product of
batches writes them where they belong, and reads those of the other factor as they are.

Shapes: T tokens, B blocks; of the first factor's blocks I inputs and M outputs, of the second's N
inputs and O outputs; B M = B N numbers between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moezoo.matrices.blocks import batched
from moezoo_kernels import block_shuffle
from moezoo_kernels.activations import GLUOptions, gated_unit
from moezoo_kernels.block_shuffle import Factors, row_width
from moezoo_kernels.grouped_mlp.rowwise import RowPasses

__all__ = ["Factors", "plain", "plain_unit", "product", "runs_here", "shuffle", "unit"]

Gradients: TypeAlias = tuple[Tensor | None, ...]


def runs_here(x: Tensor) -> bool:
    """Return whether tensors like this one are multiplied outputs first: on a CPU, uncompiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def product(x_TD: Tensor, factors: Factors) -> Tensor:
    """Return ``(T, B O)`` without the bias.

    Args:
        x_TD: ``(T, B I)``, tokens first or outputs first.
        factors: the two.
    """
    made: Tensor = _Product.apply(*_operands(x_TD, factors.first, factors.second))
    return made


def unit(x_TD: Tensor, gate: Factors, up: Factors, activation: str, glu: GLUOptions) -> Tensor:
    """Return a gated linear unit's values ``(T, B O)``, which lie outputs first, with the biases.

    Kept for the backward pass are the values before the activation and between the factors.

    Args:
        x_TD: as of :func:`product`.
        gate: of the first factor.
        up: of the other.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        glu: bounds of the factors.
    """
    made: Tensor = _Unit.apply(activation, glu, *_operands(x_TD, *gate, *up))
    return made


def plain(x_TD: Tensor, factors: Factors) -> Tensor:
    """Do what :func:`product` does token by token, which can be differentiated again."""
    return shuffle(_before_last(x_TD, factors), len(factors.first))


def plain_unit(
    x_TD: Tensor, gate: Factors, up: Factors, activation: str, glu: GLUOptions
) -> Tensor:
    """Do what :func:`unit` does token by token; one shuffle of the values does for two."""
    values = []
    for part in (gate, up):
        made = _before_last(x_TD, part)
        if part.bias is not None:
            made = made + part.bias.unflatten(0, (-1, len(part.first))).t().flatten()
        values.append(made)
    return shuffle(gated_unit(values[0], values[1], activation, glu), len(gate.first))


def _before_last(x_TD: Tensor, factors: Factors) -> Tensor:
    return batched(shuffle(batched(x_TD, factors.first), len(factors.first)), factors.second)


def shuffle(values: Tensor, count: int) -> Tensor:
    """Move number l of block k to place k of group l, in the last dimension."""
    return values.unflatten(-1, (count, -1)).transpose(-1, -2).flatten(-2)


class _Product(torch.autograd.Function):
    """Both factors, one after the other."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.native = block_shuffle.pays(x_TD, first, second)
        if ctx.native:
            made_TO, middle = block_shuffle.product(x_TD, Factors(first, second))
            ctx.save_for_backward(x_TD, first, second, middle)
            return made_TO
        made_OT = _rows(second.shape[0] * second.shape[1], x_TD)
        middle_MT = _multiply(x_TD, Factors(first, second), made_OT)
        ctx.save_for_backward(x_TD, first, second, middle_MT)
        return made_OT.t()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Gradients:
        x_TD, first, second, middle_MT = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if torch.is_grad_enabled():  # it is to be differentiated again

            def again(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
                return plain(x, Factors(first, second))

            return _differentiable(again, (x_TD, first, second), slopes[0], wants)
        d_x = _like(x_TD) if wants[0] else None
        factors = Factors(first, second)
        if ctx.native:
            asked = (slopes[0], x_TD, middle_MT, factors, d_x, wants[1:])
            return d_x, *block_shuffle.product_backward(*asked)[:2]
        return d_x, *_backward(x_TD, middle_MT, factors, _outputs_first(slopes[0]), wants[1:], d_x)


class _Unit(torch.autograd.Function):
    """The products of gate and up, and the pass that multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, glu: GLUOptions, x_TD: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        tokens, parts = len(x_TD), _parts(tensors)
        ctx.options = (activation, glu)
        ctx.native = block_shuffle.pays(x_TD, *tensors)
        if ctx.native:
            made, *kept = block_shuffle.unit(x_TD, *parts, activation, glu)
            ctx.save_for_backward(x_TD, *tensors, *kept)
            return made[:, :tokens].t()
        second = parts[0].second
        inner = x_TD.new_empty(second.shape[0] * second.shape[1], 2, _width(x_TD))
        inner[..., tokens:] = 0.0
        middles = []
        for part, made_OT in zip(parts, inner[..., :tokens].unbind(1), strict=True):
            middles.append(_multiply(x_TD, part, made_OT))
            if part.bias is not None:
                made_OT += part.bias[:, None]
        passes = RowPasses(x_TD.dtype, activation, True, glu)
        made_OT = passes.activate(inner.flatten(1))[:, :tokens]
        ctx.save_for_backward(x_TD, *tensors, inner, *middles)
        ctx.passes = passes
        return made_OT.t()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Gradients:
        x_TD, *saved = ctx.saved_tensors
        tensors, kept = saved[:6], saved[6:]
        wants = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():

            def again(x: Tensor, *tensors: Tensor | None) -> Tensor:
                gate, up = _parts(tensors)
                return plain_unit(x, gate, up, *ctx.options)

            return None, None, *_differentiable(again, (x_TD, *tensors), slopes[0], wants)
        d_x = _like(x_TD) if wants[0] else None
        if ctx.native:
            asked = (*_parts(tensors), *ctx.options, d_x, wants[1:])
            pair = block_shuffle.unit_backward(_outputs_first(slopes[0]), x_TD, kept, *asked)
            return None, None, d_x, *pair[0], *pair[1]
        inner, gate_MT, up_MT = kept
        tokens = len(x_TD)
        slope_OL = _whole_rows(slopes[0], inner.shape[2])
        ones = torch.ones(len(inner), dtype=ctx.passes.accumulation)
        d_inner = ctx.passes.backward(slope_OL, inner.flatten(1), ones).inner
        found: list[Tensor | None] = []
        each = zip(
            _parts(tensors), (gate_MT, up_MT), d_inner.view(inner.shape).unbind(1), strict=True
        )
        for number, (part, middle_MT, slopes_OL) in enumerate(each):
            asked = wants[1 + 3 * number : 4 + 3 * number]
            of_part = slopes_OL[:, :tokens]
            found += _backward(x_TD, middle_MT, part, of_part, asked[:2], d_x, add=number > 0)
            found.append(of_part.sum(1) if asked[2] else None)
        return None, None, d_x, *found


def _parts(tensors: Sequence[Any]) -> tuple[Factors, Factors]:
    """Return gate and up of their tensors, one after the other."""
    return Factors(*tensors[:3]), Factors(*tensors[3:])


def _multiply(x_TD: Tensor, factors: Factors, made_OT: Tensor) -> Tensor:
    """Write the product, and return what is between the factors, ``(B M, T)``."""
    first, second, _ = factors
    count = len(first)
    middle_MT = _rows(count * first.shape[1], x_TD)
    torch.bmm(first, _parts_of(x_TD, count).mT, out=_shuffled(middle_MT, count))
    torch.bmm(second, middle_MT.unflatten(0, (count, -1)), out=_shuffled(made_OT, count))
    return middle_MT


def _backward(
    x_TD: Tensor,
    middle_MT: Tensor,
    factors: Factors,
    slope_OT: Tensor,
    wants: tuple[bool, ...],
    d_x: Tensor | None,
    add: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both factors that are wanted; write that of x, or add it."""
    first, second, _ = factors
    count = len(first)
    slope_BOT = _shuffled(slope_OT, count)
    d_middle = _rows(len(middle_MT), x_TD)
    torch.bmm(second.mT, slope_BOT, out=d_middle.unflatten(0, (count, -1)))
    d_middle_BMT = _shuffled(d_middle, count)
    if d_x is not None:
        d_x_BTI = _parts_of(d_x, count)
        torch.baddbmm(d_x_BTI, d_middle_BMT.mT, first, beta=int(add), out=d_x_BTI)
    d_first = d_middle_BMT @ _parts_of(x_TD, count) if wants[0] else None
    d_second = slope_BOT @ middle_MT.unflatten(0, (count, -1)).mT if wants[1] else None
    return d_first, d_second


def _parts_of(x_TD: Tensor, count: int) -> Tensor:
    """Return a view of each block's inputs, ``(B, T, I)``."""
    return x_TD.unflatten(1, (count, -1)).transpose(0, 1)


def _shuffled(rows_OT: Tensor, count: int) -> Tensor:
    """Return a view of each block's outputs where the shuffle puts them, ``(B, O, T)``."""
    return rows_OT.unflatten(0, (-1, count)).transpose(0, 1)


def _width(x_TD: Tensor) -> int:
    """Return how many numbers apart rows of T are."""
    return row_width(len(x_TD), x_TD.element_size())


def _rows(count: int, x_TD: Tensor) -> Tensor:
    return x_TD.new_empty(count, _width(x_TD))[:, : len(x_TD)]


def _like(x_TD: Tensor) -> Tensor:
    """Return memory for x's gradient, which lies as x does."""
    return torch.empty_like(x_TD) if x_TD.is_contiguous() else _rows(x_TD.shape[1], x_TD).t()


def _outputs_first(x_TD: Tensor) -> Tensor:
    """Return the transpose, with a row's numbers side by side."""
    x_DT = x_TD.t()
    return x_DT if x_DT.stride(1) == 1 else _rows(len(x_DT), x_TD).copy_(x_DT)


def _whole_rows(x_TD: Tensor, width: int) -> Tensor:
    """Return the transpose with what is behind its rows, ``(D, width)``: any numbers."""
    x_DT = x_TD.t()
    rows, offset = len(x_DT), x_DT.storage_offset()
    size = x_DT.untyped_storage().nbytes() // x_DT.element_size()
    if x_DT.stride() == (width, 1) and offset + rows * width <= size:
        return x_DT.as_strided((rows, width), (width, 1))
    whole = x_DT.new_zeros(rows, width)
    whole[:, : len(x_TD)] = x_DT
    return whole


def _operands(x_TD: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return operands as BLAS reads them, tokens or outputs first, in the dtype of autocast."""
    x_TD = x_TD if 1 in x_TD.stride() else x_TD.contiguous()
    if not torch.is_autocast_enabled("cpu"):
        return x_TD, *others
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x_TD, *others))


def _differentiable(
    function: Callable[..., Tensor], inputs: Sequence[Any], slope: Tensor, wants: Sequence[bool]
) -> Gradients:
    """Return gradients by autograd, such that they have gradients too."""
    wanted = [tensor for tensor, asked in zip(inputs, wants, strict=True) if asked]
    made = function(*inputs)
    found = iter(torch.autograd.grad(made, wanted, slope, create_graph=True))
    return tuple(next(found) if asked else None for asked in wants)
