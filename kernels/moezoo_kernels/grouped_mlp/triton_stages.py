"""The stages of ``grouped_mlp`` in Triton: the activation, its recomputation, and the combine.

Shapes: N rows in expert order, T tokens, K choices, F hidden width, I = 2 F if gated else F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Unit
from moezoo_kernels.grouped_mlp.stages import HiddenGradients, Rows, Stages, is_padding
from moezoo_kernels.grouped_mlp.triton_matmul import matmul, outer
from moezoo_kernels.triton_activations import (
    bounded_gate,
    bounded_up,
    share_of,
    slope_of,
    tanh_share,
    tanh_slope,
)
from moezoo_kernels.weighted_bag import triton_bag

_MOST_COLUMNS = 1024


@triton.jit
def _gate_slope(
    gate: tl.tensor,
    share: tl.tensor,
    ACTIVATION: tl.constexpr,
    BOUND: tl.constexpr,
    GATE: tl.constexpr,
) -> tl.tensor:
    if BOUND == 3:
        capped = gate * tanh_share(gate / GATE)
        return share * (tanh_slope(gate / GATE) + capped * (1.0 - share))
    slope = slope_of(gate, share, ACTIVATION)
    if BOUND == 2:
        slope = tl.where(gate * share > GATE, 0.0, slope)
    return slope


@triton.jit
def _up_slope(up: tl.tensor, BOUND: tl.constexpr, UP: tl.constexpr) -> tl.tensor:
    if BOUND == 3:
        return tanh_slope(up / UP)
    return tl.where(tl.abs(up) > UP, 0.0, 1.0)


@triton.jit
def _activate(
    inner: tl.tensor,
    hidden: tl.tensor,
    width: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BOUND: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first = inner + row * width * (2 if GATED else 1)
    gates = columns * 2 if INTERLEAVED else columns
    gate = tl.load(first + gates, mask=inside, other=0.0).to(tl.float32)
    if BOUND == 1:
        gate = tl.where(gate > GATE, GATE, gate)
    value = bounded_gate(gate, share_of(gate, ACTIVATION), BOUND, GATE)
    if GATED:
        ups = gates + 1 if INTERLEAVED else width + columns
        up = tl.load(first + ups, mask=inside, other=0.0).to(tl.float32)
        value *= bounded_up(up, BOUND, UP, SHIFT)
    tl.store(hidden + row * width + columns, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    grad: tl.tensor,
    inner: tl.tensor,
    weights: tl.tensor,
    weighted: tl.tensor,
    grad_inner: tl.tensor,
    grad_weights: tl.tensor,
    width: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BOUND: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    offset = row * width * (2 if GATED else 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        g = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        gates = offset + (columns * 2 if INTERLEAVED else columns)
        raw = tl.load(inner + gates, mask=inside, other=0.0).to(tl.float32)
        gate = raw
        if BOUND == 1:
            gate = tl.where(raw > GATE, GATE, raw)
        share = share_of(gate, ACTIVATION)
        value = bounded_gate(gate, share, BOUND, GATE)
        of_gate = weight * g * _gate_slope(gate, share, ACTIVATION, BOUND, GATE)
        if BOUND == 1:
            of_gate = tl.where(raw > GATE, 0.0, of_gate)
        if GATED:
            ups = gates + 1 if INTERLEAVED else gates + width
            up = tl.load(inner + ups, mask=inside, other=0.0).to(tl.float32)
            of_up = weight * g * value
            if BOUND != 0:
                of_up *= _up_slope(up, BOUND, UP)
            tl.store(grad_inner + ups, of_up.to(grad_inner.dtype.element_ty), mask=inside)
            factor = bounded_up(up, BOUND, UP, SHIFT)
            of_gate *= factor
            value *= factor
        tl.store(grad_inner + gates, of_gate.to(grad_inner.dtype.element_ty), mask=inside)
        tl.store(
            weighted + row * width + columns,
            (weight * value).to(weighted.dtype.element_ty),
            mask=inside,
        )
        total += g * value
    tl.store(grad_weights + row, tl.sum(total))


def activate(inner: Tensor, unit: Unit) -> Tensor:
    """Return the hidden activations (N, F) of pre-activations (N, I)."""
    rows, inner_width = inner.shape
    width = inner_width // 2 if unit.gated else inner_width
    hidden = inner.new_empty(rows, width)
    if hidden.numel():
        columns = _columns(width)
        _activate[(rows, triton.cdiv(width, columns))](
            inner,
            hidden,
            width,
            *unit.encode(),
            COLUMNS=columns,
        )
    return hidden


def activate_backward(grad: Tensor, inner: Tensor, weights: Tensor, unit: Unit) -> HiddenGradients:
    """Recompute the activation and give its gradients, in one pass over each row."""
    rows, width = grad.shape
    found = HiddenGradients(
        torch.empty_like(grad), torch.empty_like(inner), torch.zeros_like(weights)
    )
    if grad.numel():
        _activate_backward[(rows,)](
            grad,
            inner,
            weights,
            *found,
            width,
            *unit.encode(),
            COLUMNS=_columns(width),
        )
    return found


def sum_by_token(
    rows_ND: Tensor, weights: Tensor | None, assignments: Assignments, num_tokens: int
) -> Tensor:
    """Sum each token's rows, in the order of its choices: bags of the rows, found by slot."""
    order, choices = assignments.order, assignments.choices
    num_slots = num_tokens * choices
    rows = torch.arange(order.numel(), device=order.device)
    slots = torch.where(is_padding(assignments), num_slots, order)
    found = order.new_full((num_slots + 1,), -1).index_copy_(0, slots, rows)[:num_slots]
    if weights is None:
        weights = rows_ND.new_ones(num_slots, dtype=torch.float32)
    by_token = (num_tokens, choices)
    return triton_bag.forward(rows_ND, found.view(by_token), weights.float().view(by_token))


def _columns(width: int) -> int:
    return min(_MOST_COLUMNS, triton.next_power_of_2(width))


STAGES = Stages(
    gather=Rows,
    matmul=matmul,
    outer=outer,
    activate=activate,
    activate_backward=activate_backward,
    sum_by_token=sum_by_token,
)
