"""The split of neurons: those that run on every token, and groups of the others."""

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
from moezoo.convert.carve.elimination import elimination_order
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.samples import Samples, always_first

_CMOE_MARKS = 10
_SHARED_BY = {
    "contribution": "contribution",
    "cmoe": "cmoe",
    "weight_kmeans": "contribution",
    "coactivation": "contribution",
}
"""The rules of the splits that have one."""


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


def split_neurons(block: Block, samples: Samples, options: CarveOptions) -> Partition:
    """Cut the block's neurons into a shared part and N experts of equal size.

    Args:
        block: the dense block.
        samples: calibration tokens. Neurons that those kept exact need are shared first.
        options: which rule.
    """
    x_TD, hidden_TF = samples.fitted.x, samples.fitted.hidden
    rule = options.shared_by if options.shared_by != "split" else _SHARED_BY.get(options.split)
    marks_TK = None
    if "cmoe" in (options.split, rule):
        marks_TK = cmoe_marks(block, x_TD, hidden_TF, options)
    count = block.width // options.experts * options.shared
    if rule is None:
        everyone = _deal(torch.arange(block.width), options)
        shared, candidates = everyone[:count], everyone[count:]
    else:
        order = _order(block, hidden_TF, marks_TK, rule, block.width - count)
        order = always_first(order, samples.needed)
        shared, candidates = order[:count].cpu(), order[count:].sort().values
    size = block.width // options.experts
    if options.split in ("random", "contiguous"):
        dealt = candidates if rule is None else _deal(candidates.cpu(), options)
        return _partition(shared, dealt, torch.arange(len(dealt)) // size, options)
    iterations = options.iterations or (1 if options.split == "cmoe" else 8)
    if options.split == "cmoe":
        assert marks_TK is not None
        labels = cluster_marks(
            marks_TK, block.width, candidates, options.routed, iterations, options.distance
        )
    else:
        points = _features(block, hidden_TF, options)[candidates]
        labels = balanced_kmeans(points, options.routed, iterations, options.seed)
    return _partition(shared, candidates.cpu(), labels, options)


def _deal(neurons: Tensor, options: CarveOptions) -> Tensor:
    """Return the order in which neurons are cut up without looking at activations."""
    if options.split == "contiguous":
        return neurons
    generator = torch.Generator().manual_seed(options.seed)
    return neurons[torch.randperm(len(neurons), generator=generator)]


def _order(
    block: Block, hidden_TF: Tensor, marks_TK: Tensor | None, rule: str, rest: int
) -> Tensor:
    """Sort all neurons, those to be shared first; ``rest`` of them will not be."""
    if rule == "elimination":
        return elimination_order(hidden_TF, block.down, rest)
    if rule == "cmoe":
        assert marks_TK is not None
        return rates(marks_TK, block.width).argsort(descending=True, stable=True)
    return importance(hidden_TF, block).argsort(descending=True, stable=True)


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


def _partition(shared: Tensor, neurons: Tensor, labels: Tensor, options: CarveOptions) -> Partition:
    """Sort the neurons of each part; labels count the routed experts."""
    parts = [neurons[labels == e].sort().values for e in range(options.routed)]
    return Partition(shared.sort().values, torch.stack(parts))
