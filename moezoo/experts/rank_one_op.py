"""``rank_one_experts`` as one opaque op with its backward ops: what autograd and compile see.

Written out, a token's experts are three gathers of ``(T, J, D)``: far more than the layer's
parameters for one long batch. Here only the dot products ever gather rows, for one chunk of tokens
at a time; every weighted sum of rows is an embedding bag, which reads them where they are. Saved
for the backward are the inputs and the pre-activations ``(T, J)``.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.activations import activate, activate_backward
from moezoo_kernels.row_sums import sort_by_row, table_gradient

# What one chunk of gathered rows may take: about a core's cache, or enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 1 << 21}
_DEFAULT_CHUNK_BYTES = 1 << 26


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
) -> tuple[Tensor, Tensor]:
    """Give the output (T, D) and the pre-activations (T, I), the gate's half first.

    With ``sparse`` the tables' gradients are sparse tensors of the rows that were read.
    """
    with torch.autocast(x.device.type, enabled=False):
        inner = _dots(x, u, indices, weights.dtype)
        if gate is not None:
            inner = torch.cat([_dots(x, gate, indices, weights.dtype), inner], dim=-1)
        coefficients = weights * activate(inner, activation, gate is not None)
        output = _bags(v, indices, coefficients).to(x.dtype)
    return output, inner


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
) -> tuple[Tensor, Tensor]:
    halves = 1 if gate is None else 2
    return x.new_empty(x.shape), weights.new_empty(weights.shape[0], halves * weights.shape[1])


@torch.library.custom_op("moezoo::rank_one_experts_backward", mutates_args=())
def backward(
    grad: Tensor,
    inner: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of x (T, D), if needed, of weights (T, J) and of inner (T, I).

    The fourth output is what ``v`` was multiplied with, (T, J): with it the gradient of ``v`` is a
    sum of rows of ``grad``, as those of ``u`` and ``gate`` are sums of rows of ``x``.
    """
    with torch.autocast(grad.device.type, enabled=False):
        answers = _dots(grad, v, indices, weights.dtype)
        activated, grad_inner = activate_backward(
            answers * weights, inner, activation, gate is not None
        )
        grad_x = grad.new_empty(0)
        if needs_x:
            of_gate, of_u = _halves(grad_inner, gate)
            grad_x = _bags(u, indices, of_u)
            if gate is not None:
                grad_x = grad_x + _bags(gate, indices, of_gate)
            grad_x = grad_x.to(grad.dtype)
        grad_weights = (answers * activated).masked_fill_(indices < 0, 0.0)
    return grad_x, grad_weights, grad_inner, activated.mul_(weights)


@backward.register_fake
def _(
    grad: Tensor,
    inner: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = grad.new_empty(grad.shape if needs_x else (0,))
    like_weights = (torch.empty_like(weights, memory_format=torch.contiguous_format) for _ in "wv")
    return grad_x, next(like_weights), torch.empty_like(inner), next(like_weights)


def _dots(x: Tensor, table: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each token with the table's rows that its indices name: (T, J), of ``dtype``."""
    (tokens, choices), width = indices.shape, table.shape[1]
    dots = torch.empty(tokens, choices, dtype=dtype, device=x.device)
    budget = _CHUNK_BYTES.get(x.device.type, _DEFAULT_CHUNK_BYTES)
    chunk = min(tokens, max(1, budget // (choices * width * table.element_size())))
    rows = table.new_empty(chunk * choices, width)
    for start in range(0, tokens, max(chunk, 1)):
        index = indices[start : start + chunk].clamp(min=0).reshape(-1)
        gathered = rows[: index.numel()]
        torch.index_select(table, 0, index, out=gathered)
        column = x[start : start + chunk].to(table.dtype).unsqueeze(-1)
        dots[start : start + chunk] = (gathered.view(-1, choices, width) @ column).squeeze(-1)
    return dots


def _bags(table: Tensor, indices: Tensor, coefficients: Tensor) -> Tensor:
    """Sum each token's rows of the table, weighted; index -1 adds nothing: (T, D)."""
    if indices.shape[0] == 0:
        return table.new_zeros(0, table.shape[1])
    kept = coefficients.masked_fill(indices < 0, 0.0).to(table.dtype)
    return F.embedding_bag(indices.clamp(min=0), table, mode="sum", per_sample_weights=kept)


def _halves(inner: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split (T, I) into the gate's half and the linear one; without a gate both are the whole."""
    if gate is None:
        return inner, inner
    of_gate, of_u = inner.chunk(2, dim=-1)
    return of_gate, of_u


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, sparse = inputs
    inner = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inner)
    ctx.save_for_backward(inner, *tensors)
    ctx.activation, ctx.sparse = activation, sparse


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    inner, x, u, v, gate, indices, weights = ctx.saved_tensors
    needs_x, needs_u, needs_v, needs_gate, _, needs_weights = ctx.needs_input_grad[:6]
    if grad is None:
        return (None,) * 8
    grad_x, grad_weights, grad_inner, of_v = backward(
        grad, inner, u, v, gate, indices, weights, ctx.activation, needs_x
    )
    of_gate, of_u = _halves(grad_inner, gate)
    wanted = [(u, x, of_u, needs_u), (v, grad, of_v, needs_v), (gate, x, of_gate, needs_gate)]
    grads: list[Tensor | None] = [None] * len(wanted)
    if needs_u or needs_v or needs_gate:
        assignments = sort_by_row(indices, v.shape[0], ctx.sparse)
        grads = [
            table_gradient(table, source, coefficients.contiguous(), assignments)
            if needed
            else None
            for table, source, coefficients, needed in wanted
        ]
    kept_x = grad_x if needs_x else None
    return kept_x, *grads, None, grad_weights if needs_weights else None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


def _active(indices: Tensor) -> int:
    """Count the assignments that are not -1; without data, all of them."""
    known = not isinstance(indices, FakeTensor) and indices.device.type != "meta"
    return int(indices.ge(0).sum()) if known else indices.numel()


@register_flop_formula(torch.ops.moezoo.rank_one_experts, get_raw=True)
def _forward_flops(
    x: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, indices: Tensor, *_: Any, **__: Any
) -> int:
    """Count a multiply-add per number of each row read: of u, v and gate."""
    return 2 * _active(indices) * x.shape[1] * (2 if gate is None else 3)


@register_flop_formula(torch.ops.moezoo.rank_one_experts_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    inner: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
    needs_x: bool,
    **_: Any,
) -> int:
    """Count a multiply-add per number of each row read: of v, and of u and gate for x."""
    rows = 1 + needs_x * (1 if gate is None else 2)
    return 2 * _active(indices) * grad.shape[1] * rows
