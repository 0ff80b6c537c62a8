"""Products with block-sparse matrices in Triton: a program per tile of tokens and row of blocks.

It goes through the row's blocks in their order, which fixes the sums. Nothing here was timed.

Shapes: T tokens, K inputs, N outputs, S width of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.triton_support import on_its_device, precision

_FEW, _MANY = 16, 64  # tokens of a program; tl.dot takes 16 at least


@triton.jit
def _multiply(
    x: tl.tensor,
    values: tl.tensor,
    columns: tl.tensor,
    starts: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    tokens: tl.tensor,
    width: tl.constexpr,
    rows: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write the outputs of a row of blocks for some tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1)
    inside = (token < tokens)[:, None]
    places = tl.arange(0, BLOCK)
    totals = tl.zeros((TOKENS, BLOCK), tl.float32)
    i = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    while i < end:
        first = tl.load(columns + i) * BLOCK
        at = x + token[:, None] * width + first + places[None, :]
        numbers = tl.load(at, mask=inside, other=0.0)
        block = values + i * BLOCK * BLOCK
        weights = tl.load(block + places[:, None] * BLOCK + places[None, :])
        totals = tl.dot(numbers, weights, totals, input_precision=PRECISION)
        i += 1
    outputs = row * BLOCK + places
    if HAS_BIAS:
        totals += tl.load(bias + outputs).to(tl.float32)[None, :]
    to = output + token[:, None] * rows + outputs[None, :]
    tl.store(to, totals.to(output.dtype.element_ty), mask=inside)


@on_its_device
def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    rows: int,
    n: int,
    m: int,
) -> Tensor:
    """Return ``(T, N)``, in ``x``'s dtype; the matrix has blocks, so that n and m are 0."""
    assert starts is not None
    x = x.contiguous()
    (tokens, width), block = x.shape, values.shape[1]
    output = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    given = x if bias is None else bias.contiguous()  # x is not read then
    tile = _FEW if tokens <= _FEW else _MANY
    if output.numel():
        _multiply[(triton.cdiv(tokens, tile), rows // block)](
            *(x, values, index, starts, given, output, tokens),
            width=width,
            rows=rows,
            BLOCK=block,
            TOKENS=tile,
            HAS_BIAS=bias is not None,
            PRECISION=precision(x.dtype),
            num_warps=4 if tile == _MANY else 1,
        )
    return output
