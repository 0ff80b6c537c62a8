"""``rank_one_experts`` in Triton, for any width: columns beyond the last are masked.

One kernel per direction takes an assignment from its rows to the weight of an output: gather, dot,
activate, weigh; a token's row is read from cache after its first assignment. What remains are sums
of rows, which are weighted bags: into tokens through the indices, into tables through the sorted
assignments. Each sum has one owner and a fixed order; there are no atomics.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.activations import ACTIVATION_CODES
from moezoo_kernels.rank_one_experts.operands import Experts, Gradients, Needs
from moezoo_kernels.row_sums import sort_by_row
from moezoo_kernels.triton_activations import share_of, slope_of
from moezoo_kernels.triton_support import on_its_device
from moezoo_kernels.weighted_bag import triton_bag

_MOST_COLUMNS = 1024


@triton.jit
def _dot(
    row: tl.tensor,
    other: tl.tensor,
    read: tl.tensor,
    width: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Multiply two rows in fp32; zero if they are not to be read."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < width) & read
        left = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(other + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total)


@triton.jit
def _answer(
    x: tl.tensor,
    u: tl.tensor,
    gate: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    inner: tl.tensor,
    coefficients: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    assignment = tl.program_id(0).to(tl.int64)
    token = assignment // choices
    index = tl.load(indices + assignment)
    read = index >= 0
    weight = tl.load(weights + assignment, mask=read, other=0.0)
    first = _dot(x + token * width, u + index * width, read, width, COLUMNS)
    if GATED:
        place = inner + assignment + token * choices
        tl.store(place + choices, first)
        weight *= first
        first = _dot(x + token * width, gate + index * width, read, width, COLUMNS)
        tl.store(place, first)
    else:
        tl.store(inner + assignment, first)
    tl.store(coefficients + assignment, weight * first * share_of(first, ACTIVATION))


@triton.jit
def _differentiate(
    grad: tl.tensor,
    v: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    inner: tl.tensor,
    coefficients: tl.tensor,
    of_weights: tl.tensor,
    of_u: tl.tensor,
    of_gate: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    assignment = tl.program_id(0).to(tl.int64)
    token = assignment // choices
    index = tl.load(indices + assignment)
    read = index >= 0
    weight = tl.load(weights + assignment, mask=read, other=0.0)
    answer = _dot(grad + token * width, v + index * width, read, width, COLUMNS)
    place = inner + assignment
    if GATED:
        place += token * choices
    first = tl.load(place)
    share = share_of(first, ACTIVATION)
    hidden = first * share
    back = weight * answer * slope_of(first, share, ACTIVATION)
    if GATED:
        linear = tl.load(place + choices)
        tl.store(of_u + assignment, weight * answer * hidden)
        tl.store(of_gate + assignment, back * linear)
        hidden *= linear
    else:
        tl.store(of_u + assignment, back)
    tl.store(coefficients + assignment, weight * hidden)
    tl.store(of_weights + assignment, answer * hidden)


@on_its_device
def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    indices: Tensor,  # (T, J)
    weights: Tensor,  # (T, J)
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and the pre-activations (T, I), the gate's half first."""
    tokens, choices = indices.shape
    indices, coefficients = indices.contiguous(), _like(indices)
    inner = coefficients.new_empty(tokens, choices * (2 if experts.gated else 1))
    if indices.numel():
        u = experts.u.contiguous()
        gate = u if experts.gate is None else experts.gate.contiguous()
        operands = (x.contiguous(), u, gate, indices, weights.contiguous(), inner, coefficients)
        _answer[(indices.numel(),)](*operands, **_constants(experts, choices))
    return triton_bag.forward(experts.v, indices, coefficients).to(x.dtype), inner


@on_its_device
def backward(
    grad: Tensor,  # (T, D)
    inner: Tensor,  # (T, I)
    x: Tensor,
    experts: Experts,
    indices: Tensor,
    weights: Tensor,
    needs: Needs,
    sparse: bool,
) -> Gradients:
    """Return the gradients, recomputing the activation from the pre-activations."""
    indices, grad = indices.contiguous(), grad.contiguous()
    coefficients, of_weights, of_u = (_like(indices) for _ in range(3))
    of_gate = _like(indices) if experts.gated else of_u
    if indices.numel():
        operands = (grad, experts.v.contiguous(), indices, weights.contiguous(), inner)
        outputs = (coefficients, of_weights, of_u, of_gate)
        constants = _constants(experts, indices.shape[1])
        _differentiate[(indices.numel(),)](*operands, *outputs, **constants)
    grad_x = grad_u = grad_v = grad_gate = rows = None
    if needs.x:
        grad_x = triton_bag.forward(experts.u, indices, of_u).to(x.dtype)
        if experts.gate is not None:
            grad_x += triton_bag.forward(experts.gate, indices, of_gate).to(x.dtype)
    if needs.tables:
        assignments = sort_by_row(indices, experts.u.shape[0], sparse)
        rows = assignments.rows

        def of_table(table: Tensor, source: Tensor, amounts: Tensor) -> Tensor | None:
            return triton_bag.backward(source, table, indices, amounts, assignments, False)[0]

        grad_u = of_table(experts.u, x, of_u) if needs.u else None
        grad_v = of_table(experts.v, grad, coefficients) if needs.v else None
        if experts.gate is not None and needs.gate:
            grad_gate = of_table(experts.gate, x, of_gate)
    grad_weights = of_weights if needs.weights else None
    return Gradients(grad_x, grad_u, grad_v, grad_gate, grad_weights, rows)


def _like(indices: Tensor) -> Tensor:
    """Make room for a number per assignment."""
    return torch.empty(indices.shape, dtype=torch.float32, device=indices.device)


def _constants(experts: Experts, choices: int) -> dict[str, int | bool]:
    """Return what a kernel is compiled for; nothing of it is tuned, as it orders the dot's sum."""
    width = experts.u.shape[1]
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(max(1, width)))
    return {
        "width": width,
        "choices": choices,
        "ACTIVATION": ACTIVATION_CODES[experts.activation],
        "GATED": experts.gated,
        "COLUMNS": columns,
        "num_warps": max(1, columns // 256),
    }
