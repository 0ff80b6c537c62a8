"""The formulas of hard trees in plain differentiable torch: every node and neuron is asked.

Shapes: T tokens, D width, N nodes of a tree, E leaves, I = 2 F if gated else F, P trees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.tree_descent.shapes import depth_of


def tree_descent(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute all nodes, then follow; see the package's ``tree_descent``."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = at_least_fp32(x)
        right_TN = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) >= 0
        node_T1 = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        for _ in range(depth_of(len(weight))):
            node_T1 = 2 * node_T1 + 1 + right_TN.gather(1, node_T1)
        return node_T1.squeeze(-1) - len(weight)


def leaf_mlp(
    x: Tensor,  # (T, D)
    leaves: Tensor,  # (T,)
    w_in: Tensor,  # (E, I, D)
    w_out: Tensor,  # (E, D, F)
    *,
    activation: str,
    gated: bool,
    bias_in: Tensor | None = None,  # (E, I)
    bias_out: Tensor | None = None,  # (E, D)
) -> Tensor:
    """Run every leaf on every token; see the package's ``leaf_mlp``."""
    output = torch.zeros_like(x)
    for e in range(len(w_in)):
        inner = F.linear(x, w_in[e], None if bias_in is None else bias_in[e])
        hidden = activate(inner, activation, gated)
        answer = F.linear(hidden, w_out[e], None if bias_out is None else bias_out[e])
        output = torch.where((leaves == e).unsqueeze(-1), answer.to(x.dtype), output)
    return output


def path_neurons(
    x: Tensor,  # (T, D)
    in_weight: Tensor,  # (P, N, D)
    in_bias: Tensor,  # (P, N)
    out_weight: Tensor,  # (P, N, D)
    *,
    activation: str,
    asking: Tensor | None = None,  # (T, D)
) -> tuple[Tensor, Tensor]:
    """Run all neurons and mask those off the path; see the package's ``path_neurons``."""
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_fp32(x)
        asking = x if asking is None else asking.to(x.dtype)
        weight, bias = in_weight.to(x.dtype), in_bias.to(x.dtype)
        logits_TPN = torch.einsum("td,pnd->tpn", x, weight) + bias
        right_TPN = torch.einsum("td,pnd->tpn", asking, weight) + bias > 0
        node_TP1 = torch.zeros_like(logits_TPN[..., :1], dtype=torch.int64)
        on_path_TPN = torch.zeros_like(logits_TPN, dtype=torch.bool).scatter_(-1, node_TP1, True)
        for _ in range(depth_of(in_weight.shape[1]) - 1):
            node_TP1 = 2 * node_TP1 + 1 + right_TPN.gather(-1, node_TP1)
            on_path_TPN.scatter_(-1, node_TP1, True)
        inner_TPN = ACTIVATIONS[activation](logits_TPN).masked_fill(~on_path_TPN, 0.0)
        output = torch.einsum("tpn,pnd->td", inner_TPN, out_weight.to(x.dtype))
        return output, node_TP1.squeeze(-1) - in_weight.shape[1] // 2
