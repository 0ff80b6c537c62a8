"""Trees: FFF and eFFF, whose leaves are blocks, and UltraFastBERT's, whose nodes are neurons."""

from __future__ import annotations

import torch
from plain.parts import (
    Answer,
    Call,
    Experts,
    Options,
    Weights,
    activation,
    dense_block,
    sigmoid,
    stacked,
    tokens_of,
)
from torch import Tensor


def fast_feed_forward(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_l π_l(x) Leaf_l(x)``, or one leaf's answer (arXiv:2308.14711, algorithm 1).

    Node i asks ``c = σ(w · x + b)``, sends to the right child 2 i + 2 with weight c, to the left
    with 1 - c. A master leaf answers beside the tree (arXiv:2405.16836).
    """
    tokens, asking, real = tokens_of(hidden, call)
    depth = options["depth"]
    nodes, leaves = 2**depth - 1, 2**depth
    hard = options["hard"] if options["hard"] is not None else not call.training
    swap = torch.zeros(len(tokens), nodes, dtype=torch.bool)
    if call.training and options["region_leak"]:
        drawn = torch.rand(len(tokens), nodes, dtype=hidden.dtype)
        swap = drawn < options["region_leak"]
    scale = None
    if call.training and options["leaf_dropout"]:
        ones = torch.ones(len(tokens), leaves, options["d_leaf"], dtype=hidden.dtype)
        scale = torch.nn.functional.dropout(ones, options["leaf_dropout"])
    answer = Experts(weights, "leaves.", options)
    bias = call.training or not hard or depth == 0 or options["compat"] != "upstream_eval"

    rows, counts, shares, entropies = [], [0] * leaves, [], []
    for t, x_D in enumerate(tokens):
        logit_N = weights["tree.weight"] @ asking[t] + weights["tree.bias"]
        c_N = sigmoid(logit_N)
        right_N = torch.where(swap[t], 1 - c_N, c_N)
        share_E = torch.stack([_path_share(right_N, leaf, depth) for leaf in range(leaves)])
        reached, node = 0, 0
        for _ in range(depth):
            right = bool(logit_N[node] >= 0) != bool(swap[t, node])
            reached, node = 2 * reached + right, 2 * node + 1 + right
        y_D = torch.zeros_like(x_D)
        for leaf in [reached] if hard else range(leaves):
            leaf_D = answer(leaf, x_D, None if scale is None else scale[t, leaf], bias)
            y_D = y_D + (leaf_D if hard else share_E[leaf] * leaf_D)
        if options["d_master"]:
            mix = sigmoid(weights["master_mix"])
            y_D = mix * y_D + (1 - mix) * dense_block(weights, "master.", options, x_D)
        if not real[t]:
            y_D = torch.zeros_like(y_D)
        else:
            counts[reached] += 1
            shares.append(share_E)
            entropies.append(-(c_N * torch.log(c_N) + (1 - c_N) * torch.log(1 - c_N)).sum())
        rows.append(y_D)

    losses = {}
    if call.training and options["hardening"]:  # arXiv:2308.14711, eq. for L_harden
        total = sum(entropies)
        if options["hardening_reduction"] != "sum":
            total = total / len(entropies)
        if options["hardening_reduction"] == "mean":
            total = total / max(nodes, 1)
        losses["hardening"] = options["hardening"] * total
    if call.training and options["load_balancing"]:
        mean_E = sum(shares) / len(shares)
        even = sum(counts[leaf] / sum(counts) * mean_E[leaf] for leaf in range(leaves))
        losses["load_balancing"] = options["load_balancing"] * leaves * even
    return Answer(stacked(rows, hidden), losses, counts)


def _path_share(right_N: Tensor, leaf: int, depth: int) -> Tensor:
    """Multiply what the nodes on the way to a leaf, numbered from the left, send there."""
    share, node = torch.ones((), dtype=right_N.dtype), 0
    for level in range(depth - 1, -1, -1):
        goes_right = leaf // 2**level % 2
        share = share * (right_N[node] if goes_right else 1 - right_N[node])
        node = 2 * node + 1 + goes_right
    return share


def ultra_fast_fff(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_trees Σ_{n on the way} act(a_n) v_n``; right iff ``a_n > 0`` (arXiv:2311.10770)."""
    tokens, asking, real = tokens_of(hidden, call)
    w_PND, b_PN, v_PND = (weights[name] for name in ("in_weight", "in_bias", "out_weight"))
    trees, depth = w_PND.shape[0], (w_PND.shape[1] + 1).bit_length() - 2
    rows, counts = [], [0] * (trees * 2**depth)
    for t, x_D in enumerate(tokens):
        y_D = torch.zeros_like(x_D)
        for p in range(trees if real[t] else 0):
            node = 0
            for level in range(depth + 1):
                a = w_PND[p, node] @ x_D + b_PN[p, node]
                y_D = y_D + activation(options["activation"], a) * v_PND[p, node]
                if level < depth:
                    right = bool(w_PND[p, node] @ asking[t] + b_PN[p, node] > 0)
                    node = 2 * node + 1 + right
            counts[p * 2**depth + node - (2**depth - 1)] += 1
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, counts)
