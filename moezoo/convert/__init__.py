"""From a dense feed-forward block to experts: what a conversion decides, and on which tensors.

A conversion is an :class:`~moezoo.convert.plan.LayerPlan` per layer: which neurons make up which
expert, and how tokens are routed. :mod:`~moezoo.convert.upcycle` copies the block,
:mod:`~moezoo.convert.carve` cuts it up. Nothing here knows of files; ``moezoo_models.conversion``
reads and writes checkpoints.
"""

from moezoo.convert.carve import (
    Block,
    Carved,
    CarveOptions,
    carve_block,
    carved_layer,
    prune_block,
)
from moezoo.convert.plan import Expert, LayerPlan
from moezoo.convert.upcycle import UpcycleOptions, plan_upcycle

__all__ = [
    "Block",
    "CarveOptions",
    "Carved",
    "Expert",
    "LayerPlan",
    "UpcycleOptions",
    "carve_block",
    "carved_layer",
    "plan_upcycle",
    "prune_block",
]
