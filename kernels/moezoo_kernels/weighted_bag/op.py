"""``weighted_bag`` as one opaque op with a backward op: what autograd, compile and opcheck see.

Saved for the backward are the inputs alone.

Shapes: T tokens, J rows read per token, N rows of the table, R rows of its gradient (N, or those
that were read, if it is sparse), V width.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.flops import count_active
from moezoo_kernels.row_sums import Assignments, sort_by_row, sparse_rows
from moezoo_kernels.weighted_bag import cpu, plain


@torch.library.custom_op("moezoo::weighted_bag", mutates_args=())
def forward(table: Tensor, indices: Tensor, weights: Tensor, sparse: bool, backend: str) -> Tensor:
    """Return the bags, ``(T, V)`` in the table's dtype; weights are fp32, fp64 for fp64 tables."""
    check_range(indices, table.shape[0])
    with torch.autocast(table.device.type, enabled=False):
        return _implementation(backend).forward(table, indices, weights)


@forward.register_fake
def _(table: Tensor, indices: Tensor, weights: Tensor, sparse: bool, backend: str) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1])


@torch.library.custom_op("moezoo::weighted_bag_backward", mutates_args=())
def backward(
    grad: Tensor,
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    rows: Tensor | None,
    needs_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the table's rows (R, V), if sorted for it, and of weights (T, J).

    One that is not wanted is empty.
    """
    assignments = None
    if order is not None and starts is not None:
        assignments = Assignments(order, starts, rows)
    with torch.autocast(grad.device.type, enabled=False):
        of_table, of_weights = _implementation(backend).backward(
            grad, table, indices, weights, assignments, needs_weights
        )
    return (
        grad.new_empty(0) if of_table is None else of_table,
        grad.new_empty(0) if of_weights is None else of_weights,
    )


@backward.register_fake
def _(
    grad: Tensor,
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    rows: Tensor | None,
    needs_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if starts is None else (starts.numel() - 1, table.shape[1])
    of_weights = weights.new_empty(weights.shape) if needs_weights else grad.new_empty(0)
    return table.new_empty(shape), of_weights


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # looked for when asked for, as it imports triton
        return importlib.import_module("moezoo_kernels.weighted_bag.triton_bag")
    return {"cpu": cpu, "torch": plain}[backend]


def check_range(indices: Tensor, num_rows: int) -> None:
    """Refuse an index that is not in -1 … N-1; on an accelerator the device asserts it."""
    if indices.numel() == 0:
        return
    least, most = indices.aminmax()
    if indices.device.type != "cpu":
        torch._assert_async((least >= -1) & (most < num_rows), "indices: give rows, or -1 for none")
    elif int(least) < -1 or int(most) >= num_rows:
        wrong = int(least) if int(least) < -1 else int(most)
        raise ValueError(f"indices: {wrong} is not a row; give -1 (none) … {num_rows - 1}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, indices, weights, ctx.sparse, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(table, indices, weights)


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    table, indices, weights = ctx.saved_tensors
    needs_table, _, needs_weights = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 5
    sorted_ = sort_by_row(indices, table.shape[0], ctx.sparse) if needs_table else None
    order, starts, rows = (None, None, None) if sorted_ is None else sorted_
    of_table, of_weights = backward(
        grad, table, indices, weights, order, starts, rows, needs_weights, ctx.backend
    )
    if rows is not None:
        of_table = sparse_rows(rows, of_table, table)
    kept_table = of_table if needs_table else None
    return kept_table, None, of_weights if needs_weights else None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.moezoo.weighted_bag, get_raw=True)
def _forward_flops(table: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    """Count a multiply-add per number read."""
    return 2 * count_active(indices) * table.shape[1]


@register_flop_formula(torch.ops.moezoo.weighted_bag_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    rows: Tensor | None,
    needs_weights: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Count a multiply-add per number added up, and one per number of a dot product."""
    return 2 * count_active(indices) * table.shape[1] * ((order is not None) + needs_weights)
