"""Hard trees in plain torch, level by level: only rows on the path are read.

Runs on any device in any dtype. Differentiable where the result is: the gradient of an embedding
is summed in a fixed order, that of indexing is not.

Shapes: T tokens, D width, N nodes of a tree, E leaves, I = 2 F if gated else F, P trees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.grouped_mlp import grouped_mlp
from moezoo_kernels.tree_descent.shapes import depth_of


def tree_descent(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute one node per level; see the package's ``tree_descent``."""
    with torch.no_grad():
        node_T = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for _ in range(depth_of(len(weight))):
            logit_T1 = _row_logits(x, weight, bias, node_T.unsqueeze(-1))
            node_T = 2 * node_T + 1 + (logit_T1.squeeze(-1) >= 0)
        return node_T - len(weight)


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
    """Run a leaf as an expert of weight one; see the package's ``leaf_mlp``."""
    weights_T1 = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    return grouped_mlp(
        x,
        w_in,
        w_out,
        leaves.unsqueeze(-1),
        weights_T1,
        activation=activation,
        gated=gated,
        bias_in=bias_in,
        bias_out=bias_out,
    )


def path_neurons(
    x: Tensor,  # (T, D)
    in_weight: Tensor,  # (P, N, D)
    in_bias: Tensor,  # (P, N)
    out_weight: Tensor,  # (P, N, D)
    *,
    activation: str,
    asking: Tensor | None = None,  # (T, D)
) -> tuple[Tensor, Tensor]:
    """Run one neuron per tree and level; see the package's ``path_neurons``."""
    trees, num_nodes, _ = in_weight.shape
    in_rows, out_rows = in_weight.flatten(0, 1), out_weight.flatten(0, 1)
    root_P = torch.arange(trees, device=x.device) * num_nodes
    node_TP = torch.zeros(len(x), trees, dtype=torch.int64, device=x.device)
    output_T1D: Tensor | None = None
    depth = depth_of(num_nodes) - 1
    for level in range(depth + 1):
        rows_TP = root_P + node_TP
        logits_TP = _row_logits(x, in_rows, in_bias.flatten(), rows_TP)
        inner_TP = ACTIVATIONS[activation](logits_TP).to(out_rows.dtype)
        answer_T1D = torch.bmm(inner_TP.unsqueeze(1), F.embedding(rows_TP, out_rows))
        answer_T1D = at_least_fp32(answer_T1D)
        output_T1D = answer_T1D if output_T1D is None else output_T1D + answer_T1D
        if level < depth:
            if asking is not None:
                logits_TP = _row_logits(asking, in_rows, in_bias.flatten(), rows_TP)
            node_TP = 2 * node_TP + 1 + (logits_TP.detach() > 0)
    assert output_T1D is not None
    return output_T1D.squeeze(1), node_TP - num_nodes // 2


def _row_logits(x: Tensor, weight_ND: Tensor, bias_N: Tensor, rows_TP: Tensor) -> Tensor:
    """Compute ``(T, P)`` logits ``w_n · x + b_n`` of P rows per token, reading only those rows."""
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_fp32(x)
        weight_TPD = F.embedding(rows_TP, weight_ND).to(x.dtype)
        bias_TP1 = F.embedding(rows_TP, bias_N.unsqueeze(-1)).to(x.dtype)
        return (torch.bmm(weight_TPD, x.unsqueeze(-1)) + bias_TP1).squeeze(-1)
