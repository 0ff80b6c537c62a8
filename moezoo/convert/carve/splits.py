"""Which neurons go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.options import CarveOptions
from moezoo.errors import InputError


@dataclass(frozen=True)
class Partition:
    """Every neuron of a block, once.

    Attributes:
        shared: ``(x m,)`` int64, ascending.
        experts: ``(N, m)`` int64, each row ascending.
    """

    shared: Tensor
    experts: Tensor


def split_neurons(block: Block, x_TD: Tensor, options: CarveOptions) -> Partition:
    """Cut the block's neurons into a shared part and N experts of equal size."""
    size = block.width // options.experts
    if options.split == "random":
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(block.width, generator=generator)
    elif options.split == "contiguous":
        order = torch.arange(block.width)
    else:
        raise InputError(f"split: {options.split} is being written")
    count = size * options.shared
    experts = order[count:].view(options.routed, size)
    return Partition(order[:count].sort().values, experts.sort(dim=1).values)
