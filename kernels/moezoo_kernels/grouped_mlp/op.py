"""``grouped_mlp`` as one opaque op with a backward op: what autograd, compile and opcheck see.

Forward returns what backward wants besides its inputs (pre-activations and index metadata), because
a custom op can save nothing else. Everything else is recomputed: the activation from the
pre-activations, and the router's gradient as ``<dA', A>`` with A the hidden activations and
``dA' = dO W_out`` their gradient before the router weight, so the experts' outputs are not saved.

Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F,
N = ``rows``: room for that many assignments.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels import native
from moezoo_kernels.activations import GLUOptions
from moezoo_kernels.flops import count_active, has_data
from moezoo_kernels.grouped_mlp import cpu, grouped_mm
from moezoo_kernels.grouped_mlp.assignments import Assignments, check, sort_by_expert
from moezoo_kernels.grouped_mlp.operands import Experts, Needs, Unit
from moezoo_kernels.layouts import like


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # looked for when asked for, as it imports triton
        return importlib.import_module("moezoo_kernels.grouped_mlp.triton_backend")
    return {"cpu": cpu, "grouped_mm": grouped_mm}[backend]


def _unit(activation: str, gated: bool, glu: Sequence[float], interleaved: bool) -> Unit:
    return Unit(activation, gated, GLUOptions.decode(glu), interleaved)


@torch.library.custom_op("moezoo::grouped_mlp", mutates_args=())
def forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    rows: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, D), pre-activations (N, I), row order (N,) and group ends (E,).

    ``glu`` is what :meth:`GLUOptions.encode` returns, as an op takes numbers only.
    Without ``keep`` no backward can follow, and all but the output are empty.
    """
    experts = Experts(w_in, w_out, bias_in, bias_out, _unit(activation, gated, glu, interleaved))
    with torch.autocast(x.device.type, enabled=False):
        few = backend == "cpu" and native.unusable(x.device, x.dtype) is None
        few = few and cpu.is_few(indices.numel(), w_in.shape[0], x.dtype)
        few = few and cpu.lie_for_few(w_in, w_out)
        if few and not keep:
            check(indices, w_in.shape[0], rows)
            output, _ = cpu.few(x, experts, indices, weights)
        else:
            assignments = sort_by_expert(indices, w_in.shape[0], rows)
            if few:
                output, by_slot = cpu.few(x, experts, indices, weights)
                inner = by_slot.index_select(0, assignments.order).to(x.dtype)
            else:
                run = _implementation(backend).forward
                output, inner = run(x, experts, weights, assignments, keep)
    if keep:
        return output, inner, assignments.order, assignments.ends
    return output, x.new_empty(0, w_in.shape[1]), indices.new_empty(0), indices.new_empty(0)


@forward.register_fake
def _(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    rows: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_experts, inner_width, _ = w_in.shape
    inner = x.new_empty(rows if keep else 0, inner_width)
    order = indices.new_empty(rows if keep else 0)
    ends = indices.new_empty(num_experts if keep else 0)
    return x.new_empty(x.shape), inner, order, ends


@torch.library.custom_op("moezoo::grouped_mlp_backward", mutates_args=())
def backward(
    grad: Tensor,
    inner: Tensor,
    order: Tensor,
    ends: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the order of :class:`Needs`; one that is not needed is empty."""
    experts = Experts(w_in, w_out, bias_in, bias_out, _unit(activation, gated, glu, interleaved))
    assignments = Assignments(order, ends, weights.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        gradients = _implementation(backend).backward(
            grad, inner, x, experts, weights, assignments, Needs(*needs)
        )
    of_x, of_w_in, of_w_out, *others = (x.new_empty(0) if g is None else g for g in gradients)
    of_weights, of_bias_in, of_bias_out = others
    return of_x, of_w_in, of_w_out, of_weights, of_bias_in, of_bias_out


@backward.register_fake
def _(
    grad: Tensor,
    inner: Tensor,
    order: Tensor,
    ends: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, w_in, w_out, weights, bias_in, bias_out)
    return tuple(
        like(t) if t is not None and needed else x.new_empty(0)
        for t, needed in zip(inputs, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, w_out, _, weights, bias_in, bias_out, *unit, _, _, backend = inputs
    _, inner, order, ends = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inner, order, ends)
    ctx.save_for_backward(inner, order, ends, x, w_in, w_out, weights, bias_in, bias_out)
    ctx.options = (unit, backend)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inner, order, ends, x, w_in, w_out, weights, bias_in, bias_out = ctx.saved_tensors
    unit, backend = ctx.options
    x_needs, w_in_needs, w_out_needs, _, *other_needs = ctx.needs_input_grad[:7]
    needs = (x_needs, w_in_needs, w_out_needs, *other_needs)
    gradients: Sequence[Tensor | None] = [None] * len(needs)
    if grad is not None:
        saved = (inner, order, ends, x, w_in, w_out, weights, bias_in, bias_out)
        computed = backward(grad, *saved, *unit, needs, backend)
        gradients = [g if needed else None for g, needed in zip(computed, needs, strict=True)]
    of_x, of_w_in, of_w_out, of_weights, of_bias_in, of_bias_out = gradients
    options = (None,) * 7
    return of_x, of_w_in, of_w_out, None, of_weights, of_bias_in, of_bias_out, *options


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.moezoo.grouped_mlp, get_raw=True)
def _forward_flops(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    rows: int,
    *_: Any,
    out_val: Any = None,
) -> int:
    """Count the two products of the active rows; without data, of all there is room for."""
    return 2 * count_active(indices, otherwise=rows) * (w_in[0].numel() + w_out[0].numel())


@register_flop_formula(torch.ops.moezoo.grouped_mlp_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    inner: Tensor,
    order: Tensor,
    ends: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    glu: Sequence[float],
    interleaved: bool,
    needs: Sequence[bool],
    *_: Any,
    out_val: Any = None,
) -> int:
    """Count the products for the gradients that are needed: of x, of w_in, of w_out and of A."""
    active = int(ends[-1]) if has_data(ends) and ends.numel() else order.numel()
    wanted = Needs(*needs)
    in_products = wanted.x + wanted.w_in
    out_products = 1 + wanted.w_out
    per_row = in_products * w_in[0].numel() + out_products * w_out[0].numel()
    return 2 * active * per_row
