"""From a block and calibration inputs to a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.prune import PruneMethod, prune
from moezoo.convert.carve.splits import split_neurons
from moezoo.convert.plan import Expert, LayerPlan


@dataclass(frozen=True)
class Carved:
    """A plan, and how good it is on held-out tokens."""

    plan: LayerPlan
    figures: dict[str, float]


@torch.no_grad()
def carve_block(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    options: CarveOptions = CarveOptions(),  # noqa: B008 - frozen
    act: Callable[[Tensor], Tensor] = F.silu,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> Carved:
    """Cut a dense block into shared and routed experts."""
    start = time.perf_counter()
    block = Block(gate, up, down, act, bias_in, bias_out).to(x.dtype)
    options.check(block.width)
    partition = split_neurons(block, x, options)
    source = block.up if block.gate is None else block.gate
    plan = LayerPlan(
        experts=tuple(Expert(e, out_scale=options.output_scale) for e in partition.experts),
        top_k=options.active,
        router=source[partition.experts].mean(dim=1).float(),
        weighting="unit",
        shared=Expert(partition.shared) if options.shared else None,
    )
    return Carved(plan, {"seconds": time.perf_counter() - start})


@torch.no_grad()
def prune_block(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    keep: int,
    method: PruneMethod = "static",
    act: Callable[[Tensor], Tensor] = F.silu,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    bias: bool | None = None,
) -> Block:
    """Keep ``keep`` neurons of a dense block; what stays has a ``bias_out`` where it needs one."""
    return prune(Block(gate, up, down, act, bias_in, bias_out).to(x.dtype), x, keep, method)
