"""How much each layer may save: less where it costs more.

Shapes: W windows, L tokens each, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert import prune_block
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Head, Stage, embed

TOKENS = 1024
"""Tokens on which layers' costs are measured; rounded up to whole windows."""
_MOST = 2.0
"""What a layer saves at most, over the mean."""


@torch.no_grad()
def layer_costs(
    source: Source,
    tokens: Tensor,
    layers: Sequence[int],
    keep: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Measure what it costs to save in one layer alone, in nats.

    Each layer in turn is pruned to its most active neurons on these tokens, all others being
    dense; what follows is the KL divergence of the model's predictions from the dense ones. It
    takes half as many passes through layers as there are pairs of them.

    Args:
        source: the dense model.
        tokens: ``(W, L)``.
        layers: those that will save something.
        keep: neurons that are left in a pruned layer.
        device: where to compute.
        progress: called after each layer.

    Returns:
        The mean KL divergence per token, by layer.
    """
    dense, pruned = embed(source, tokens), dict[int, Tensor]()
    for layer in range(source.num_layers):
        stage = Stage(source, layer, device)

        def through(states: Tensor, stage: Stage = stage) -> Tensor:
            return torch.cat(list(stage.outputs(states, stage.block.run)))

        pruned = {other: through(states) for other, states in pruned.items()}
        if layer in layers:
            attended = torch.cat(list(stage.attended(dense)))
            x, block = stage.inputs(attended), stage.block
            first = torch.zeros(tokens.shape, dtype=torch.bool)
            first[:, 0] = True
            small = prune_block(
                x,
                block.gate,
                block.up,
                block.down,
                keep,
                act=block.act,
                bias_in=block.bias_in,
                bias_out=block.bias_out,
                apart=first.flatten(),
            )
            pruned[layer] = stage.answered(attended, small.run)
        dense = through(dense)
        progress()
    return _divergences(Head(source, device), dense, pruned)


def _divergences(head: Head, dense: Tensor, others: Mapping[int, Tensor]) -> dict[int, float]:
    """Return the means of ``KL(dense || other)`` over the tokens after each window's first."""
    total, count = dict.fromkeys(others, 0.0), dense[:, 1:, 0].numel()
    for window, states in enumerate(dense[:, 1:]):
        wanted_LV = head.logits(states).log_softmax(dim=-1)
        for layer, other in others.items():
            found_LV = head.logits(other[window, 1:]).log_softmax(dim=-1)
            nats = F.kl_div(found_LV, wanted_LV, reduction="sum", log_target=True)
            total[layer] += float(nats)
    return {layer: max(nats / count, 0.0) for layer, nats in total.items()}


def share_out(costs: Mapping[int, float], active: int, routed: int) -> dict[int, int]:
    """Return how many experts a token is routed to in each layer, ``active`` on average.

    A layer's cost is taken to grow with the square of what it leaves out, so that the sum is least
    where a layer leaves out as much as is inverse to its cost; at most twice the mean. Single
    experts are given where rounding has taken most.

    Args:
        costs: of layers that leave out the same, in any unit.
        active: experts per token on average.
        routed: experts to choose from.
    """
    mean = float(routed - active)
    smallest = max(max(costs.values()) * 1e-6, 1e-30)
    inverse = {layer: 1.0 / max(cost, smallest) for layer, cost in costs.items()}
    most = min(_MOST * mean, routed - 1.0)
    low, high = 0.0, mean * len(costs) / min(inverse.values())
    for _ in range(200):  # bisection: the sum grows with the factor
        factor = (low + high) / 2
        if sum(min(factor * each, most) for each in inverse.values()) < mean * len(costs):
            low = factor
        else:
            high = factor
    left_out = {layer: min(high * each, most) for layer, each in inverse.items()}
    whole = {layer: math.floor(each) for layer, each in left_out.items()}
    missing = round(mean * len(costs)) - sum(whole.values())
    by_rest = sorted(left_out, key=lambda layer: whole[layer] - left_out[layer])
    for layer in by_rest[:missing]:
        whole[layer] += 1
    return {layer: routed - left for layer, left in whole.items()}
