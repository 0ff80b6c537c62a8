"""Hard trees in Triton: a program per token, which walks alone and reads its path only.

Sums run over whole rows in one program, in an order that its constants fix: nothing is tuned, as
another order might decide otherwise. Parameters and tokens are fp32, bf16 or fp16, sums fp32.

Shapes: T tokens, D width, N nodes of a tree, E leaves, I = 2 F if gated else F, P trees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.tree_descent.shapes import depth_of
from moezoo_kernels.triton_activations import tanh_share
from moezoo_kernels.triton_support import on_its_device

# Hidden units of a leaf that are computed side by side, in elements of its tile.
_TILE = 16384


@triton.jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        value = tl.where(x < 0.0, 0.0, x * x)
    elif ACTIVATION == "silu":
        value = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        value = x * tl.sigmoid(1.5957691216 * x * (1.0 + 0.044715 * x * x))
    elif ACTIVATION == "quick_gelu":
        value = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "tanh":
        value = x * tanh_share(x)
    elif ACTIVATION == "leaky_relu":
        value = tl.where(x < 0.0, 0.01 * x, x)
    else:
        value = 0.5 * x * (1.0 + tl.erf(0.7071067812 * x))
    return value


@triton.jit
def _logit(
    row: tl.tensor,
    bias: tl.tensor,
    x: tl.tensor,
    columns: tl.tensor,
    width: tl.constexpr,
) -> tl.tensor:
    weight = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.sum(weight * x) + tl.load(bias).to(tl.float32)


@triton.jit
def _descend(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    leaves: tl.tensor,
    width: tl.constexpr,
    depth: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    own = tl.load(x + token * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    node = token * 0
    for _ in range(depth):
        logit = _logit(weight + node * width, bias + node, own, columns, width)
        node = 2 * node + 1 + (logit >= 0.0).to(tl.int64)
    tl.store(leaves + token, node - ((1 << depth) - 1))


@triton.jit
def _sum_path(
    x: tl.tensor,
    asking: tl.tensor,
    in_weight: tl.tensor,
    in_bias: tl.tensor,
    out_weight: tl.tensor,
    output: tl.tensor,
    bottoms: tl.tensor,
    width: tl.constexpr,
    trees: tl.constexpr,
    depth: tl.constexpr,
    HAS_ASKING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    own = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    asks = own
    if HAS_ASKING:
        asks = tl.load(asking + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for tree in range(trees):
        node = token * 0
        bottom = node
        for _ in range(depth + 1):
            row = node + tree * ((2 << depth) - 1)
            logit = _logit(in_weight + row * width, in_bias + row, own, columns, width)
            answer = tl.load(out_weight + row * width + columns, mask=inside, other=0.0)
            total += _activated(logit, ACTIVATION) * answer.to(tl.float32)
            decides = logit
            if HAS_ASKING:
                decides = _logit(in_weight + row * width, in_bias + row, asks, columns, width)
            bottom = node
            node = 2 * node + 1 + (decides > 0.0).to(tl.int64)
        tl.store(bottoms + token * trees + tree, bottom - ((1 << depth) - 1))
    tl.store(output + token * width + columns, total, mask=inside)


@triton.jit
def _products(
    rows: tl.tensor,
    bias: tl.tensor,
    x: tl.tensor,
    units: tl.tensor,
    columns: tl.tensor,
    width: tl.constexpr,
    hidden: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    inside = (units < hidden)[:, None] & (columns < width)[None, :]
    tile = tl.load(rows + units[:, None] * width + columns[None, :], mask=inside, other=0.0)
    logits = tl.sum(tile.to(tl.float32) * x[None, :], axis=1)
    if HAS_BIAS:
        logits += tl.load(bias + units, mask=units < hidden, other=0.0).to(tl.float32)
    return logits


@triton.jit
def _answer(
    x: tl.tensor,
    leaves: tl.tensor,
    w_in: tl.tensor,
    w_out: tl.tensor,
    bias_in: tl.tensor,
    bias_out: tl.tensor,
    output: tl.tensor,
    width: tl.constexpr,
    hidden: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS_IN: tl.constexpr,
    HAS_BIAS_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    leaf = tl.load(leaves + token)
    total = tl.zeros((COLUMNS,), tl.float32)
    if leaf >= 0:
        own = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        inner: tl.constexpr = 2 * hidden if GATED else hidden
        rows, biases = w_in + leaf * inner * width, bias_in + leaf * inner
        if HAS_BIAS_OUT:
            of_leaf = bias_out + leaf * width + columns
            total += tl.load(of_leaf, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, hidden, UNITS):
            units = start + tl.arange(0, UNITS)
            products = _products(rows, biases, own, units, columns, width, hidden, HAS_BIAS_IN)
            values = _activated(products, ACTIVATION)
            if GATED:
                up, up_bias = rows + hidden * width, biases + hidden
                values *= _products(up, up_bias, own, units, columns, width, hidden, HAS_BIAS_IN)
            present = inside[:, None] & (units < hidden)[None, :]
            tile = w_out + leaf * width * hidden + columns[:, None] * hidden + units[None, :]
            weight = tl.load(tile, mask=present, other=0.0).to(tl.float32)
            total += tl.sum(weight * values[None, :], axis=1)
    tl.store(output + token * width + columns, total, mask=inside)


@on_its_device
def tree_descent(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return each token's leaf, (T,)."""
    tokens, width = x.shape
    leaves = torch.empty(tokens, dtype=torch.int64, device=x.device)
    if tokens:
        operands = (x.contiguous(), weight.contiguous(), bias.contiguous(), leaves)
        _descend[(tokens,)](*operands, width, depth_of(len(weight)), **_launch(width))
    return leaves


@on_its_device
def leaf_mlp(
    x: Tensor,
    leaves: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Return each token's leaf's output, (T, D) fp32."""
    in_range = ((leaves >= -1) & (leaves < len(w_in))).all()
    torch._assert_async(in_range, "leaves: give leaf numbers, or -1 for none")
    (tokens, width), hidden = x.shape, w_out.shape[-1]
    output = torch.empty(tokens, width, dtype=torch.float32, device=x.device)
    if output.numel():
        launch = _launch(width)
        units = min(triton.next_power_of_2(hidden), max(1, _TILE // launch["COLUMNS"]))
        biases = [w_in if t is None else t.contiguous() for t in (bias_in, bias_out)]
        _answer[(tokens,)](
            *(x.contiguous(), leaves.contiguous(), w_in.contiguous(), w_out.contiguous()),
            *(*biases, output, width, hidden),
            GATED=gated,
            HAS_BIAS_IN=bias_in is not None,
            HAS_BIAS_OUT=bias_out is not None,
            ACTIVATION=activation,
            UNITS=units,
            **launch,
        )
    return output


@on_its_device
def path_neurons(
    x: Tensor,
    asking: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the outputs on each token's paths, (T, D) fp32, and the ends, (T, P)."""
    (tokens, width), (trees, num_nodes, _) = x.shape, in_weight.shape
    output = torch.empty(tokens, width, dtype=torch.float32, device=x.device)
    bottoms = torch.empty(tokens, trees, dtype=torch.int64, device=x.device)
    if output.numel():
        asks = x if asking is None else asking
        tensors = (x, asks, in_weight, in_bias, out_weight)
        _sum_path[(tokens,)](
            *(t.contiguous() for t in tensors),
            *(output, bottoms, width, trees, depth_of(num_nodes) - 1),
            HAS_ASKING=asking is not None,
            ACTIVATION=activation,
            **_launch(width),
        )
    return output, bottoms


def _launch(width: int) -> dict[str, int]:
    """Hold a row in the registers of one program."""
    columns = triton.next_power_of_2(max(1, width))
    return {"COLUMNS": columns, "num_warps": min(8, max(1, columns // 256))}
