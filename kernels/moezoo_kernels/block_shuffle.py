"""Block shuffles in fp32 on a CPU, in C++ (csrc/block_shuffle.cpp), and gated units of two of them.

``y = P blockdiag(second) P blockdiag(first) x``, where P moves number l of block k to place k of
group l (arXiv:2406.16450). Whether they take these products is
:func:`moezoo_kernels.product_libraries.own_keeps_up`'s to say. Not differentiable.

Shapes: T tokens, B blocks; of the first factor's blocks I inputs and M outputs, of the second's M
inputs and O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels import native, product_libraries
from moezoo_kernels.activations import ACTIVATION_CODES, GLUOptions
from moezoo_kernels.transforms import is_ordinary


class Factors(NamedTuple):
    """What a block shuffle is made of.

    Attributes:
        first: ``(B, M, I)``.
        second: ``(B, O, M)``.
        bias: ``(B O,)`` or None.
    """

    first: Tensor
    second: Tensor
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """Of factors; None where it is not wanted."""

    first: Tensor | None
    second: Tensor | None
    bias: Tensor | None = None


def pays(*tensors: Tensor | None) -> bool:
    """Return whether tensors are fp32 on a CPU that these products keep busy as torch's would.

    Where torch's operators are counted or transformed, they have to be seen.
    """
    fit = all(t is None or (t.dtype == torch.float32 and t.is_cpu) for t in tensors)
    return fit and is_ordinary() and product_libraries.own_keeps_up()


def row_width(tokens: int, size: int) -> int:
    """Return how many numbers of ``size`` bytes apart rows of T are.

    Rows that are 4 KiB apart share the few places of a cache that their addresses allow, and every
    B-th row is what is read: a cache line more keeps them apart.
    """
    return tokens if tokens * size % 1024 else tokens + 64 // size


def product(x_TD: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return ``(T, B O)``, and what is between the factors, ``(B M, row_width(T))``.

    Args:
        x_TD: ``(T, B I)`` of which one stride is 1.
        factors: the two, and a bias that is added.
    """
    middle = _rows(factors.first.shape[0] * factors.first.shape[1], x_TD)
    made_TF = native.floats(len(x_TD), factors.second.shape[0] * factors.second.shape[1])
    native.call(
        "moezoo_block_shuffle",
        *_lying(x_TD),
        *_contiguous(*factors),
        *_sizes(x_TD, factors),
        middle.shape[1],
        middle,
        made_TF,
    )
    return made_TF, middle


def product_backward(
    slope_TF: Tensor,
    x_TD: Tensor,
    middle: Tensor,
    factors: Factors,
    d_x: Tensor | None,
    wants: tuple[bool, bool],
) -> Gradients:
    """Return the gradients of the factors; write that of x.

    Args:
        slope_TF: ``(T, B O)``.
        x_TD: as :func:`product` read it.
        middle: as it returned.
        factors: the two.
        d_x: memory that lies as x does, tokens or outputs first; None if it is not wanted.
        wants: whether the gradients of the first and the second are.
    """
    slope_TF = slope_TF if 1 in slope_TF.stride() else slope_TF.contiguous()
    first, second, _ = factors
    found = Gradients(*_wanted(wants, first, second))
    native.call(
        "moezoo_block_shuffle_backward",
        *_lying(slope_TF),
        *_lying(x_TD),
        *_contiguous(first, second),
        *_sizes(x_TD, factors),
        middle.shape[1],
        middle,
        *_lying(d_x),
        *found[:2],
    )
    return found


def unit(
    x_TD: Tensor, gate: Factors, up: Factors, activation: str, glu: GLUOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``act(gate) up``, what is between both pairs of factors, and both values.

    Args:
        x_TD: ``(T, B I)`` of which one stride is 1.
        gate: of the first value.
        up: of the other.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        glu: bounds of both.

    Returns:
        Outputs first: ``(B O, row_width(T))``, ``(2, B M, row_width(T))`` and ``(B O,
        row_width(2 T))``; each row has numbers of T or of 2 T tokens, and any behind them.
    """
    outputs = gate.second.shape[0] * gate.second.shape[1]
    made = _rows(outputs, x_TD)
    middle = _rows(2 * gate.first.shape[0] * gate.first.shape[1], x_TD)
    inner = native.floats(outputs, row_width(2 * len(x_TD), 4))
    native.call(
        "moezoo_block_shuffle_unit",
        *_lying(x_TD),
        *_contiguous(*gate, *up),
        *_sizes(x_TD, gate),
        ACTIVATION_CODES[activation],
        *glu.encode(),
        made.shape[1],
        inner.shape[1],
        middle,
        inner,
        made,
    )
    return made, middle, inner


def unit_backward(
    slope_OT: Tensor,
    x_TD: Tensor,
    kept: tuple[Tensor, Tensor],
    gate: Factors,
    up: Factors,
    activation: str,
    glu: GLUOptions,
    d_x: Tensor | None,
    wants: tuple[bool, ...],
) -> tuple[Gradients, Gradients]:
    """Return the gradients of gate and up; write that of x.

    Args:
        slope_OT: ``(B O, T)``, the numbers of a row side by side.
        x_TD: as :func:`unit` read it.
        kept: what it returned but the first.
        gate: as there.
        up: as there.
        activation: as there.
        glu: as there.
        d_x: memory that lies as x does, tokens or outputs first; None if it is not wanted.
        wants: whether the gradients of gate's and up's factors and biases are.
    """
    middle, inner = kept
    of_gate = Gradients(*_wanted(wants[:3], *gate))
    of_up = Gradients(*_wanted(wants[3:], *up))
    native.call(
        "moezoo_block_shuffle_unit_backward",
        slope_OT.data_ptr(),
        slope_OT.stride(0),
        *_lying(x_TD),
        *_contiguous(*gate[:2], *up[:2]),
        *_sizes(x_TD, gate),
        ACTIVATION_CODES[activation],
        *glu.encode(),
        middle.shape[1],
        inner.shape[1],
        middle,
        inner,
        *_lying(d_x),
        *of_gate,
        *of_up,
    )
    return of_gate, of_up


def _rows(count: int, x_TD: Tensor) -> Tensor:
    return native.floats(count, row_width(len(x_TD), 4))


def _lying(x: Tensor | None) -> tuple[int, int, int]:
    """Return where a matrix is, and its strides."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _sizes(x_TD: Tensor, factors: Factors) -> tuple[int, int, int, int, int]:
    blocks, between, inputs = factors.first.shape
    return blocks, len(x_TD), inputs, between, factors.second.shape[1]


def _wanted(wants: tuple[bool, ...], *tensors: Tensor | None) -> list[Tensor | None]:
    return [
        native.floats(*tensor.shape) if tensor is not None and asked else None
        for tensor, asked in zip(tensors, wants, strict=True)
    ]
