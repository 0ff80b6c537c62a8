"""Hard trees for CPUs, in C++: tokens in fp32, parameters in fp32 or bf16, sums in fp32.

Shapes: T tokens, D width, N nodes of a tree, E leaves, I = 2 F if gated else F, P trees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.activations import ACTIVATION_CODES
from moezoo_kernels.tree_descent.shapes import depth_of


def tree_descent(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return each token's leaf, (T,)."""
    tokens, width = x.shape
    leaves = torch.empty(tokens, dtype=torch.int64)
    operands = _contiguous(x.float(), weight, bias)
    sizes = (tokens, width, depth_of(len(weight)), native.dtype_code(weight.dtype))
    native.call("moezoo_tree_descent", *operands, leaves, *sizes)
    return leaves


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
    x = x.float()
    tokens, width = x.shape
    _check_range(leaves, len(w_in))
    output = native.floats(tokens, width)
    operands = _contiguous(x, leaves, w_in, w_out, bias_in, bias_out)
    code = ACTIVATION_CODES[activation]
    sizes = (tokens, width, w_out.shape[-1], code, gated, native.dtype_code(w_in.dtype))
    native.call("moezoo_leaf_mlp", *operands, output, *sizes)
    return output


def path_neurons(
    x: Tensor,
    asking: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the outputs on each token's paths, (T, D) fp32, and the ends, (T, P)."""
    tokens, width = x.shape
    trees, num_nodes, _ = in_weight.shape
    output = native.floats(tokens, width)
    bottoms = torch.empty(tokens, trees, dtype=torch.int64)
    asking = None if asking is None else asking.float()
    operands = _contiguous(x.float(), asking, in_weight, in_bias, out_weight)
    depth, code = depth_of(num_nodes) - 1, ACTIVATION_CODES[activation]
    sizes = (tokens, trees, depth, width, code, native.dtype_code(in_weight.dtype))
    native.call("moezoo_path_neurons", *operands, output, bottoms, *sizes)
    return output, bottoms


def _check_range(leaves: Tensor, num_leaves: int) -> None:
    if leaves.numel() == 0:
        return
    least, most = leaves.aminmax()
    if least < -1 or most >= num_leaves:
        wrong, last = int(least if least < -1 else most), num_leaves - 1
        raise ValueError(f"leaves: {wrong} is not a leaf; give -1 for none, or 0 to {last}")


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
