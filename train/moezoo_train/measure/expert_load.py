"""How evenly the experts of each layer are used, summed over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moezoo.routing.stats import load_entropy, max_violation

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ExpertLoad:
    """How one layer used its experts, values, leaves or neurons: its slots.

    The first two are those of the choices of all micro-batches together; they are None where a
    layer has too many slots to count at every step. Usage and unevenness are means over
    micro-batches of each one's own: fewer tokens reach fewer slots. `moezoo inspect usage`
    measures them over a whole text.

    Attributes:
        layer: number of the block in the model.
        max_over_mean: choices of the busiest slot over the mean; 1 is even, N is one slot for
            everything. Less 1 it is MaxVio (arXiv:2408.15664).
        entropy: of the slots' shares of the choices, divided by log N: 1 is even, 0 is one slot.
        router_entropy: mean entropy of a token's routing probabilities, divided by log E; None
            where nothing is learned, as in a hash layer.
        dropped: share of assignments dropped for lack of capacity; None where there is no such.
        without_expert: share of tokens that no expert takes; None where every token has some.
        usage: share of the slots that had any weight.
        unevenness: divergence of the slots' weights from uniform, in nats.
        top1_usage: share of the slots that were some head's best; None where there are no heads.
        density: mean share of a token's neurons that are not zero; None but for top-k activation.
        node_entropy: mean entropy of a tree's decisions in nats; None where there is no tree.
    """

    layer: int
    max_over_mean: float | None
    entropy: float | None
    router_entropy: float | None
    dropped: float | None
    without_expert: float | None = None
    usage: float | None = None
    unevenness: float | None = None
    top1_usage: float | None = None
    density: float | None = None
    node_entropy: float | None = None


_MEANS = (
    "router_entropy",
    "without_expert",
    "usage",
    "unevenness",
    "top1_usage",
    "density",
    "node_entropy",
)
"""Statistics of a micro-batch that are averaged over tokens."""


class LoadCounter:
    """Adds up the layers' statistics over micro-batches, on the device, without waiting for it."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}

    def add(self, ffn_stats: Sequence[Mapping[str, Tensor]]) -> None:
        """Add one forward pass: the statistics of each block; few, where nothing is chosen."""
        for layer, stats in enumerate(ffn_stats):
            if "expert_counts" not in stats and "usage" not in stats:
                continue
            tokens = precise(stats["tokens"])
            new = {"tokens": tokens}
            new |= {k: precise(stats[k]) for k in ("expert_counts", "dropped") if k in stats}
            new |= {k: precise(stats[k]) * tokens for k in _MEANS if k in stats}
            old = self._sums.get(layer)
            self._sums[layer] = {k: v + old[k] for k, v in new.items()} if old else new

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Return the sums so far."""
        return {
            layer: {name: value.cpu() for name, value in sums.items()}
            for layer, sums in self._sums.items()
        }

    def load_state_dict(
        self, state_dict: dict[int, dict[str, Tensor]], device: torch.device
    ) -> None:
        """Go on from the sums."""
        self._sums = {
            layer: {name: value.to(device) for name, value in sums.items()}
            for layer, sums in state_dict.items()
        }

    def loads(self, trainer: Trainer | None = None) -> list[ExpertLoad]:
        """Sum over ranks, and say how evenly the experts were used so far."""
        loads = []
        for layer, sums in sorted(self._sums.items()):
            if trainer is not None:
                sums = {k: _sum_over_ranks(trainer, v) for k, v in sums.items()}
            loads.append(_expert_load(layer, sums))
        return loads

    def clear(self) -> None:
        """Start again from zero."""
        self._sums = {}

    def take(self, trainer: Trainer | None = None) -> list[ExpertLoad]:
        """Return :meth:`loads`, and start again from zero."""
        found = self.loads(trainer)
        self.clear()
        return found


def _expert_load(layer: int, sums: Mapping[str, Tensor]) -> ExpertLoad:
    tokens = sums["tokens"].clamp(min=1)
    figures = {name: float(sums[name] / tokens) if name in sums else None for name in _MEANS}
    counts = sums.get("expert_counts")
    if counts is None:
        return ExpertLoad(layer, None, None, dropped=None, **figures)
    if figures["router_entropy"] is not None:
        figures["router_entropy"] /= math.log(len(counts)) or 1.0
    dropped = sums["dropped"] / counts.sum().clamp(min=1) if "dropped" in sums else None
    return ExpertLoad(
        layer,
        max_over_mean=float(max_violation(counts)) + 1,
        entropy=float(load_entropy(counts)),
        dropped=None if dropped is None else float(dropped),
        **figures,
    )


def precise(value: Tensor) -> Tensor:
    """Convert to the widest floating type that the device has, for sums over many tokens."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _sum_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    # reduce works in place, and the sums of several layers may share a tensor
    return cast(Tensor, trainer.strategy.reduce(value.clone(), reduce_op="sum"))
