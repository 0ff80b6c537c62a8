"""``selective_mlp`` in Triton: two kernels, whose loads are masked where nothing is kept.

A row of memory that is masked costs no traffic: of gate and down these are columns, where the
matrices lie column by column, and of up the rows of neurons that do not go on. Each program is a
token's, and sums in an order that its constants fix. Nothing here was timed.

Shapes: T tokens, D width, M hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.activations import ACTIVATION_CODES
from moezoo_kernels.selective_mlp.thresholds import Thresholds, count_kept, keeps
from moezoo_kernels.triton_activations import bounded_gate, bounded_up, share_of
from moezoo_kernels.triton_support import on_its_device

_UNITS = 64
_DEPTH = 32


@triton.jit
def _passes(values: tl.tensor, least: tl.tensor, everything: tl.tensor) -> tl.tensor:
    """Return which numbers exceed the thresholds or are none, or all of them."""
    return tl.where(everything, 0, (tl.abs(values) <= least).to(tl.int32)) == 0


@triton.jit
def _product(
    x: tl.tensor,
    thresholds: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    wanted: tl.tensor,
    everything: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    depth: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """Return the products of wanted rows with what is kept of x, rounded to its dtype."""
    totals = tl.zeros(rows.shape, tl.float32)
    for start in range(0, depth, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        used = columns < depth
        values = tl.load(x + columns, mask=used, other=0.0).to(tl.float32)
        if HAS_THRESHOLDS:
            least = tl.load(thresholds + columns, mask=used, other=0.0)
            used = used & _passes(values, least, everything)
        at = weight + rows[:, None] * stride_row + columns[None, :] * stride_column
        tile = tl.load(at, mask=wanted[:, None] & used[None, :], other=0.0).to(tl.float32)
        totals += tl.sum(tile * tl.where(used, values, 0.0)[None, :], axis=1)
    if HAS_BIAS:
        totals += tl.load(bias + rows, mask=wanted, other=0.0).to(tl.float32)
    return totals.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _hide(
    x: tl.tensor,
    w_gate: tl.tensor,
    w_up: tl.tensor,
    bias_gate: tl.tensor,
    bias_up: tl.tensor,
    least_input: tl.tensor,
    least_up_input: tl.tensor,
    least_gate: tl.tensor,
    dense: tl.tensor,
    hidden: tl.tensor,
    gates: tl.tensor,
    stride_gate: tl.tensor,
    stride_gate_column: tl.tensor,
    stride_up: tl.tensor,
    stride_up_column: tl.tensor,
    width: tl.constexpr,
    units: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS_GATE: tl.constexpr,
    HAS_BIAS_UP: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_UP_INPUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BOUND: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Write one token's hidden units, zero where a neuron does not go on, and which did."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = rows < units
    own = x + token * width
    kind = x.dtype.element_ty
    everything = token < 0
    if HAS_DENSE:
        everything = tl.load(dense + token) != 0
    if GATED:
        inner = _product(
            own,
            least_input,
            w_gate,
            bias_gate,
            rows,
            inside,
            everything,
            stride_gate,
            stride_gate_column,
            width,
            HAS_INPUT,
            HAS_BIAS_GATE,
            DEPTH,
        )
    else:
        inner = _product(
            own,
            least_input,
            w_up,
            bias_up,
            rows,
            inside,
            everything,
            stride_up,
            stride_up_column,
            width,
            HAS_INPUT,
            HAS_BIAS_UP,
            DEPTH,
        )
    if BOUND == 1:
        inner = tl.where(inner > GATE, GATE, inner)
    value = bounded_gate(inner, share_of(inner, ACTIVATION), BOUND, GATE)
    value = value.to(kind).to(tl.float32)
    goes_on = inside
    if HAS_GATE:
        least = tl.load(least_gate + rows, mask=inside, other=0.0)
        goes_on = inside & _passes(value, least, everything)
    tl.store(gates + token * units + rows, goes_on.to(tl.int8), mask=inside)
    if GATED:
        factor = _product(
            own,
            least_up_input,
            w_up,
            bias_up,
            rows,
            goes_on,
            everything,
            stride_up,
            stride_up_column,
            width,
            HAS_UP_INPUT,
            HAS_BIAS_UP,
            DEPTH,
        )
        factor = bounded_up(factor, BOUND, UP, SHIFT).to(kind).to(tl.float32)
        value = (value * factor).to(kind).to(tl.float32)
    value = tl.where(goes_on, value, 0.0)
    tl.store(hidden + token * units + rows, value.to(kind), mask=inside)


@triton.jit
def _answer(
    hidden: tl.tensor,
    w_down: tl.tensor,
    bias_down: tl.tensor,
    least_hidden: tl.tensor,
    dense: tl.tensor,
    output: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    width: tl.constexpr,
    units: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Write a part of one token's output."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = rows < width
    everything = token < 0
    if HAS_DENSE:
        everything = tl.load(dense + token) != 0
    found = _product(
        hidden + token * units,
        least_hidden,
        w_down,
        bias_down,
        rows,
        inside,
        everything,
        stride_row,
        stride_column,
        units,
        HAS_HIDDEN,
        HAS_BIAS,
        DEPTH,
    )
    tl.store(output + token * width + rows, found.to(output.dtype.element_ty), mask=inside)


@on_its_device
def selective_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    thresholds: Thresholds,
    biases: Sequence[Tensor | None],
    activation: str,
    glu: Sequence[float],
    dense: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output (T, D), in ``x``'s dtype, and counts (T, 4)."""
    x = x.contiguous()
    (tokens, width), units = x.shape, w_up.shape[0]
    output, hidden = torch.empty_like(x), x.new_empty(tokens, units)
    gates = torch.empty(tokens, units, dtype=torch.int8, device=x.device)
    bias_gate, bias_up, bias_down = (None if t is None else t.contiguous() for t in biases)
    least = [None if t is None else t.contiguous() for t in thresholds]
    everything = None if dense is None else dense.contiguous().view(torch.int8)

    def or_x(*tensors: Tensor | None) -> list[Tensor]:
        return [x if t is None else t for t in tensors]  # which is not read

    gate = w_up if w_gate is None else w_gate
    kind, *bounds = glu
    if hidden.numel():
        _hide[(tokens, triton.cdiv(units, _UNITS))](
            *(x, gate, w_up, *or_x(bias_gate, bias_up, *least[:3], everything), hidden, gates),
            *(*gate.stride(), *w_up.stride(), width, units),
            GATED=w_gate is not None,
            HAS_BIAS_GATE=bias_gate is not None,
            HAS_BIAS_UP=bias_up is not None,
            HAS_INPUT=least[0] is not None,
            HAS_UP_INPUT=least[1] is not None,
            HAS_GATE=least[2] is not None,
            HAS_DENSE=dense is not None,
            ACTIVATION=ACTIVATION_CODES[activation],
            BOUND=int(kind),
            **dict(zip(("GATE", "UP", "SHIFT"), map(float, bounds), strict=True)),
            UNITS=_UNITS,
            DEPTH=_DEPTH,
        )
    if output.numel():
        _answer[(tokens, triton.cdiv(width, _UNITS))](
            *(hidden, w_down, *or_x(bias_down, least[3], everything), output),
            *(*w_down.stride(), width, units),
            HAS_BIAS=bias_down is not None,
            HAS_HIDDEN=least[3] is not None,
            HAS_DENSE=dense is not None,
            UNITS=_UNITS,
            DEPTH=_DEPTH,
        )
    of_input = count_kept(keeps(x, thresholds.input, dense), x)
    of_up = torch.zeros_like(of_input)
    if w_gate is not None:
        of_up = count_kept(keeps(x, thresholds.up_input, dense), x)
    of_hidden = count_kept(keeps(hidden, thresholds.hidden, dense), hidden)
    return output, torch.stack((of_input, of_up, gates.sum(1), of_hidden), dim=1)
