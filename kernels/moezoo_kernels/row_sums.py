"""Sums of rows by where they go: the gradient of a table whose rows are read by index.

That gradient is, for each row of the table, a sum over the assignments that read it. They are
sorted by row first, so that the sum is an embedding bag: deterministic on every device, and
without atomics (the reverse indices of Berges et al. 2024, arXiv:2412.09764, section 3.2).

Shapes: T tokens, J assignments per token, N rows of the table, R rows of its gradient, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels import native
from moezoo_kernels.flops import has_data


class Assignments(NamedTuple):
    """The assignments sorted by table row, those of no row (index -1) last.

    Attributes:
        order: ``(T * J,)`` positions in the flattened indices, by row, then by position.
        starts: ``(R + 1,)`` where each row's run begins; the last is that of index -1.
        rows: ``(R,)`` which rows these are; None for all of them.
    """

    order: Tensor
    starts: Tensor
    rows: Tensor | None


def sort_by_row(indices: Tensor, num_rows: int, only_used: bool) -> Assignments:
    """Sort assignments by row, stably; ``only_used`` leaves out rows without an assignment.

    Of a table with many more rows than assignments, time and memory do then not grow with it.
    """
    if only_used and num_rows > 2 * indices.numel():
        return _sort_used(indices, num_rows)
    order, starts = _sort(indices, num_rows)
    if not only_used:
        return Assignments(order, starts, None)
    rows = torch.diff(starts).nonzero().squeeze(-1)
    return Assignments(order, torch.cat([starts[rows], starts[-1:]]), rows)


@torch.library.custom_op("moezoo::sort_by_row", mutates_args=())
def _sort(indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the order (T * J,) of the assignments, and where each row's run begins, (N + 1,)."""
    flat = indices.reshape(-1).contiguous()  # a view of one dimension may have strides
    if native.unusable(indices.device, torch.float32) is None:
        dealt, order = torch.empty_like(flat), torch.empty_like(flat)
        starts = flat.new_empty(num_rows + 1)
        native.call("moezoo_sort_by_row", flat, flat.numel(), num_rows, dealt, order, starts)
        return order, starts
    ordered, order = torch.where(flat < 0, num_rows, flat).sort(stable=True)
    wanted = torch.arange(num_rows + 1, device=flat.device)
    return order, torch.searchsorted(ordered, wanted)


@_sort.register_fake
def _(indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(indices.numel()), indices.new_empty(num_rows + 1)


def _sort_used(indices: Tensor, num_rows: int) -> Assignments:
    """Return the assignments of the rows that have some; what is returned is no larger."""
    flat = indices.reshape(-1).contiguous()
    if native.unusable(indices.device, torch.float32) is None:
        dealt, order, rows = (torch.empty_like(flat) for _ in range(3))
        starts, found = flat.new_empty(flat.numel() + 1), flat.new_empty(1)
        results = dealt, order, rows, starts, found
        native.call("moezoo_sort_used_rows", flat, flat.numel(), num_rows, *results)
        return Assignments(order, starts[: int(found) + 1], rows[: int(found)])
    ordered, order = torch.where(flat < 0, num_rows, flat).sort(stable=True)
    rows, counts = ordered.unique_consecutive(return_counts=True)
    starts, used = F.pad(counts.cumsum(0), (1, 0)), int((rows < num_rows).sum())
    return Assignments(order, starts[: used + 1], rows[:used])


@torch.library.custom_op("moezoo::sum_rows", mutates_args=())
def sum_rows(
    source: Tensor, coefficients: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sum ``coefficients[t, j] * source[t]`` over each row's run of assignments: (R, D).

    Args:
        source: ``(T, D)``.
        coefficients: ``(T, J)``.
        order: ``(T * J,)``, from :func:`sort_by_row`.
        starts: ``(R + 1,)``, from :func:`sort_by_row`; what follows the last is left out.
        dtype: of the result, accumulated in fp32 where that is shorter.
    """
    rows, width = starts.numel() - 1, source.shape[1]
    if _is_native(source, coefficients, dtype):
        sums = source.new_empty(rows, width, dtype=dtype)
        native.call(
            "moezoo_sum_rows",
            source.contiguous(),
            native.dtype_code(source.dtype),
            coefficients.contiguous(),
            coefficients.shape[1],
            order.contiguous(),
            starts.contiguous(),
            rows,
            width,
            sums,
            native.dtype_code(dtype),
        )
        return sums
    if order.numel() == 0:
        return source.new_zeros(rows, source.shape[1], dtype=dtype)
    tokens = order // coefficients.shape[1]
    ordered = coefficients.reshape(-1)[order].to(dtype)
    # One bag more takes the assignments of no row.
    return F.embedding_bag(
        tokens, source.to(dtype), starts, mode="sum", per_sample_weights=ordered
    ).narrow(0, 0, rows)


@sum_rows.register_fake
def _(
    source: Tensor, coefficients: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype
) -> Tensor:
    return source.new_empty(starts.numel() - 1, source.shape[1], dtype=dtype)


def _is_native(source: Tensor, coefficients: Tensor, dtype: torch.dtype) -> bool:
    kinds = (source.dtype, dtype)
    usable = all(native.unusable(source.device, kind) is None for kind in kinds)
    return usable and coefficients.dtype == torch.float32


def table_gradient(
    table: Tensor, source: Tensor, coefficients: Tensor, assignments: Assignments
) -> Tensor:
    """Return the gradient of a table, ``(N, D)``: sparse if the assignments name only used rows.

    Args:
        table: ``(N, D)``.
        source: ``(T, D)``, what each assignment adds, before it is weighted.
        coefficients: ``(T, J)``.
        assignments: from :func:`sort_by_row`.
    """
    order, starts, rows = assignments
    values = sum_rows(source, coefficients, order, starts, table.dtype)
    return values if rows is None else sparse_rows(rows, values, table)


def sparse_rows(rows: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Make a coalesced sparse gradient ``(N, D)`` of ``values`` (R, D) at ascending ``rows``."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, table.shape, is_coalesced=True, check_invariants=False
    )


@register_flop_formula(torch.ops.moezoo.sum_rows, get_raw=True)
def _sum_flops(
    source: Tensor, coefficients: Tensor, order: Tensor, starts: Tensor, *_: Any, **__: Any
) -> int:
    """Count a multiply-add per number of each token's row that is added."""
    active = int(starts[-1]) if has_data(starts) else order.numel()
    return 2 * active * source.shape[1]
