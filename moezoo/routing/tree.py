"""A binary tree of decisions: a token's leaf is found by one decision per level.

Node i asks ``w_i · x + b_i >= 0`` and sends a token to its right child 2i + 2 on yes, else to its
left child 2i + 1; behind the last level are the leaves, numbered from the left (Belcak and
Wattenhofer 2023, arXiv:2308.14711). A soft decision is ``c_i = sigmoid(w_i · x + b_i)``, the
probability of going right, and a leaf's probability is the product along its path.

Shapes: T tokens, D d_model, N = 2^depth - 1 nodes, E = 2^depth leaves, P nodes of one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo_kernels import tree_descent
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.linear import linear


class DecisionTree(nn.Module):
    """A complete binary tree with one hyperplane per node.

    The arithmetic is fp32 whatever autocast says (fp64 for fp64 inputs): rounding a logit to bf16
    changes which leaf is reached.

    Args:
        d_model: width of what the nodes read.
        depth: number of levels; 0 is a single leaf and no question.
    """

    def __init__(self, d_model: int, depth: int) -> None:
        super().__init__()
        self.d_model, self.depth = d_model, depth
        self.num_nodes, self.num_leaves = 2**depth - 1, 2**depth
        self.weight = nn.Parameter(torch.empty(self.num_nodes, d_model))
        self.bias = nn.Parameter(torch.empty(self.num_nodes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(-1/sqrt(d), 1/sqrt(d))."""
        bound = self.d_model**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits of going right at every node: ``(T, N)``."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden_TD = at_least_fp32(hidden_TD)
            dtype = hidden_TD.dtype
            return linear(hidden_TD, self.weight.to(dtype), self.bias.to(dtype))

    def descend(self, hidden_TD: Tensor) -> Tensor:
        """Return the leaves ``(T,)``, reading one node's row per level; without gradient."""
        return tree_descent(hidden_TD, self.weight, self.bias)


def follow(right_TN: Tensor, depth: int) -> Tensor:
    """Follow decisions that were made at every node: ``(T,)`` leaves.

    Args:
        right_TN: bool, true where a node sends the token to the right.
        depth: number of levels.
    """
    node_T1 = torch.zeros(len(right_TN), 1, dtype=torch.int64, device=right_TN.device)
    for _ in range(depth):
        node_T1 = 2 * node_T1 + 1 + right_TN.gather(1, node_T1)
    return node_T1.squeeze(-1) - (2**depth - 1)


def leaf_probabilities(left_TN: Tensor, right_TN: Tensor) -> Tensor:
    """Multiply the probabilities along every path, level by level: ``(T, E)``, rows sum to 1.

    Args:
        left_TN: probability of going left at each node; given apart from ``right_TN`` because
            ``1 - c`` loses what is small.
        right_TN: probability of going right.
    """
    p_TE = left_TN.new_ones(len(left_TN), 1)
    first = 0
    while first < left_TN.shape[1]:
        level = slice(first, 2 * first + 1)
        split = (p_TE * left_TN[:, level], p_TE * right_TN[:, level])
        p_TE = torch.stack(split, dim=-1).flatten(1)
        first = 2 * first + 1
    return p_TE


def path(leaf: int, depth: int) -> list[tuple[int, bool]]:
    """List the nodes on the way to a leaf, each with whether the way goes right there."""
    node, steps = 0, []
    for level in reversed(range(depth)):
        right = bool(leaf >> level & 1)
        steps.append((node, right))
        node = 2 * node + 1 + right
    return steps


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy, in nats, of a coin that shows 1 with probability ``sigmoid(logits)``.

    ``H = log(1 + e^-|z|) + |z| sigmoid(-|z|)``: exact for any z, without clamping.
    """
    size = logits.abs()
    return F.softplus(-size) + size * (-size).sigmoid()
