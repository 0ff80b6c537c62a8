"""Sparse upcycling: experts that begin as copies of a dense block.

Every expert is the dense block (Komatsuzaki et al. 2022, arXiv:2212.05055), so with weights that
sum to one the mixture computes what the block computed. With granularity G each copy is cut into G
shards (He et al. 2024, arXiv:2410.07524): expert ``e G + g`` is shard g of copy e, the G shards of
a copy share a row of the router (a virtual group), and the chosen experts are whole copies if G
divides top_k. Drop-upcycling draws a part of each expert anew (Nakamura et al. 2025,
arXiv:2502.19261).

A shard's weight is 1 / top_k where the copy's was G / top_k, so the output wants a factor G. On
``down`` alone that is exact. The paper spreads it, as its cube root, over gate, up and down: no
longer the same function, since the activation is not homogeneous, but by their figures a better
start for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moezoo.convert.plan import Expert, LayerPlan
from moezoo.errors import InputError, check_choice, check_int, check_number


@dataclass(frozen=True)
class UpcycleOptions:
    """Options of upcycling a dense block.

    Attributes:
        experts: copies E of the block; there are E G routed experts.
        top_k: routed experts per token, a multiple of the granularity.
        granularity: shards G per copy.
        drop: fraction r of each expert's neurons drawn anew, the same in gate, up and down.
        shared: keep one copy as an expert that runs on every token with half of the output; the
            routed ones give the other half.
        scale: put the factor G on ``down`` (exact), or its cube root on gate, up and down
            (``cbrt``, arXiv:2410.07524, section 3.2).
        weighting: ``normalized`` weights of the chosen experts sum to one; ``softmax`` leaves them
            as the softmax over all experts gave them and scales the output by E G² / top_k, what
            even routing needs: not exact, trains better by the paper's figures.
        router_std: standard deviation of the fresh router.
        seed: of everything drawn.
    """

    experts: int = 8
    top_k: int = 2
    granularity: int = 1
    drop: float = 0.0
    shared: bool = False
    scale: Literal["down", "cbrt"] = "down"
    weighting: Literal["normalized", "softmax"] = "normalized"
    router_std: float = 0.02
    seed: int = 0

    def check(self, width: int) -> None:
        """Check the options against each other and a block.

        Args:
            width: hidden width F of the dense block.

        Raises:
            InputError: an option is out of range, or contradicts another or the width.
        """
        check_int("experts", self.experts, minimum=2)
        check_int("granularity", self.granularity)
        check_int("top_k", self.top_k, maximum=self.experts * self.granularity)
        check_number("drop", self.drop, maximum=1.0)
        check_number("router_std", self.router_std)
        check_choice("scale", self.scale, ("down", "cbrt"))
        check_choice("weighting", self.weighting, ("normalized", "softmax"))
        if width % self.granularity:
            raise InputError(
                f"granularity: {self.granularity} does not divide the block's {width} neurons; "
                "give a divisor"
            )
        if self.top_k % self.granularity:
            raise InputError(
                f"top_k: {self.top_k} is no multiple of granularity {self.granularity}, so tokens "
                "would get parts of copies; choose a multiple"
            )

    @property
    def exact(self) -> bool:
        """Whether the mixture computes what the dense block computed."""
        spread = self.scale == "cbrt" and self.granularity > 1
        return not (self.drop or spread or self.weighting == "softmax")

    @property
    def num_experts(self) -> int:
        """Routed experts, E G."""
        return self.experts * self.granularity


def plan_upcycle(options: UpcycleOptions, layer: int, d_model: int, width: int) -> LayerPlan:
    """Plan one layer; the same options and layer give the same plan, whatever ran before.

    Args:
        options: what to make.
        layer: number of the block in the model; every layer has draws of its own.
        d_model: width of the model.
        width: hidden width F of the dense block.

    Returns:
        Which neurons each expert copies, their scales and redrawn ones, and the router.

    Raises:
        InputError: the options do not fit the block.
    """
    options.check(width)
    seed = (options.seed * 1_000_003 + layer) * 1_000_003
    shards = torch.arange(width).view(options.granularity, -1)
    in_scale, out_scale = _scales(options)
    bias_scale = _bias_scale(options)
    experts = []
    for number in range(options.num_experts):
        expert_seed = seed + 16 * (number + 1)
        neurons = shards[number % options.granularity]
        redrawn = _redrawn(options.drop, neurons.numel(), expert_seed)
        experts.append(Expert(neurons, in_scale, out_scale, redrawn, expert_seed + 1, bias_scale))
    generator = torch.Generator().manual_seed(seed)
    router_ED = torch.randn(options.experts, d_model, generator=generator) * options.router_std
    return LayerPlan(
        experts=tuple(experts),
        top_k=options.top_k,
        router=router_ED.repeat_interleave(options.granularity, dim=0),
        weighting=options.weighting,
        shared=Expert(torch.arange(width), out_scale=0.5, bias_scale=0.5)
        if options.shared
        else None,
    )


def _scales(options: UpcycleOptions) -> tuple[float, float]:
    """Return the factors on gate and up, and on down."""
    factor = float(options.granularity)
    if options.weighting == "softmax":
        factor *= options.num_experts / options.top_k
    share = 0.5 if options.shared else 1.0
    if options.scale == "down":
        return 1.0, factor * share
    root = factor ** (1 / 3)
    return root, root * share


def _bias_scale(options: UpcycleOptions) -> float:
    """Return the factor on the output's bias: weights that sum to one leave it as it is."""
    even = options.num_experts / options.top_k if options.weighting == "softmax" else 1.0
    return even * (0.5 if options.shared else 1.0)


def _redrawn(drop: float, size: int, seed: int) -> torch.Tensor | None:
    count = int(drop * size)
    if not count:
        return None
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values
