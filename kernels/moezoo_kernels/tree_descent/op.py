"""Hard trees as opaque ops, without gradients: what compile and FLOP counters see.

Shapes: T tokens, D width, N nodes of a tree, E leaves, I = 2 F if gated else F, P trees.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moezoo_kernels.flops import count_active
from moezoo_kernels.tree_descent import cpu
from moezoo_kernels.tree_descent.shapes import depth_of


@torch.library.custom_op("moezoo::tree_descent", mutates_args=())
def tree_descent(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Return each token's leaf, (T,) int64."""
    return _implementation(backend).tree_descent(x, weight, bias)


@tree_descent.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.custom_op("moezoo::leaf_mlp", mutates_args=())
def leaf_mlp(
    x: Tensor,
    leaves: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
) -> Tensor:
    """Return the output of each token's leaf, (T, D) fp32."""
    run = _implementation(backend).leaf_mlp
    return run(x, leaves, w_in, w_out, bias_in, bias_out, activation, gated)


@leaf_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("moezoo::path_neurons", mutates_args=())
def path_neurons(
    x: Tensor,
    asking: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the outputs, (T, D) fp32, and the bottom neurons, (T, P) int64."""
    run = _implementation(backend).path_neurons
    return run(x, asking, in_weight, in_bias, out_weight, activation)


@path_neurons.register_fake
def _(x: Tensor, asking: Tensor | None, in_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    bottoms = x.new_empty(x.shape[0], in_weight.shape[0], dtype=torch.int64)
    return x.new_empty(x.shape, dtype=torch.float32), bottoms


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":  # looked for when asked for, as it imports triton
        return importlib.import_module("moezoo_kernels.tree_descent.triton_trees")
    return cpu


@register_flop_formula(torch.ops.moezoo.tree_descent, get_raw=True)
def _descent_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Count one product of a row per token and level."""
    return 2 * x.numel() * depth_of(len(weight))


@register_flop_formula(torch.ops.moezoo.leaf_mlp, get_raw=True)
def _leaf_flops(x: Tensor, leaves: Tensor, w_in: Tensor, w_out: Tensor, *_: Any, **__: Any) -> int:
    """Count the two products of the tokens that have a leaf; without data, of all."""
    return 2 * count_active(leaves) * (w_in[0].numel() + w_out[0].numel())


@register_flop_formula(torch.ops.moezoo.path_neurons, get_raw=True)
def _path_flops(x: Tensor, asking: Tensor | None, in_weight: Tensor, *_: Any, **__: Any) -> int:
    """Count two products of a row per token, tree and level; one more for another's decision."""
    levels = depth_of(in_weight.shape[1])
    products = 2 * levels if asking is None else 3 * levels - 1
    return 2 * x.numel() * in_weight.shape[0] * products
