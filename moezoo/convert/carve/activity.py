"""Activity of neurons on calibration tokens: how much they matter, when, and with which others.

Shapes: T tokens, F neurons, K marks per token, N clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block

_TOKENS, _NEURONS = 1024, 256  # worked on at a time, so that memory holds all activations once

_FEATURE_TOKENS = 4096


def importance(hidden_TF: Tensor, block: Block) -> Tensor:
    """Rate neurons by ``std(h_i) ||down[:, i]||``, ``(F,)``: what a constant cannot replace."""
    mean_F = hidden_TF.mean(dim=0)
    square_F = torch.zeros_like(mean_F)
    for part in hidden_TF.split(_TOKENS):
        square_F += (part - mean_F).square_().sum(dim=0)
    return (square_F / len(hidden_TF)).sqrt() * block.down.norm(dim=0)


def contribution_features(hidden_TF: Tensor, dimensions: int, seed: int) -> Tensor:
    """Describe when each neuron deviates from its mean, ``(F, dimensions)``.

    ``|h_i - mean(h_i)|`` over tokens, centred and of unit length, so that inner products are
    correlations; projected at random, which keeps them up to ``1 / sqrt(dimensions)``. Of many
    tokens a few thousand, evenly spaced, tell correlations four times as exactly. A neuron that
    never deviates is zero.
    """
    hidden_TF = hidden_TF[:: max(len(hidden_TF) // _FEATURE_TOKENS, 1)]
    directions_TC = _directions(len(hidden_TF), dimensions, seed).to(hidden_TF)
    parts = [_part_features(part, directions_TC) for part in hidden_TF.split(_NEURONS, dim=1)]
    return torch.cat(parts)


def _part_features(hidden_TF: Tensor, directions_TC: Tensor) -> Tensor:
    hidden_FT = hidden_TF.t().contiguous()
    total_F = torch.linalg.vector_norm(hidden_FT, dim=1)
    deviation_FT = hidden_FT.sub_(hidden_FT.mean(dim=1, keepdim=True)).abs_()
    deviation_FT -= deviation_FT.mean(dim=1, keepdim=True)
    length_F = torch.linalg.vector_norm(deviation_FT, dim=1)
    features_FC = deviation_FT @ directions_TC / length_F.clamp(min=1e-30).unsqueeze(-1)
    # Rounding must not give dead neurons a direction.
    return features_FC.masked_fill((length_F <= 1e-6 * total_F).unsqueeze(-1), 0.0)


def _directions(tokens: int, dimensions: int, seed: int) -> Tensor:
    """Draw random directions ``(T, dimensions)`` whose inner products are about the identity."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, dimensions), generator=generator) * dimensions**-0.5


def cosine_block(block: Block) -> Block:
    """Normalize the rows of gate and up to length one, without biases (CMoE's code)."""
    gate = None if block.gate is None else F.normalize(block.gate, dim=1)
    return Block(gate, F.normalize(block.up, dim=1), block.down, block.act)


def strongest(hidden_TF: Tensor, count: int) -> Tensor:
    """Mark the neurons with the largest ``|h|`` of every token, ``(T, count)`` int64 (ATopK)."""
    return torch.cat([h.abs().topk(count, dim=1).indices for h in hidden_TF.split(_TOKENS)])


def rates(marks_TK: Tensor, width: int) -> Tensor:
    """Count how many tokens mark each neuron, ``(F,)`` int64."""
    return torch.bincount(marks_TK.flatten(), minlength=width)


def coactivation_features(marks_TK: Tensor, width: int, dimensions: int, seed: int) -> Tensor:
    """Describe which tokens mark each neuron; inner products are about co-activation counts."""
    directions_TC = _directions(len(marks_TK), dimensions, seed).to(marks_TK.device)
    features_FC = torch.zeros(width, dimensions, device=marks_TK.device)
    for marks, directions in zip(
        marks_TK.split(_TOKENS), directions_TC.split(_TOKENS), strict=True
    ):
        active_TF = torch.zeros(len(marks), width, device=marks.device).scatter_(1, marks, 1.0)
        features_FC += active_TF.t() @ directions
    return features_FC


def mark_distances(marks_TK: Tensor, labels_F: Tensor, clusters: int, metric: str) -> Tensor:
    """Measure how far every neuron's marks are from every cluster's mean marks.

    With binary marks c and means ĉ in [0, 1], ``||c - ĉ||_1`` and ``||c - ĉ||_2^2`` are both a
    constant of the cluster plus the sum, over the tokens that mark the neuron, of ``1 - 2 ĉ``. We
    sum integers, so the result does not depend on any order.

    Args:
        marks_TK: the neurons each token marks.
        labels_F: ``(F,)`` cluster of each neuron, -1 for none.
        clusters: number of clusters N.
        metric: ``l1`` or ``l2``.

    Returns:
        ``(F, N)`` fp64.
    """
    size_N = torch.bincount(labels_F + 1, minlength=clusters + 1)[1:].clamp(min=1)
    count_TN = torch.zeros(len(marks_TK), clusters + 1, dtype=torch.int64, device=marks_TK.device)
    count_TN.scatter_add_(1, labels_F[marks_TK] + 1, torch.ones_like(marks_TK))
    count_TN = count_TN[:, 1:]
    near_FN = torch.zeros(len(labels_F), clusters, dtype=torch.int64, device=marks_TK.device)
    for k in range(marks_TK.shape[1]):
        near_FN.index_add_(0, marks_TK[:, k], size_N - 2 * count_TN)
    if metric == "l1":
        constant_N = count_TN.sum(dim=0).double() / size_N
        return near_FN.double() / size_N + constant_N
    constant_N = count_TN.square().sum(dim=0).double() / size_N.square()
    return (near_FN.double() / size_N + constant_N).clamp(min=0).sqrt()
