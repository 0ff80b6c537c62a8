"""``weighted_bag`` in Triton, for any width: columns beyond the last are masked.

Each program owns a bag (or a row of the table's gradient) and some of its columns, and adds its
rows in order, so results do not depend on the tuning and nothing is added atomically. Several rows
are asked for at once, as the loop waits for memory, not for arithmetic.

Bounds of loops are constants or compared in `while`: the interpreter of triton 3.6 cannot make a
range of a tensor with numpy 2.4.

Shapes: T tokens, J rows read per token, N rows of the table, R rows of its gradient, V width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.row_sums import Assignments
from moezoo_kernels.triton_support import configurations, on_its_device

# Columns of one program, rows it asks for at once, warps.
_CONFIGURATIONS = (
    ({"COLUMNS": 256, "AHEAD": 4}, 1),
    ({"COLUMNS": 512, "AHEAD": 4}, 2),
    ({"COLUMNS": 512, "AHEAD": 8}, 2),
    ({"COLUMNS": 1024, "AHEAD": 4}, 4),
)
_MOST_COLUMNS = 1024


@triton.autotune(configurations(*_CONFIGURATIONS), key=["width", "choices"])
@triton.jit
def _bag(
    table: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    first = token * choices
    for start in range(0, choices, AHEAD):
        for ahead in tl.static_range(AHEAD):
            j = start + ahead
            index = tl.load(indices + first + j, mask=j < choices, other=-1)
            read = index >= 0
            weight = tl.load(weights + first + j, mask=(j < choices) & read, other=0.0)
            row = tl.load(table + index * width + columns, mask=inside & read, other=0.0)
            total += weight * row.to(tl.float32)
    tl.store(output + token * width + columns, total.to(output.dtype.element_ty), mask=inside)


@triton.autotune(configurations(*_CONFIGURATIONS), key=["width"])
@triton.jit
def _sum_rows(
    source: tl.tensor,
    weights: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    sums: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    start = begin
    while start < end:
        for ahead in tl.static_range(AHEAD):
            p = start + ahead
            assignment = tl.load(order + p, mask=p < end, other=0)
            weight = tl.load(weights + assignment, mask=p < end, other=0.0)
            token = assignment // choices
            added = tl.load(source + token * width + columns, mask=inside & (p < end), other=0.0)
            total += weight * added.to(tl.float32)
        start += AHEAD
    tl.store(sums + row * width + columns, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def _dots(
    grad: tl.tensor,
    table: tl.tensor,
    indices: tl.tensor,
    dots: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    assignment = tl.program_id(0).to(tl.int64)
    index = tl.load(indices + assignment)
    read = index >= 0
    token = assignment // choices
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < width) & read
        row = tl.load(table + index * width + columns, mask=inside, other=0.0).to(tl.float32)
        of_token = tl.load(grad + token * width + columns, mask=inside, other=0.0)
        total += row * of_token.to(tl.float32)
    tl.store(dots + assignment, tl.sum(total))


@on_its_device
def forward(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the bags, ``(T, V)``."""
    (tokens, choices), width = indices.shape, table.shape[1]
    output = table.new_empty(tokens, width)
    if output.numel():
        operands = (table.contiguous(), indices.contiguous(), weights.contiguous(), output)
        _bag[_by_columns(tokens, width)](*operands, width, choices)
    return output


@on_its_device
def backward(
    grad: Tensor,  # (T, V)
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    assignments: Assignments | None,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the table's rows (R, V), if sorted for it, and of weights (T, J)."""
    grad, width, choices = grad.contiguous(), table.shape[1], indices.shape[1]
    of_table = of_weights = None
    if assignments is not None:
        order, starts, _ = assignments
        of_table = table.new_empty(starts.numel() - 1, width)
        if of_table.numel():
            grid = _by_columns(of_table.shape[0], width)
            sums = (weights.contiguous(), order, starts, of_table)
            _sum_rows[grid](grad, *sums, width, max(1, choices))
    if needs_weights:
        of_weights = torch.empty(indices.shape, dtype=weights.dtype, device=weights.device)
        if of_weights.numel():
            columns = min(_MOST_COLUMNS, triton.next_power_of_2(max(1, width)))
            rows = (table.contiguous(), indices.contiguous())
            _dots[(indices.numel(),)](grad, *rows, of_weights, width, choices, COLUMNS=columns)
    return of_table, of_weights


def _by_columns(rows: int, width: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """Return the grid: rows, and the blocks of columns that a configuration needs."""
    return lambda constants: (rows, triton.cdiv(width, constants["COLUMNS"]))
