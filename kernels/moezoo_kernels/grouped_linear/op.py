"""The products of :mod:`moezoo_kernels.grouped_linear` as opaque ops, and what is behind them.

Shapes: T tokens, K choices, E experts, A and B widths, N rows in expert order, of which those from
``ends[-1]`` on are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.flops import has_data
from moezoo_kernels.grouped_linear import by_expert, by_stage, whole
from moezoo_kernels.grouped_mlp.assignments import Assignments, sort_by_expert
from moezoo_kernels.grouped_mlp.stages import is_padding
from moezoo_kernels.grouped_products import is_whole
from moezoo_kernels.layouts import like


class Operation(NamedTuple):
    """An op as autograd, compilers and FLOP counters see it, and the function it calls."""

    opaque: Callable[..., Any]
    plain: Callable[..., Any]


# On a CPU, below this many rows per expert, a loop over experts costs more than fresh buffers do,
# unless all are run by one call.
_FEW_ROWS_PER_EXPERT = 64


def _implementation(w: Tensor, order: Tensor) -> Any:
    if w.device.type == "cpu" and is_whole(w.dtype):
        return whole
    many = order.shape[0] >= _FEW_ROWS_PER_EXPERT * w.shape[0]
    return by_expert if w.device.type == "cpu" and many else by_stage


def _sort(indices: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the order (N,) and the group ends (E,)."""
    found = sort_by_expert(indices, num_experts, rows)
    return found.order, found.ends


def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, order: Tensor, ends: Tensor, choices: int
) -> Tensor:
    """Return the products (N, B); without ``choices``, ``x`` has the rows themselves."""
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _implementation(w, order).linear(
            x, w, bias, Assignments(order, ends, choices)
        )
    return found


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    order: Tensor,
    ends: Tensor,
    choices: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, w and bias; one that is not needed is empty."""
    assignments = Assignments(order, ends, choices)
    with torch.autocast(x.device.type, enabled=False):
        run = _implementation(w, order).linear_backward
        of_x, of_w, of_bias = _whole(x, run(grad, x, w, bias, assignments, needs))
    return of_x, of_w, of_bias


def _linear_sum(
    rows: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    """Return the sums (T, B)."""
    assignments = Assignments(order, ends, weights.shape[1])
    with torch.autocast(rows.device.type, enabled=False):
        found: Tensor = _implementation(w, order).linear_sum(rows, w, bias, weights, assignments)
    return found


def _linear_sum_backward(
    grad: Tensor,
    rows: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, w, bias and weights; one that is not needed is empty."""
    assignments = Assignments(order, ends, weights.shape[1])
    with torch.autocast(rows.device.type, enabled=False):
        run = _implementation(w, order).linear_sum_backward
        found = run(grad, rows, w, bias, weights, assignments, needs)
        of_rows, of_w, of_bias, of_weights = _whole(rows, found)
    return of_rows, of_w, of_bias, of_weights


def _whole(x: Tensor, gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [x.new_empty(0) if g is None else g for g in gradients]


def _op(name: str, function: Callable[..., Any]) -> Any:
    return torch.library.custom_op(f"moezoo::{name}", function, mutates_args=())


_sort_op = _op("sort_by_expert", _sort)
_linear_op = _op("grouped_linear", _linear)
_linear_backward_op = _op("grouped_linear_backward", _linear_backward)
_sum_op = _op("grouped_linear_sum", _linear_sum)
_sum_backward_op = _op("grouped_linear_sum_backward", _linear_sum_backward)


@_sort_op.register_fake
def _(indices: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(rows), indices.new_empty(num_experts)


@_linear_op.register_fake
def _(
    x: Tensor, w: Tensor, bias: Tensor | None, order: Tensor, ends: Tensor, choices: int
) -> Tensor:
    return x.new_empty(order.shape[0], w.shape[1])


@_sum_op.register_fake
def _(
    rows: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    return rows.new_empty(weights.shape[0], w.shape[1])


def _fakes(x: Tensor, tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        like(t) if t is not None and needed else x.new_empty(0)
        for t, needed in zip(tensors, needs, strict=True)
    )


@_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    order: Tensor,
    ends: Tensor,
    choices: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _fakes(x, (x, w, bias), needs)


@_sum_backward_op.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _fakes(rows, (rows, w, bias, weights), needs)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.choices = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = _linear_backward_op(grad, *ctx.saved_tensors, ctx.choices, needs)
    return (*_needed(found, needs), None, None, None)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = _sum_backward_op(grad, *ctx.saved_tensors, needs)
    return (*_needed(found, needs), None, None)


def _needed(found: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [g if needed else None for g, needed in zip(found, needs, strict=True)]


_linear_op.register_autograd(_differentiate_linear, setup_context=_save_linear)
_sum_op.register_autograd(_differentiate_sum, setup_context=_save_sum)

sort = Operation(_sort_op, _sort)
linear = Operation(_linear_op, _linear)
linear_sum = Operation(_sum_op, _linear_sum)


def slots(order: Tensor, ends: Tensor, num_slots: int) -> Tensor:
    """Return the slot of each row, ``(N,)``; ``num_slots`` for padding."""
    return torch.where(is_padding(Assignments(order, ends, 1)), num_slots, order)


def _active(order: Tensor, ends: Tensor) -> int:
    return int(ends[-1]) if has_data(ends) and ends.numel() else order.shape[0]


@register_flop_formula(
    [torch.ops.moezoo.grouped_linear, torch.ops.moezoo.grouped_linear_sum], get_raw=True
)
def _forward_flops(x: Tensor, w: Tensor, *others: Any, out_val: Any = None, **_: Any) -> int:
    """Count the product of the rows that are no padding."""
    order, ends = _order_and_ends(others)
    return 2 * _active(order, ends) * w[0].numel()


@register_flop_formula(
    [
        torch.ops.moezoo.grouped_linear_backward,
        torch.ops.moezoo.grouped_linear_sum_backward,
    ],
    get_raw=True,
)
def _backward_flops(
    grad: Tensor, x: Tensor, w: Tensor, *others: Any, out_val: Any = None, **_: Any
) -> int:
    """Count the products for the gradients of rows and matrix; weights take that of the rows."""
    order, ends = _order_and_ends(others)
    of_x, of_w, _, *of_weights = others[-1]
    return 2 * _active(order, ends) * w[0].numel() * (int(of_x or any(of_weights)) + int(of_w))


def _order_and_ends(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Find order and ends, the last two tensors of integers."""
    order, ends = (t for t in arguments if isinstance(t, Tensor) and not t.dtype.is_floating_point)
    return order, ends
