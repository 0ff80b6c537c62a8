"""Grouped matrix products in Triton: for fp32, bf16 and fp16, from SM80, with a gather prologue.

A tile of rows belongs to one group. Which one is looked up on the device, so nothing waits for it:
there are as many programs as tiles could be needed, and those beyond the last end at once. The
blocks of the summed dimension are fixed and the others are tuned, so tuning changes no bit.

Shapes: N rows, E groups, A and B widths; group e is rows ``ends[e-1] … ends[e]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.grouped_mlp.stages import Rows
from moezoo_kernels.triton_support import configurations, precision

_ROWS = 64  # of a tile
_SUMMED = 32  # of the summed dimension, at once


@triton.autotune(
    configurations(
        ({"COLUMNS": 64}, 4), ({"COLUMNS": 128}, 4), ({"COLUMNS": 128}, 8), ({"COLUMNS": 256}, 8)
    ),
    key=["height", "width"],
)
@triton.jit
def _matmul(
    data: tl.tensor,
    tokens: tl.tensor,
    matrices: tl.tensor,
    product: tl.tensor,
    groups: tl.tensor,
    firsts: tl.tensor,
    ends: tl.tensor,
    stride_group: tl.tensor,
    stride_height: tl.tensor,
    stride_width: tl.tensor,
    num_groups: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    SUMMED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    group = tl.load(groups + tile)
    if group < num_groups:
        end = tl.load(ends + group)
        rows = tl.load(firsts + tile) + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row_inside = rows < end
        column_inside = columns < width
        sources = rows
        if GATHER:
            sources = tl.load(tokens + rows, mask=row_inside, other=0)
        matrix = matrices + group * stride_group
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, height, SUMMED):
            summed = start + tl.arange(0, SUMMED)
            summed_inside = summed < height
            left = tl.load(
                data + sources[:, None] * height + summed[None, :],
                mask=row_inside[:, None] & summed_inside[None, :],
                other=0.0,
            )
            right = tl.load(
                matrix + summed[:, None] * stride_height + columns[None, :] * stride_width,
                mask=summed_inside[:, None] & column_inside[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(
            product + rows[:, None] * width + columns[None, :],
            total.to(product.dtype.element_ty),
            mask=row_inside[:, None] & column_inside[None, :],
        )


@triton.autotune(
    configurations(
        ({"HEIGHT": 64, "WIDTH": 64}, 4),
        ({"HEIGHT": 128, "WIDTH": 64}, 4),
        ({"HEIGHT": 128, "WIDTH": 128}, 8),
    ),
    key=["height", "width"],
)
@triton.jit
def _outer(
    left: tl.tensor,
    left_tokens: tl.tensor,
    right: tl.tensor,
    right_tokens: tl.tensor,
    product: tl.tensor,
    starts: tl.tensor,
    height: tl.constexpr,
    width: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMMED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    group = tl.program_id(1).to(tl.int64)
    across: tl.constexpr = (width + WIDTH - 1) // WIDTH
    lines = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
    columns = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(starts + group + 1)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    start = tl.load(starts + group)
    while start < end:
        rows = start + tl.arange(0, SUMMED)
        inside = rows < end
        left_rows = rows
        if GATHER_LEFT:
            left_rows = tl.load(left_tokens + rows, mask=inside, other=0)
        right_rows = rows
        if GATHER_RIGHT:
            right_rows = tl.load(right_tokens + rows, mask=inside, other=0)
        a = tl.load(
            left + left_rows[None, :] * height + lines[:, None],
            mask=inside[None, :] & (lines < height)[:, None],
            other=0.0,
        )
        b = tl.load(
            right + right_rows[:, None] * width + columns[None, :],
            mask=inside[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
        start += SUMMED
    tl.store(
        product + group * height * width + lines[:, None] * width + columns[None, :],
        total.to(product.dtype.element_ty),
        mask=(lines < height)[:, None] & (columns < width)[None, :],
    )


def matmul(rows: Rows, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        rows: N rows of width A.
        matrices: ``(E, A, B)``, of any strides.
        ends: ``(E,)`` int64.

    Returns:
        ``(N, B)``; rows from ``ends[-1]`` on are uninitialised.
    """
    data, tokens = rows.data.contiguous(), rows.tokens
    count = data.shape[0] if tokens is None else tokens.numel()
    num_groups, height, width = matrices.shape
    product = data.new_empty(count, width)
    if product.numel() == 0:
        return product
    groups, firsts = _tiles(ends, count)
    _matmul[lambda constants: (groups.numel(), triton.cdiv(width, constants["COLUMNS"]))](
        data,
        data if tokens is None else tokens,
        matrices,
        product,
        groups,
        firsts,
        ends,
        *matrices.stride(),
        num_groups,
        height,
        width,
        GATHER=tokens is not None,
        PRECISION=precision(data.dtype),
        ROWS=_ROWS,
        SUMMED=_SUMMED,
    )
    return product


def outer(left: Rows, right: Rows, ends: Tensor) -> Tensor:
    """Sum the outer products of paired rows over each group: ``left_eᵀ right_e``, ``(E, A, B)``."""
    left_data, right_data = left.data.contiguous(), right.data.contiguous()
    height, width = left_data.shape[1], right_data.shape[1]
    product = left_data.new_empty(ends.numel(), height, width)
    if product.numel() == 0:
        return product
    starts = torch.cat([ends.new_zeros(1), ends])

    def grid(constants: dict[str, int]) -> tuple[int, int]:
        lines, across = (
            triton.cdiv(height, constants["HEIGHT"]),
            triton.cdiv(width, constants["WIDTH"]),
        )
        return lines * across, ends.numel()

    _outer[grid](
        left_data,
        left_data if left.tokens is None else left.tokens,
        right_data,
        right_data if right.tokens is None else right.tokens,
        product,
        starts,
        height,
        width,
        GATHER_LEFT=left.tokens is not None,
        GATHER_RIGHT=right.tokens is not None,
        PRECISION=precision(left_data.dtype),
        SUMMED=_SUMMED,
    )
    return product


def _tiles(ends: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return each tile's group, E for none, and its first row; as many as could be needed."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tile_ends = ((ends - starts + _ROWS - 1) // _ROWS).cumsum(0)
    tiles = torch.arange(triton.cdiv(rows, _ROWS) + ends.numel(), device=ends.device)
    groups = torch.searchsorted(tile_ends, tiles, right=True)
    known = groups.clamp(max=ends.numel() - 1)
    before = torch.where(known > 0, tile_ends[known - 1], 0)
    return groups, starts[known] + (tiles - before) * _ROWS
