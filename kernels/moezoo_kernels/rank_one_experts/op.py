"""``rank_one_experts`` as one opaque op with a backward op: what autograd and compile see.

Written out, a token's experts are three gathers of ``(T, J, D)``: far more than the layer's
parameters for one long batch. No backend makes such a tensor. Saved for the backward are the
inputs and the pre-activations ``(T, I)``.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.flops import count_active
from moezoo_kernels.rank_one_experts import cpu, plain_torch
from moezoo_kernels.rank_one_experts.operands import Experts, Needs
from moezoo_kernels.row_sums import sparse_rows
from moezoo_kernels.weighted_bag.op import check_range


@torch.library.custom_op("moezoo::rank_one_experts", mutates_args=())
def forward(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and the pre-activations (T, I), the gate's half first.

    With ``sparse`` the tables' gradients are sparse tensors of the rows that were read.
    """
    check_range(indices, u.shape[0])
    experts = Experts(u, v, gate, activation)
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(backend).forward(x, experts, indices, weights)


@forward.register_fake
def _(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    parts = 1 if gate is None else 2
    return x.new_empty(x.shape), weights.new_empty(weights.shape[0], parts * weights.shape[1])


@torch.library.custom_op("moezoo::rank_one_experts_backward", mutates_args=())
def backward(
    grad: Tensor,
    inner: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    sparse: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the order of :class:`Needs`, then the rows of the tables' gradients.

    What is not needed is empty. Without ``sparse`` the tables' gradients have all rows, and the
    last output is empty.
    """
    experts = Experts(u, v, gate, activation)
    with torch.autocast(x.device.type, enabled=False):
        gradients = _implementation(backend).backward(
            grad, inner, x, experts, indices, weights, Needs(*needs), sparse
        )
    of_x, of_u, of_v, of_gate, of_weights = (
        x.new_empty(0) if g is None else g for g in gradients[:-1]
    )
    rows = indices.new_empty(0) if gradients.rows is None else gradients.rows
    return of_x, of_u, of_v, of_gate, of_weights, rows


@backward.register_fake
def _(
    grad: Tensor,
    inner: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    sparse: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    rows = torch.library.get_ctx().new_dynamic_size() if sparse and any(needs[1:4]) else 0

    def like(tensor: Tensor | None, needed: bool, table: bool) -> Tensor:
        if tensor is None or not needed:
            return x.new_empty(0)
        length = rows if sparse and table else tensor.shape[0]
        return tensor.new_empty(length, tensor.shape[1])

    tensors, tables = (x, u, v, gate, weights), (False, True, True, True, False)
    gradients = (like(*each) for each in zip(tensors, needs, tables, strict=True))
    return (*gradients, indices.new_empty(rows))


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # looked for when asked for, as it imports triton
        return importlib.import_module("moezoo_kernels.rank_one_experts.triton_rank_one")
    return {"cpu": cpu, "torch": plain_torch}[backend]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, sparse, backend = inputs
    inner = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inner)
    ctx.save_for_backward(inner, *tensors)
    ctx.options = (activation, sparse, backend)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    inner, x, u, v, gate, indices, weights = ctx.saved_tensors
    activation, sparse, backend = ctx.options
    *of_operands, _, of_weights = ctx.needs_input_grad[:6]
    needs = (*of_operands, of_weights)
    if grad is None:
        return (None,) * 9
    operands = (x, u, v, gate, indices, weights)
    *computed, rows = backward(grad, inner, *operands, activation, sparse, needs, backend)
    grads = [g if needed else None for g, needed in zip(computed, needs, strict=True)]
    if sparse:
        for i in (1, 2, 3):
            values = grads[i]
            grads[i] = None if values is None else sparse_rows(rows, values, u)
    *of_operands, of_weights = grads
    return *of_operands, None, of_weights, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.moezoo.rank_one_experts, get_raw=True)
def _forward_flops(
    x: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, indices: Tensor, *_: Any, **__: Any
) -> int:
    """Count a multiply-add per number of each row read: of u, v and gate."""
    return 2 * count_active(indices) * x.shape[1] * (2 if gate is None else 3)


@register_flop_formula(torch.ops.moezoo.rank_one_experts_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    inner: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    sparse: bool,
    needs: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Count a multiply-add per number of each row read or added to.

    Of v for the pre-activations' gradients, of u and gate for x, and of each table's gradient.
    """
    wanted = Needs(*needs)
    gated = gate is not None
    rows = 1 + wanted.x * (1 + gated) + wanted.u + wanted.v + (gated and wanted.gate)
    return 2 * count_active(indices) * x.shape[1] * rows
