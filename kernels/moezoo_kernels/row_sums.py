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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula


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
    """Sort assignments by row, stably; ``only_used`` leaves out rows that nobody reads."""
    flat = indices.reshape(-1)
    ordered, order = torch.where(flat < 0, num_rows, flat).sort(stable=True)
    rows = None
    if only_used:
        rows = torch.unique_consecutive(ordered)
        rows = rows[rows < num_rows]
        wanted = torch.cat([rows, rows.new_full((1,), num_rows)])
    else:
        wanted = torch.arange(num_rows + 1, device=flat.device)
    return Assignments(order, torch.searchsorted(ordered, wanted), rows)


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
    rows = starts.numel() - 1
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


def table_gradient(
    table: Tensor, source: Tensor, coefficients: Tensor, assignments: Assignments
) -> Tensor:
    """Give the gradient of a table, ``(N, D)``: sparse if the assignments name only used rows.

    Args:
        table: ``(N, D)``.
        source: ``(T, D)``, what each assignment adds, before it is weighted.
        coefficients: ``(T, J)``.
        assignments: from :func:`sort_by_row`.
    """
    order, starts, rows = assignments
    values = sum_rows(source, coefficients, order, starts, table.dtype)
    if rows is None:
        return values
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, table.shape, is_coalesced=True, check_invariants=False
    )


@register_flop_formula(torch.ops.moezoo.sum_rows, get_raw=True)
def _sum_flops(
    source: Tensor, coefficients: Tensor, order: Tensor, starts: Tensor, *_: Any, **__: Any
) -> int:
    """Count a multiply-add per number of each token's row that is added."""
    known = not isinstance(starts, FakeTensor) and starts.device.type != "meta"
    active = int(starts[-1]) if known else order.numel()
    return 2 * active * source.shape[1]
