"""Which neurons answer every token, and which of the others go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.activity import (
    coactivation_features,
    contribution_features,
    cosine_block,
    importance,
    rates,
    strongest,
)
from moezoo.convert.carve.block import Block
from moezoo.convert.carve.clusters import balanced_kmeans, cluster_marks
from moezoo.convert.carve.options import CarveOptions

_CMOE_MARKS = 10


@dataclass(frozen=True)
class Partition:
    """Every neuron of a block, once.

    Attributes:
        shared: ``(x m,)`` int64, ascending, on the CPU as are the others.
        experts: ``(N, m)`` int64, each row ascending.
    """

    shared: Tensor
    experts: Tensor

    def labels(self) -> Tensor:
        """Name each neuron's expert, ``(F,)`` int64, -1 in the shared part."""
        labels = torch.full((self.shared.numel() + self.experts.numel(),), -1)
        for e, neurons in enumerate(self.experts):
            labels[neurons] = e
        return labels


def split_neurons(
    block: Block, x_TD: Tensor, hidden_TF: Tensor, options: CarveOptions
) -> Partition:
    """Cut the block's neurons into a shared part and N experts of equal size.

    Args:
        block: the dense block.
        x_TD: calibration inputs.
        hidden_TF: the block's activations on them.
        options: which rule.
    """
    if options.split in ("random", "contiguous"):
        generator = torch.Generator().manual_seed(options.seed)
        drawn = torch.randperm(block.width, generator=generator)
        order = drawn if options.split == "random" else torch.arange(block.width)
        labels = torch.arange(block.width) // (block.width // options.experts)
        return _partition(order, labels, options)
    if options.split == "cmoe":
        marks_TK = cmoe_marks(block, x_TD, hidden_TF, options)
        order = rates(marks_TK, block.width).argsort(descending=True, stable=True)
    else:
        order = importance(hidden_TF, block).argsort(descending=True, stable=True)
    count = block.width // options.experts * options.shared
    candidates = order[count:].sort().values
    iterations = options.iterations or (1 if options.split == "cmoe" else 8)
    if options.split == "cmoe":
        labels = cluster_marks(
            marks_TK, block.width, candidates, options.routed, iterations, options.distance
        )
    else:
        points = _features(block, hidden_TF, options)[candidates]
        labels = balanced_kmeans(points, options.routed, iterations, options.seed)
    everyone = torch.cat([order[:count].cpu(), candidates.cpu()])
    return _partition(
        everyone,
        torch.cat([torch.zeros(count, dtype=torch.int64), labels + options.shared]),
        options,
    )


def _features(block: Block, hidden_TF: Tensor, options: CarveOptions) -> Tensor:
    """Describe every neuron by what the split goes by, ``(F, d)``."""
    if options.split == "contribution":
        return contribution_features(hidden_TF, options.features, options.seed)
    if options.split == "weight_kmeans":
        return block.up if block.gate is None else block.gate
    count = options.top_activations or max(block.width // 10, 1)
    marks_TK = strongest(hidden_TF, count)
    return coactivation_features(marks_TK, block.width, options.features, options.seed)


def cmoe_marks(block: Block, x_TD: Tensor, hidden_TF: Tensor, options: CarveOptions) -> Tensor:
    """Mark each token's K_a strongest neurons as CMoE does, ``(T, K_a)`` int64."""
    count = min(options.top_activations or _CMOE_MARKS, block.width)
    if options.profile == "raw":
        return strongest(hidden_TF, count)
    plain = cosine_block(block)
    parts = torch.nn.functional.normalize(x_TD, dim=1).split(4096)
    return torch.cat([strongest(plain.hidden(part), count) for part in parts])


def _partition(neurons: Tensor, labels: Tensor, options: CarveOptions) -> Partition:
    """Sort neurons into parts; labels below ``shared`` are the shared part."""
    shared = neurons[labels < options.shared].sort().values
    routed = range(options.shared, options.experts)
    return Partition(shared, torch.stack([neurons[labels == e].sort().values for e in routed]))
